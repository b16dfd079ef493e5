"""A Llama of a few thousand weights for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qat_plugin import Policy, calibrate, convert, prepare
from qat_plugin.qat import prepared_layers, set_input_scale

SAMPLE = {"input_ids": torch.arange(48).reshape(2, 24) % 128}


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32, ffn: int = 128) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=ffn, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def converted(
    rules: dict[str, str],
    keep: tuple[str, ...] = (),
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    ffn: int = 128,
) -> Any:
    policy, model = Policy(rules, keep=list(keep)), llama(tied=tied, dtype=dtype, ffn=ffn)
    if any("static" in scheme for scheme in rules.values()):
        return convert(calibrate(model, policy, [SAMPLE], method="rtn"))
    return convert(model, policy)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**SAMPLE).logits.float()
    return found


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", bos_token="w1", eos_token="w2")


def dividing_its_input(scheme: str) -> Any:
    """A converted Llama whose o_proj layers keep an input scale, as AWQ leaves one where it cannot be folded."""
    model = prepare(llama(), Policy({"attention": scheme}, keep=["lm_head", "embedding", "ffn"]))
    for name, layer in prepared_layers(model).items():
        if name.endswith("o_proj"):
            set_input_scale(layer, torch.linspace(0.5, 2.0, 64))
    return convert(model)


def files(folder: Path) -> dict[str, bytes]:
    """What must be the same bytes each time: not the card, and not what transformers notes of a tokenizer's origin."""
    return {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.name not in ("README.md", "tokenizer_config.json")
    }
