"""A base streamed from its files equals the one that transformers and bitsandbytes make, and costs little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("bitsandbytes")
import transformers as tf

from qat_plugin.errors import CheckpointError, ConfigError, PrepareError, QatError
from qat_plugin.policy import Policy
from qat_plugin.qlora.fingerprint import tensor_sum
from qat_plugin.qlora.nf4 import is_nf4
from qat_plugin.qlora.streaming import BaseRecord, load_base
from tests.qlora.tiny_models import FAMILIES, family, logits, mixtral, saved


def reference(folder: Path, dtype: torch.dtype, *, double: bool = True) -> Any:
    """transformers' own loader with its own quantizer; the in-place repack of evaluation is off, as it is in ours."""
    config = tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head"],
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config, device_map="cpu")
    for module in model.modules():
        if is_nf4(module):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers_with_bitsandbytes_to_the_bit(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = family(name, tmp_path)
    model, tokenizer, record = load_base(folder, dtype=dtype, progress=False)
    theirs = reference(folder, dtype)
    layers = {name for name, module in model.named_modules() if is_nf4(module)}
    assert layers == {name for name, module in theirs.named_modules() if is_nf4(module)}
    assert len(layers) >= 8
    assert torch.equal(logits(model), logits(theirs))
    assert record.streamed and not record.cached and record.note == ""
    assert not model.training and len(tokenizer) >= 64


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_policy_it_is_what_from_pretrained_gives(name: str, tmp_path: Path) -> None:
    folder = family(name, tmp_path)
    model, _, _ = load_base(folder, None, dtype=torch.bfloat16, progress=False)
    plain = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    assert ours.keys() == theirs.keys()
    for key, parameter in theirs.items():
        assert torch.equal(ours[key], parameter) and ours[key].dtype == parameter.dtype, key
        assert ours[key].requires_grad == parameter.requires_grad, key
    ours, theirs = dict(model.named_buffers()), dict(plain.named_buffers())
    assert ours.keys() == theirs.keys()
    for key, buffer in theirs.items():
        assert torch.equal(ours[key], buffer) and ours[key].dtype == buffer.dtype, key
    assert torch.equal(logits(model), logits(plain))
    assert model.config.to_dict() == plain.config.to_dict()
    assert model.generation_config.to_dict() == plain.generation_config.to_dict()
    assert model.config._name_or_path == str(folder)


def test_tied_weights_are_one_parameter(tmp_path: Path) -> None:
    model, _, _ = load_base(family("llama-tied", tmp_path), progress=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.is_meta


def test_a_file_with_the_tied_weight_under_the_heads_name_alone(tmp_path: Path) -> None:
    folder = family("llama-tied", tmp_path, shard="10MB")
    rename(folder, {"model.embed_tokens.weight": "lm_head.weight"})
    model, _, _ = load_base(folder, progress=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(reference(folder, torch.bfloat16)))


def test_without_double_quantization(tmp_path: Path) -> None:
    folder = family("llama", tmp_path)
    model, _, _ = load_base(folder, "nf4", progress=False)
    assert torch.equal(logits(model), logits(reference(folder, torch.bfloat16, double=False)))


def test_files_of_the_bare_model_and_files_with_old_buffers(tmp_path: Path) -> None:
    folder = family("gpt2", tmp_path, shard="10MB")
    expected = logits(load_base(folder, progress=False)[0])
    weights = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): value.clone() for name, value in weights.items()}
    bare |= {"h.0.attn.bias": torch.ones(1, 1, 128, 128), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    model, _, record = load_base(folder, progress=False)
    assert torch.equal(logits(model), expected)
    assert record.streamed


def test_fused_experts_are_left_to_transformers_and_that_is_said(tmp_path: Path) -> None:
    folder = saved(mixtral(), tmp_path)
    model, _, record = load_base(folder, progress=False)
    assert not record.streamed and "converts" in record.note
    assert torch.equal(logits(model), logits(reference(folder, torch.bfloat16)))


def test_a_policy_with_float_and_integer_schemes(tmp_path: Path) -> None:
    policy = Policy({"attention": "nf4-dq", "head": "bf16", "ffn": "w4a16-g32"})
    model, _, record = load_base(family("llama", tmp_path), policy, dtype=torch.float32, progress=False)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert is_nf4(model.model.layers[0].self_attn.q_proj)
    assert torch.isfinite(logits(model)).all()
    schemes = {layer["name"]: layer["scheme"] for layer in record.plan}
    assert schemes["model.layers.0.mlp.up_proj"] == "w4a16-g32" and schemes["model.embed_tokens"] is None


def test_weights_that_have_no_nf4_form_are_named(tmp_path: Path) -> None:
    folder = family("llama", tmp_path, shard="10MB")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PrepareError, match=r"model\.layers\.1\.mlp\.up_proj: .*NaN"):
        load_base(folder, progress=False)


def test_an_embedding_cannot_be_nf4(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"model\.embed_tokens .*cannot be nf4"):
        load_base(family("llama", tmp_path), {"embedding": "nf4"}, progress=False)


def test_the_record_says_what_was_read_and_survives_json(tmp_path: Path) -> None:
    folder = family("llama", tmp_path)
    *_, record = load_base(folder, progress=False)
    stored = {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
    assert record.sums == {name: tensor_sum(tensor) for name, tensor in stored.items()}
    assert record.largest_tensor_bytes == max(tensor.nbytes for tensor in stored.values())
    assert record.path == str(folder) and record.revision is None
    assert record.quantized_bytes < sum(tensor.nbytes for tensor in stored.values()) / 2
    assert BaseRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    with pytest.raises(CheckpointError, match="unknown field 'pth'.*'path'"):
        BaseRecord.from_dict({"pth": "x"})


def test_the_model_does_not_hang_on_its_files(tmp_path: Path) -> None:
    folder = family("llama", tmp_path)
    model, _, _ = load_base(folder, None, dtype=torch.float32, progress=False)
    before = logits(model)
    for file in folder.glob("*.safetensors"):
        size = file.stat().st_size
        with open(file, "r+b") as opened:  # the same file, not a new one in its place
            opened.write(b"\0" * size)
    assert torch.equal(logits(model), before)


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    folder = family("gemma2", tmp_path)
    before = torch.get_rng_state()
    load_base(folder, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_parameters_of_other_models_are_left_alone(tmp_path: Path) -> None:
    load_base(family("llama", tmp_path), progress=False)
    assert not torch.nn.Linear(2, 2).weight.is_meta


# Bad input: each is found by headers and shapes, before a weight is read.


def rename(folder: Path, names: dict[str, str | None]) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {names.get(name, name): value.clone() for name, value in weights.items()}
    save_file({k: v for k, v in kept.items() if k}, folder / "model.safetensors", metadata={"format": "pt"})


def fails(folder: Path, match: str, error: type[QatError] = CheckpointError, **options: Any) -> None:
    read: list[int] = []
    with pytest.raises(error, match=match):
        load_base(folder, progress=lambda done, total: read.append(done), **options)
    assert read == []


def test_a_truncated_shard(tmp_path: Path) -> None:
    shard = sorted(family("llama", tmp_path).glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    fails(tmp_path, f"{shard.name} is truncated or corrupt")


def test_a_missing_shard(tmp_path: Path) -> None:
    shard = sorted(family("llama", tmp_path).glob("*.safetensors"))[1]
    shard.unlink()
    fails(tmp_path, f"lacks {shard.name}")


def test_a_missing_tensor(tmp_path: Path) -> None:
    rename(family("llama", tmp_path, shard="10MB"), {"model.layers.1.mlp.up_proj.weight": None})
    fails(tmp_path, r"lack 1 of the model's weights: model\.layers\.1\.mlp\.up_proj\.weight")


def test_an_unknown_tensor(tmp_path: Path) -> None:
    rename(family("llama", tmp_path, shard="10MB"), {"model.layers.1.mlp.up_proj.weight": "model.layers.9.mlp.x"})
    fails(tmp_path, r"1 tensors? that a LlamaForCausalLM does not have: model\.layers\.9\.mlp\.x")


def test_a_tied_weight_that_is_nowhere(tmp_path: Path) -> None:
    rename(family("llama-tied", tmp_path, shard="10MB"), {"model.embed_tokens.weight": None})
    fails(tmp_path, "lack 2 of the model's weights: lm_head.weight, model.embed_tokens.weight")


def test_a_config_of_another_size(tmp_path: Path) -> None:
    change_config(family("llama", tmp_path), intermediate_size=192)
    fails(tmp_path, r"down_proj\.weight \(\[64, 128\] in the file, \[64, 192\] in the model\)")


def test_a_tokenizer_of_another_vocabulary(tmp_path: Path) -> None:
    fails(family("llama", tmp_path, tokens=80), "80 tokens and the model embeds 72")


def test_a_model_that_is_quantized_already(tmp_path: Path) -> None:
    change_config(family("llama", tmp_path), quantization_config={"quant_method": "gptq", "bits": 4})
    fails(tmp_path, r"quantized already \(gptq\)")


def test_code_in_the_directory_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = family("llama", tmp_path)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w').close()\nclass Evil: ...\n")
    change_config(folder, auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    load_base(folder, progress=False)
    assert "names code of its own (auto_map), which is not run" in capsys.readouterr().err
    change_config(folder, model_type="evil")
    fails(folder, "'evil'.*auto_map.*is never run")
    assert not (tmp_path / "exploded").exists()


def test_arguments_are_checked_first(tmp_path: Path) -> None:
    fails(tmp_path, "backend='gptq' is not one of bitsandbytes, torchao", ConfigError, backend="gptq")
    fails(tmp_path, "dtype=torch.int8 is not one of torch.float32", ConfigError, dtype=torch.int8)
    fails(tmp_path, "revision 'main' was given for the local directory", ConfigError, revision="main")


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


PEAK = """
import sys, torch
from qat_plugin.qlora.streaming import load_base
torch.set_num_threads(1)
load_base(sys.argv[1], progress=False)  # what is imported on first use does not count
_, _, record = load_base(sys.argv[2], progress=False)
print(record.peak_host_bytes, record.largest_tensor_bytes, record.quantized_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_host_memory_stays_below_four_of_the_largest_tensor_and_the_quantized_model(tmp_path: Path) -> None:
    """88 million parameters in float32: 350 MB of files, the largest tensor 25 MB, at most 160 MB allowed in bf16.

    A loader that holds the model in bf16 before it quantizes needs 176 MB and more.
    """
    config = tf.LlamaConfig(
        vocab_size=8192, hidden_size=768, intermediate_size=3072, num_hidden_layers=8, num_attention_heads=12
    )
    with torch.device("meta"):
        empty = tf.LlamaForCausalLM(config)
    model = empty.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.05, 0.05)
    saved(model, tmp_path / "large", shard="50MB", tokens=64)
    assert len(list((tmp_path / "large").glob("*.safetensors"))) >= 6
    del model
    small = family("llama", tmp_path / "small")
    command = [sys.executable, "-c", PEAK, str(small), str(tmp_path / "large")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    peak, largest, quantized = map(int, subprocess.check_output(command, env=env).split())
    assert quantized / 2 < peak <= 4 * largest + quantized, (peak, largest, quantized)
