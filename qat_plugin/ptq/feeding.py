"""Feeding a user's own batches to a user's own model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.errors import DataError
from qat_plugin.measure.evaluating import device_of

_NOT_INPUTS = frozenset({"labels", "label", "target", "targets"})


def feed(model: nn.Module, batch: Any) -> Any:
    """Run a model on the inputs of one batch, on the model's device; see :func:`arguments` for the batch's form."""
    args, kwargs = arguments(model, batch)
    return model(*args, **kwargs)


def arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with on one batch, on the model's device.

    Args:
        model: any module.
        batch: a tensor; a tuple or list whose first entry is the input; or a mapping, of which the entries that the
            model's ``forward`` takes are passed by name (labels are not: nothing here needs a loss).

    Returns:
        ``(args, kwargs)``.

    Raises:
        DataError: when a mapping has no entry that ``forward`` takes, or a batch has another form.
    """
    device = device_of(model)
    if isinstance(batch, Mapping):
        return (), {name: _moved(value, device) for name, value in _known(model, batch).items()}
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise DataError(
            f"a calibration batch is a tensor, (inputs, targets) or a mapping of inputs, not {type(batch).__name__}"
        )
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    return (_moved(batch, device),), {"use_cache": False} if takes_cache else {}


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Inside, no transformers model in ``model`` keeps keys and values: a block that is run twice must not see them."""
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    before = [(config, config.use_cache) for config in configs.values() if getattr(config, "use_cache", False) is True]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in before:
            config.use_cache = value


def _known(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    inputs = {name: value for name, value in batch.items() if name not in _NOT_INPUTS}
    named = {name: value for name, value in inputs.items() if name in parameters}
    if not named:
        raise DataError(
            f"a calibration batch has {', '.join(map(repr, batch)) or 'nothing'}, and {type(model).__name__}.forward "
            f"takes {', '.join(name for name in parameters)}: none of them fits. Rename the batch's entries, or pass "
            "the input tensors themselves"
        )
    if "use_cache" in parameters:
        named["use_cache"] = False
    return (inputs | named) if open_ended and "input_ids" in named else named


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
