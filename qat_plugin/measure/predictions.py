"""Scores of predictions: negative log-likelihood, correctness, divergence from a reference model."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.nn import functional as F

from qat_plugin.errors import DataError, QatError

_CHUNK = 1 << 23  # logits scored at a time: 32 MB in float32, 64 MB in float64, however large the vocabulary


class Tally:
    """Running sums over scored predictions, in nats and float64; logits are dropped as soon as they are scored.

    Predictions are added in groups (one window of text, one batch of images); the mean loss of each group is kept, so
    that two models can be compared group by group.
    """

    def __init__(self) -> None:
        self.count = 0
        self.correct = 0
        self.losses: list[float] = []
        self.counts: list[int] = []
        self._nll: list[float] = []
        self._kl: list[float] = []
        self._agreeing: int | None = None

    @torch.no_grad()
    def add(self, batch: int, logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None) -> None:
        """Score one group of N predictions over V classes.

        Args:
            batch: index of the batch they come from, for error messages.
            logits: [N, V] in any float dtype.
            targets: [N] class indices on the device of ``logits``.
            reference: [N, V] logits of the reference model on the same device.

        Raises:
            DataError: when a target is not in 0..V-1.
            QatError: when a loss is NaN or infinite, or the reference has another number of classes.
        """
        if not len(targets):
            return
        _check_classes(batch, logits, targets, reference)
        nll = kl = 0.0
        rows = max(1, _CHUNK // logits.shape[-1])
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            nll += self._add_losses(batch, logits[part], targets[part])
            if reference is not None:
                kl += self._add_divergence(batch, logits[part], reference[part])
        self.count += len(targets)
        self.losses.append(nll / len(targets))
        self.counts.append(len(targets))
        self._nll.append(nll)
        self._kl.append(kl)

    def _add_losses(self, batch: int, logits: torch.Tensor, targets: torch.Tensor) -> float:
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        bad = int((~losses.isfinite()).sum())
        if bad:
            raise QatError(
                f"the loss is not finite on batch {batch} ({bad} of {len(losses)} predictions): the model's weights or "
                "activations hold NaN or overflowed; check the learning rate, and fp16 for overflow"
            )
        self.correct += int((logits.argmax(dim=-1) == targets).sum())
        return float(losses.to(_wide(losses)).sum())

    def _add_divergence(self, batch: int, logits: torch.Tensor, reference: torch.Tensor) -> float:
        ours, theirs = (F.log_softmax(x.to(_wide(logits)), dim=-1) for x in (logits, reference))
        probability = theirs.exp()
        # classes that the reference rules out add nothing, also where both logits are -inf
        kl = float(torch.where(probability > 0, probability * (theirs - ours), 0.0).sum())
        if math.isnan(kl) or bool(reference.isnan().any()):
            raise QatError(f"the reference model's logits hold NaN on batch {batch}; it cannot be compared with")
        agreeing = int((logits.argmax(dim=-1) == reference.argmax(dim=-1)).sum())
        self._agreeing = agreeing + (self._agreeing or 0)
        return kl

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood over all predictions, in nats."""
        return math.fsum(self._nll) / self.count

    @property
    def accuracy(self) -> float:
        """Share of predictions whose largest logit is the target's."""
        return self.correct / self.count

    @property
    def kl(self) -> float | None:
        """Mean KL(reference || model) in nats, or ``None`` without a reference."""
        return None if self._agreeing is None else math.fsum(self._kl) / self.count

    @property
    def top1_agreement(self) -> float | None:
        """Share of predictions on which model and reference choose the same class, or ``None`` without a reference."""
        return None if self._agreeing is None else self._agreeing / self.count


def logits_of(output: object, dimensions: int) -> torch.Tensor:
    """The logits in what a model returned: a tensor, something with ``logits``, or the first such tensor of a tuple.

    Raises:
        QatError: when there is none with that number of dimensions.
    """
    candidates: list[object] = [output, getattr(output, "logits", None)]
    if isinstance(output, Mapping):
        candidates.append(output.get("logits"))
    elif isinstance(output, (tuple, list)):
        candidates.extend(output)
    for candidate in candidates:
        if isinstance(candidate, torch.Tensor) and candidate.dim() == dimensions:
            return candidate
    raise QatError(
        f"the model returned {type(output).__name__} without logits of {dimensions} dimensions; it must return such a "
        "tensor, or an object or mapping with 'logits'"
    )


def _check_classes(batch: int, logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None) -> None:
    classes = logits.shape[-1]
    if reference is not None and reference.shape != logits.shape:
        raise QatError(
            f"the reference model's logits are {tuple(reference.shape)} where the model's are {tuple(logits.shape)}: "
            "they can be compared only over the same vocabulary or classes"
        )
    lowest, highest = int(targets.min()), int(targets.max())
    if lowest < 0 or highest >= classes:
        raise DataError(
            f"batch {batch} has targets from {lowest} to {highest}, the model predicts classes 0 to {classes - 1}; "
            "does the tokenizer or the label set belong to another model?"
        )


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64  # MPS has no float64
