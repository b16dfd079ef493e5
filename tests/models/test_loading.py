"""A model directory is checked before anything is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat_plugin.errors import CheckpointError, DataError
from qat_plugin.models.causal_lm import load_causal_lm


def test_a_missing_directory_is_named_and_no_hub_is_asked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no model directory .*meta-llama"):
        load_causal_lm(tmp_path / "meta-llama/Llama-3-70B")


def test_a_directory_without_config_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"no config\.json.*notes\.txt"):
        load_causal_lm(tmp_path)


def test_truncated_weights_are_found_by_their_header(minute_model: Path) -> None:
    weights = minute_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or corrupt"):
        load_causal_lm(minute_model)


def _replace_weight(model: Path, name: str, value: torch.Tensor | None) -> None:
    weights = load_file(model / "model.safetensors")
    del weights[name]
    if value is not None:
        weights[name] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def test_a_weight_that_the_files_lack_is_an_error_and_not_drawn_at_random(minute_model: Path) -> None:
    _replace_weight(minute_model, "model.layers.0.mlp.up_proj.weight", None)
    with pytest.raises(CheckpointError, match=r"lack 1 of the model's weights: model\.layers\.0\.mlp\.up_proj\.weight"):
        load_causal_lm(minute_model)


def test_a_weight_of_another_shape_is_an_error_with_both_shapes(minute_model: Path) -> None:
    _replace_weight(minute_model, "model.layers.0.mlp.up_proj.weight", torch.zeros(3, 4))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight \(\[3, 4\] in the file, \[64, 64\] in the model\)"):
        load_causal_lm(minute_model)


def test_a_missing_shard_is_named(minute_model: Path) -> None:
    (minute_model / "model.safetensors").rename(minute_model / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (minute_model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks model-00002-of-00002"):
        load_causal_lm(minute_model)


def test_an_index_may_not_point_outside(minute_model: Path) -> None:
    (minute_model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../other.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="outside"):
        load_causal_lm(minute_model)


def test_pickled_weights_are_refused(minute_model: Path) -> None:
    (minute_model / "model.safetensors").rename(minute_model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        load_causal_lm(minute_model)


def test_a_tokenizer_of_another_vocabulary_is_refused(minute_model: Path) -> None:
    file = minute_model / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= {f"new{i}": len(content["model"]["vocab"]) + i for i in range(50)}
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="350 tokens and the model embeds 300"):
        load_causal_lm(minute_model)


def test_a_missing_tokenizer_is_said(minute_model: Path) -> None:
    for file in minute_model.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_causal_lm(minute_model)


def test_a_broken_config_is_said(minute_model: Path) -> None:
    (minute_model / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_causal_lm(minute_model)


def test_code_that_lies_in_the_directory_is_not_run(minute_model: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "exploded"
    config = json.loads((minute_model / "config.json").read_text())
    config |= {"model_type": "bomb", "auto_map": {"AutoConfig": "bomb.Bomb", "AutoModelForCausalLM": "bomb.Bomb"}}
    target = tmp_path / "model"
    shutil.copytree(minute_model, target)
    (target / "config.json").write_text(json.dumps(config))
    (target / "bomb.py").write_text(f"open({str(bomb)!r}, 'w').close()\nclass Bomb: ...\n")
    with pytest.raises(CheckpointError):
        load_causal_lm(target)
    assert not bomb.exists()
