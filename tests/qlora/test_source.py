"""Where a model comes from: a directory first, else the hub, pinned to a commit."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest

from qat_plugin.errors import CheckpointError, ConfigError, DataError
from qat_plugin.qlora.source import Source, check_shards, find_source, read_config
from tests.qlora.tiny_models import family

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """huggingface_hub without network; the directory of its cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_a_local_directory_comes_first(offline: Path, tmp_path: Path) -> None:
    (tmp_path / "org/name").mkdir(parents=True)
    assert find_source("org/name") == Source(Path("org/name"), "org/name", None)
    with pytest.raises(ConfigError, match="revision 'v1' was given for the local directory org/name"):
        find_source("org/name", revision="v1")


def test_a_hub_name_is_pinned_to_its_commit(offline: Path) -> None:
    repository = offline / "models--org--name"
    family("llama", repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    source = find_source("org/name")
    assert source == Source(repository / "snapshots" / COMMIT, "org/name", COMMIT)
    check_shards(source.folder)
    assert find_source("org/name", revision=COMMIT).revision == COMMIT
    with pytest.raises(DataError, match="'org/name' at revision 'v2'"):
        find_source("org/name", revision="v2")


def test_a_hub_that_cannot_be_reached_is_said(offline: Path) -> None:
    with pytest.raises(DataError, match="no local directory 'org/name', and the hub did not give the model"):
        find_source("org/name")


@pytest.mark.parametrize("path", ["/no/such/model", "./org/name", "name", "a/b/c", "../org/name", Path("org/name")])
def test_what_is_no_hub_name_is_not_asked_for(path: str | Path, offline: Path) -> None:
    with pytest.raises(DataError, match="there is no model directory"):
        find_source(path)


def test_the_checks_name_what_is_wrong(tmp_path: Path) -> None:
    folder = family("llama", tmp_path / "model")
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json.*it holds"):
        read_config(tmp_path / "other")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(CheckpointError, match="is not an index of shards"):
        check_shards(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled weights, which are not loaded"):
        check_shards(folder)
