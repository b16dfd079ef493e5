"""Reading torchao's directories: what this project wrote, and what torchao and transformers wrote by themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qat_plugin
from qat_plugin.conversion import is_converted
from qat_plugin.errors import CheckpointError
from qat_plugin.exporting import export_model
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.foreign import Gathered
from qat_plugin.exporting.torchao_read import _add
from tests.exporting.tiny_llama import converted, files, llama, logits, tokenizer

MIXED = {
    "embedding": "w8a16", "head": "w8a16", "*.q_proj": "w8a8", "*.k_proj": "w4a8-g32", "*.v_proj": "w4a16-g64",
    "*.o_proj": "w3a16-g32-asym", "*.gate_proj": "w8a16-g32", "*.up_proj": "w8a16-asym", "*.down_proj": "w8a8-tensor",
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_read_back_is_the_same_and_gives_the_same_bytes(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = converted(MIXED, tied=tied, dtype=dtype)
    options = {"shard_size": "30KB"}
    made = export_model(model, "torchao", tmp_path / "a", tokenizer=tokenizer(), options=options, verify=False)
    read, words = qat_plugin.load(made.path, dtype=dtype)
    assert torch.equal(logits(read), logits(model)) and words.vocab_size == 128
    assert [str(layer.scheme) for layer in Exportable(read, ()).plan.quantized] == [
        str(layer.scheme) for layer in Exportable(model, ()).plan.quantized
    ]
    again = export_model(read, "torchao", tmp_path / "b", tokenizer=words, options=options, verify=False)
    assert files(made.path) == files(again.path)


def saved_by_torchao(config: Any, path: Path, dtype: torch.dtype) -> Any:
    """What transformers loads of a directory that torchao's own quantize_ and save_pretrained made."""
    from transformers import AutoModelForCausalLM, TorchAoConfig

    llama(dtype=dtype).save_pretrained(path / "float")
    model = AutoModelForCausalLM.from_pretrained(path / "float", dtype=dtype, quantization_config=TorchAoConfig(config))
    model.save_pretrained(path / "quantized")
    return AutoModelForCausalLM.from_pretrained(path / "quantized")


def test_int4_that_torchao_made_keeps_its_integers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    theirs = saved_by_torchao(config, tmp_path, torch.bfloat16)
    capsys.readouterr()
    read, _ = qat_plugin.load(tmp_path / "quantized", dtype=torch.bfloat16)
    assert is_converted(read) and capsys.readouterr().err == ""
    for name, layer in Exportable(read, ()).layers.items():
        held = theirs.get_parameter(name)
        assert str(layer.scheme) == "w4a16-g32"
        assert torch.equal(layer.integers.q, held.qdata)
        assert torch.equal(layer.integers.scale, held.scale.float())
    error = (logits(read) - logits(theirs)).norm() / logits(theirs).norm()
    assert error < 2e-2


def test_scales_and_integers_of_another_grid_are_not_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    theirs = saved_by_torchao(Int8WeightOnlyConfig(), tmp_path, torch.float32)
    read, _ = qat_plugin.load(tmp_path / "quantized")
    told = capsys.readouterr().err
    layers = Exportable(read, ()).layers if is_converted(read) else {}
    for name, parameter in read.named_parameters():
        held = theirs.get_parameter(name)
        if name in layers:  # scales in float32, as theirs
            assert torch.equal(layers[name].integers.q, held.qdata)
            assert torch.equal(layers[name].integers.scale, held.scale)
        else:
            wanted = held.dequantize() if type(held.data) is not torch.Tensor else held
            torch.testing.assert_close(parameter.data, wanted.data, rtol=2e-7, atol=0)
    assert (f"{14 - len(layers)} quantized layers become float numbers" in told) == (len(layers) < 14)
    torch.testing.assert_close(logits(read), logits(theirs), rtol=1e-4, atol=1e-5)


def test_tensors_of_other_kinds_are_named(tmp_path: Path) -> None:
    made = export_model(converted({"ffn": "w8a16"}, ("lm_head", "embedding", "attention")), "torchao", tmp_path / "a",
                        verify=False)  # fmt: skip
    file = made.path / "model.safetensors"
    data = file.read_bytes()

    def changed(old: str, new: str) -> None:
        assert len(old) == len(new) and old.encode() in data
        file.write_bytes(data.replace(old.encode(), new.encode()))

    changed('\\"Int8Tensor\\"', '\\"Int4Tensor\\"')
    with pytest.raises(CheckpointError, match=r"is a Int4Tensor, which is not read here"):
        qat_plugin.load(made.path)
    changed("tensor_names", "tensor_NAMES")
    with pytest.raises(CheckpointError, match="no file of torchao's tensors"):
        qat_plugin.load(made.path)
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        qat_plugin.load(made.path)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    made = export_model(converted({"ffn": "w8a16"}, ("lm_head", "embedding", "attention")), "torchao", tmp_path / "a",
                        verify=False)  # fmt: skip
    config = json.loads((made.path / "config.json").read_text())
    (made.path / "config.json").write_text(json.dumps({**config, "intermediate_size": 192}))
    with pytest.raises(CheckpointError, match=r"another model's.*shape"):
        qat_plugin.load(made.path)


def test_integers_beyond_their_bits_become_the_numbers_they_stand_for() -> None:
    q, zero_point = torch.tensor([[-100, 3, 5, -8]], dtype=torch.int8), torch.tensor([[-3]], dtype=torch.int8)
    entry = {"_type": "IntxUnpackedToInt8Tensor", "_data": {"target_dtype": {"_data": "int4"}, "block_size": [1, 4]}}
    found = Gathered()
    parts = {"qdata": q, "scale": torch.full((1, 1), 0.5), "zero_point": zero_point}
    _add(found, "x.weight", entry, parts, grouped=False)
    assert found.quantized == {} and "from -92 to 13" in found.off_grid["x.weight"]
    assert torch.equal(found.floats["x.weight"], torch.tensor([[-48.5, 3, 4, -2.5]]))
