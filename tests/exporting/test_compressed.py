"""compressed-tensors' directories: our integers, unpacked by its own library and loaded by transformers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig

from qat_plugin.errors import ConfigError, ExportError
from qat_plugin.exporting import compressed, export_model
from qat_plugin.exporting.compressed_layout import group_of, tensors_of
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.elsewhere import check_kind
from qat_plugin.exporting.verification import Comparison
from qat_plugin.numerics import Quantized, round_to_nearest
from qat_plugin.scheme import Scheme
from tests.exporting.tiny_llama import SAMPLE, converted, dividing_its_input, logits, tokenizer

KEEP = ("lm_head", "embedding")
FLOAT_ENDS = {"embedding": "fp16"}
MIXED = {
    **FLOAT_ENDS, "attention": "w8a8-static", "*.gate_proj": "w4a16-g32", "*.up_proj": "w8a16", "*.down_proj": "w8a8",
}  # fmt: skip


def plain(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True)


def stored(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_a_mixed_model_is_proven_by_another_interpreter(tmp_path: Path) -> None:
    model = converted(MIXED, ("lm_head",))
    made = export_model(
        model, "compressed-tensors", tmp_path / "out", tokenizer=tokenizer(), options={"shard_size": "30KB"},
        progress=False,
    )  # fmt: skip
    found = made.verification
    assert found is not None and "without this package" in found.reader and "compressed-tensors" in found.reader
    assert (found.tensors, found.integers, found.scales, found.floats, found.rounded) == (14, 0, 0, 15, 0)
    assert found.error is not None and found.error < 1e-4
    assert 0 < found.tolerance < 1e-2 and any("absmax / 127.5" in note for note in found.notes)
    assert any("vLLM fuses model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj" in note for note in found.notes)
    assert len(list(made.path.glob("model-*.safetensors"))) > 2 and (made.path / "tokenizer.json").is_file()


@pytest.mark.parametrize("scheme", [
    "w4a16-g32", "w4a16-g32-asym", "w4a16", "w3a16-g32", "w3a16-g32-asym", "w2a16-g32-asym", "w8a16", "w8a16-g32-asym",
])  # fmt: skip
@pytest.mark.parametrize("shape", [(40, 96), (33, 64)])
def test_packed_tensors_are_those_of_the_library(scheme: str, shape: tuple[int, int]) -> None:
    held = round_to_nearest(torch.randn(shape), Scheme.parse(scheme))
    parts = tensors_of("x", held, torch.float32)
    bits, offset = held.scheme.weight_bits, 0 if held.scheme.symmetric else 1 << (held.scheme.weight_bits - 1)
    signed = (held.q.to(torch.int16) - offset).to(torch.int8)
    assert torch.equal(parts["x.weight_packed"], pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(parts["x.weight_packed"], bits, held.q.shape), signed)
    if held.zero_point is not None:
        zero_point = (held.zero_point.to(torch.int16) - offset).to(torch.int8)
        assert torch.equal(parts["x.weight_zero_point"], pack_to_int32(zero_point, bits, packed_dim=0))
    config = QuantizationConfig.model_validate({"config_groups": {"group_0": group_of(held.scheme, ["Linear"])}})
    group = config.config_groups["group_0"]
    local = {name.removeprefix("x."): tensor for name, tensor in parts.items()}
    numbers = BaseCompressor.get_value_from_registry(group.format).decompress(local, group)["weight"]
    assert torch.equal(numbers, held.dequantize())


def test_half_a_byte_a_weight(tmp_path: Path) -> None:
    held = round_to_nearest(torch.randn(64, 128), Scheme.parse("w4a16-g32"))
    parts = tensors_of("x", held, torch.bfloat16)
    assert parts["x.weight_packed"].nbytes == 64 * 128 // 2
    meta = Quantized(held.q.to("meta"), held.scale.to("meta"), None, held.scheme)
    planned = tensors_of("x", meta, torch.bfloat16)
    assert {name: (part.shape, part.dtype) for name, part in planned.items()} == {
        name: (part.shape, part.dtype) for name, part in parts.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g64-asym", "w8a16", "w3a16-g32"])
def test_weight_only_models_give_the_same_logits_in_plain_transformers(
    scheme: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = converted({**FLOAT_ENDS, "attention": scheme, "ffn": scheme}, ("lm_head",), dtype=dtype)
    export_model(model, "compressed-tensors", tmp_path / "out", verify=False)
    read = plain(tmp_path / "out")
    error = (logits(read) - logits(model)).norm() / logits(model).norm()
    assert error <= (1e-6 if dtype == torch.float32 else 2e-2)
    weight = read.model.layers[0].mlp.up_proj.weight  # after a forward pass the library has decompressed it
    wanted = Exportable(model, ()).layers["model.layers.0.mlp.up_proj.weight"].integers.dequantize(dtype)
    assert torch.equal(weight, wanted)


def test_the_configuration_is_what_the_library_writes(tmp_path: Path) -> None:
    model = converted(MIXED, ("lm_head",), tied=False)
    export_model(model, "compressed-tensors", tmp_path / "out", verify=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"], config["quantization_status"], config["ignore"]) == (
        "compressed-tensors", "mixed-precision", "compressed", ["lm_head"],
    )  # fmt: skip
    groups = {group["format"] for group in config["config_groups"].values()}
    assert groups == {"pack-quantized", "int-quantized"} and "dequantize" not in config
    static = next(g for g in config["config_groups"].values() if g["targets"][0].endswith("q_proj"))
    assert static["input_activations"]["strategy"] == "tensor" and static["input_activations"]["dynamic"] is False
    assert static["targets"][1] == "model.layers.0.self_attn.k_proj"
    read = QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "version"})
    assert read.to_dict().items() <= {**config, **read.to_dict()}.items()


def test_static_activation_scales_are_in_the_file_as_calibrated(tmp_path: Path) -> None:
    model = converted({"attention": "w8a8-static"}, (*KEEP, "ffn"), dtype=torch.bfloat16)
    export_model(model, "compressed-tensors", tmp_path / "out", verify=False)
    tensors = stored(tmp_path / "out")
    for name, layer in Exportable(model, ()).layers.items():
        held = tensors[f"{name.removesuffix('.weight')}.input_scale"]
        assert held.dtype == torch.float32 and torch.equal(held[0], layer.weight.activation_scale)
        assert torch.equal(tensors[name], layer.integers.q)


def test_a_head_tied_to_a_float_embedding_is_ignored_by_name(tmp_path: Path) -> None:
    model = converted({"attention": "w4a16-g32", "ffn": "w4a16-g32"}, KEEP, tied=True)
    export_model(model, "compressed-tensors", tmp_path / "out", verify=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"] and config["tie_word_embeddings"] is True
    assert config["quantization_config"]["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert "lm_head.weight" not in stored(tmp_path / "out")
    torch.testing.assert_close(logits(plain(tmp_path / "out")), logits(model), rtol=1e-5, atol=1e-5)


def test_what_it_cannot_hold_is_refused_and_nothing_written(tmp_path: Path) -> None:
    def refused(model: Any, match: str, **options: str) -> None:
        with pytest.raises(ExportError, match=match):
            export_model(model, "compressed-tensors", tmp_path / "out", options=options)

    refused(converted({"embedding": "w8a16", "head": "w8a16", "ffn": "w8a16"}, tied=True), "embeddings.*as floats")
    refused(
        converted({"attention": "w4a16-g32-asym", "ffn": "w4a16-g64-asym"}, KEEP),
        r"q_proj.*\(w4a16-g32-asym\).*same scheme; nearest that fits: w4a16-g32\n",
    )
    refused(dividing_its_input("w4a16-g32"), r"o_proj.*divides its inputs")
    unequal = converted(
        {"*.gate_proj": "w4a16-g32", "*.up_proj": "w8a16", "*.down_proj": "w8a16"}, (*KEEP, "attention")
    )
    refused(unequal, r"gate_proj.*vLLM computes gate_proj, up_proj of one block", fused="refuse")
    with pytest.raises(ConfigError, match="fused='no' is not allowed: 'warn' or 'refuse'"):
        export_model(unequal, "compressed-tensors", tmp_path / "out", options={"fused": "no"})
    assert list(tmp_path.iterdir()) == []


def test_another_integer_scale_or_format_in_the_file_is_seen() -> None:
    layer = next(iter(Exportable(converted({"attention": "w4a16-g32"}, (*KEEP, "ffn")), ()).layers.values()))
    held = layer.integers
    parts = {"weight": held.q.clone(), "weight_scale": held.scale.clone()}
    seen = Comparison()
    compressed._compare(seen, "x", layer, parts)
    assert (seen.verification("").integers, seen.verification("").scales) == (0, 0)
    parts["weight"][3, 5] += 1
    parts["weight_scale"][0, 0] *= 2
    compressed._compare(seen, "x", layer, parts)
    found = seen.verification("")
    assert found.integers == 1 and found.scales == float(held.scale[0, 0].abs())
    with pytest.raises(ExportError, match="transformers has it as int-quantized, inputs per token, written was pack"):
        check_kind("x", layer, "pack-quantized", "int-quantized, inputs per token")


def test_a_file_of_another_rounding_of_inputs_is_caught(tmp_path: Path) -> None:
    model, other = (converted({"attention": scheme}, (*KEEP, "ffn")).eval() for scheme in ("w8a8", "w8a8-static"))
    export_model(other, "compressed-tensors", tmp_path / "out", verify=False)
    with pytest.raises(ExportError, match="q_proj.*inputs per tensor, written was int-quantized, inputs per token"):
        compressed.verify(Exportable(model, SAMPLE), tmp_path / "out", compressed.Options())
