"""Reading compressed-tensors' directories: what this project wrote, and what its own library compressed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams

import qat_plugin
from qat_plugin.conversion import is_converted
from qat_plugin.errors import CheckpointError
from qat_plugin.exporting import export_model
from qat_plugin.exporting.contents import Exportable
from tests.exporting.tiny_llama import converted, files, llama, logits, tokenizer

KEEP = ("lm_head", "embedding")
PLANS = {
    "mixed": {"*.q_proj": "w8a8", "*.k_proj": "w8a8-static", "*.v_proj": "w8a16", "*.o_proj": "w4a16-g64",
              "*.gate_proj": "w3a16-g32", "*.up_proj": "w4a8-g32-asym", "*.down_proj": "w2a16-g32"},
    "asymmetric": {"attention": "w4a16-g32-asym", "ffn": "w4a16-g32-asym"},
}  # fmt: skip


@pytest.mark.parametrize("plan", list(PLANS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_read_back_is_the_same_and_gives_the_same_bytes(plan: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tied = plan == "asymmetric"
    rules = PLANS[plan] if tied else {"embedding": "fp16", **PLANS[plan]}
    model = converted(rules, KEEP if tied else ("lm_head",), tied=tied, dtype=dtype)
    options = {"shard_size": "30KB"}
    made = export_model(
        model, "compressed-tensors", tmp_path / "a", tokenizer=tokenizer(), options=options, verify=False
    )
    read, words = qat_plugin.load(made.path, dtype=dtype)
    assert torch.equal(logits(read), logits(model)) and words.vocab_size == 128
    again = export_model(read, "compressed-tensors", tmp_path / "b", tokenizer=words, options=options, verify=False)
    assert files(made.path) == files(again.path)


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w3a16", "w2a16", "w8a16-asym", "w3a16-asym"])
def test_rows_that_end_within_a_word_are_read_whole(scheme: str, tmp_path: Path) -> None:
    model = converted({"ffn": scheme}, (*KEEP, "attention"), ffn=43 * 2)
    made = export_model(model, "compressed-tensors", tmp_path / "a", verify=False)
    read, _ = qat_plugin.load(made.path)
    assert torch.equal(logits(read), logits(model))


def compressed_by_the_library(groups: dict[str, Any], path: Path, dtype: torch.dtype) -> dict[str, Any]:
    """A directory without a line of this project; name -> (integers, scale, numbers) of each layer in it."""
    model = llama(dtype=dtype)
    apply_quantization_config(
        model, QuantizationConfig.model_validate({"config_groups": groups, "ignore": ["lm_head"]})
    )
    held = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        weights, size = scheme.weights, scheme.weights.group_size or module.weight.shape[1]
        tiles = module.weight.detach().unflatten(-1, (-1, size))
        scale, zero_point = calculate_qparams(tiles.amin(-1), tiles.amax(-1), weights)
        module.weight_scale.data.copy_(scale)
        if not weights.symmetric:
            module.weight_zero_point.data.copy_(zero_point)
        zero_point = None if weights.symmetric else module.weight_zero_point
        q = quantize(module.weight, module.weight_scale, zero_point, weights, dtype=torch.int8)
        numbers = dequantize(q, module.weight_scale, zero_point, weights)
        held[name] = (q, module.weight_scale.detach().clone(), numbers)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(path)
    return held


def weights(**fields: Any) -> dict[str, Any]:
    return {"type": "int", "symmetric": True, "dynamic": False, **fields}


def test_int4_that_the_library_packed_keeps_its_integers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    group = {"targets": ["re:.*(up|down)_proj"], "weights": weights(num_bits=4, strategy="group", group_size=32)}
    held = compressed_by_the_library({"group_0": group}, tmp_path / "theirs", torch.bfloat16)
    capsys.readouterr()
    read, words = qat_plugin.load(tmp_path / "theirs", dtype=torch.bfloat16)
    assert is_converted(read) and words is None and capsys.readouterr().err == ""
    layers = Exportable(read, ()).layers
    assert len(layers) == len(held) == 4
    for name, (q, scale, _) in held.items():
        integers = layers[f"{name}.weight"].integers
        assert str(integers.scheme) == "w4a16-g32"
        assert torch.equal(integers.q, q) and torch.equal(integers.scale, scale.float())


def test_scales_that_16_bits_do_not_hold_are_kept_in_32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groups = {
        "group_0": {"targets": ["re:.*self_attn.*"], "weights": weights(num_bits=8, strategy="channel")},
        "group_1": {"targets": ["re:.*mlp.*"],
                    "weights": weights(num_bits=4, strategy="group", group_size=32, symmetric=False)},
    }  # fmt: skip
    held = compressed_by_the_library(groups, tmp_path / "theirs", torch.float32)
    capsys.readouterr()
    read, _ = qat_plugin.load(tmp_path / "theirs")
    told, layers = capsys.readouterr().err, Exportable(read, ()).layers
    below = {name for name, (q, _, _) in held.items() if "self_attn" in name and int(q.min()) < -127}
    assert {f"{name}.weight" for name in held.keys() - below} == layers.keys()
    assert (f"{len(below)} quantized layers become float numbers" in told) == bool(below)
    for name, (q, scale, numbers) in held.items():
        if name in below:
            torch.testing.assert_close(read.get_parameter(f"{name}.weight").data, numbers, rtol=2e-7, atol=0)
            continue
        integers = layers[f"{name}.weight"].integers
        assert torch.equal(integers.scale, scale.float()) and torch.equal(integers.dequantize(), numbers)
        if integers.zero_point is None:
            assert torch.equal(integers.q, q)


def written(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    model = converted({"ffn": "w8a8"}, (*KEEP, "attention"))
    made = export_model(model, "compressed-tensors", tmp_path / "a", verify=False)
    return made.path, json.loads((made.path / "config.json").read_text())


@pytest.mark.parametrize(("field", "value", "told"), [
    ("num_bits", 5, "has 5-bit int weights"),
    ("type", "float", "8-bit float weights"),
    ("strategy", "block", "weights per block"),
])  # fmt: skip
def test_weights_that_no_scheme_here_stands_for_are_named(field: str, value: Any, told: str, tmp_path: Path) -> None:
    path, config = written(tmp_path)
    config["quantization_config"]["config_groups"]["group_0"]["weights"][field] = value
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"down_proj.*{told}"):
        qat_plugin.load(path)


def test_layers_that_no_group_names_and_other_tensors_are_refused(tmp_path: Path) -> None:
    path, config = written(tmp_path)
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["re:.*q_proj"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"down_proj has scales, and no group"):
        qat_plugin.load(path)
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Linear"]
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["symmetric"] = False
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"quantizes activations as .* read are symmetric INT8"):
        qat_plugin.load(path)


@pytest.mark.parametrize("part", ["transform_config", "kv_cache_scheme"])
def test_what_changes_outputs_beyond_the_layers_is_refused(part: str, tmp_path: Path) -> None:
    path, config = written(tmp_path)
    config["quantization_config"][part] = {"num_bits": 8}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{part} of config.json.*not read here"):
        qat_plugin.load(path)


def test_reordered_groups_are_not_read_as_plain_ones(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path, _ = written(tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_g_idx"] = torch.arange(64)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.weight_g_idx: tensors of this kind are not read"):
        qat_plugin.load(path)
