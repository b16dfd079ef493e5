"""Losses over a large vocabulary that never hold all logits at once.

A language model's logits are the largest tensor of its training step: 2048 tokens x 128,000 words are 1 GiB in float32,
and the usual loss holds them several times over. Here the output head runs on some rows at a time, and the gradient of
each chunk is taken while its logits are there: one forward and one backward pass of the head, as ever, and no
recomputation. The softmax is computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_plugin.errors import DataError

IGNORED: Final = -100
_LOGITS: Final = 1 << 24  # numbers a chunk, 64 MiB in float32
_LEAST_ROWS: Final = 64

Transform = Callable[[Tensor], Tensor]
_ChunkLoss = Callable[[Tensor, slice], Tensor]


def chunked_cross_entropy(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    *,
    chunk: int | None = None,
    ignore_index: int = IGNORED,
    transform: Transform | None = None,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Mean cross entropy of ``transform(head(hidden))``, in nats; equal to the plain loss up to float32 rounding.

    Args:
        hidden: [..., D], the last hidden states.
        head: maps [n, D] to logits [n, V]; its parameters get gradients where they require them, tied ones too.
        labels: [...] of class indices, aligned with ``hidden`` (the caller shifts).
        chunk: rows at a time; by default as many as make 16 million logits, at least 64.
        ignore_index: label of a position that is not scored.
        transform: elementwise function of the logits (a soft cap, a scale).
        num_items: divide the sum by this instead of the number of scored positions.

    Returns:
        A float32 scalar (float64 for float64 logits). Without any scored position it is 0, and so are its gradients.

    Raises:
        DataError: when shapes do not fit or a label is no class.
    """
    rows, flat = _rows(hidden, labels)
    scored = flat != ignore_index
    count = _divisor(scored, num_items)

    def loss_of(part: Tensor, where: slice) -> Tensor:
        logits = _logits(head, part, transform)
        targets = flat[where]
        _check_labels(targets, logits.shape[-1], ignore_index)
        return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum") / count

    return _summed(rows, head, loss_of, chunk)


def chunked_distillation(
    hidden: Tensor,
    head: nn.Module,
    teacher_hidden: Tensor,
    teacher_head: nn.Module,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    ignore_index: int = IGNORED,
    transform: Transform | None = None,
    teacher_transform: Transform | None = None,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Mean ``T^2 KL(teacher || student)`` over the scored positions, in nats (arXiv:1503.02531).

    Args:
        hidden, head, transform: the student's, as for :func:`chunked_cross_entropy`.
        teacher_hidden, teacher_head, teacher_transform: the teacher's, which gets no gradient.
        labels: only tells which positions are scored.
        temperature: softens both distributions.
        chunk, ignore_index, num_items: as for :func:`chunked_cross_entropy`.

    Raises:
        DataError: when shapes do not fit.
    """
    rows, flat = _rows(hidden, labels)
    theirs, _ = _rows(teacher_hidden.detach(), labels)
    weights = (flat != ignore_index).to(torch.float32)
    count = _divisor(flat != ignore_index, num_items)

    def loss_of(part: Tensor, where: slice) -> Tensor:
        with torch.no_grad():
            target = F.log_softmax(_logits(teacher_head, theirs[where], teacher_transform) / temperature, dim=-1)
        ours = F.log_softmax(_logits(head, part, transform) / temperature, dim=-1)
        if ours.shape != target.shape:
            raise DataError(f"the teacher has {target.shape[-1]} classes, the student {ours.shape[-1]}")
        divergence = F.kl_div(ours, target, reduction="none", log_target=True).sum(-1)
        return temperature**2 * (divergence * weights[where].to(divergence.dtype)).sum() / count

    return _summed(rows, head, loss_of, chunk)


class _ChunkedSum(torch.autograd.Function):
    """The sum over chunks; gradients are taken chunk by chunk in the forward pass, backward only scales them."""

    @staticmethod
    def forward(ctx: Any, loss_of: _ChunkLoss, step: int, rows: Tensor, *parameters: Tensor) -> Tensor:
        wanted = [i for i, tensor in enumerate((rows, *parameters)) if ctx.needs_input_grad[2 + i]]
        rows_gradient = torch.empty_like(rows) if 0 in wanted else None
        sums: dict[int, Tensor] = {}
        total = rows.new_zeros((), dtype=torch.float64)
        for start in range(0, len(rows), step):
            where = slice(start, start + step)
            part = rows[where].detach()
            with torch.enable_grad():
                part.requires_grad_(rows_gradient is not None)
                loss = loss_of(part, where)
            total += loss.detach()
            sources = [part if i == 0 else parameters[i - 1] for i in wanted]
            gradients = torch.autograd.grad(loss, sources, allow_unused=True)
            for i, gradient in zip(wanted, gradients, strict=True):
                if i == 0:
                    assert rows_gradient is not None
                    rows_gradient[where] = 0 if gradient is None else gradient
                elif gradient is not None:
                    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                    sums[i] = wide if i not in sums else sums[i].add_(wide)
        ctx.gradients = [
            rows_gradient if i == 0 else sums.get(i) if i in wanted else None for i in range(1 + len(parameters))
        ]
        ctx.dtypes = [tensor.dtype for tensor in (rows, *parameters)]
        return total.to(torch.promote_types(loss.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = upstream
        scaled = [
            None if gradient is None else (gradient * scale.to(gradient.dtype)).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        return None, None, *scaled


def _summed(rows: Tensor, head: nn.Module, loss_of: _ChunkLoss, chunk: int | None) -> Tensor:
    step = chunk or _chunk_for(head)
    if step < 1:
        raise DataError(f"chunk is {chunk}; it must be at least 1")
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if torch.is_grad_enabled() and (rows.requires_grad or parameters):
        result: Tensor = _ChunkedSum.apply(loss_of, step, rows, *parameters)
        return result
    parts = [loss_of(rows[i : i + step], slice(i, i + step)).double() for i in range(0, len(rows), step)]
    return torch.stack(parts).sum().to(torch.float32)


def _rows(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if hidden.shape[:-1] != labels.shape:
        raise DataError(f"labels {list(labels.shape)} do not fit hidden states {list(hidden.shape)}")
    if not labels.numel():
        raise DataError("there is no position to score: the batch is empty")
    return hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)


def _logits(head: nn.Module, rows: Tensor, transform: Transform | None) -> Tensor:
    logits: Tensor = head(rows)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if transform is None else transform(logits)


def _divisor(scored: Tensor, num_items: int | Tensor | None) -> Tensor | int:
    return scored.sum().clamp(min=1) if num_items is None else num_items


def _check_labels(targets: Tensor, classes: int, ignore_index: int) -> None:
    if targets.device.type == "cpu":  # on other devices the kernel itself asserts, and looking would wait for it
        bad = (targets != ignore_index) & ((targets < 0) | (targets >= classes))
        if bool(bad.any()):
            raise DataError(f"label {int(targets[bad][0])} is not one of the {classes} classes 0..{classes - 1}")


def _chunk_for(head: nn.Module) -> int:
    classes = getattr(head, "out_features", None)
    if classes is None:
        classes = max((p.shape[0] for p in head.parameters() if p.dim() == 2), default=1)
    return max(_LEAST_ROWS, _LOGITS // max(1, int(classes)))
