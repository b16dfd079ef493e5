"""What a language model is trained on: next tokens, and optionally a teacher's distribution over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

    ``(1 - weight) * cross entropy + weight * T^2 * KL(teacher || student)``, both softened by the temperature T.

    Attributes:
        weight: 0 to 1; 1 ignores the data's own next tokens.
        temperature: T, above 0.
    """

    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ConfigError(f"distill.weight={self.weight} is not allowed: it is above 0 and at most 1")
        if not self.temperature > 0:
            raise ConfigError(f"distill.temperature={self.temperature} is not allowed: it must be above 0")


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
        hidden, labels = parts.hidden(batch), next_tokens(batch["labels"])
        with self._teaching() as teacher:
            taught = self._split(teacher)
            assert isinstance(taught, SplitModel)
            theirs = taught.hidden(batch)
        divergence = chunked_distillation(
            hidden, parts.head, theirs, taught.head, labels,
            temperature=self.distillation.temperature, transform=parts.transform, teacher_transform=taught.transform,
        )  # fmt: skip
        if weight == 1:
            return divergence
        return (1 - weight) * chunked_cross_entropy(hidden, parts.head, labels, transform=parts.transform) + (
            weight * divergence
        )

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


def next_tokens(labels: Tensor) -> Tensor:
    """Labels [B, T] aligned with the position that predicts them: shifted by one, the last position predicts none."""
    end = torch.full_like(labels[:, :1], IGNORED)
    return torch.cat([labels[:, 1:], end], dim=1)
