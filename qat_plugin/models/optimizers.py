"""AdamW with 32-bit or 8-bit moments, one call for every device, and the schedule of its learning rate."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import nn

from qat_plugin.errors import ConfigError
from qat_plugin.kernels.torchao_import import known_noise_dropped

_BLOCK: Final = 256
_SMALLEST: Final = 4096  # numbers; smaller parameters keep 32-bit moments, in both libraries
_COMPILERS: Final = ("g++", "clang++", "c++")


def adamw(
    groups: Iterable[Any],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bits: int = 32,
) -> torch.optim.Optimizer:
    """AdamW.

    Args:
        groups: parameters or parameter groups.
        lr, betas, eps, weight_decay: as torch's.
        bits: of the two moments. 8: bitsandbytes' paged AdamW where parameters are on CUDA (states move to host memory
            when the card is short of it), torchao's elsewhere, which compiles its step for each shape: the first step
            takes seconds. Small parameters keep more bits, see :func:`expected_state_bytes`.

    Raises:
        ConfigError: for other bits, or 8 on a machine without what it needs.
    """
    groups = list(groups)
    if bits == 32:
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    if bits != 8:
        raise ConfigError(f"optimizer.bits={bits} is not allowed: it is 32 or 8")
    parameters = [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]
    options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if any(parameter.is_cuda for parameter in parameters):
        from qat_plugin.qlora.extra import import_extra

        paged: torch.optim.Optimizer = import_extra("bitsandbytes.optim").PagedAdamW8bit(groups, **options)
        return paged
    if not any(shutil.which(name) for name in _COMPILERS):
        raise ConfigError(
            "optimizer.bits=8 on this device needs a C++ compiler (torchao compiles its step); install g++, or use "
            "optimizer.bits=32"
        )
    with known_noise_dropped():
        from torchao.optim import AdamW8bit

    warnings.filterwarnings("ignore", message=".*OptimState8bit does not implement _stable_hash_for_caching.*")
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, block_size=_BLOCK, **options)
    return optimizer


def allow_states_in_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read torchao's 8-bit moments; it knows their class once it is imported."""
    with known_noise_dropped():
        import torchao.optim  # noqa: F401


def expected_state_bytes(parameters: Iterable[nn.Parameter], bits: int = 32) -> int:
    """Bytes of the two moments of parameters that require gradients, and of 8-bit blocks' scales and tables.

    Of 8 bits are those of parameters with at least 4096 numbers in whole blocks of 256. The others are as with 32 bits,
    on CUDA in float32 always (bitsandbytes), elsewhere in the parameter's type (torchao).
    """
    total = 0
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        count = parameter.numel()
        if bits == 8 and count >= _SMALLEST and count % _BLOCK == 0:
            total += 2 * (count + 4 * (count // _BLOCK) + 4 * 256)
        else:
            total += 2 * count * (4 if bits == 8 and parameter.is_cuda else parameter.element_size())
    return total


def warmup_cosine(step: int, warmup: int, total: float, final_share: float) -> float:
    """Learning rate at a step over the peak: linear warm-up, then a cosine down to ``final_share``.

    Args:
        step: from 0.
        warmup: steps of it.
        total: steps of the whole run; infinite for a stream, whose rate stays at the peak.
        final_share: of the peak, at the end.
    """
    if step < warmup:
        return (step + 1) / warmup
    if math.isinf(total):
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return final_share + (1 - final_share) / 2 * (1 + math.cos(math.pi * done))


def check_schedule(learning_rate: float, weight_decay: float, warmup_steps: int, final_share: float) -> None:
    """Raise for numbers out of their range.

    Raises:
        ConfigError: naming the number.
    """
    if not learning_rate > 0:
        raise ConfigError(f"learning_rate is {learning_rate}; it must be above 0")
    if weight_decay < 0 or warmup_steps < 0:
        raise ConfigError(f"weight_decay ({weight_decay}) and warmup_steps ({warmup_steps}) must not be negative")
    if not 0 <= final_share <= 1:
        raise ConfigError(f"final_share is {final_share}; it is a share of the peak learning rate, from 0 to 1")
