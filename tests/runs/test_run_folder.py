"""A run's folder: made once, continued by the same recipe, refused to any other, whole after any kill."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from qat_plugin.atomic import replacing, write_text
from qat_plugin.config.options import AdamW, EmbeddedModel, EmbeddedText
from qat_plugin.config.schema import Config, TrainerConfig
from qat_plugin.errors import CheckpointError, ConfigError
from qat_plugin.runs.folder import RunFolder, open_folder
from qat_plugin.runs.record import Record, StageRecord, sha256_of


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe(folder: str | None = None, **trainer: int) -> Config:
    config = Config(name="mine", model=EmbeddedModel(), data=EmbeddedText(), optimizer=AdamW())
    config.run.dir = folder
    config.trainer = TrainerConfig(**trainer)
    return config


def opened(config: Config) -> RunFolder:
    return open_folder(config, "qat recipe=mine")


def test_a_new_folder_holds_recipe_and_record(tmp_path: Path) -> None:
    folder = opened(recipe("here", seed=7))
    assert folder.path == tmp_path / "here"
    assert not folder.continued
    assert folder.resume_command == f"qat resume={folder.path}"
    record = json.loads((folder.path / "run.json").read_text())
    assert record["schema"] == "qat_plugin.run/1"
    assert record["seed"] == 7
    assert record["command"] == "qat recipe=mine"
    assert record["versions"]["torch"]
    assert len(record["config_hash"]) == 64
    assert "# @package _global_" in (folder.path / "recipe.yaml").read_text()


def test_without_a_folder_each_run_gets_its_own() -> None:
    paths = {opened(recipe()).path for _ in range(3)}
    assert len(paths) == 3
    assert {path.parent.name for path in paths} == {"mine"}


def test_the_same_recipe_continues_and_keeps_what_was_done() -> None:
    first = opened(recipe("here"))
    first.record.stages["float"] = StageRecord(1.5, {"perplexity": 3.0})
    first.record.status = "interrupted"
    first.save()
    again = opened(recipe("here"))
    assert again.continued
    assert again.record.stages == {"float": StageRecord(1.5, {"perplexity": 3.0})}
    assert again.record.status == "running"
    assert again.record.started == first.record.started


def test_verbosity_does_not_make_another_recipe() -> None:
    opened(recipe("here"))
    assert opened(replace(recipe("here"), verbose=True)).continued


def test_a_run_that_made_nothing_gives_its_folder_to_the_corrected_recipe() -> None:
    opened(recipe("here", seed=1))
    folder = opened(recipe("here", seed=2))
    assert not folder.continued
    assert Record.read(folder.path).seed == 2


@pytest.mark.parametrize("made", ["stage", "checkpoint"])
def test_another_recipe_is_refused_and_told_what_differs(made: str) -> None:
    folder = opened(recipe("here", seed=1, max_steps=5))
    if made == "stage":
        folder.record.stages["float"] = StageRecord(1.0)
        folder.save()
    else:
        write_text(folder.checkpoints / "qat" / "last.ckpt", "floats")
    with pytest.raises(ConfigError) as caught:
        opened(recipe("here", seed=2, max_steps=6))
    assert "trainer.seed was 1 and is 2" in str(caught.value)
    assert "trainer.max_steps was 5 and is 6" in str(caught.value)
    assert "resume=" in str(caught.value)


def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    with pytest.raises(ConfigError, match="other files"):
        opened(recipe("photos"))
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write into the run's folder"):
        opened(recipe("file/below"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        opened(recipe("locked"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "other/1"}', '{"schema": "qat_plugin.run/1"}'])
def test_a_damaged_record(text: str, tmp_path: Path) -> None:
    opened(recipe("here"))
    (tmp_path / "here" / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json"):
        opened(recipe("here"))


def test_finishing_records_the_sum_of_each_artifact() -> None:
    folder = opened(recipe("here"))
    write_text(folder.converted / "model.safetensors", "weights")
    write_text(folder.checkpoints / "qat" / "last.ckpt", "floats")
    folder.finish()
    record = Record.read(folder.path)
    assert record.status == "finished"
    assert set(record.artifacts) == {"recipe.yaml", "converted/model.safetensors", "checkpoints/qat/last.ckpt"}
    assert record.artifacts["checkpoints/qat/last.ckpt"] == sha256_of(folder.checkpoints / "qat" / "last.ckpt")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
