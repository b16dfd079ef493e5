"""What the benchmarks share: a random Llama, of 137 M parameters unless options say otherwise; and their JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat_plugin import native

FORMS = {"hidden": 1024, "ffn": 2816, "layers": 12, "heads": 16, "kv-heads": 4, "vocabulary": 2048}


def add_model_options(parser: argparse.ArgumentParser, **changed: int) -> None:
    """``--hidden`` and the others, with another default where ``changed`` gives one; and ``--threads``."""
    for name, default in FORMS.items():
        value = changed.get(name, default)
        parser.add_argument(f"--{name}", type=int, default=value, help=f"of the model (default {value})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())


def write_json(options: argparse.Namespace, **found: Any) -> None:
    """What a benchmark found, beside its settings and versions, where ``--json`` says."""
    if options.json:
        settings = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(options).items()
            if name != "json"
        }
        record = {"settings": settings, "torch": torch.__version__, "native": str(native.native()), **found}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def random_llama(options: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    """The same weights at each call, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=options.ffn,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=options.kv_heads,
        max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # made in its own type: a conversion's peak would hide behind that of a cast
    try:
        model: nn.Module = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return model
