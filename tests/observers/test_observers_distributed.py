"""Ranks agree: two real processes that talk by gloo, against one process that sees all the data."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from qat_plugin import calibrate, prepare
from qat_plugin.errors import DataError
from qat_plugin.observers import make_observer, synchronize
from qat_plugin.qat import quantizer_state, synchronize_observers

SPECS = ("minmax", "moving-average:0.5", "percentile:99", "mse", "entropy")
SHARDS = (3, 5)  # batches of each rank: their numbers differ, and so do their ranges


def batches(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(16, 32, generator=generator) * 10.0 ** (step - rank) for step in range(SHARDS[rank])]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    result = {"twice": _observed(rank), "model": _calibrated(rank), "bad": _bad(rank), "folded": _folded(rank)}
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _observed(rank: int) -> dict[str, Any]:
    """The shard in two parts with a reduction after each, and a last one that has nothing to add."""
    observers = [make_observer(spec) for spec in SPECS]
    mine = batches(rank)
    for part in (mine[:1], mine[1:], []):
        for batch in part:
            for observer in observers:
                observer(batch)
        synchronize(observers)
    return {spec: dict(o.named_buffers()) | {"scale": o.scale()} for spec, o in zip(SPECS, observers, strict=True)}


def _calibrated(rank: int) -> dict[str, Any]:
    model = calibrate(network(), "w8a8-static", batches(rank), observer="mse", progress=False)
    return dict(quantizer_state(model)["layers"])


def _folded(rank: int) -> dict[str, Any]:
    """Each rank's norm saw other batches, of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4)).train()
    model(batches(rank)[0].reshape(16, 4, 8))
    before = {f"before.{name}": value.clone() for name, value in model.state_dict().items()}
    return before | dict(prepare(model, "w8a8-static").state_dict())


def _bad(rank: int) -> str:
    """One rank meets a NaN between two reductions: all of them say so, and none waits for ever."""
    model = prepare(network(), "w8a8-static").train()
    model(batches(rank)[0])
    if rank == 1:
        model[2].fake_quantizer.observer(torch.tensor([torch.nan]))  # type: ignore[union-attr, operator]
    try:
        synchronize_observers(model)
    except DataError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("spec", SPECS)
def test_every_rank_ends_with_the_same_statistics(ranks: list[dict[str, Any]], spec: str) -> None:
    mine, other = (rank["twice"][spec] for rank in ranks)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.startswith("moving")])
def test_they_are_those_of_all_the_data(ranks: list[dict[str, Any]], spec: str) -> None:
    single = make_observer(spec)
    for batch in batches(0) + batches(1):
        single(batch)
    mine = ranks[0]["twice"][spec]
    assert torch.equal(mine["scale"], single.scale())
    assert torch.equal(mine["absmax"], single.absmax)
    if "counts" in mine:
        assert torch.equal(mine["counts"], single.counts)


def test_a_moving_average_is_the_greatest_among_ranks_at_each_moment(ranks: list[dict[str, Any]]) -> None:
    absmax = max(float(batches(rank)[0].abs().max()) for rank in range(2))
    ends = []
    for rank in range(2):
        mine = absmax
        for batch in batches(rank)[1:]:
            mine = 0.5 * mine + 0.5 * float(batch.abs().max())
        ends.append(mine)
    assert float(ranks[0]["twice"]["moving-average:0.5"]["absmax"]) == pytest.approx(max(ends), rel=1e-6)


def test_calibrate_gives_the_scales_of_one_process_with_all_batches(ranks: list[dict[str, Any]]) -> None:
    alone = calibrate(network(), "w8a8-static", batches(0) + batches(1), observer="mse", progress=False)
    expected = quantizer_state(alone)["layers"]
    for rank in ranks:
        for name, tensors in expected.items():
            assert all(torch.equal(rank["model"][name][key], tensors[key]) for key in tensors.keys() - {"batches"})


def test_a_nan_on_one_rank_is_an_error_on_all_that_names_the_layer(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["bad"].startswith("2 (w8a8-static): its input holds NaN or infinity") for rank in ranks)


def test_every_rank_folds_the_statistics_of_rank_0(ranks: list[dict[str, Any]]) -> None:
    mine, other = (rank["folded"] for rank in ranks)
    assert not torch.equal(mine["before.1.running_var"], other["before.1.running_var"])
    gain = (mine["before.1.running_var"].double() + 1e-5).rsqrt()[:, None, None]
    torch.testing.assert_close(mine["0.weight"].double(), mine["before.0.weight"].double() * gain)
    assert all(torch.equal(mine[name], other[name]) for name in mine if not name.startswith("before."))


def test_alone_nothing_happens() -> None:
    observer = make_observer("mse")
    observer(batches(0)[0])
    before = copy.deepcopy(dict(observer.named_buffers()))
    synchronize([observer])
    assert all(torch.equal(value, before[name]) for name, value in observer.named_buffers())
