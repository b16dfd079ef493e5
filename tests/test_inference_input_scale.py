"""Layers with input scales in a compiled decode step, which merges the products of others that share an input."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qat_plugin import Policy, compile_for_inference, convert, prepare
from qat_plugin.qat import prepared_layers, set_input_scale


def test_a_compiled_decode_step_gives_the_eager_logits() -> None:
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    prepare(model, Policy({"attention": "w8a8", "ffn": "w4a16-g32", "default": "keep"}))
    one, other = torch.rand(64) * 3 + 0.1, torch.rand(64) * 3 + 0.1
    layers = prepared_layers(model)
    for name, scale in (("q_proj", one), ("k_proj", one), ("v_proj", other), ("gate_proj", one), ("up_proj", None)):
        part = "mlp" if "gate" in name or "up" in name else "self_attn"
        set_input_scale(layers[f"model.layers.0.{part}.{name}"], scale)
    convert(model)
    ids = torch.randint(96, (1, 5))
    options: Any = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        expected: Any = model.generate(ids, **options)
        actual: Any = compile_for_inference(model).generate(ids, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    for now, once in zip(actual.logits, expected.logits, strict=True):
        assert float((now - once).norm() / once.norm()) < 1e-3
