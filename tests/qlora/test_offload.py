"""Activations that wait on the host: the same numbers, and only what is large enough and no parameter moves."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from qat_plugin.qlora import offloading, prepare
from tests.qlora.adapters import learned, llama

IDS = torch.arange(24).reshape(2, 12) * 7 % 64


def step(model: Any, *, offload: bool) -> tuple[list[Tensor], int]:
    """Loss and gradients of one step, and how many bytes moved."""
    model.zero_grad(set_to_none=True)
    context: Any = offloading(model, minimum_bytes=1, force=True) if offload else nullcontext()
    torch.manual_seed(5)  # of dropout
    with context as count:
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *gradients], count.moved_bytes if offload else 0


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"dropout": 0.2}], ids=["lora", "dora", "dropout"])
@pytest.mark.parametrize("base", ["nf4-dq", None])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_equal_to_the_bit(
    checkpointing: bool, base: str | None, options: dict[str, Any]
) -> None:
    model = learned(prepare(llama(), base, rank=4, gradient_checkpointing=checkpointing, **options)).train()
    expected, _ = step(model, offload=False)
    found, moved = step(model, offload=True)
    assert moved > 0
    assert len(found) == len(expected) == 1 + 14 * (3 if "dora" in options else 2)
    assert all(bool(one.any()) and torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_checkpointing_leaves_less_to_move() -> None:
    moved = {}
    for checkpointing in (False, True):
        model = prepare(llama(), rank=4, gradient_checkpointing=checkpointing)
        with offloading(model, minimum_bytes=1, force=True) as count:
            model(input_ids=IDS, use_cache=False)
        moved[checkpointing] = count.moved_bytes
    assert 0 < moved[True] < moved[False] / 4


def cube(x: Tensor, layer: nn.Module, **options: Any) -> Any:
    with offloading(layer, **options) as count:
        (layer(x) ** 3).sum().backward()
    return count


def test_small_tensors_stay_and_what_moves_is_counted() -> None:
    layer = nn.Linear(16, 8, bias=False)
    x = torch.randn(4, 16)  # 256 bytes, kept for the gradient of the weight; the output, kept for the cube, has 128
    for least, tensors, moved in ((1, 2, 384), (256, 1, 256), (257, 0, 0)):
        count = cube(x, layer, minimum_bytes=least, force=True)
        assert (count.tensors, count.moved_bytes) == (tensors, moved)
    wide = torch.randn(1 << 14, 16)  # 1 MiB: the least that moves by default
    assert cube(wide, layer, force=True).moved_bytes == wide.nbytes
    assert cube(wide[1:], layer, force=True).tensors == 0


def test_tensors_on_the_cpu_stay_unless_forced() -> None:
    assert cube(torch.randn(4, 16), nn.Linear(16, 8), minimum_bytes=1).tensors == 0


def test_parameters_buffers_and_their_views_do_not_move() -> None:
    layer = nn.Linear(16, 16, bias=False)
    layer.register_buffer("table", torch.randn(16, 16))
    x = torch.randn(4, 16, requires_grad=True)
    layer.requires_grad_(False)
    with offloading(layer, minimum_bytes=1, force=True) as count:
        out = (layer(x) @ layer.table) @ layer.weight.t()[:, :8]
        out.sum().backward()
    assert count.tensors == 0
    torch.testing.assert_close(x.grad, torch.ones(4, 8) @ layer.weight[:8] @ layer.table.t() @ layer.weight)


def test_values_are_those_at_the_time_they_were_saved_when_their_memory_is_reused() -> None:
    x = torch.randn(8, 8, requires_grad=True)
    with offloading(nn.Linear(1, 1), minimum_bytes=1, force=True) as count:
        hidden = x * 2
        out = hidden**2
        expected = 8 * x.detach()
        hidden.data.zero_()  # as an allocator's next user would
        out.sum().backward()
    assert count.tensors >= 1
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_moves_after_the_block(fails: bool) -> None:
    layer = nn.Linear(16, 8)
    with (
        pytest.raises(ZeroDivisionError) if fails else nullcontext(),
        offloading(layer, minimum_bytes=1, force=True) as c,
    ):
        layer(torch.randn(4, 16, requires_grad=True))
        inside = c.tensors
        if fails:
            raise ZeroDivisionError
    (layer(torch.randn(4, 16)) ** 2).sum().backward()
    assert c.tensors == inside == 1
