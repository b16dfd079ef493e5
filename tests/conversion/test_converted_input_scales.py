"""Input scales survive conversion, kernels, copies and files; the numbers a layer stands for stay in its own domain."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from qat_plugin import (
    Phase,
    convert,
    load_converted,
    prepare,
    proof_of,
    save_converted,
    set_phase,
)
from qat_plugin.conversion import conversion_of, dequantized_state_dict, reload_float
from qat_plugin.errors import CheckpointError, ConversionError
from qat_plugin.kernels import LayerSpec, kernel_named
from qat_plugin.kernels.weight import QuantizedWeight
from qat_plugin.measure.size import model_bytes
from qat_plugin.numerics import fake_quantize_activation, round_to_nearest
from qat_plugin.qat import calibrating, prepared_layers, quantizer_state, set_input_scale
from qat_plugin.scheme import Scheme
from tests.qat.models import FAMILIES, batch, output

KERNELS = [
    ("native-int4", "w4a16-g32"), ("native-int4", "w4a8-g32"), ("native-int8", "w8a8"), ("native-int8", "w8a16"),
    ("onednn-int8", "w8a8"), ("aten-int8", "w8a16"), ("aten-int4", "w4a16-g32"), ("aten-int4", "w4a8-g32"),
    ("dequantize", "w4a16-g32-asym"), ("dequantize", "w8a8"), ("dequantize", "w2a8-g32"),
]  # fmt: skip


def scale_for(features: int) -> Tensor:
    return torch.rand(features, generator=torch.Generator().manual_seed(3)) * 1.5 + 0.5


def scaled(model: nn.Module, policy: Any, x: Tensor | None = None) -> nn.Module:
    """Prepared, with an input scale on every linear layer that is not tied; calibrated on x."""
    prepare(model, policy)
    for layer in prepared_layers(model).values():
        entry = layer.fake_quantizer.layer
        if entry.usage == "linear" and entry.tied_to is None:
            set_input_scale(layer, scale_for(entry.shape[1]))
    if x is not None:
        with calibrating(model), torch.no_grad():
            output(model, x)
    return model


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "spelling"), KERNELS)
@pytest.mark.parametrize("rows", [1, 7, 200])
def test_each_kernel_divides_its_input(kernel: str, spelling: str, dtype: torch.dtype, rows: int) -> None:
    scheme, s = Scheme.parse(spelling), scale_for(128)
    integers = round_to_nearest(torch.randn(64, 128) * s, scheme)
    spec = LayerSpec(scheme, 64, 128, torch.device("cpu"), dtype)
    if (refusal := kernel_named(kernel).refusal(spec)) is not None:
        pytest.skip(f"{kernel} {refusal}")
    weight = QuantizedWeight.from_integers(integers, dtype, input_scale=s, kernel=kernel)
    x, bias = torch.randn(2, rows, 128).to(dtype), torch.randn(64).to(dtype)
    divided = x.float() / s
    divided = fake_quantize_activation(divided) if scheme.quantizes_activations else divided.to(dtype)
    expected = divided.double() @ integers.dequantize(torch.float64).t() + bias.double()
    actual = F.linear(x, weight, bias)
    assert actual.dtype == dtype
    assert actual.shape == (2, rows, 64)
    assert relative(actual, expected) < (1e-5 if dtype is torch.float32 else 1e-2)


@pytest.mark.parametrize("family", ["mlp", "llama", "gpt2", "bert", "own_forwards"])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g32-asym", "w8a8", "w8a8-static"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float32 run in bfloat16"])
def test_the_proof_holds_to_the_bit(family: str, scheme: str, kind: str) -> None:
    model, x = FAMILIES[family]().eval(), batch(family)
    if kind == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16() if x.is_floating_point() else x
    scaled(model, scheme, x)
    layers = prepared_layers(model)
    fakes = {n: q.fake_quantizer.fake_weight(q.fake_quantizer.rows(q.weight.detach())) for n, q in layers.items()}
    set_phase(model, Phase.FAKE_QUANTIZED)
    with torch.no_grad():
        expected = output(model, x)
    convert(model, dtype=torch.bfloat16 if "run in" in kind else None)
    assert max(layer.weight_difference for layer in proof_of(model).layers) == 0
    for name, layer in layers.items():
        assert torch.equal(layer.weight.integers().dequantize(fakes[name].dtype), fakes[name])
    with torch.no_grad():
        x = x.bfloat16() if x.is_floating_point() and "bfloat16" in kind else x
        actual = output(model, x)
    if kind == "float32":
        assert relative(actual, expected) < (2e-3 if "a8" in scheme else 1e-5)
    elif "a16" in scheme:  # INT8 activations round to neighbours where a 16-bit layer before rounded otherwise
        assert relative(actual, expected) < 2e-2


def test_a_wrong_input_scale_breaks_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scaled(FAMILIES["mlp"](), "w8a16")
    original = QuantizedWeight.from_integers.__func__  # type: ignore[attr-defined]

    def forgetful(cls: Any, *args: Any, **kwargs: Any) -> QuantizedWeight:
        weight: QuantizedWeight = original(cls, *args, **{**kwargs, "input_scale": None})
        return weight

    monkeypatch.setattr(QuantizedWeight, "from_integers", classmethod(forgetful))
    with pytest.raises(ConversionError, match="up: the converted weight"):
        convert(model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_files_hold_the_scale_and_read_back_to_the_same_logits(family: str, tmp_path: Path) -> None:
    x, fresh = batch(family), FAMILIES[family]()
    model = convert(scaled(FAMILIES[family](), {"attention": "w8a8-static", "default": "w4a16-g32"}, x))
    save_converted(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    held = {name for name, p in model.named_parameters() if getattr(p, "input_scale", None) is not None}
    assert held
    assert {name.removesuffix(".input_scale") for name in stored if name.endswith(".input_scale")} == held
    load_converted(fresh, tmp_path)
    with torch.no_grad():
        assert torch.equal(output(fresh, x), output(model, x))
    assert conversion_of(fresh).plan == conversion_of(model).plan


def test_a_file_without_input_scales_gives_layers_without(tmp_path: Path) -> None:
    save_converted(convert(FAMILIES["mlp"](), "w8a8"), tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "input_scale" in name]
    assert load_converted(FAMILIES["mlp"](), tmp_path).up.weight.input_scale is None


def test_copies_pickles_and_other_types_keep_the_scale() -> None:
    model = convert(scaled(FAMILIES["mlp"](), "w8a8"))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    x = batch("mlp")
    twins = [copy.deepcopy(model), loaded, copy.deepcopy(model).to("cpu", torch.bfloat16).float()]
    for twin in twins:
        assert torch.equal(twin.up.weight.input_scale, scale_for(64))
        assert twin.up.weight.input_scale.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(twins[0](x), model(x))
        assert torch.equal(twins[1](x), model(x))
    assert model.up.weight.clone().input_scale is not model.up.weight.input_scale


def test_the_plan_counts_the_scale_s_bytes() -> None:
    plain, model = convert(FAMILIES["mlp"](), "w4a16-g32"), convert(scaled(FAMILIES["mlp"](), "w4a16-g32"))
    assert model_bytes(model) - model_bytes(plain) == 4 * (64 + 128)
    assert conversion_of(model).plan.bytes_after - conversion_of(plain).plan.bytes_after == 4 * (64 + 128)


def test_dequantized_weights_compute_the_same_in_the_float_model() -> None:
    model, x = convert(scaled(FAMILIES["llama"](), "w4a16-g32")), batch("llama")
    plain = FAMILIES["llama"]()
    plain.load_state_dict(dequantized_state_dict(model))
    with torch.no_grad():
        assert relative(output(plain, x), output(model, x)) < 1e-5


def test_a_float_checkpoint_reloads_to_the_integers_of_its_scales() -> None:
    trained = scaled(FAMILIES["mlp"](), "w4a16-g32")
    with torch.no_grad():
        trained.up.weight.mul_(1.5)
    set_input_scale(trained.up, scale_for(64) * 2)
    set_phase(trained, Phase.FROZEN)
    floats, state = copy.deepcopy(trained.state_dict()), quantizer_state(trained)
    expected = convert(copy.deepcopy(trained))
    model = convert(scaled(FAMILIES["mlp"](), "w4a16-g32"))
    reload_float(model, floats, state)
    for name in ("up", "down"):
        mine, theirs = model.get_submodule(name).weight, expected.get_submodule(name).weight
        assert torch.equal(mine.integers().q, theirs.integers().q)
        assert torch.equal(mine.input_scale, theirs.input_scale)
    model.load_state_dict(floats)  # without the state: min-max scales of the weight times the layer's own scale
    assert torch.equal(model.up.weight.input_scale, scale_for(64) * 2)
    with pytest.raises(CheckpointError, match="has an input scale"):
        reload_float(convert(FAMILIES["mlp"](), "w4a16-g32"), floats, state)
