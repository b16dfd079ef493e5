"""The proof: what it says, what it catches, and that a failure leaves the model as it was."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_plugin import Phase, capture_inputs, convert, is_converted, prepare, proof_of, set_phase, unprepare
from qat_plugin.conversion import LayerProof, Proof
from qat_plugin.errors import ConversionError, PrepareError
from qat_plugin.kernels import LayerSpec, table
from qat_plugin.kernels.portable import Portable
from qat_plugin.kernels.table import Kernel, Packed
from qat_plugin.numerics import Quantized
from qat_plugin.qat import get_phase, is_prepared, prepared_layers
from qat_plugin.scheme import Scheme
from tests.qat.models import MLP, batch, llama, output


class Wrong(Portable):
    """A kernel that is right but for what a subclass breaks, on layers of 64 outputs only: "down" of the MLP."""

    name = "wrong"

    def serves(self, scheme: Scheme, device: torch.device) -> bool:
        return scheme.is_integer

    def refusal(self, spec: LayerSpec) -> str | None:
        return None if (spec.out_features, spec.in_features) == (64, 128) else "serves other shapes"


class Louder(Wrong):
    def linear(self, x: Tensor, weight: Any) -> Tensor:
        return super().linear(x, weight) * 1.01


class OneIntegerOff(Wrong):
    def pack(self, quantized: Quantized, spec: LayerSpec) -> Packed:
        q = quantized.q.clone()
        q[3, 5] += 1 if q[3, 5] < 0 else -1
        return super().pack(replace(quantized, q=q), spec)


class NotANumber(Wrong):
    def linear(self, x: Tensor, weight: Any) -> Tensor:
        return super().linear(x, weight) / 0 * 0


class OtherShape(Wrong):
    def linear(self, x: Tensor, weight: Any) -> Tensor:
        return super().linear(x, weight)[..., :-1].repeat(1, 2)[..., : weight.out_features - 1]


class Crashes(Wrong):
    def linear(self, x: Tensor, weight: Any) -> Tensor:
        raise RuntimeError("illegal instruction")


class SwappedScales(Wrong):
    """Scales of two rows change places: the weights' norm stays."""

    def pack(self, quantized: Quantized, spec: LayerSpec) -> Packed:
        return super().pack(replace(quantized, scale=quantized.scale.roll(1, 0)), spec)


BROKEN: list[tuple[type[Kernel], str]] = [
    (Louder, r"down: the output of kernel wrong \(w4a8-g32\) differs .* by 0.0.*its rounding explains 1e-05"),
    (OneIntegerOff, r"down: the converted weight \(w4a8-g32, kernel wrong\) differs .* by up to .*must be equal"),
    (NotANumber, r"down: the output of kernel wrong .* by inf"),
    (OtherShape, "down"),
    (Crashes, r"down \(Linear\).*no integer form \(RuntimeError: illegal instruction\)"),
    (SwappedScales, r"down: the converted weight"),
]


@pytest.fixture
def with_kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    def register(kernel: Kernel) -> None:
        monkeypatch.setattr(table, "_KERNELS", {kernel.name: kernel, **table._KERNELS})

    return register


@pytest.mark.parametrize(("kernel", "text"), BROKEN, ids=lambda part: getattr(part, "__name__", ""))
@pytest.mark.parametrize("prepared", [True, False])
def test_a_broken_kernel_is_named_with_its_layer_and_the_model_is_what_it_was(
    kernel: type[Kernel], text: str, prepared: bool, with_kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = MLP(), batch("mlp")
    if prepared:
        set_phase(prepare(model, "w4a8-g32", learn_scales=True), Phase.FROZEN)
    parameters = dict(model.named_parameters())
    expected = model(x)
    with monkeypatch.context() as patch:
        patch.setattr(table, "_KERNELS", {"wrong": kernel(), **table._KERNELS})
        with pytest.raises(ConversionError, match=text):
            convert(model, None if prepared else "w4a8-g32")
    assert not is_converted(model)
    assert is_prepared(model) == prepared
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert all(p.requires_grad for p in model.parameters())
    assert not model.up._load_state_dict_pre_hooks
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    assert model.up.weight.grad is not None
    if prepared:
        assert get_phase(model) is Phase.FROZEN
    convert(model, None if prepared else "w4a8-g32")  # with sound kernels it can be done after all
    assert is_converted(model)


@pytest.mark.parametrize("kernel", [Louder, OneIntegerOff])
def test_the_kernel_of_the_type_it_will_run_in_is_the_one_proven(kernel: type[Wrong], with_kernel: Any) -> None:
    class OnlyBf16(kernel):  # type: ignore[valid-type, misc]
        def refusal(self, spec: LayerSpec) -> str | None:
            return "bf16 only" if spec.dtype != torch.bfloat16 else super().refusal(spec)

        def linear(self, x: Tensor, weight: Any) -> Tensor:
            return super().linear(x, weight) * 1.05  # beyond bf16's rounding

    with_kernel(OnlyBf16())
    convert(MLP(), "w4a16-g32")
    model, x = MLP(), batch("mlp")
    expected = model(x)
    with pytest.raises(ConversionError, match="down"):
        convert(model, "w4a16-g32", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model(x), expected)


def test_a_failure_parts_no_ties_and_keeps_modes(with_kernel: Any) -> None:
    class LastOnly(Louder):
        def refusal(self, spec: LayerSpec) -> str | None:
            return None if spec.usage == "both" else "serves the tied weight"

    with_kernel(LastOnly())
    model = prepare(llama(), {"default": "w8a8", "embedding": "w8a16"}).train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(ConversionError, match="lm_head"):
        convert(model, dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert output(unprepare(model), batch("llama")).isfinite().all()


class Cumulative(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.cumsum(0), self.bias)


def test_a_forward_that_needs_numbers_of_the_weight_is_a_named_error() -> None:
    model = nn.Sequential(nn.Linear(64, 64), Cumulative(64, 64))
    prepare(model, "w4a16-g32")
    x = batch("mlp")
    expected = model(x)
    with pytest.raises(ConversionError, match=r"1 \(Cumulative\): its forward does something with the weight.*Keep"):
        convert(model)
    assert torch.equal(model(x), expected)


class Statistics(nn.Linear):
    """Returns more than a tensor."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return y, y.mean()


def test_a_layer_that_returns_a_tuple_is_proven_by_its_product() -> None:
    layer, x = Statistics(64, 64), batch("mlp")
    model = prepare(nn.Sequential(layer), "w8a8")
    expected = layer(x)
    convert(model)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert proof_of(model).layers[0].output_error <= 1e-5


class Adapted(nn.Linear):
    """A layer that holds layers, as adapters do."""

    def __init__(self) -> None:
        super().__init__(64, 64)
        self.side = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        side: Tensor = self.side(x)
        return super().forward(x) + side


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_layers_within_layers(dtype: torch.dtype | None) -> None:
    model, x = nn.Sequential(Adapted()), batch("mlp")
    prepare(model, {"side": "w4a16-g32", "0": "w8a8"})
    assert len(prepared_layers(model)) == 2
    expected = model(x).detach()
    convert(model, dtype=dtype)
    torch.testing.assert_close(model(x.to(dtype or x.dtype)).float(), expected, rtol=0.05, atol=0.05)


class TestWithoutAWayBack:
    def test_it_converts_the_same(self) -> None:
        x = batch("llama")
        model = llama()
        kept = convert(copy.deepcopy(model), "w4a16-g32")
        let_go = convert(model, "w4a16-g32", reversible=False)
        assert torch.equal(output(kept, x), output(let_go, x))
        assert str(proof_of(kept)) == str(proof_of(let_go))

    def test_float_weights_go_layer_by_layer(self, with_kernel: Any) -> None:
        model = MLP()
        floats, alive = [weakref.ref(model.up.weight), weakref.ref(model.down.weight)], []

        class Watching(Wrong):
            """Sees, before "down" is packed, which float weights are still there."""

            def pack(self, quantized: Quantized, spec: LayerSpec) -> Packed:
                gc.collect()
                alive.append([weight() is not None for weight in floats])
                return super().pack(quantized, spec)

        with_kernel(Watching())
        convert(model, "w4a16-g32", reversible=False)
        assert alive == [[False, True]]
        assert [weight() is not None for weight in floats] == [False, False]

    def test_a_failure_says_what_is_left(self, with_kernel: Any) -> None:
        with_kernel(Louder())
        with pytest.raises(ConversionError, match=r"MLP is partly converted \(1 of 2 layers\).*load it anew. down: "):
            convert(MLP(), "w4a16-g32", reversible=False)


class TestInputs:
    def test_real_rows_are_used_and_said_to_be(self) -> None:
        model, x = prepare(llama(), {"default": "w8a8", "embedding": "w8a16"}), batch("llama")
        with capture_inputs(model) as rows:
            output(model, x)
        del rows["lm_head"]
        convert(model, inputs=rows)
        real = {layer.name: layer.inputs for layer in proof_of(model).layers}
        assert real.pop("lm_head") == "random"
        assert set(real.values()) == {"real"}

    def test_a_failure_that_only_real_rows_show_is_caught(self, with_kernel: Any) -> None:
        class WrongWhereLarge(Wrong):
            def linear(self, x: Tensor, weight: Any) -> Tensor:
                return super().linear(x.clamp(-10, 10), weight)

        with_kernel(WrongWhereLarge())
        convert(prepare(MLP(), "w4a16-g32"))
        model = prepare(MLP(), "w4a16-g32")
        with pytest.raises(ConversionError, match=r"down: .*real inputs"):
            convert(model, inputs={"down": torch.full((2, 128), 50.0)})

    def test_rows_of_bf16_autocast_prove_a_float_model(self) -> None:
        model = prepare(MLP(), "w8a8")
        with capture_inputs(model) as rows, torch.autocast("cpu", torch.bfloat16):
            model(batch("mlp"))
        assert rows["down"].dtype == torch.bfloat16
        convert(model, inputs=rows)

    def test_names_and_shapes_that_do_not_fit(self) -> None:
        model = MLP()
        with pytest.raises(ConversionError, match=r"inputs were given for dwn.*Did you mean 'down'"):
            convert(model, "w8a8", inputs={"dwn": torch.zeros(1, 128)})
        with pytest.raises(ConversionError, match=r"down: the inputs given have shape \(1, 64\).*\[rows, 128\]"):
            convert(model, "w8a8", inputs={"down": torch.zeros(1, 64)})
        assert type(model.up) is nn.Linear
        assert not is_prepared(model)
        convert(model, "w8a8")


class TestContent:
    def test_it_prints_as_one_line_and_survives_json(self) -> None:
        model = convert(MLP(), {"up": "w8a8", "down": "w4a16-g32"})
        proof = proof_of(model)
        text = str(proof)
        assert "\n" not in text
        assert text.startswith("2 layers converted and checked: largest weight difference 0; worst output error")
        assert "0 on real inputs, 2 on random ones" in text
        assert Proof.from_list(json.loads(json.dumps(proof.to_list()))) == proof
        assert [layer.name for layer in proof.layers] == ["up", "down"]

    def test_the_worst_layer_is_the_one_closest_to_its_own_tolerance(self) -> None:
        near = LayerProof("near", "w8a16", "k", 0.0, 9e-6, 1e-5, "real")
        far = LayerProof("far", "w8a16", "k", 0.0, 1e-3, 1e-2, "random")
        assert "(near, k)" in str(Proof((far, near)))
        assert "1 on real inputs, 1 on random" in str(Proof((far, near)))
        assert str(Proof(())) == "no layer was converted"

    @pytest.mark.parametrize("value", [1e-9, float("nan"), float("inf")])
    def test_a_broken_promise_raises(self, value: float) -> None:
        sound = LayerProof("layer", "w8a16", "k", 0.0, 1e-6, 1e-5, "real")
        assert sound.check() is sound
        with pytest.raises(ConversionError, match="layer"):
            replace(sound, weight_difference=value).check()
        with pytest.raises(ConversionError, match="layer"):
            replace(sound, output_error=value + sound.tolerance).check()

    def test_there_is_none_before_conversion(self) -> None:
        with pytest.raises(ConversionError, match=r"MLP was not converted by convert\(\) or load_converted\(\)"):
            proof_of(MLP())


class TestRefusals:
    def test_converting_twice(self) -> None:
        model = convert(MLP(), "w8a8")
        with pytest.raises(ConversionError, match="MLP is already converted"):
            convert(model, "w8a8")

    def test_no_plan_for_an_unprepared_model(self) -> None:
        with pytest.raises(ConversionError, match="needs a plan or a policy"):
            convert(MLP())

    @pytest.mark.parametrize("policy", ["w4a8-g32", {"up": "w8a8"}])
    def test_a_plan_other_than_the_trained_one(self, policy: Any) -> None:
        model = prepare(MLP(), "w8a8")
        with pytest.raises(
            ConversionError, match=r"(up|down) was trained as w8a8 and the plan .* says (w4a8-g32|float)"
        ):
            convert(model, policy)
        assert is_prepared(model)
        convert(model, "w8a8")

    @pytest.mark.parametrize("prepared", [True, False])
    def test_a_static_scheme_without_calibration(self, prepared: bool) -> None:
        model = MLP().eval()
        if prepared:
            prepare(model, "w8a8-static")
        with pytest.raises(PrepareError, match=r"up \(w8a8-static\).* saw no activation: calibrate first"):
            convert(model, None if prepared else "w8a8-static")
        assert is_prepared(model) == prepared

    def test_weights_that_became_nan_in_training(self) -> None:
        model = prepare(MLP(), "w8a8", phase=Phase.FLOAT)
        with torch.no_grad():
            model.down.weight[0, 0] = float("nan")
        with pytest.raises(PrepareError, match="down: 1 of its 8192 weights"):
            convert(model)
        assert get_phase(model) is Phase.FLOAT

    def test_a_model_without_storage(self) -> None:
        with torch.device("meta"):
            model = MLP()
        with pytest.raises(ConversionError, match="up is on the meta device: load its weights"):
            convert(model, "w8a8")
        assert not is_prepared(model)

    def test_nf4_is_no_target(self) -> None:
        with pytest.raises(ValueError, match=r"nf4.*QLoRA"):
            convert(MLP(), "nf4")
