"""How fast a QLoRA run can be: peaks of common cards, and a roofline over them.

Per micro step, with P weights in linear layers, A in adapters and e bytes a number in activations::

    compute    6 P + 8 A a token     forward, recomputation, gradients to inputs (the base has no weight gradients)
               + 9 T Q a block       causal attention; its backward recomputes the scores
    traffic    3 (codes + 2 e) P     NF4 weights are read, written dequantized and read again, three times

Without checkpointing one forward pass less. Traffic does not shrink with the batch: give a micro step 2,000 tokens.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from qat_plugin.errors import ConfigError, did_you_mean
from qat_plugin.qlora.forecast import CARD_GIB, Forecast
from qat_plugin.qlora.nf4 import nf4_bytes

SHARES: Final = (0.3, 0.5)
"""Of the peak, what training of large models reaches."""


@dataclass(frozen=True)
class Card:
    """What a device can do at most.

    Attributes:
        name: as people call it.
        gib: memory as sold, in GB; ``None`` where it is the host's.
        tflops: 10^12 bf16 operations a second, dense, float32 accumulation.
        gb_per_s: memory bandwidth, 10^9 bytes a second.
    """

    name: str
    gib: float | None
    tflops: float
    gb_per_s: float


# NVIDIA's datasheets; figures with sparsity halved.
CARDS: Final = (
    Card("RTX 4080", 16, 97.5, 717),
    Card("RTX 4090", 24, 165.2, 1008),
    Card("A100 40GB", 40, 312.0, 1555),
    Card("RTX A6000", 48, 154.8, 768),
    Card("L40S", 48, 362.0, 864),
    Card("A100 80GB", 80, 312.0, 2039),
    Card("H100 PCIe", 80, 756.0, 2000),
    Card("H100", 80, 989.4, 3350),
    Card("H200", 141, 989.4, 4800),
)


LEAST_SHARE: Final = min(usable / sold for sold, usable in CARD_GIB.items())
"""Of the GB that a card is sold as, the share that torch finds in GiB at least."""


def usable_gib(sold: float) -> float:
    """GiB that torch has on a card sold as so many GB: known for standard sizes, else the least share of theirs."""
    return CARD_GIB.get(sold, LEAST_SHARE * sold)  # type: ignore[call-overload, no-any-return]


def card_named(name: str) -> Card:
    """A card by its name, whatever the case and punctuation (``"a100-80gb"``).

    Raises:
        ConfigError: listing the names.
    """
    for card in CARDS:
        if _plain(card.name) == _plain(name):
            return card
    names = [card.name for card in CARDS]
    raise ConfigError(f"the card {name!r} is not one of {', '.join(names)}.{did_you_mean(name, names)}")


def card_of_size(gib: float) -> Card:
    """The fastest of the smallest cards that are sold with at least so much memory; the largest for more."""
    sizes = [card.gib for card in CARDS if card.gib is not None]
    size = min((s for s in sizes if s >= gib), default=max(sizes))
    return max((card for card in CARDS if card.gib == size), key=lambda card: card.tflops)


def present_card(device: int = 0) -> Card | None:
    """The CUDA card in this machine; ``None`` without one, or where it is not in :data:`CARDS`."""
    if not torch.cuda.is_available():
        return None
    name, memory = _plain(torch.cuda.get_device_name(device)), torch.cuda.get_device_properties(device).total_memory
    named = [c for c in CARDS if _plain(re.sub(r"\d+GB$", "", c.name)) in name and c.gib and memory <= c.gib * 1.08e9]
    return min(named, key=lambda card: (card.gib or 0, -len(card.name)), default=None)


def roofline(forecast: Forecast, card: Card, tokens: int | None = None) -> tuple[float, float]:
    """Tokens a second to expect, at 30% and at 50% of the card's peak.

    Args:
        forecast: of the run.
        card: where it runs.
        tokens: of one micro step; by default the forecast's.

    Raises:
        ConfigError: for a card without peaks.
    """
    if not (card.tflops > 0 and card.gb_per_s > 0):
        raise ConfigError(f"card {card.name!r} has no peaks: give tflops and gb_per_s above 0")
    count = tokens or forecast.settings.tokens
    moving = dequantization_bytes(forecast) / (card.gb_per_s * 1e9)
    low, high = (count / (count * token_flops(forecast) / (share * card.tflops * 1e12) + moving) for share in SHARES)
    return low, high


def token_flops(forecast: Forecast) -> float:
    """Operations for one token of training."""
    facts, settings = forecast.outline, forecast.settings
    head = facts.vocabulary * facts.hidden  # tied or not, it multiplies
    body = facts.nf4_count + sum(entry.count for entry in facts.floats if entry.part == "float linear layers")
    adapters = sum(facts.adapter_counts(settings.rank))
    blocks = () if isinstance(facts.blocks, str) else facts.blocks
    attention = settings.sequence_length * sum(block.query for block in blocks)
    again = settings.gradient_checkpointing
    return (4 + 2 * again) * body + 4 * head + (6 + 2 * again) * adapters + (7 + 2 * again) * attention


def dequantization_bytes(forecast: Forecast) -> float:
    """Bytes that NF4 weights make move in one micro step, whatever its tokens."""
    facts, settings = forecast.outline, forecast.settings
    codes = sum(nf4_bytes(shape, scheme, settings.backend) for shape, scheme in facts.nf4)
    return (2 + settings.gradient_checkpointing) * (codes + 2 * settings.dtype.itemsize * facts.nf4_count)


def measured_host(dtype: torch.dtype = torch.bfloat16, seconds: float = 0.5) -> Card:
    """The host's peaks as torch reaches them now: a large product and a large copy, with the threads torch has.

    Args:
        dtype: of the product.
        seconds: to spend on each of the two.
    """
    a, b = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    source = torch.ones(1 << 24, dtype=torch.float32)
    target = torch.empty_like(source)
    product, copied = _fastest(lambda: a @ b, seconds), _fastest(lambda: target.copy_(source), seconds)
    return Card("this CPU", None, 2 * 1024**3 / product / 1e12, 2 * source.nbytes / copied / 1e9)


def _fastest(run: Callable[[], object], seconds: float) -> float:
    run()
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds:
        before = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - before)
    return best


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
