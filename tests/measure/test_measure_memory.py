from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from qat_plugin.errors import QatError
from qat_plugin.measure import host_memory
from qat_plugin.measure.host_memory import AnonymousMemory, anonymous_bytes, available_bytes
from qat_plugin.measure.memory import cpu_allocations, cuda_allocations

MIB = 1 << 20


def test_the_peak_of_cpu_tensors_is_exact() -> None:
    with cpu_allocations() as found:
        a = torch.zeros(3 * MIB, dtype=torch.uint8)
        b = torch.zeros(5 * MIB, dtype=torch.uint8)
        del a
        c = torch.zeros(MIB, dtype=torch.uint8)
    assert (found.peak, found.left, found.reserved) == (8 * MIB, 6 * MIB, None)
    assert b.nbytes + c.nbytes == found.left


def test_temporaries_of_an_operation_count() -> None:
    x = torch.ones(MIB)
    with cpu_allocations() as found:
        y = (x + 1) * (x + 2)  # both sums are alive when the product is made
    assert (found.peak, found.left) == (3 * y.nbytes, y.nbytes)


def test_a_backward_pass_counts_what_it_keeps_and_its_gradients() -> None:
    width, rows = 256, 512
    layers = [torch.nn.Linear(width, width, bias=False) for _ in range(4)]
    with cpu_allocations() as found:
        x = torch.ones(rows, width)
        for layer in layers:
            x = torch.sigmoid(layer(x))
        kept = x.nbytes
        x.sum().backward()
        del x
    gradients = sum(layer.weight.nbytes for layer in layers)
    # the input and each sigmoid's result are kept; backward adds its gradient, the next one and that of a weight
    assert found.left == gradients
    assert 5 * kept + 2 * kept < found.peak <= 5 * kept + 2 * kept + gradients // 2


def test_what_was_there_before_is_not_counted_when_it_is_freed() -> None:
    with cpu_allocations():
        earlier = torch.zeros(4 * MIB, dtype=torch.uint8)
    before = torch.zeros(8 * MIB, dtype=torch.uint8)
    with cpu_allocations() as found:
        del before, earlier
        after = torch.zeros(MIB, dtype=torch.uint8)
    assert (found.peak, found.left) == (after.nbytes, after.nbytes)


def test_measuring_inside_a_profile_is_refused() -> None:
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        pytest.raises(QatError, match="does not nest"),
        cpu_allocations(),
    ):
        pass


@pytest.mark.skipif(anonymous_bytes() is None, reason="the system has no /proc")
def test_anonymous_memory_sees_what_torch_does_not() -> None:
    with AnonymousMemory(interval=0.001) as found:
        block = bytearray(b"x" * (64 * MIB))
        found.sample()
        del block
    assert found.growth is not None
    assert 60 * MIB < found.growth < 200 * MIB
    assert not any(thread.name == "anonymous-memory" for thread in threading.enumerate())


def test_anonymous_memory_is_unknown_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host_memory, "_STATUS", tmp_path / "status")
    with AnonymousMemory() as found:
        pass
    assert (found.start, found.peak, found.growth) == (None, None, None)


@pytest.mark.skipif(anonymous_bytes() is None, reason="the system has no /proc")
def test_available_memory_is_less_than_there_is() -> None:
    there = available_bytes()
    assert there is not None
    assert 0 < there < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_an_interval_of_zero_is_refused() -> None:
    with pytest.raises(QatError, match="above 0"):
        AnonymousMemory(interval=0)


def test_a_host_is_no_card() -> None:
    with pytest.raises(QatError, match="cpu_allocations"), cuda_allocations("cpu"):
        pass


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_peak_on_a_card_is_exact() -> None:
    with cuda_allocations() as found:
        a = torch.zeros(4 * MIB, dtype=torch.uint8, device="cuda")
        b = torch.zeros(2 * MIB, dtype=torch.uint8, device="cuda")
        del a
    assert (found.peak, found.left) == (6 * MIB, b.nbytes)
    assert found.reserved is not None
    assert found.reserved >= found.peak
