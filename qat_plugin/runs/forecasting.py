"""``task=plan`` of a recipe that trains adapters: will it fit, what to change if not, and how fast it may run."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import torch
from torch import nn

from qat_plugin.config.schema import Config, PlanConfig
from qat_plugin.errors import ConfigError
from qat_plugin.policy import Plan, clean_name
from qat_plugin.qlora.adapters import target_layers
from qat_plugin.qlora.cards import (
    LEAST_SHARE,
    Card,
    card_named,
    card_of_size,
    measured_host,
    present_card,
    roofline,
    usable_gib,
)
from qat_plugin.qlora.economies import Change
from qat_plugin.qlora.forecast import CARD_GIB, Forecast, forecast
from qat_plugin.runs.planning import adapter_options

WILL_NOT_FIT: Final = 3
"""Exit code of a plan whose run would not fit."""

_KEYS: Final = {
    "gradient_checkpointing": "lora.gradient_checkpointing",
    "offload": "lora.offload_activations",
    "batch_size": "data.batch_size",
    "sequence_length": "data.sequence_length",
    "rank": "lora.rank",
}
"""Setting of a forecast -> key of a recipe; the optimizer's is its own."""

_SHORTEST_STEP: Final = 0.01
"""Seconds of a micro step below which a roofline says nothing: launching kernels takes as long."""

_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_card(plan: PlanConfig, given: Collection[str]) -> None:
    """Check the card's name; its own memory then counts, not the one that a recipe is for.

    Args:
        plan: changed in place.
        given: keys on the command line.

    Raises:
        ConfigError: for an unknown name, or a card and another size on the command line.
    """
    if plan.card is None:
        return
    card = card_named(plan.card)
    if "plan.gpu_gib" in given and plan.gpu_gib not in (None, card.gib):
        raise ConfigError(
            f"plan.card={plan.card} has {card.gib:g} GB and plan.gpu_gib={plan.gpu_gib:g} says otherwise: give one"
        )
    plan.gpu_gib = None


def forecast_run(config: Config, network: nn.Module, plan: Plan) -> tuple[str, bool]:
    """What a recipe's run will take.

    Args:
        config: the recipe.
        network: its model on the meta device.
        plan: of the base.

    Returns:
        A text to print, and whether the run fits (true where no size was given and some card holds it).
    """
    predicted = _forecast(config, network, plan)
    lines = [f"Memory in training, {_where(predicted)}", predicted.table(), ""]
    fits, sentence = _verdict(config, predicted)
    lines.append(sentence)
    lines.append(_speed(config, predicted))
    return "\n".join(line for line in lines if line is not None), fits


def _forecast(config: Config, network: nn.Module, plan: Plan) -> Forecast:
    options, lora = adapter_options(config), config.lora
    names = [clean_name(candidate.path) for candidate in target_layers(network, options.targets)]
    return forecast(
        network,
        plan,
        rank=options.rank,
        targets=names,
        batch_size=config.data.batch_size,
        sequence_length=config.data.sequence_length,
        dtype=torch.float32 if config.trainer.precision.startswith("32") else torch.bfloat16,
        adapter_dtype=_DTYPES[lora.dtype],
        optimizer="adamw8bit" if getattr(config.optimizer, "bits", 32) == 8 else "adamw",
        gradient_checkpointing=lora.gradient_checkpointing,
        offload=lora.offload_activations,
        backend=lora.backend,  # type: ignore[arg-type]
        device=_device(config),
        dropout=options.dropout,
    )


def _device(config: Config) -> str:
    """Where the run is planned for: a card when one is meant or here."""
    if config.trainer.accelerator != "auto":
        return config.trainer.accelerator
    meant = config.plan.gpu_gib is not None or config.plan.card is not None
    return "cuda" if meant or torch.cuda.is_available() else "cpu"


def _where(predicted: Forecast) -> str:
    settings = predicted.settings
    windows = f"{settings.batch_size} x {settings.sequence_length} tokens a micro step"
    return f"{windows}, rank {settings.rank}, {'CUDA' if settings.on_cuda else 'CPU (tensors alone)'}"


def _verdict(config: Config, predicted: Forecast) -> tuple[bool, str]:
    if not predicted.settings.on_cuda:
        return True, "Planned for the CPU; plan.gpu_gib=SIZE or plan.card=NAME plans for a card."
    card = predicted.smallest_card()
    smallest = (
        f"The smallest standard card that holds it: {card} GB." if card else "No standard card up to 141 GB holds it."
    )
    asked = config.plan.gpu_gib if config.plan.gpu_gib is not None else _chosen(config).gib
    if asked is None:
        return card is not None, smallest
    usable = usable_gib(asked)
    total = predicted.total / 2**30
    there = f"{usable:.1f} GiB that torch has on a card of {asked:g} GB"
    if asked not in CARD_GIB:
        there += f" (assumed: {LEAST_SHARE:.1%}, as on the standard card that gives least)"
    if predicted.fits(usable):
        return True, f"Yes: {total:.1f} GiB fit the {there}. {smallest}"
    change = predicted.cheapest_change(usable)
    advice = (
        f"The cheapest change that fits: {_in_keys(change)}." if change else "No combination of options makes it fit."
    )
    return False, f"No: {total:.1f} GiB do not fit the {there}. {advice} {smallest}"


def _in_keys(change: Change) -> str:
    """A change as a recipe's keys."""
    keys = " ".join(f"{_KEYS.get(name, name)}={str(value).lower()}" for name, value in change.settings.items())
    return f"{keys} ({'; '.join(change.costs)})"


def _chosen(config: Config) -> Card:
    if config.plan.card is not None:
        return card_named(config.plan.card)
    return present_card() or Card("", None, 0.0, 0.0)


def _speed(config: Config, predicted: Forecast) -> str:
    if config.plan.card is not None:
        card = card_named(config.plan.card)
    elif not predicted.settings.on_cuda:
        card = measured_host()
    else:
        size = config.plan.gpu_gib or predicted.smallest_card()
        card = present_card() or card_of_size(size or 141)
    low, high = roofline(predicted, card)
    if predicted.settings.tokens / high < _SHORTEST_STEP:
        return (
            f"No speed is forecast: a step of so small a model is ruled by overheads, not by the peaks of {card.name}."
        )
    return f"Expected on {card.name}: {low:,.0f} to {high:,.0f} tokens/s (roofline at 30 to 50% of its bf16 peak)."
