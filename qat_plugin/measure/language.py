"""How well a language model predicts held-out text, and how far it is from a reference model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from qat_plugin.errors import DataError
from qat_plugin.measure.evaluating import device_of, evaluating, length_of
from qat_plugin.measure.predictions import Tally, logits_of
from qat_plugin.measure.progress import Progress, progressing

IGNORED = -100
"""Label of a position that is not predicted."""


@dataclass(frozen=True)
class LMMetrics:
    """Quality of a language model on one set of windows.

    Attributes:
        loss: mean next-token cross entropy over all tokens, in nats.
        perplexity: ``exp(loss)``; ``inf`` where that overflows.
        tokens: number of predicted tokens.
        kl: mean KL(reference || model) per token in nats; ``None`` without a reference.
        top1_agreement: share of tokens on which model and reference would choose the same next token.
        losses: mean loss of each window in the order of the data, for paired comparisons.
        counts: predicted tokens of each window; ``loss`` is the mean of ``losses`` weighted by them.
    """

    loss: float
    perplexity: float
    tokens: int
    kl: float | None = None
    top1_agreement: float | None = None
    losses: tuple[float, ...] = field(default=(), repr=False)
    counts: tuple[int, ...] = field(default=(), repr=False)


def evaluate_lm(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    reference: nn.Module | None = None,
    progress: Progress | bool = True,
) -> LMMetrics:
    """Measure next-token loss and perplexity, and with a ``reference`` the divergence from it.

    The cross entropy is computed in float32 whatever the model's dtype and summed in float64, token by token, so the
    result does not depend on the batch size. Logits of one batch are held at a time. Modes, gradients and random
    number state are left as they were.

    Args:
        model: returns logits [B, T, V] (or an object with ``logits``) for ``input_ids`` [B, T]. It is called with
            keywords where its ``forward`` knows them, else with ``input_ids`` alone.
        batches: mappings with ``input_ids`` [B, T] and ``labels`` [B, T]. Labels are **not** shifted: position t is
            scored on predicting ``labels[:, t + 1]``, as transformers does; -100 is not scored.
        reference: the model to compare with, usually the float one; evaluated on the same batches, in turn.
        progress: a bar on stderr once two seconds have passed, nothing, or a callback(done, total) in batches.

    Raises:
        DataError: when there is nothing to predict, or a batch has another form.
        QatError: when a loss is not finite; the message says on which batch.
    """
    tally = Tally()
    models = [model] if reference is None else [model, reference]
    with evaluating(*models), progressing(progress, "evaluating", length_of(batches)) as advance:
        for index, batch in enumerate(batches):
            labels = _checked_labels(index, batch)
            logits = _forward(model, index, batch)
            theirs = None if reference is None else _forward(reference, index, batch).to(logits.device)
            _add_windows(tally, index, logits, labels.to(logits.device), theirs)
            advance(index + 1)
    if not tally.count:
        raise DataError(
            "there is no token to evaluate on: the batches are empty or every label is -100; give at least one window "
            "of two tokens"
        )
    return LMMetrics(
        loss=tally.loss,
        perplexity=_exp(tally.loss),
        tokens=tally.count,
        kl=tally.kl,
        top1_agreement=tally.top1_agreement,
        losses=tuple(tally.losses),
        counts=tuple(tally.counts),
    )


def _add_windows(
    tally: Tally, batch: int, logits: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor | None
) -> None:
    if logits.shape[:2] != labels.shape:
        raise DataError(f"batch {batch}: labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}")
    for window, targets in enumerate(labels[:, 1:]):
        scored = targets != IGNORED
        every = bool(scored.all())  # then slices do, and nothing is copied
        tally.add(
            batch,
            logits[window, :-1] if every else logits[window, :-1][scored],
            targets if every else targets[scored],
            None if reference is None else (reference[window, :-1] if every else reference[window, :-1][scored]),
        )


def _checked_labels(index: int, batch: object) -> torch.Tensor:
    if not isinstance(batch, Mapping):
        raise DataError(f"batch {index} is {type(batch).__name__}; expected a mapping with 'input_ids' and 'labels'")
    for key in ("input_ids", "labels"):
        if key not in batch:
            raise DataError(f"batch {index} lacks {key!r}; it has {', '.join(map(repr, batch)) or 'nothing'}")
    labels: torch.Tensor = batch["labels"]
    if labels.dim() != 2 or labels.shape != batch["input_ids"].shape:
        raise DataError(
            f"batch {index}: 'input_ids' {tuple(batch['input_ids'].shape)} and 'labels' {tuple(labels.shape)} must "
            "have the same shape [batch, tokens]"
        )
    return labels


def _forward(model: nn.Module, index: int, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    device = device_of(model)
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    ids = batch["input_ids"].to(device)
    try:
        if "input_ids" not in parameters and not open_ended:
            return logits_of(model(ids), dimensions=3)
        extra: dict[str, object] = {}
        for name in ("attention_mask", "position_ids"):  # packed examples come with positions that begin anew
            if name in batch and (open_ended or name in parameters):
                extra[name] = batch[name].to(device)
        if "use_cache" in parameters:
            extra["use_cache"] = False
        return logits_of(model(input_ids=ids, **extra), dimensions=3)
    except IndexError as error:
        raise DataError(
            f"batch {index} has token ids from {int(ids.min())} to {int(ids.max())}, which the model's embedding does "
            f"not hold ({error}); does the tokenizer belong to another model?"
        ) from error


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
