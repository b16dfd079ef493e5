"""AdamW with 32-bit and with 8-bit moments: the steps, and the bytes that were promised."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_plugin.errors import ConfigError
from qat_plugin.models.optimizers import adamw, allow_states_in_checkpoints, expected_state_bytes

COMPILER = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}


def tensors(value: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of."""
    names = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
    if not names:
        yield value
    for name in names:
        yield from tensors(getattr(value, name))


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all states but the counters of steps."""
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return sum(part.nbytes for moment in moments for part in tensors(moment))


def stepped(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, target: Tensor) -> list[float]:
    """Steps towards ``target`` on a quadratic; the losses before each."""
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = sum(((p.float() - target[: p.numel()].view_as(p)) ** 2).sum() for p in parameters if p.requires_grad)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """One large enough for 8-bit moments, two that are not, one frozen."""
    torch.manual_seed(3)
    made = [nn.Parameter(torch.randn(*shape).to(dtype)) for shape in ((64, 128), (5000,), (7, 5), (64, 64))]
    made[-1].requires_grad_(False)
    return made


@pytest.mark.parametrize("grouped", [False, True])
def test_32_bits_are_the_steps_of_torch(grouped: bool) -> None:
    ours, theirs, target = parameters(), parameters(), torch.randn(8192)
    groups: list[Any] = ours if not grouped else [{"params": ours[:1], "lr": 0.1}, {"params": ours[1:]}]
    same: list[Any] = theirs if not grouped else [{"params": theirs[:1], "lr": 0.1}, {"params": theirs[1:]}]
    losses = stepped(ours, adamw(iter(groups), **OPTIONS), target)
    assert losses == stepped(theirs, torch.optim.AdamW(same, **OPTIONS), target)
    assert losses[-1] < losses[0]
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_32_bit_moments_are_as_expected(dtype: torch.dtype) -> None:
    made = parameters(dtype)
    optimizer = adamw(made, **OPTIONS)
    stepped(made, optimizer, torch.randn(8192))
    assert moment_bytes(optimizer) == expected_state_bytes(made) == 2 * dtype.itemsize * (8192 + 5000 + 35)


@pytest.mark.skipif(not COMPILER, reason="torchao compiles its step: needs a C++ compiler")
def test_8_bits_on_the_cpu_step_like_32_in_the_bytes_expected_and_can_be_saved(tmp_path: Any) -> None:
    ours, theirs, target = parameters(), parameters(), torch.randn(8192)
    optimizer = adamw(ours, bits=8, **OPTIONS)
    losses = stepped(ours, optimizer, target)
    exact = stepped(theirs, adamw(theirs, **OPTIONS), target)
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(exact, rel=1e-2) and losses != exact
    assert moment_bytes(optimizer) == expected_state_bytes(ours, 8) < expected_state_bytes(ours) / 1.7
    assert torch.equal(ours[-1], parameters()[-1])  # the frozen one
    narrow = parameters(torch.bfloat16)
    optimizer_of_narrow = adamw(narrow, bits=8, **OPTIONS)
    stepped(narrow, optimizer_of_narrow, target)
    assert moment_bytes(optimizer_of_narrow) == expected_state_bytes(narrow, 8)
    torch.save(optimizer.state_dict(), tmp_path / "state")
    allow_states_in_checkpoints()
    state = torch.load(tmp_path / "state", weights_only=True)["state"]
    for index, parameter in enumerate(ours[:3]):
        saved, held = (tensors(each["exp_avg"]) for each in (state[index], optimizer.state[parameter]))
        assert all(torch.equal(one, other) for one, other in zip(saved, held, strict=True))


def test_8_bits_save_three_quarters_of_large_parameters_and_nothing_of_small_ones() -> None:
    large, odd, small = (
        nn.Parameter(torch.empty(1 << 20)),
        nn.Parameter(torch.empty(4097)),
        nn.Parameter(torch.empty(9)),
    )
    assert expected_state_bytes([large], 8) == pytest.approx(expected_state_bytes([large]) / 4, rel=0.02)
    for parameter in (odd, small):
        assert expected_state_bytes([parameter], 8) == expected_state_bytes([parameter]) == 8 * parameter.numel()
    assert expected_state_bytes([large.requires_grad_(False)]) == 0


@pytest.mark.parametrize("bits", [4, 16, 0])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(ConfigError, match=f"optimizer.bits={bits} is not allowed: it is 32 or 8"):
        adamw(parameters(), lr=1e-3, bits=bits)


def test_8_bits_without_a_compiler_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"optimizer\.bits=8 .* needs a C\+\+ compiler .*use optimizer\.bits=32"):
        adamw(parameters(), lr=1e-3, bits=8)
