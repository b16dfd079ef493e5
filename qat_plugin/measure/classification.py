"""How well a classifier does on held-out examples, and how far it is from a reference model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from qat_plugin.errors import DataError
from qat_plugin.measure.evaluating import device_of, evaluating, length_of
from qat_plugin.measure.predictions import Tally, logits_of
from qat_plugin.measure.progress import Progress, progressing

ClassifierBatch = Sequence[torch.Tensor] | Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ClassifierMetrics:
    """Quality of a classifier on one set of examples.

    Attributes:
        loss: mean cross entropy over all examples, in nats.
        accuracy: share of examples whose largest logit is the label's.
        samples: number of examples.
        kl: mean KL(reference || model) in nats; ``None`` without a reference.
        top1_agreement: share of examples to which model and reference give the same class.
        losses: mean loss of each batch in the order of the data, for paired comparisons.
        counts: examples of each batch.
    """

    loss: float
    accuracy: float
    samples: int
    kl: float | None = None
    top1_agreement: float | None = None
    losses: tuple[float, ...] = field(default=(), repr=False)
    counts: tuple[int, ...] = field(default=(), repr=False)


def evaluate_classifier(
    model: nn.Module,
    batches: Iterable[ClassifierBatch],
    *,
    reference: nn.Module | None = None,
    progress: Progress | bool = True,
) -> ClassifierMetrics:
    """Measure accuracy and loss, and with a ``reference`` the divergence from it.

    Args:
        model: returns logits [B, C] (or an object with ``logits``).
        batches: pairs (inputs, labels [B]), or mappings whose ``labels`` [B] are the classes and whose other entries
            are the model's keyword arguments.
        reference: the model to compare with, usually the float one.
        progress: a bar on stderr once two seconds have passed, nothing, or a callback(done, total) in batches.

    Raises:
        DataError: when there is no example, or a batch has another form.
        QatError: when a loss is not finite; the message says on which batch.
    """
    tally = Tally()
    models = [model] if reference is None else [model, reference]
    with evaluating(*models), progressing(progress, "evaluating", length_of(batches)) as advance:
        for index, batch in enumerate(batches):
            inputs, labels = _split(index, batch)
            logits = _forward(model, inputs)
            if labels.shape != logits.shape[:1]:
                raise DataError(f"batch {index}: labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}")
            theirs = None if reference is None else _forward(reference, inputs).to(logits.device)
            tally.add(index, logits, labels.to(logits.device), theirs)
            advance(index + 1)
    if not tally.count:
        raise DataError("there is no example to evaluate on: the batches are empty")
    return ClassifierMetrics(
        loss=tally.loss,
        accuracy=tally.accuracy,
        samples=tally.count,
        kl=tally.kl,
        top1_agreement=tally.top1_agreement,
        losses=tuple(tally.losses),
        counts=tuple(tally.counts),
    )


def _split(index: int, batch: object) -> tuple[torch.Tensor | dict[str, torch.Tensor], torch.Tensor]:
    """Separate the model's input, positional or by keyword, from the labels."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise DataError(
        f"batch {index} is {type(batch).__name__}; expected a pair (inputs, labels) or a mapping with 'labels'"
    )


def _forward(model: nn.Module, inputs: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
    device = device_of(model)
    if isinstance(inputs, dict):
        return logits_of(model(**{key: value.to(device) for key, value in inputs.items()}), dimensions=2)
    return logits_of(model(inputs.to(device)), dimensions=2)
