from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from qat_plugin.__main__ import main
from qat_plugin.native import native

MODULE = '''
import os, signal
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(L.LightningModule):
    """Dropout and a shuffled loader, so that resuming has random numbers to get wrong."""
    def __init__(self, width=64, rate=0.01):
        super().__init__()
        self.rate = rate
        self.layers = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 4))
    def forward(self, x):
        return self.layers(x)
    def training_step(self, batch, batch_idx):
        if os.environ.get("PRESS_CTRL_C_AT") == f"{signal_stage(self)} {self.global_step}":
            os.environ.pop("PRESS_CTRL_C_AT")
            os.kill(os.getpid(), signal.SIGINT)
        return nn.functional.cross_entropy(self(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.rate)

def signal_stage(module):
    from qat_plugin.qat import is_prepared
    return "qat" if is_prepared(module) else "fine-tuned"

class Data(L.LightningDataModule):
    def __init__(self, batch_size=32, size=256):
        super().__init__()
        self.batch_size, self.size = batch_size, size
    @property
    def fingerprint(self):
        return f"random {self.size}"
    def setup(self, stage=None):
        generator = torch.Generator().manual_seed(0)
        x, w = torch.randn(self.size, 32, generator=generator), torch.randn(32, 4, generator=generator)
        self.data = TensorDataset(x, (x @ w).argmax(1))
    def train_dataloader(self):
        return DataLoader(self.data, batch_size=self.batch_size, shuffle=True)
    def val_dataloader(self):
        return DataLoader(self.data, batch_size=64)
'''

RECIPE = """\
# @package _global_
# An MLP of my own.
defaults:
  - override /policy: int4
  - override /model: custom
  - override /data: custom
  - override /optimizer: own
model: {_target_: mine_of_tests.Net}
data: {_target_: mine_of_tests.Data}
trainer: {max_steps: 13, threads: 1, checkpoint_interval: 5}
measure: {latency_rounds: 1}
"""


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


Qat = Callable[..., Answer]


@pytest.fixture
def qat(capsys: pytest.CaptureFixture[str]) -> Qat:
    """The command, inside this process."""

    def run(*argv: str) -> Answer:
        capsys.readouterr()
        code = main(argv)
        out, err = capsys.readouterr()
        return Answer(code, out, err)

    return run


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """Arguments that run a small recipe of the user's own, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("PRESS_CTRL_C_AT", raising=False)
    (tmp_path / "mine_of_tests.py").write_text(MODULE)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mlp.yaml").write_text(RECIPE)
    threads = torch.get_num_threads()
    yield ("--config-dir", "recipes", "recipe=mlp", "allow=[mine_of_tests]")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the module's own, but for the operators that are built already."""
    folder = tmp_path_factory.mktemp("cache")
    if path := native().path:
        (folder / "native").symlink_to(path.parent)
    return folder


@pytest.fixture
def alone(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, with that cache."""
    monkeypatch.setenv("QAT_PLUGIN_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
