"""Chunked losses against torch's own on all logits at once, in value, gradient and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_plugin.errors import DataError
from qat_plugin.losses import chunked_cross_entropy, chunked_distillation
from qat_plugin.measure.memory import cpu_allocations

ROWS, WIDTH, CLASSES = 23, 16, 40


def cap(logits: Tensor) -> Tensor:
    return 5 * torch.tanh(logits / 5)


def example(dtype: torch.dtype = torch.float64, *, bias: bool = True) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    hidden = (2 * torch.randn(ROWS, WIDTH, dtype=dtype)).requires_grad_()
    head = nn.Linear(WIDTH, CLASSES, bias=bias, dtype=dtype)
    labels = torch.randint(CLASSES, (ROWS,))
    labels[::4] = -100
    return hidden, head, labels


def gradients(loss: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("transform", [None, cap], ids=["plain", "capped"])
@pytest.mark.parametrize("chunk", [1, 7, ROWS, 1000, None])
def test_loss_and_gradients_are_those_of_all_logits_at_once(chunk: int | None, transform: Any) -> None:
    hidden, head, labels = example()
    logits = head(hidden) if transform is None else transform(head(hidden))
    expected = F.cross_entropy(logits, labels)
    found = chunked_cross_entropy(hidden, head, labels, chunk=chunk, transform=transform)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected)
    theirs = gradients(expected, hidden, head.weight, head.bias)
    for ours, right in zip(gradients(found, hidden, head.weight, head.bias), theirs, strict=True):
        torch.testing.assert_close(ours, right)


def test_float32_is_exact_to_its_rounding() -> None:
    hidden, head, labels = example(torch.float32)
    exact = F.cross_entropy(head(hidden).double(), labels)
    found = chunked_cross_entropy(hidden, head, labels, chunk=5)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-6)


def test_bfloat16_logits_are_scored_in_float32() -> None:
    hidden, head, labels = example(torch.bfloat16)
    exact = F.cross_entropy(head(hidden).double(), labels)
    found = chunked_cross_entropy(hidden, head, labels, chunk=5)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-6)
    expected = gradients(exact, hidden, head.weight)
    for ours, right in zip(gradients(found, hidden, head.weight), expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - right.float()).norm() < 0.01 * right.float().norm()


def test_a_tied_head_gets_the_gradients_of_both_uses() -> None:
    _, head, labels = example(bias=False)
    ids = torch.arange(ROWS) % CLASSES
    expected = gradients(F.cross_entropy(head(F.embedding(ids, head.weight)), labels), head.weight)[0]
    found = gradients(chunked_cross_entropy(F.embedding(ids, head.weight), head, labels, chunk=4), head.weight)[0]
    torch.testing.assert_close(found, expected)


def test_a_scaled_loss_scales_its_gradients_and_the_divisor_may_be_given() -> None:
    hidden, head, labels = example()
    scored = int((labels != -100).sum())
    plain = chunked_cross_entropy(hidden, head, labels, chunk=4)
    divided = chunked_cross_entropy(hidden, head, labels, chunk=4, num_items=2 * scored)
    torch.testing.assert_close(2 * divided, plain)
    torch.testing.assert_close(gradients(3 * plain, hidden)[0], 6 * gradients(divided, hidden)[0])


def test_a_frozen_head_gets_no_gradient_and_hidden_states_do() -> None:
    hidden, head, labels = example()
    head.requires_grad_(False)
    chunked_cross_entropy(hidden, head, labels, chunk=4).backward()
    assert head.weight.grad is None
    assert hidden.grad is not None
    right = gradients(F.cross_entropy(head(hidden), labels), hidden)[0]
    torch.testing.assert_close(hidden.grad, right)


def test_without_gradients_the_value_is_the_same() -> None:
    hidden, head, labels = example()
    expected = chunked_cross_entropy(hidden, head, labels, chunk=4)
    with torch.no_grad():
        found = chunked_cross_entropy(hidden, head, labels, chunk=4)
    assert not found.requires_grad
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_where_nothing_is_scored_loss_and_gradients_are_zero() -> None:
    hidden, head, labels = example()
    loss = chunked_cross_entropy(hidden, head, torch.full_like(labels, -100), chunk=4)
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(loss, hidden, head.weight))


def test_another_label_may_be_the_ignored_one() -> None:
    hidden, head, labels = example()
    zeros = labels.clamp(min=0)
    found = chunked_cross_entropy(hidden, head, zeros, ignore_index=0, chunk=4)
    torch.testing.assert_close(found, F.cross_entropy(head(hidden), zeros, ignore_index=0))


def test_all_logits_are_never_there() -> None:
    rows, width, classes = 512, 32, 4096
    hidden, head = torch.randn(rows, width, requires_grad=True), nn.Linear(width, classes, bias=False)
    labels = torch.randint(classes, (rows,))
    whole = 4 * rows * classes
    with cpu_allocations() as at_once:
        F.cross_entropy(head(hidden), labels).backward()
    with cpu_allocations() as chunked:
        chunked_cross_entropy(hidden, head, labels, chunk=32).backward()
    assert at_once.peak > 2 * whole
    assert chunked.peak < whole / 2


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="do not fit hidden states"):
        chunked_cross_entropy(torch.zeros(2, 4, WIDTH), nn.Linear(WIDTH, CLASSES), torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_label_that_is_no_class_is_refused(label: int) -> None:
    hidden, head, labels = example()
    labels[-1] = label
    with pytest.raises(DataError, match=rf"label {label} is not one of the {CLASSES} classes"):
        chunked_cross_entropy(hidden, head, labels, chunk=4)


def test_an_empty_batch_and_a_negative_chunk_are_refused() -> None:
    hidden, head, labels = example()
    with pytest.raises(DataError, match="batch is empty"):
        chunked_cross_entropy(hidden[:0], head, labels[:0])
    with pytest.raises(DataError, match="at least 1"):
        chunked_cross_entropy(hidden, head, labels, chunk=-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 6, None])
def test_distillation_is_the_divergence_by_its_definition(chunk: int | None, temperature: float) -> None:
    hidden, head, labels = example()
    theirs, teacher = torch.randn(ROWS, 8, dtype=torch.float64), nn.Linear(8, CLASSES, dtype=torch.float64)
    scored = labels != -100
    ours = F.log_softmax(cap(head(hidden))[scored] / temperature, -1)
    right = F.log_softmax(teacher(theirs)[scored] / temperature, -1).detach()
    expected = temperature**2 * (right.exp() * (right - ours)).sum(-1).mean()
    found = chunked_distillation(
        hidden, head, theirs, teacher, labels, temperature=temperature, chunk=chunk, transform=cap
    )
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients(found, hidden, head.weight), gradients(expected, hidden, head.weight), strict=True):
        torch.testing.assert_close(one, other)
    assert teacher.weight.grad is None


def test_a_teacher_of_other_classes_is_refused() -> None:
    hidden, head, labels = example()
    with pytest.raises(DataError, match=f"the teacher has 7 classes, the student {CLASSES}"):
        chunked_distillation(hidden, head, hidden, nn.Linear(WIDTH, 7, dtype=torch.float64), labels)
