"""Calibration on two real processes that talk by gloo, each with batches of its own: one set of integers for both."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from qat_plugin import calibrate
from qat_plugin.errors import QatError
from qat_plugin.ptq import calibration_of
from qat_plugin.qat import quantizer_state
from tests.ptq.test_walker import texts
from tests.qat import models

RANKS = 2


class Routed(nn.Module):
    """A residual block of two experts; a row's first feature, which stays what it is, chooses between them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.experts = nn.LayerNorm(32), nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y, first = self.norm(x), x[:, 0] > 0
        out = torch.zeros_like(x)
        for rows, expert in ((first, self.experts[0]), (~first, self.experts[1])):
            if bool(rows.any()):
                out[rows] = expert(y[rows])
        out[:, 0] = 0
        return x + out


class ReadTwice(nn.Module):
    """The norm's output has a second reader on inputs of a positive mean: there no scale can be folded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        out: Tensor = self.b(torch.tanh(self.a(y)))
        return out + y if x.mean() > 0 else out


def text_model() -> nn.Module:
    torch.manual_seed(0)
    return models.llama()


def experts() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Routed(), Routed(), Routed()).eval()


def read_twice() -> nn.Module:
    torch.manual_seed(0)
    return ReadTwice().eval()


def one_layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16)).eval()


def rows(rank: int, count: int = 3) -> list[Tensor]:
    """Gaussian rows with outlying features; the first feature routes rank 0 to one expert, rank 1 to both."""
    generator = torch.Generator().manual_seed(rank)
    found = [torch.randn(24, 32, generator=generator) for _ in range(count + rank)]
    for index, x in enumerate(found):
        x[:, 5::9] *= 12.0
        x[:, 0] = 3.0 if rank == 0 else -3.0
        if rank and index:
            x[::2, 0] = 3.0
    return found


def shifted(rank: int) -> list[Tensor]:
    return [x + (5.0 if rank else -5.0) for x in rows(rank)]


def whole_numbers(rank: int) -> list[Tensor]:
    """Sums of their products are exact in whatever order."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(-4, 5, (16, 32), generator=generator).float() for _ in range(2 + rank)]


def words(rank: int) -> list[Any]:
    return texts(2 + rank, seed=rank)


def with_a_nan(rank: int) -> list[Tensor]:
    found = rows(rank)
    if rank == 1:
        found[2][3, 7] = float("nan")
    return found


def none_on_rank_1(rank: int) -> list[Tensor]:
    return [] if rank else rows(rank)


Case = tuple[Callable[[], nn.Module], Callable[[int], list[Any]], str, str]
CASES: dict[str, Case] = {
    "llama, gptq": (text_model, words, "w4a16-g32-asym", "gptq"),
    "llama, awq": (text_model, words, "w4a16-g32", "awq"),
    "llama, awq-gptq, static": (text_model, words, "w8a8-static", "awq-gptq"),
    "llama, smoothquant": (text_model, words, "w8a8", "smoothquant"),
    "experts, gptq": (experts, rows, "w4a16-g32-asym", "gptq"),
    "experts, awq": (experts, rows, "w4a16-g32-asym", "awq"),
    "a fold that one rank's data forbids": (read_twice, shifted, "w4a16-g32", "awq"),
    "exact sums": (one_layer, whole_numbers, "w4a16-g32-asym", "gptq"),
}
FAILURES: dict[str, Case] = {
    "nan": (experts, with_a_nan, "w4a16-g32", "gptq"),
    "nan, static": (one_layer, with_a_nan, "w8a8-static", "rtn"),
    "no batches": (one_layer, none_on_rank_1, "w4a16-g32", "gptq"),
    "other weights": (one_layer, rows, "w4a16-g32", "gptq"),
}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=timedelta(seconds=30)
    )
    for name, (make, data, scheme, method) in (CASES | FAILURES).items():
        model = make()
        if name == "other weights" and rank:
            torch.nn.init.normal_(model[0].weight)
        try:
            calibrate(model, scheme, data(rank), method=method, progress=False)
        except QatError as error:
            result: dict[str, Any] = {"error": str(error)}
        else:
            result = outcome(model)
        torch.save(result, f"{folder}/{name}-{rank}.pt")
    torch.save(_resumed(rank, Path(folder)), f"{folder}/resumed-{rank}.pt")
    dist.destroy_process_group()


def _resumed(rank: int, folder: Path) -> dict[str, Any]:
    """Rank 1 was killed a block earlier than rank 0."""
    kept, settings = folder / "kept", {"method": "gptq", "resume": folder / "kept", "progress": False}
    first = outcome(calibrate(experts(), "w4a16-g32-asym", rows(rank), **settings))
    if rank == 0:
        for path in [*(kept / "rank-0").glob("2.*"), *(kept / "rank-1").glob("[12].*")]:
            path.unlink()
    dist.barrier()
    left = sorted(path.name for path in (kept / f"rank-{rank}").glob("*.safetensors"))
    again = outcome(calibrate(experts(), "w4a16-g32-asym", rows(rank), **settings))
    return {"first": first, "again": again, "left": left}


def outcome(model: nn.Module) -> dict[str, Any]:
    return {
        "weights": dict(model.state_dict()),
        "quantizers": dict(quantizer_state(model)["layers"]),
        "results": [asdict(layer) for layer in calibration_of(model).layers],
    }


Outcome = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=RANKS)
    return lambda name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(RANKS)]


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b["weights"][name]) for name, value in a["weights"].items())
    for name, tensors in a["quantizers"].items():
        assert tensors.keys() == b["quantizers"][name].keys()
        assert all(torch.equal(tensors[key], b["quantizers"][name][key]) for key in tensors), name
    assert a["results"] == b["results"]


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_end_with_the_same_integers_scales_and_folds(ranks: Outcome, name: str) -> None:
    mine, other = ranks(name)
    assert "error" not in mine, mine
    assert_same(mine, other)


def test_integers_are_those_of_one_process_with_all_batches(ranks: Outcome) -> None:
    alone = one_layer()
    calibrate(alone, "w4a16-g32-asym", whole_numbers(0) + whole_numbers(1), method="gptq", progress=False)
    assert_same(ranks("exact sums")[0], outcome(alone))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_expert_that_one_rank_alone_reaches_is_calibrated_on_its_rows(ranks: Outcome, method: str) -> None:
    seen = {layer["name"]: layer["rows"] for layer in ranks(f"experts, {method}")[0]["results"]}
    both, second = 3 * 24 + 3 * 12, 24 + 3 * 12
    assert seen == {f"{i}.experts.{e}": count for i in range(3) for e, count in enumerate((both, second))}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nan", "are NaN or infinite in calibration batch 2"),
        ("nan, static", "calibration batch 2.*holds NaN or infinity"),
        ("no batches", "there is no calibration data"),
        ("other weights", r"rank 1 ended with other numbers than rank 0 \(0\.weight\)"),
    ],
)
def test_what_fails_on_one_rank_fails_on_all_and_none_waits(ranks: Outcome, name: str, text: str) -> None:
    for rank, result in enumerate(ranks(name)):
        assert re.search(text, result.get("error", "")), (rank, result.get("error"))


def test_a_rank_that_kept_fewer_blocks_does_not_part_from_the_other(ranks: Outcome) -> None:
    mine, other = ranks("resumed")
    assert mine["left"] != other["left"]
    assert_same(mine["first"], other["first"])
    for each in (mine, other):
        assert_same(each["again"], each["first"])
