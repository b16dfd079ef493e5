from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("QAT_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Two contended OpenMP threads are ten to twenty times slower than one."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with a real pretrained Llama and real text; tests that need it are skipped without it."""
    if not (SHARED / "stories260K" / "config.json").is_file():
        pytest.skip("the real pretrained model is not beside this checkout (set QAT_SHARED_DATA to its folder)")
    return SHARED
