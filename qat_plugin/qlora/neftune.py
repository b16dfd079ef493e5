"""NEFTune: noise on the embeddings while training (arXiv:2310.05914)."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qat_plugin.errors import ConfigError


def add_noise(model: nn.Module, alpha: float) -> RemovableHandle:
    """Add uniform noise in ``[-1, 1] * alpha / sqrt(L * d)`` to what the input embedding returns, in train mode only.

    Args:
        model: a transformers model, or any module with an nn.Embedding (the first one is taken).
        alpha: magnitude; 5 to 15 in the paper. L is the sequence length and d the width of the embedding's output.

    Returns:
        A handle that removes it.

    Raises:
        ConfigError: when alpha is not above 0 or there is no embedding.
    """
    return noisy_embedding(model, alpha).register_forward_hook(functools.partial(_noisy, alpha))


def noisy_embedding(model: nn.Module, alpha: float) -> nn.Module:
    """The embedding that :func:`add_noise` takes.

    Raises:
        ConfigError: as there.
    """
    if not 0 < alpha < math.inf:
        raise ConfigError(f"neftune_alpha={alpha} is not allowed: it must be above 0; 5 is usual")
    getter: Any = getattr(model, "get_input_embeddings", None)
    found = getter() if callable(getter) else None
    if not isinstance(found, nn.Module):
        found = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    if found is None:
        raise ConfigError(f"neftune_alpha: {type(model).__name__} has no embedding to add noise to")
    return found


def _noisy(alpha: float, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    if not module.training:
        return output
    magnitude = alpha / (output.shape[-2] * output.shape[-1]) ** 0.5
    return output + torch.empty_like(output).uniform_(-magnitude, magnitude)
