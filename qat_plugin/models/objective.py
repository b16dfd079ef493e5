"""What a language model is trained on: next tokens, and optionally a teacher's distribution over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from qat_plugin import qlora
from qat_plugin.errors import ConfigError
from qat_plugin.losses import chunked_cross_entropy, chunked_distillation
from qat_plugin.measure.evaluating import evaluating
from qat_plugin.models.head import SplitModel, inputs_of, split

IGNORED = -100


@dataclass(frozen=True)
class Distillation:
    """Learning from a teacher beside the data (arXiv:1503.02531).

    ``(1 - weight) * cross entropy + weight * T^2 * KL(teacher || student)``, both softened by the temperature T, and
    ``hidden`` times the squared error of the states after each block, relative to the teacher's (:func:`hidden_error`).

    Attributes:
        weight: 0 to 1; 1 ignores the data's own next tokens.
        temperature: T, above 0.
        hidden: weight of the states' error; 0 for none. The teacher needs the student's width and depth.
    """

    weight: float = 0.5
    temperature: float = 1.0
    hidden: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ConfigError(f"distill.weight={self.weight} is not allowed: it is above 0 and at most 1")
        if not self.temperature > 0:
            raise ConfigError(f"distill.temperature={self.temperature} is not allowed: it must be above 0")
        if self.hidden < 0:
            raise ConfigError(f"distill.hidden={self.hidden} is not allowed: it is 0 or above")


class Objective:
    """The training loss of one causal language model.

    Args:
        model: a transformers model.
        chunked: never hold all logits at once; where the model cannot be taken apart at its head, a warning says so and
            the model's own loss is used.
        distillation: learn from a teacher too.
        teacher: the teacher; ``None`` takes the model's own frozen base, without adapters and fake quantization, which
            needs a model that was prepared by :func:`qat_plugin.qlora.prepare` with a float base.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        chunked: bool = True,
        distillation: Distillation | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        self.model, self.chunked, self.distillation, self.teacher = model, chunked, distillation, teacher
        self._parts: dict[int, SplitModel | str] = {}

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean training loss over the tokens to predict, in nats."""
        if self.distillation is None:
            return self.cross_entropy(batch)
        parts, weight = self._split(self.model), self.distillation.weight
        assert isinstance(parts, SplitModel)  # else _split has raised
        states, labels = self._states(parts, batch), next_tokens(batch["labels"])
        with self._teaching() as teacher:
            taught = self._split(teacher)
            assert isinstance(taught, SplitModel)
            theirs = self._states(taught, batch)
        hidden = states[-1]
        loss = weight * chunked_distillation(
            hidden, parts.head, theirs[-1], taught.head, labels,
            temperature=self.distillation.temperature, transform=parts.transform, teacher_transform=taught.transform,
        )  # fmt: skip
        if weight < 1:
            loss = loss + (1 - weight) * chunked_cross_entropy(hidden, parts.head, labels, transform=parts.transform)
        if self.distillation.hidden:
            loss = loss + self.distillation.hidden * hidden_error(states, theirs, labels)
        return loss

    def _states(self, parts: SplitModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The states that are compared; the last are what the head takes."""
        assert self.distillation is not None
        return parts.all_hidden(batch) if self.distillation.hidden else (parts.hidden(batch),)

    def cross_entropy(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean next-token cross entropy alone, in nats."""
        parts = self._split(self.model) if self.chunked else ""
        if isinstance(parts, str):
            loss: Tensor = self.model(**inputs_of(batch), labels=batch["labels"], use_cache=False).loss
            return loss
        labels = next_tokens(batch["labels"])
        return chunked_cross_entropy(parts.hidden(batch), parts.head, labels, transform=parts.transform)

    def _split(self, model: nn.Module) -> SplitModel | str:
        if id(model) not in self._parts:
            self._parts[id(model)] = parts = split(model)
            if isinstance(parts, str):
                if self.distillation is not None:
                    raise ConfigError(f"distillation is not possible here: {parts}")
                rank_zero_warn(f"the loss is not chunked, all logits are held at once: {parts}")
        return self._parts[id(model)]

    @contextmanager
    def _teaching(self) -> Iterator[nn.Module]:
        with ExitStack() as stack:
            teacher = self.teacher
            if teacher is None:
                if not qlora.is_prepared(self.model):
                    raise ConfigError(
                        "distillation needs a teacher: give one, or prepare the model with adapters (its own base is "
                        "the teacher then)"
                    )
                teacher = self.model
                stack.enter_context(qlora.without_adapters(teacher))
            else:
                device = next(self.model.parameters()).device
                if next(teacher.parameters()).device != device:
                    teacher.to(device)
            stack.enter_context(evaluating(teacher))
            yield teacher


def hidden_error(states: Sequence[Tensor], theirs: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Squared error of a student's states over a teacher's mean square, averaged over blocks.

    Args:
        states: [B, T, D] after each block.
        theirs: the teacher's, which get no gradient.
        labels: [B, T]; positions that predict nothing are left out.

    Returns:
        A float32 scalar: 0 for equal states, 1 for states that are as far off as zeros would be.

    Raises:
        ConfigError: when the two have not the same number of blocks or width.
    """
    if [state.shape for state in states] != [state.shape for state in theirs]:
        raise ConfigError(
            f"distill.hidden compares the states of each block: the student has {len(states)} of width "
            f"{states[-1].shape[-1]}, the teacher {len(theirs)} of width {theirs[-1].shape[-1]}; set distill.hidden=0"
        )
    scored = (labels != IGNORED).unsqueeze(-1)
    errors = []
    for state, target in zip(states, theirs, strict=True):
        target = target.detach().to(torch.float32)
        error = (state.to(torch.float32) - target).square() * scored
        errors.append(error.sum() / (target.square() * scored).sum().clamp(min=1e-12))
    return torch.stack(errors).mean()


def next_tokens(labels: Tensor) -> Tensor:
    """Labels [B, T] aligned with the position that predicts them: shifted by one, the last position predicts none."""
    end = torch.full_like(labels[:, :1], IGNORED)
    return torch.cat([labels[:, 1:], end], dim=1)
