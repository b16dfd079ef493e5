"""Which plans a file holds, in which types; what is refused; what is found when a file is altered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import nn

from qat_plugin import Policy, convert
from qat_plugin.errors import ConfigError, ExportError
from qat_plugin.exporting import export_model
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.gguf import Options, verify
from qat_plugin.kernels.weight import QuantizedWeight
from tests.exporting.gguf.families import network

SAMPLE = {"input_ids": torch.arange(24).reshape(2, 12)}


def llama(policy: Any, **changes: Any) -> nn.Module:
    return convert(network("Llama", **{"num_hidden_layers": 1, **changes}), policy)


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def keys_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_each_layer_has_the_type_of_its_scheme(tmp_path: Path) -> None:
    policy = Policy({"embedding": "fp16", "attention": "w8a8", "*gate_proj": "w4a16-g32-asym", "ffn": "w4a16-g32"})
    made = export_model(llama(policy), "gguf", tmp_path / "model", options={"name": "Tiny"})
    types, keys = types_of(made.path), keys_of(made.path)
    assert types["token_embd.weight"] == "F16" and types["output.weight"] == "F32"
    assert {types[f"blk.0.attn_{part}.weight"] for part in ("q", "k", "v", "output")} == {"Q8_0"}
    assert types["blk.0.ffn_up.weight"] == types["blk.0.ffn_down.weight"] == "Q4_0"
    assert types["blk.0.ffn_gate.weight"] == "Q4_1"
    assert {types[name] for name in types if "norm" in name} == {"F32"}
    assert keys["general.name"] == "Tiny" and keys["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    assert keys["llama.attention.head_count_kv"] == 2 and keys["llama.context_length"] == 128
    assert made.card.is_file() and made.path.suffix == ".gguf"


@pytest.mark.parametrize("scheme", ["w8a16", "w8a16-tensor", "w4a16", "w4a8-g32", "w3a16-g32", "w2a16-g32-asym"])
def test_integers_are_never_changed(scheme: str, tmp_path: Path) -> None:
    found = export_model(llama(scheme), "gguf", tmp_path / "model").verification
    assert found is not None and (found.integers, found.scales) == (0, 0)
    assert found.error is not None and found.error < 1e-6
    assert ("2-bit integers unchanged" in str(found)) == scheme.startswith("w2")
    assert ("round their inputs to INT8" in str(found)) == ("a8" in scheme)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("w4a16-g16", r"\(w4a16-g16\): groups of 16 are not whole blocks of 32 \(.*\); nearest that fits: w4a16-g32"),
        ("w8a16-g32-asym", "8-bit blocks have no zero point; nearest that fits: w8a16-g32"),
        ("w8a8-asym", "8-bit blocks have no zero point; nearest that fits: w8a8"),
        (Policy({"*down_proj": "w8a16"}), r"down_proj \(w8a16\): rows of 172 weights are not whole blocks of 32"),
    ],
)
def test_what_blocks_do_not_hold_is_refused_with_what_fits(policy: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export_model(llama(policy, intermediate_size=172), "gguf", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_static_and_input_scales_are_refused(tmp_path: Path) -> None:
    from qat_plugin import calibrating, prepare

    model = network("Llama", num_hidden_layers=1)
    prepared = prepare(model, Policy({"*up_proj": "w8a8-static"}))
    with calibrating(prepared):
        prepared(**SAMPLE)
    with pytest.raises(ExportError, match="calibrated activation scale.*nearest that fits: w8a8"):
        export_model(convert(prepared), "gguf", tmp_path / "model")
    model = llama("w8a16")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert isinstance(weight, QuantizedWeight)
    weight.input_scale = torch.ones(64)
    with pytest.raises(ExportError, match="inputs are divided by a scale of their own"):
        export_model(model, "gguf", tmp_path / "model")


def test_indivisible_layers_may_be_floats_of_the_same_numbers(tmp_path: Path) -> None:
    policy = Policy({"attention": "w8a16", "*down_proj": "w8a16", "*up_proj": "w4a16-g16", "*gate_proj": "w4a16-g32"})
    model = llama(policy, intermediate_size=172)
    made = export_model(model, "gguf", tmp_path / "model", options={"indivisible": "float"})
    types = types_of(made.path)
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("F32", "F16")
    assert types["blk.0.ffn_gate.weight"] == "Q4_0"
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(made.path).tensors}
    held = Exportable(model, SAMPLE).layers["model.layers.0.mlp.up_proj.weight"].integers
    values = held.q.double().reshape(172, 4, 16) * held.scale.double()[..., None]
    assert np.array_equal(stored["blk.0.ffn_up.weight"].data.astype(np.float64), values.reshape(172, 64).numpy())
    assert "up_proj: written as F16 with exactly their quantized numbers" in str(made)
    assert made.verification is not None and made.verification.error == 0


def test_floats_lose_nothing_unless_asked(tmp_path: Path) -> None:
    policy = Policy({"ffn": "w4a16-g32", "embedding": "bf16"})
    exact = export_model(llama(policy), "gguf", tmp_path / "exact")
    assert types_of(exact.path)["token_embd.weight"] == "BF16" and types_of(exact.path)["blk.0.attn_q.weight"] == "F32"
    narrow = export_model(llama(policy), "gguf", tmp_path / "narrow", options={"float_type": "f16"})
    assert types_of(narrow.path)["blk.0.attn_q.weight"] == "F16"
    assert exact.verification is not None and exact.verification.rounded == 0
    assert narrow.verification is not None and 1e-5 < narrow.verification.rounded < 1e-3
    assert narrow.verification.error == 0  # against the copy with the rounded numbers


def test_an_altered_file_is_found_out(tmp_path: Path) -> None:
    model = Exportable(llama("w4a16-g32-asym"), SAMPLE)
    path = export_model(model.network, "gguf", tmp_path / "model", options={"outputs": False}).path
    options = Options(outputs=False)
    tensor = next(t for t in gguf.GGUFReader(path, "r+").tensors if t.name == "blk.0.ffn_up.weight")
    tensor.data[3, 7] ^= 1  # one nibble
    with pytest.raises(ExportError):
        verify(model, path, options).check(path)
    tensor.data[3, 7] ^= 1
    assert verify(model, path, options).check(path).integers == 0
    tensor.data[3, 0] ^= 1  # a scale
    with pytest.raises(ExportError):
        verify(model, path, options).check(path)
    tensor.data[3, 0] ^= 1
    norm = next(t for t in gguf.GGUFReader(path, "r+").tensors if t.name == "output_norm.weight")
    norm.data[5] *= 1.0001
    with pytest.raises(ExportError, match=r"output_norm\.weight: the file holds other numbers"):
        verify(model, path, options)
    norm.data[5] = model.network.state_dict()["model.norm.weight"][5]
    assert verify(model, path, options).rounded == 0
    reader = gguf.GGUFReader(path, "r+")
    reader.fields["llama.rope.freq_base"].parts[-1][0] = 500.0
    with pytest.raises(ExportError, match=r"rope.freq_base 500.0, the model has 10000.0"):
        verify(model, path, Options()).check(path)


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'bf16'"):
        Options(float_type="bf6")
    with pytest.raises(ConfigError, match="indivisible='keep' is not allowed"):
        Options(indivisible="keep")
    with pytest.raises(ConfigError, match="belong to kquant"):
        Options(output_type="Q8_0")
