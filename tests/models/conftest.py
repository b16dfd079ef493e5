from __future__ import annotations

from pathlib import Path

import pytest

from qat_plugin.models.embedded import EmbeddedRecipe, embedded_lm

MINUTE = EmbeddedRecipe(
    hidden=64, ffn=64, vocabulary=300, layers=1, heads=2, steps=3, batch_size=2, sequence_length=32,
    train_characters=60_000, valid_characters=9_000,
)  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QAT_PLUGIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def minute_model(cache: Path) -> Path:
    return embedded_lm(recipe=MINUTE, progress=False)
