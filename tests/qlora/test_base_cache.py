"""A quantized base that is kept on disk is the same base; a stale or damaged one is made anew, and that is said."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("bitsandbytes")
from qat_plugin.errors import ConfigError
from qat_plugin.qlora.nf4 import is_nf4, state_tensors
from qat_plugin.qlora.streaming import BaseRecord, load_base
from tests.qlora.tiny_models import family, logits, mixtral, saved


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load(folder: Path, cache: Path | bool, **options: Any) -> tuple[Any, BaseRecord]:
    model, _, record = load_base(folder, cache=cache, progress=False, **options)
    return model, record


def assert_equal(one: Any, other: Any) -> None:
    """Every tensor, to the bit, and what is computed with them."""
    modules = dict(other.named_modules())
    for name, module in one.named_modules():
        assert is_nf4(module) == is_nf4(modules[name])
        if is_nf4(module):
            mine, theirs = state_tensors(module), state_tensors(modules[name])
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
    floats, others = dict(one.named_parameters()), dict(other.named_parameters())
    assert floats.keys() == others.keys()
    for name, parameter in floats.items():
        if not is_nf4(one.get_submodule(name.rpartition(".")[0])) or name.endswith("bias"):
            assert torch.equal(parameter, others[name]) and parameter.dtype == others[name].dtype, name
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "gemma3", "gpt2"])
def test_the_second_load_comes_from_the_cache_and_is_equal_to_the_bit(name: str, tmp_path: Path, cache: Path) -> None:
    folder = family(name, tmp_path / "model")
    model, first = load(folder, cache)
    again, second = load(folder, cache)
    assert (first.cached, second.cached) == (False, True)
    assert_equal(model, again)
    assert second.sums == first.sums and second.quantized_bytes == first.quantized_bytes
    if name == "llama-tied":
        assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("backend", ["bitsandbytes", "torchao"])
@pytest.mark.parametrize("base", ["nf4", "nf4-dq", {"attention": "nf4-dq", "head": "bf16"}])
def test_each_way_of_quantizing_has_its_own_place(base: Any, backend: Any, tmp_path: Path, cache: Path) -> None:
    if backend == "torchao" and base == "nf4":
        pytest.skip("torchao always quantizes its scales")
    folder = family("llama-wide", tmp_path / "model")  # torchao takes multiples of 16384 weights
    load(folder, cache)
    options = {"base": base, "backend": backend, "dtype": torch.float32}
    model, first = load(folder, cache, **options)
    again, second = load(folder, cache, **options)
    assert (first.cached, second.cached) == (False, True)
    assert_equal(model, again)
    assert load(folder, cache)[1].cached


def test_a_model_without_nf4_layers_is_not_kept(tmp_path: Path, cache: Path) -> None:
    folder = family("llama", tmp_path / "model")
    load(folder, cache, base=None)
    assert not load(folder, cache, base=None)[1].cached and not cache.exists()


def test_a_model_that_transformers_loads_is_kept_too(tmp_path: Path, cache: Path) -> None:
    folder = saved(mixtral(), tmp_path / "model")
    model, first = load(folder, cache)
    again, second = load(folder, cache)
    assert (first.cached, second.cached) == (False, True) and not second.streamed
    assert_equal(model, again)


def test_changed_files_are_quantized_again(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = family("llama", tmp_path / "model", shard="10MB")
    load(folder, cache)
    file = folder / "model.safetensors"
    status = file.stat()
    with open(file, "r+b") as opened:  # one weight, in place
        opened.seek(-4, os.SEEK_END)
        opened.write(b"\x00\x00\x80\x3f")
    model, record = load(folder, cache)
    assert not record.cached and "of another state of the source's files" in record.note
    assert "is made anew" in capsys.readouterr().err
    assert_equal(model, load_base(folder, progress=False)[0])
    assert load(folder, cache)[1].cached
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert not load(folder, cache)[1].cached
    assert len(list(cache.iterdir())) == 1


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


DAMAGE = {
    "a flipped bit": lambda place: flip(next(place.glob("*.safetensors"))),
    "a truncated shard": lambda place: cut(next(place.glob("*.safetensors"))),
    "a missing shard": lambda place: next(place.glob("*.safetensors")).unlink(),
    "a truncated index": lambda place: cut(place / "index.json"),
    "an empty index": lambda place: (place / "index.json").write_text("{}"),
    "no index": lambda place: (place / "index.json").unlink(),
    "a lost entry": lambda place: forget(place / "index.json"),
}


def forget(index: Path) -> None:
    content = json.loads(index.read_text())
    del next(iter(content["shards"].values()))["tensors"]["model.norm.weight"]
    index.write_text(json.dumps(content))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_made_anew(
    damage: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = family("llama", tmp_path / "model")
    model, _ = load(folder, cache)
    (place,) = cache.iterdir()
    DAMAGE[damage](place)
    again, record = load(folder, cache)
    assert not record.cached and f"{place} is damaged" in record.note
    assert f"{place} is damaged" in capsys.readouterr().err
    assert_equal(model, again)
    assert load(folder, cache)[1].cached


def test_a_cache_that_cannot_be_written_is_an_error_before_quantizing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be kept in .*file"):
        load(family("llama", tmp_path / "model"), tmp_path / "file")


def test_true_is_the_users_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_PLUGIN_CACHE", str(tmp_path / "user"))
    folder = family("llama", tmp_path / "model")
    assert not load(folder, True)[1].cached and load(folder, True)[1].cached
    assert len(list((tmp_path / "user" / "quantized").iterdir())) == 1


def test_the_model_does_not_hang_on_its_cache(tmp_path: Path, cache: Path) -> None:
    folder = family("llama", tmp_path / "model")
    model, _ = load(folder, cache)
    again, record = load(folder, cache)
    assert record.cached
    for file in cache.rglob("*.safetensors"):
        with open(file, "r+b") as opened:
            opened.write(b"\xff" * file.stat().st_size)
    shutil.rmtree(cache)
    assert_equal(model, again)
