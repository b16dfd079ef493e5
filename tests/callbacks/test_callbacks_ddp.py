"""Two ranks under Lightning's DDP end with one set of scales: real processes, gloo, each with its own data."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from qat_plugin import PostTrainingQuantization, QuantizationAwareTraining
from qat_plugin.errors import ConfigError
from qat_plugin.qat import quantizer_state
from tests.callbacks.subjects import Classifier, loader, trainer

STEPS = 3


def work(rank: int, folder: str, port: int) -> None:
    """One rank, as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    trained = _fitted(folder, QuantizationAwareTraining("w8a8-static", observer="mse", convert=False))
    converted = _fitted(folder, PostTrainingQuantization("w8a8-static"))
    scales = {name: converted.get_parameter(f"{name}.weight").activation_scale for name in ("net.0", "net.3", "net.5")}
    torch.save({"qat": quantizer_state(trained)["layers"], "ptq": scales}, f"{folder}/{rank}.pt")


def _fitted(folder: str, callback: Callback) -> Any:
    torch.manual_seed(0)
    subject = Classifier(dropout=0.0)
    trainer(Path(folder), callback, devices=2, strategy="ddp", max_steps=STEPS).fit(subject, loader(batch_size=8))
    return subject


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("ranks"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (folder, port), nprocs=2)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(2)]


def test_training_observes_each_activation_of_the_global_batch_once(ranks: list[dict[str, Any]]) -> None:
    mine, other = (rank["qat"] for rank in ranks)
    for name, tensors in mine.items():
        assert all(torch.equal(value, other[name][key]) for key, value in tensors.items())
    assert int(mine["net.0"]["counts"].sum()) == 2 * STEPS * 8 * 64


def test_calibration_gives_both_ranks_the_same_scales(ranks: list[dict[str, Any]]) -> None:
    mine, other = (rank["ptq"] for rank in ranks)
    assert mine == other
    assert all(isinstance(scale, Tensor) and scale > 0 for scale in mine.values())


def test_spawned_processes_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, PostTrainingQuantization(), devices=2, strategy="ddp_spawn")
    with pytest.raises(ConfigError, match="use strategy='ddp'"):
        run.callbacks[0].setup(run, Classifier(), "fit")
