from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qat_plugin.config.arguments import ALLOW_VARIABLE, parse
from qat_plugin.config.launch import Job, launch
from qat_plugin.config.schema import Config

Compose = Callable[..., Config]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra makes folders below the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(ALLOW_VARIABLE, raising=False)


def jobs_of(*argv: str) -> list[Job]:
    jobs: list[Job] = []

    def run(job: Job) -> int:
        jobs.append(job)
        return 0

    assert launch(parse(argv), run) == 0
    return jobs


@pytest.fixture
def compose() -> Compose:
    """The checked config that a command line composes to."""

    def composed(*argv: str) -> Config:
        (job,) = jobs_of(*argv)
        return job.config

    return composed


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A user's own folder of recipes."""
    folder = tmp_path / "mine"
    folder.mkdir()
    return folder
