"""The embedded model: deterministic, cached, whole or not there."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qat_plugin.errors import ConfigError
from qat_plugin.models.causal_lm import load_causal_lm
from qat_plugin.models.embedded import EmbeddedRecipe, embedded_lm
from tests.models.conftest import MINUTE


def _build_quietly() -> None:
    torch.set_num_threads(1)
    embedded_lm(recipe=MINUTE, progress=False)


def test_the_default_has_dimensions_that_every_kernel_takes() -> None:
    recipe = EmbeddedRecipe()
    assert not recipe.hidden % 256
    assert not recipe.ffn % 256
    assert not recipe.vocabulary % 256
    per_layer = 4 * recipe.hidden**2 + 3 * recipe.hidden * recipe.ffn
    assert 3e6 <= recipe.layers * per_layer + recipe.vocabulary * recipe.hidden <= 8e6


def test_it_loads_as_a_transformers_model_with_its_tokenizer(minute_model: Path) -> None:
    model, tokenizer = load_causal_lm(minute_model)
    text = "def forward(self, x):\n    return self.weight @ x  # é\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(tokenizer) == MINUTE.vocabulary


def test_it_is_a_function_of_its_recipe(minute_model: Path, cache: Path) -> None:
    first = load_file(minute_model / "model.safetensors")
    (minute_model / "complete.json").unlink()
    again = load_file(embedded_lm(recipe=MINUTE, progress=False) / "model.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert embedded_lm(recipe=replace(MINUTE, seed=1), progress=False) != minute_model


def test_training_it_leaves_the_callers_generator_alone(cache: Path) -> None:
    before = torch.get_rng_state()
    embedded_lm(recipe=MINUTE, progress=False)
    assert torch.equal(before, torch.get_rng_state())


def test_the_cache_is_used(minute_model: Path) -> None:
    stamp = (minute_model / "model.safetensors").stat().st_mtime_ns
    assert embedded_lm(recipe=MINUTE, progress=False) == minute_model
    assert (minute_model / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_entry_is_trained_again_and_said(
    minute_model: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = minute_model / name
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    assert embedded_lm(recipe=MINUTE, progress=False) == minute_model
    assert damaged.read_bytes() == content
    assert "damaged" in capsys.readouterr().err


def test_an_interrupted_build_leaves_nothing(cache: Path) -> None:
    def stop(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded_lm(recipe=MINUTE, progress=stop)
    assert list(cache.iterdir()) == []


def test_a_mark_without_sums_vouches_for_nothing(minute_model: Path) -> None:
    (minute_model / "model.safetensors").write_bytes(b"")
    (minute_model / "complete.json").write_text("{}")
    assert (embedded_lm(recipe=MINUTE, progress=False) / "model.safetensors").stat().st_size > 0


def test_what_a_killed_build_left_is_tidied_up_later_but_not_a_build_that_may_be_running(cache: Path) -> None:
    killed, running = cache / ".building-killed", cache / ".building-running"
    killed.mkdir(parents=True)
    running.mkdir()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(killed, (two_days_ago, two_days_ago))
    model = embedded_lm(recipe=MINUTE, progress=False)
    assert set(cache.iterdir()) == {model, running}


def test_a_cache_that_cannot_be_written_is_said_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("QAT_PLUGIN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"cannot be kept in .*cache \(.*set QAT_PLUGIN_CACHE"):
        embedded_lm(recipe=MINUTE, progress=False)


def test_two_processes_may_race(cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    racers = [context.Process(target=_build_quietly) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(120)
    assert [racer.exitcode for racer in racers] == [0, 0]
    (entry,) = cache.iterdir()
    assert set(json.loads((entry / "complete.json").read_text())) >= {"model.safetensors", "config.json"}
