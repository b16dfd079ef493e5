"""What was trained is what is read back: schemes that blocks of 32 do not show are restored from sealed files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import qat_plugin
from qat_plugin import Policy, convert
from qat_plugin.errors import CheckpointError
from qat_plugin.exporting import export_model
from qat_plugin.exporting.contents import Exportable, outputs_of
from qat_plugin.exporting.gguf.schemes import KEY
from qat_plugin.exporting.gguf.seal import BLANK, DATA_SEAL, SEAL, seal
from tests.exporting.gguf.families import network

SAMPLE = {"input_ids": torch.arange(24).reshape(2, 12)}


def model_of(scheme: str, *, tied: bool = False) -> Any:
    net = network("Llama", num_hidden_layers=1, intermediate_size=128, tie_word_embeddings=tied)
    return convert(net, Policy({"embedding": scheme, "head": scheme}, default=scheme))


def resealed(path: Path, schemes: object) -> None:
    """Another value of the same length, under checksums that are right again."""
    reader = gguf.GGUFReader(path, "r+")
    text = schemes if isinstance(schemes, str) else json.dumps(schemes)
    place = reader.fields[KEY].parts[-1]
    assert len(text) <= len(place)
    place[:] = np.frombuffer(text.ljust(len(place)).encode(), np.uint8)
    for key in (SEAL, DATA_SEAL):
        reader.fields[key].parts[-1][:] = np.frombuffer(BLANK.encode(), np.uint8)
    del reader, place
    seal(path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "scheme",
    ["w8a8", "w8a16", "w8a16-tensor", "w8a8-g64", "w4a8-g32", "w4a16-g64", "w4a16-g64-asym", "w4a16-tensor-asym",
     "w3a16-g32", "w2a16-asym"],
)  # fmt: skip
def test_the_trained_model_is_read_back(scheme: str, tied: bool, tmp_path: Path) -> None:
    model = model_of(scheme, tied=tied)
    made = export_model(model, "gguf", tmp_path / "model", options={"outputs": False})
    read, _ = qat_plugin.load(made.path)
    ours, theirs = Exportable(model, SAMPLE).layers, Exportable(read, SAMPLE).layers
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        held, found = layer.integers, theirs[name].integers
        assert found.scheme == held.scheme and torch.equal(found.q, held.q) and torch.equal(found.scale, held.scale)
        assert held.zero_point is None or (
            found.zero_point is not None and torch.equal(found.zero_point, held.zero_point)
        )
    assert torch.equal(outputs_of(read, SAMPLE), outputs_of(model, SAMPLE))
    assert [str(entry.scheme) for entry in Exportable(read, SAMPLE).plan] == [
        str(entry.scheme) for entry in Exportable(model, SAMPLE).plan
    ]
    again = export_model(read, "gguf", tmp_path / "again", options={"outputs": False, "name": "Llama"})
    tensors = [{t.name: t.data.tobytes() for t in gguf.GGUFReader(p).tensors} for p in (made.path, again.path)]
    assert tensors[0] == tensors[1]


def test_without_checksums_blocks_speak_for_themselves(tmp_path: Path) -> None:
    made = export_model(model_of("w8a8"), "gguf", tmp_path / "model", options={"outputs": False})
    read, _ = qat_plugin.load(made.path, checksums=False)
    assert {str(layer.scheme) for layer in Exportable(read, SAMPLE).layers.values()} == {"w8a16-g32"}


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        ({"blk.0.attn_q.weight": "w4a16-g32"}, r"says w4a16-g32 of blk\.0\.attn_q\.weight, which is Q8_0"),
        ({"blk.0.attn_q.weight": "w8a8-static"}, "says w8a8-static of"),
        ({"blk.0.attn_q.weight": "fp16"}, "says fp16 of"),
        ({"blk.9.attn_q.weight": "w8a8"}, "which is not there"),
        ({"output_norm.weight": "w8a8"}, "which is F32"),
        ({"blk.0.attn_q.weight": "w8a16-tensor"}, r"attn_q\.weight holds no integers and scales of w8a16-tensor"),
        ({"blk.0.attn_q.weight": 8}, "is no list of schemes"),
        ("[1, 2]", "is no list of schemes"),
        ("{", "is no list of schemes"),
    ],
)
def test_schemes_that_are_not_the_tensors_are_refused(schemes: object, message: str, tmp_path: Path) -> None:
    made = export_model(model_of("w8a8"), "gguf", tmp_path / "model", options={"outputs": False})
    resealed(made.path, schemes)
    with pytest.raises(CheckpointError, match=message):
        qat_plugin.load(made.path)
