"""Small models with adapters that have learned something, made by this package and by plain peft."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import nn

from qat_plugin.qlora.prepare import prepare
from qat_plugin.qlora.updates import adapter_layers, adapter_root, update_of


def llama(**options: Any) -> Any:
    """A random Llama, the same each time."""
    sizes = {
        "vocab_size": 72, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return tf.LlamaForCausalLM(tf.LlamaConfig(**{**sizes, **options})).eval()


def learned(model: nn.Module, *, seed: int = 1) -> Any:
    """Give every adapter of a model weights as after training: B is no longer zero, DoRA's magnitudes have moved."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(adapter_root(model)).values():
        update = update_of(layer)
        update.b.copy_(0.05 * torch.randn(update.b.shape, generator=generator))
        if update.magnitude is not None:
            update.magnitude.mul_(1 + 0.1 * torch.rand(update.magnitude.shape, generator=generator))
    return model.eval()


def prepared(model: nn.Module, base: Any = "nf4-dq", **options: Any) -> Any:
    """A prepared model whose adapters have learned something."""
    return learned(prepare(model, base, **{"rank": 4, "alpha": 8, "gradient_checkpointing": False, **options}))


def with_peft(model: Any, **options: Any) -> Any:
    """The same by plain peft: a PeftModel."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options})
    return learned(get_peft_model(model, config))
