"""What an assignment of schemes does to a model's predictions, measured by its fake-quantized forward pass."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from qat_plugin.errors import ConfigError, DataError, QatError
from qat_plugin.measure.evaluating import evaluating
from qat_plugin.measure.language import IGNORED
from qat_plugin.measure.predictions import Tally, logits_of
from qat_plugin.numerics import Quantized
from qat_plugin.policy import LayerPlan, Plan
from qat_plugin.ptq import METHODS, calibrate
from qat_plugin.ptq.feeding import feed
from qat_plugin.qat import (
    Phase,
    calibrating,
    hold,
    prepare,
    prepared_layers,
    quantizers,
    reusing_weights,
    unprepare,
)  # fmt: skip
from qat_plugin.qat.folding import Unfolded
from qat_plugin.qat.layers import current_weight
from qat_plugin.scheme import Scheme

_KEPT: Final = 2 << 30
"""Bytes of the float model's logits that are kept in memory; more goes into a temporary file."""


@dataclass(frozen=True)
class Damage:
    """How far a quantized model's predictions are from the float model's.

    Attributes:
        kl: mean KL(float || quantized) over all predictions, in nats.
        loss_increase: mean cross entropy on the labels less the float model's, in nats; ``None`` without labels.
        agreement: share of predictions whose most likely class is the float model's.
    """

    kl: float
    loss_increase: float | None
    agreement: float


class Measure:
    """Measures assignments on one model and one set of batches.

    The float model's logits are computed once. The model is prepared for each assignment and is as it was afterwards:
    parameters, buffers, classes, modes, the random state.

    Args:
        model: float; returns logits [B, T, V] or [B, C], or an object with ``logits``.
        batches: as :func:`~qat_plugin.calibrate` takes them; labels, where there are, as in a causal language model
            (not shifted, -100 is not scored) or the classes [B].
        plans: where weights are not rounded to nearest: plans of all layers, one a candidate. Each is calibrated once,
            and a layer's integers in any assignment are those that it found for its scheme.
        quantize: how weights become integers; see :func:`~qat_plugin.calibrate`.

    Raises:
        DataError: when there is no batch.
        ConfigError: for an unknown method, or one that changes more than the weights it quantizes (AWQ, SmoothQuant).
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Any], *, plans: Iterable[Plan] = (), quantize: str = "rtn"
    ) -> None:
        if quantize not in METHODS:
            raise ConfigError(f"quantize={quantize!r} is not one of {', '.join(METHODS)}")
        if METHODS[quantize].scaling is not None:
            alone = ", ".join(name for name, method in METHODS.items() if method.scaling is None)
            raise ConfigError(
                f"quantize={quantize!r} divides a layer's input inside the layers before it, so that layers cannot be "
                f"measured one at a time: choose the policy with quantize= one of {alone}, and calibrate the model "
                f"with method={quantize!r} under that policy"
            )
        self.model, self.quantize = model, quantize
        self.batches = list(batches)
        if not self.batches:
            raise DataError("there is no calibration data: the batches are empty; give at least one")
        self.passes = 0
        self.measured = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._integers: dict[tuple[str, Scheme], Quantized] = {}
        self._reference: list[Tensor | Path] = []
        self._targets: list[Tensor | None] = []
        self._read_float()
        if quantize != "rtn":
            for plan in plans:
                self._calibrate(plan)

    @property
    def tokens(self) -> int:
        """Predictions that each measurement scores."""
        return self._float.count

    @property
    def labelled(self) -> bool:
        """Whether the batches tell what should have been predicted."""
        return all(targets is not None for targets in self._targets)

    def of(self, layers: Sequence[LayerPlan]) -> Damage:
        """The damage when these layers, and no others, take their schemes.

        Raises:
            QatError: when a prediction is not finite.
        """
        tally = Tally()
        with self._standing(layers), evaluating(self.model):
            self._score(tally)
        self.measured += 1
        assert tally.kl is not None
        assert tally.top1_agreement is not None
        increase = tally.loss - self._float.loss if self.labelled else None
        return Damage(tally.kl, increase, tally.top1_agreement)

    def calibrated(self, plan: Plan) -> Damage:
        """The damage when the whole plan is calibrated at once, as a run would do it; the model is as it was after."""
        if self.quantize == "rtn":
            return self.of(plan.quantized)
        with self._restoring(plan.quantized):
            calibrate(self.model, plan, self.batches, method=self.quantize, progress=False)
            try:
                tally = Tally()
                with evaluating(self.model):
                    self._score(tally)
            finally:
                unprepare(self.model)
        assert tally.kl is not None
        assert tally.top1_agreement is not None
        return Damage(tally.kl, tally.loss - self._float.loss if self.labelled else None, tally.top1_agreement)

    def numbers(self, layer: LayerPlan) -> Quantized | None:
        """The integers found for a layer in its scheme; ``None`` where they are its weight's, rounded to nearest."""
        return None if layer.scheme is None else self._integers.get((layer.name, layer.scheme))

    def _score(self, tally: Tally) -> None:
        for index, batch in enumerate(self.batches):
            theirs = self._reference_of(index)
            logits, _ = predictions(self.model, feed(self.model, batch), batch)
            self.passes += 1
            theirs = theirs.to(logits.device)
            targets = self._targets[index]
            tally.add(index, logits, (theirs.argmax(-1) if targets is None else targets).to(logits.device), theirs)

    def _read_float(self) -> None:
        tally, kept = Tally(), 0
        with evaluating(self.model):
            for index, batch in enumerate(self.batches):
                logits, targets = predictions(self.model, feed(self.model, batch), batch)
                self.passes += 1
                tally.add(index, logits, logits.argmax(-1) if targets is None else targets, None)
                logits = logits.detach().clone()
                kept += logits.numel() * logits.element_size()
                self._reference.append(logits if kept <= _KEPT else self._spilled(index, logits))
                self._targets.append(targets)
        if not tally.count:
            raise QatError("there is no prediction to measure on: the batches are empty or every label is -100")
        self._float = tally

    def _spilled(self, index: int, logits: Tensor) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="qat_sensitivity_")
        path = Path(self._folder.name) / f"{index}.pt"
        torch.save(logits.cpu(), path)
        return path

    def _reference_of(self, index: int) -> Tensor:
        kept = self._reference[index]
        if isinstance(kept, Tensor):
            return kept
        loaded: Tensor = torch.load(kept, weights_only=True)
        return loaded

    @contextmanager
    def _standing(self, layers: Sequence[LayerPlan]) -> Iterator[None]:
        """Let the model stand with these layers quantized, and be as it was afterwards."""
        changing = tuple(layer for layer in layers if layer.scheme is not None)
        if not changing:
            yield
            return
        held = {layer.name: integers for layer in changing if (integers := self.numbers(layer)) is not None}
        with self._restoring([layer for layer in changing if layer.name in held]):
            prepare(self.model, Plan(changing, type(self.model).__name__), phase=Phase.FAKE_QUANTIZED)
            try:
                modules = prepared_layers(self.model)
                for name, integers in held.items():
                    hold(modules[name], integers)
                if any(layer.scheme is not None and layer.scheme.static for layer in changing):
                    with evaluating(self.model), calibrating(self.model):
                        for batch in self.batches:
                            feed(self.model, batch)
                            self.passes += 1
                with reusing_weights(self.model):
                    yield
            finally:
                unprepare(self.model)

    @contextmanager
    def _restoring(self, layers: Sequence[LayerPlan]) -> Iterator[None]:
        """Put the weights of these layers back afterwards, and what was folded: norms, their layers, their modes."""
        modes = {module: module.training for module in self.model.modules()}
        unfolded = Unfolded(self.model)
        modules = dict(_by_name(self.model, {layer.name for layer in layers}))
        weights = {name: current_weight(module).detach().clone() for name, module in modules.items()}
        try:
            yield
        finally:
            unfolded.restore()
            with torch.no_grad():
                for name, weight in weights.items():
                    current_weight(modules[name]).copy_(weight)
            for module, training in modes.items():
                module.training = training

    def _calibrate(self, plan: Plan) -> None:
        """Find the integers of every layer of a plan."""
        with self._restoring(plan.quantized):
            calibrate(self.model, plan, self.batches, method=self.quantize, progress=False)
            try:
                modules = prepared_layers(self.model)
                for name, quantizer in quantizers(self.model).items():
                    if quantizer.scheme.is_integer:
                        integers = quantizer.integers(current_weight(modules[name]).detach())
                        self._integers[name, quantizer.scheme] = integers
            finally:
                unprepare(self.model)


def _by_name(model: nn.Module, names: set[str]) -> Iterator[tuple[str, nn.Module]]:
    from qat_plugin.policy import candidates

    yield from ((c.name, c.module) for c in candidates(model) if c.name in names)


def predictions(model: nn.Module, output: object, batch: Any) -> tuple[Tensor, Tensor | None]:
    """What one batch's output predicts, and what it should have.

    Args:
        model: whose output it is; it says whether its predictions are of the next token.
        output: logits [B, T, V] or [B, C], or what holds them.
        batch: its input and, if it has any, labels. Tokens without labels are their own.

    Returns:
        Logits [N, V] of the scored predictions; targets [N], or ``None`` when the batch does not tell.
    """
    try:
        logits = logits_of(output, dimensions=3)
    except QatError:
        logits = logits_of(output, dimensions=2)
        labels = _labels(batch)
        fits = labels is not None and labels.shape == logits.shape[:1] and not labels.is_floating_point()
        return logits, labels.to(logits.device) if fits and labels is not None else None
    labels = _labels(batch)
    if labels is None:
        labels = _tokens(model, batch)
    if labels is None or labels.shape != logits.shape[:2] or labels.is_floating_point():
        return logits.flatten(0, 1), None
    targets = labels[:, 1:].to(logits.device)
    scored = targets != IGNORED
    return logits[:, :-1][scored], targets[scored]


def _labels(batch: Any) -> Tensor | None:
    if isinstance(batch, Mapping):
        found = batch.get("labels")
    else:
        found = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    return found if isinstance(found, Tensor) else None


def _tokens(model: nn.Module, batch: Any) -> Tensor | None:
    """The tokens of a batch without labels, those of padding as not to be predicted."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    takes_tokens = "input_ids" in inspect.signature(model.forward).parameters
    if not isinstance(ids, Tensor) or ids.is_floating_point() or not takes_tokens:
        return None
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return ids if mask is None else ids.masked_fill(mask == 0, IGNORED)
