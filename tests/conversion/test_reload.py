"""A converted model takes a float state_dict and stays converted (Lightning #12896)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qat_plugin import Phase, convert, is_converted, load_converted, prepare, save_converted, set_phase
from qat_plugin.conversion import reload_float
from qat_plugin.errors import CheckpointError, ConversionError
from qat_plugin.kernels.weight import CastWeight, QuantizedWeight
from qat_plugin.qat import prepared_layers, quantizer_state
from tests.qat.arithmetic import grid
from tests.qat.models import FAMILIES, MLP, batch, llama, output

SCHEMES = ["w8a16", "w8a8", "w4a16-g32", "w4a8-g32-asym", "w2a16-g32", "fp16"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["mlp", "llama", "gpt2", "own_forwards"])
def test_a_float_state_dict_is_quantized_on_its_way_in(scheme: str, family: str) -> None:
    model, other, x = convert(FAMILIES[family](), scheme), FAMILIES[family](), batch(family)
    state = {name: value.clone() for name, value in other.state_dict().items()}
    given = dict(state)
    assert str(model.load_state_dict(given, strict=True)) == "<All keys matched successfully>"
    assert given.keys() == state.keys()
    assert all(given[name] is state[name] for name in state)  # the caller's dict is as it was
    assert all(torch.equal(state[name], value) for name, value in other.state_dict().items())
    assert is_converted(model)
    torch.testing.assert_close(output(model, x), output(convert(other, scheme), x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_and_parameters_stay(dtype: torch.dtype) -> None:
    model = convert(MLP(), {"up": "w4a16-g32", "down": "w8a8"}, dtype=dtype)
    objects, kernels = [id(p) for p in model.parameters()], [layer.weight.kernel_name for layer in model.children()]
    other = MLP()
    model.load_state_dict(other.state_dict())
    assert [id(p) for p in model.parameters()] == objects
    assert [layer.weight.kernel_name for layer in model.children()] == kernels
    numbers = model.up.weight.integers().dequantize(torch.float64).numpy()
    assert np.array_equal(numbers, grid(other.up.weight, "w4a16-g32").weight)


def test_tied_layers_stay_tied() -> None:
    model, other = convert(llama(), {"embedding": "w8a16", "default": "w8a8"}), llama()
    model.load_state_dict(other.state_dict())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = convert(other, {"embedding": "w8a16", "default": "w8a8"})
    assert torch.equal(output(model, batch("llama")), output(expected, batch("llama")))


def test_a_loaded_model_takes_float_state_too(tmp_path: Any) -> None:
    model = load_converted(MLP(), save_converted(convert(MLP(), "w4a8-g32"), tmp_path))
    other, x = MLP(), batch("mlp")
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), convert(other, "w4a8-g32")(x))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_converted_state_dict_loads_as_it_is(scheme: str) -> None:
    model, other, x = convert(MLP(), scheme), convert(MLP(), scheme), batch("mlp")
    assert not torch.equal(model(x), other(x))
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x))
    assert isinstance(model.up.weight, QuantizedWeight | CastWeight)


def test_a_model_nested_in_another_and_partial_states() -> None:
    model, other = nn.ModuleDict({"net": convert(MLP(), "w8a8")}), nn.ModuleDict({"net": MLP()})
    model.load_state_dict(other.state_dict())
    assert is_converted(model)
    part = {"net.up.weight": torch.ones(128, 64)}
    missing = model.load_state_dict(part, strict=False).missing_keys
    assert missing == ["net.up.bias", "net.down.weight", "net.down.bias"]
    assert torch.equal(model["net"].up.weight.dequantize(), model["net"].up.weight.dequantize()[:1].expand(128, 64))


def test_wrong_shapes_are_torchs_own_error() -> None:
    model = convert(MLP(), "w8a8")
    with pytest.raises(RuntimeError, match=r"size mismatch for up.weight.*\[256, 64\].*\[128, 64\]"):
        model.load_state_dict(MLP(hidden=256).state_dict())


def drifted(scheme: str, *, learn_scales: bool, phase: Phase) -> nn.Module:
    """A model whose scales are not the min-max ones of its weights."""
    model = prepare(MLP(), scheme, learn_scales=learn_scales).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for step in range(4):
        if step == 2:
            set_phase(model, phase)
        optimizer.zero_grad()
        model(batch("mlp")).square().sum().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a8-g32-asym", "w8a8", "w8a8-static"])
@pytest.mark.parametrize(
    ("learn_scales", "phase"), [(True, Phase.FAKE_QUANTIZED), (True, Phase.FROZEN), (False, Phase.FROZEN)]
)
def test_with_its_quantizer_state_the_integers_are_those_of_the_checkpoint(
    scheme: str, learn_scales: bool, phase: Phase
) -> None:
    best = drifted(scheme, learn_scales=learn_scales, phase=phase)
    float_state = {name: value.clone() for name, value in best.state_dict().items()}
    state, x = quantizer_state(best), batch("mlp")
    integers = {n: layer.fake_quantizer.integers(layer.weight) for n, layer in prepared_layers(best).items()}
    model = prepare(MLP(), scheme, learn_scales=learn_scales).train()
    model(batch("mlp") * 3)
    convert(model)
    reload_float(model, float_state, state)
    for name, expected in integers.items():
        actual = model.get_submodule(name).weight.integers()
        assert torch.equal(actual.q, expected.q)
        assert torch.equal(actual.scale, expected.scale)
        assert (actual.zero_point is None) == (expected.zero_point is None)
        assert actual.zero_point is None or torch.equal(actual.zero_point, expected.zero_point)
    convert(best)
    assert torch.equal(model(x), best(x))


def test_without_a_quantizer_state_scales_are_min_max() -> None:
    best = drifted("w4a16-g32", learn_scales=True, phase=Phase.FAKE_QUANTIZED)
    model = convert(MLP(), "w4a16-g32")
    reload_float(model, best.state_dict())
    numbers = model.up.weight.integers().dequantize(torch.float64).numpy()
    assert np.array_equal(numbers, grid(best.up.weight, "w4a16-g32").weight)


class TestRefusals:
    def test_an_unconverted_model(self) -> None:
        with pytest.raises(ConversionError, match="MLP is not converted: use load_state_dict"):
            reload_float(MLP(), MLP().state_dict())

    @pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "no tensor"])
    def test_a_state_dict_that_does_not_fit_changes_nothing(self, damage: str) -> None:
        model, x = convert(MLP(), "w8a8"), batch("mlp")
        expected, state = model(x), dict(MLP().state_dict())
        if damage == "missing":
            del state["down.bias"]
        elif damage == "unknown":
            state["down.scale"] = torch.zeros(1)
        elif damage == "shape":
            state["down.weight"] = torch.zeros(64, 127)
        else:
            state["down.weight"] = [1.0]  # type: ignore[assignment]
        with pytest.raises(CheckpointError, match=r"does not fit MLP: down\."):
            reload_float(model, state)
        assert torch.equal(model(x), expected)

    @pytest.mark.parametrize(
        ("policy", "text"),
        [
            ({"up": "w4a16-g32"}, "not one of this model .*down"),
            ("w4a16-g32", "up is w8a8 here, w4a16-g32 in the quantizer state"),
        ],
    )
    def test_a_quantizer_state_of_another_plan(self, policy: Any, text: str) -> None:
        model, x = convert(MLP(), "w8a8"), batch("mlp")
        expected = model(x)
        with pytest.raises(CheckpointError, match=text):
            reload_float(model, MLP().state_dict(), quantizer_state(prepare(MLP(), policy, learn_scales=True)))
        assert torch.equal(model(x), expected)

    def test_scales_of_another_shape(self) -> None:
        state = quantizer_state(prepare(MLP(), "w8a8", learn_scales=True))
        state["layers"]["down"]["scale"] = torch.ones(3, 1)
        with pytest.raises(
            CheckpointError, match=r"down: the quantizer state's scale has shape \(3, 1\), not \(64, 1\)"
        ):
            reload_float(convert(MLP(), "w8a8"), MLP().state_dict(), state)

    def test_what_is_no_quantizer_state(self) -> None:
        with pytest.raises(CheckpointError, match="not one of this model"):
            reload_float(convert(MLP(), "w8a8"), MLP().state_dict(), {"layers": 3})
