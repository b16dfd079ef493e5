"""The forward pass of a prepared layer against the published formulas in float64, and against torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchao.quantization.quant_primitives import dequantize_affine, quantize_affine
from transformers.pytorch_utils import Conv1D

from qat_plugin import Phase, prepare, set_phase
from qat_plugin.errors import PrepareError
from qat_plugin.qat import prepared_layers, quantizers
from tests.qat.arithmetic import grid, per_tensor, per_token
from tests.qat.models import FAMILIES, MLP, Scaled, WithOptions, batch, encoder, output

WEIGHT_ONLY = [
    "w8a16", "w8a16-g32", "w8a16-tensor", "w8a16-asym", "w8a16-g32-asym", "w4a16-g32", "w4a16-g64", "w4a16-g32-asym",
    "w4a16", "w3a16-g32", "w3a16-g32-asym", "w2a16-g32", "w2a16-g32-asym", "w4a16-g1",
]  # fmt: skip
DYNAMIC = ["w8a8", "w4a8-g32", "w8a8-g32", "w8a8-tensor", "w4a8-g32-asym", "w3a8-g32"]


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "own"])
def test_weights_follow_the_formula(scheme: str, kind: str) -> None:
    layer: nn.Module
    if kind == "linear":
        layer, x = nn.Linear(64, 24), torch.randn(5, 64)
        reference = x.double().numpy() @ grid(layer.weight, scheme).weight.T + layer.bias.detach().numpy()
    elif kind == "conv1d":
        layer, x = Conv1D(24, 64), torch.randn(2, 5, 64)
        nn.init.normal_(layer.bias)
        reference = x.double().numpy() @ grid(layer.weight.t(), scheme).weight.T + layer.bias.detach().numpy()
    elif kind == "embedding":
        layer, x = nn.Embedding(24, 64), torch.randint(24, (2, 5))
        reference = grid(layer.weight, scheme).weight[x.numpy()]
    else:
        layer, x = Scaled(64, 24), torch.randn(5, 64)
        inner = (x * layer.gain.detach()).double().numpy()
        reference = inner @ grid(layer.weight, scheme).weight.T + layer.bias.detach().numpy()
    model = prepare(nn.Sequential(layer), {"0": scheme})
    np.testing.assert_allclose(model(x).detach().double().numpy(), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", DYNAMIC)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "own"])
def test_activations_are_rounded_per_token_where_they_meet_the_weight(scheme: str, kind: str) -> None:
    x = torch.randn(4, 3, 64)
    x[0, 0] = 0
    layer = {"linear": nn.Linear, "own": Scaled}[kind](64, 24) if kind != "conv1d" else Conv1D(24, 64)
    rows = layer.weight.t() if kind == "conv1d" else layer.weight
    rounded = per_token(x * layer.gain.detach() if kind == "own" else x)
    reference = rounded @ grid(rows, scheme).weight.T + layer.bias.detach().numpy()
    model = prepare(nn.Sequential(layer), scheme)
    np.testing.assert_allclose(model(x).detach().double().numpy(), reference, rtol=1e-4, atol=1e-5)


def test_a_static_scheme_uses_its_calibrated_scale_and_clips() -> None:
    model, x = prepare(nn.Sequential(nn.Linear(64, 16)), "w8a8-static").train(), torch.randn(5, 64)
    model(x)
    absmax = float(x.abs().max())
    model.eval()
    louder = x * 3
    reference = per_tensor(louder, absmax) @ grid(model[0].weight, "w8a8").weight.T + model[0].bias.detach().numpy()
    np.testing.assert_allclose(model(louder).detach().double().numpy(), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["fp16", "bf16"])
def test_float_schemes_round_the_weight_alone(scheme: str) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[scheme]
    for family in ("mlp", "gpt2"):
        model, x = FAMILIES[family](), batch(family)
        twin = FAMILIES[family]()
        twin.load_state_dict(model.state_dict())
        plan = prepare(model, {"default": scheme})
        with torch.no_grad():
            for name, layer in prepared_layers(plan).items():
                layer_twin = twin.get_submodule(name)
                layer_twin.weight.copy_(layer.weight.to(dtype).to(torch.float32))
        torch.testing.assert_close(output(model, x), output(twin, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_integers_in_force_are_torchaos_up_to_ties(scheme: str) -> None:
    layer = nn.Linear(64, 24)
    prepare(nn.Sequential(layer), scheme)
    quantizer = layer.fake_quantizer
    numbers = quantizer.integers(layer.weight)
    low, high = quantizer.scheme.qmin, quantizer.scheme.qmax
    group = quantizer.scheme.group_size or 64
    block = (24, 64) if quantizer.scheme.per_tensor else (1, group)
    zero = torch.zeros_like(numbers.scale) if numbers.zero_point is None else numbers.zero_point.float()
    scale = numbers.scale.where(numbers.scale != 0, 1.0)
    theirs = quantize_affine(layer.weight, block, scale, zero, numbers.q.dtype, low, high)
    assert (theirs.int() - numbers.q.int()).abs().max() <= 1
    assert (theirs != numbers.q).float().mean() < 0.01
    back = dequantize_affine(numbers.q, block, numbers.scale, zero, numbers.q.dtype, low, high)
    assert torch.equal(back, quantizer.fake_weight(layer.weight))


def test_a_module_used_twice_in_one_forward_is_quantized_twice() -> None:
    shared = nn.Linear(64, 64)
    model, x = prepare(nn.Sequential(shared, nn.Tanh(), shared), "w8a8"), torch.randn(3, 64)
    weight, bias = grid(shared.weight, "w8a8").weight, shared.bias.detach().double().numpy()
    middle = np.tanh(per_token(x) @ weight.T + bias)
    reference = per_token(torch.from_numpy(middle).float()) @ weight.T + bias
    np.testing.assert_allclose(model(x).detach().double().numpy(), reference, rtol=1e-4, atol=1e-5)


def test_an_own_forward_with_keywords_and_more_arguments() -> None:
    layer, x = WithOptions(64, 24), torch.randn(3, 64)
    prepare(layer, "w8a8")
    reference = (per_token(x) @ grid(layer.weight, "w8a8").weight.T + layer.bias.detach().numpy()) * 3
    np.testing.assert_allclose(layer(hidden=x, factor=3).detach().double().numpy(), reference, rtol=1e-4, atol=1e-5)


class Gate(nn.Linear):
    """A mask of integers comes before the input."""

    def forward(self, mask: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * mask.unsqueeze(-1)


def test_the_input_of_the_product_is_found_among_other_tensors() -> None:
    layer, mask, x = Gate(64, 24), torch.tensor([1, 0, 1]), torch.randn(3, 64)
    prepare(layer, "w8a8-static").train()
    layer(mask, x)
    assert torch.equal(layer.fake_quantizer.observer.absmax, x.abs().max())
    rounded = per_tensor(x, float(x.abs().max()))
    reference = (rounded @ grid(layer.weight, "w8a8").weight.T + layer.bias.detach().numpy()) * mask.numpy()[:, None]
    np.testing.assert_allclose(layer(mask, x).detach().double().numpy(), reference, rtol=1e-4, atol=1e-5)


class Bilateral(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


def test_an_own_product_takes_fake_weights_and_refuses_activation_rounding() -> None:
    layer, x = Bilateral(64, 24, bias=False), torch.randn(3, 64)
    model = prepare(nn.Sequential(layer), "w4a16-g32")
    np.testing.assert_allclose(
        model(x).detach().double().numpy(), x.double().numpy() @ grid(layer.weight, "w4a16-g32").weight.T, atol=1e-5
    )
    model = prepare(nn.Sequential(Bilateral(64, 24, bias=False)), "w4a8-g32")
    with pytest.raises(PrepareError, match=r"0 \(Bilateral\).*does not call F.linear.*w4a8-g32"):
        model(x)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a8-g32", "w8a8-static"])
def test_the_encoders_fused_inference_path_does_not_bypass_fake_quantization(scheme: str, mask: bool) -> None:
    model, x = encoder(), batch("encoder")
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = mask
    given = {"src_key_padding_mask": padding} if mask else {}
    prepare(model, scheme)
    model.train()(x)
    model.eval()
    with torch.enable_grad():
        slow = model(x, **given)
    with torch.no_grad():
        fast = model(x, **given)
    kept = ~padding
    torch.testing.assert_close(fast[kept], slow[kept], rtol=1e-5, atol=1e-5)
    set_phase(model, Phase.FLOAT)
    with torch.no_grad():
        assert (model(x, **given)[kept] - fast[kept]).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 0, 3), (2, 3)])
@pytest.mark.parametrize("phase", [Phase.FAKE_QUANTIZED, Phase.FROZEN])
def test_embeddings_take_ids_of_any_shape(shape: tuple[int, ...], phase: Phase) -> None:
    layer = nn.Embedding(10, 32)
    ids = torch.randint(10, shape)
    model = prepare(nn.Sequential(layer), {"embedding": "w4a16-g32"}, phase=phase)
    expected = torch.from_numpy(grid(layer.weight, "w4a16-g32").weight).float()[ids]
    assert torch.equal(model(ids), expected)


@pytest.mark.parametrize("phase", [Phase.FAKE_QUANTIZED, Phase.FROZEN])
@pytest.mark.parametrize("scheme", ["w8a16", "w8a16-tensor", "fp16"])
def test_the_padding_row_of_an_embedding_gets_no_gradient(phase: Phase, scheme: str) -> None:
    model = prepare(nn.Sequential(nn.Embedding(10, 32, padding_idx=3)), {"embedding": scheme}, phase=phase)
    model(torch.tensor([1, 3, 3, 5])).sum().backward()
    touched = model[0].weight.grad.abs().sum(-1) > 0
    assert touched.tolist() == [i in (1, 5) for i in range(10)]


def test_empty_batches_pass() -> None:
    model = prepare(MLP(), "w8a8-static").train()
    assert model(torch.empty(0, 64)).shape == (0, 64)
    assert not model.up.fake_quantizer.observer.has_data


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32"])
def test_autocast_computes_in_bf16_from_float32_quantization(scheme: str) -> None:
    model, x = prepare(MLP(), scheme), batch("mlp")
    with torch.autocast("cpu", torch.bfloat16):
        half = model.up(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), model.up(x), rtol=0.02, atol=0.02)
    half.sum().backward()
    assert model.up.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32", "w4a16-g32-asym"])
def test_bf16_models_hold_the_grids_numbers_rounded_once(scheme: str) -> None:
    model = prepare(MLP().to(torch.bfloat16), scheme)
    layer = model.up
    expected = torch.from_numpy(grid(layer.weight.float(), scheme).weight).to(torch.bfloat16)
    fake = layer.fake_quantizer.fake_weight(layer.weight)
    assert torch.equal(fake, expected)
    y = model(batch("mlp").to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("scheme", ["w4a8-g32", "w8a8-static"])
@pytest.mark.parametrize("order", ["prepared, then compiled", "compiled and run, then prepared", "child compiled"])
def test_torch_compile_computes_the_same(backend: str, scheme: str, order: str) -> None:
    torch._dynamo.reset()
    x = batch("mlp")
    plain = MLP()
    plain.load_state_dict((model := MLP()).state_dict())
    prepare(plain, scheme).train()
    if order == "child compiled":
        model.up = torch.compile(model.up, backend=backend)  # type: ignore[assignment]
        compiled = prepare(model, scheme)
    elif order == "prepared, then compiled":
        compiled = torch.compile(prepare(model, scheme), backend=backend)
    else:
        compiled = torch.compile(model, backend=backend)
        compiled(x)
        prepare(compiled, scheme)
    compiled.train()
    for _ in range(2):
        expected, actual = plain(x), compiled(x)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    expected.sum().backward()
    actual.sum().backward()
    torch.testing.assert_close(model.down.weight.grad, plain.down.weight.grad, rtol=1e-5, atol=1e-6)
    assert list(quantizers(compiled)) == ["up", "down"]
    if scheme == "w8a8-static":
        torch.testing.assert_close(model.down.fake_quantizer.observer.absmax, plain.down.fake_quantizer.observer.absmax)
    set_phase(compiled, Phase.FLOAT)
    set_phase(plain, Phase.FLOAT)
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-6, atol=1e-6)


def test_torch_compile_of_an_own_forward() -> None:
    torch._dynamo.reset()
    model, x = prepare(FAMILIES["own_forwards"](), "w4a8-g32"), batch("own_forwards")
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x), rtol=1e-6, atol=1e-6)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return out


@pytest.mark.parametrize("scheme", ["w4a8-g32", "w8a8-static", "w4a16-g32-asym"])
@pytest.mark.parametrize("learn_scales", [False, True])
def test_gradient_checkpointing_gives_the_same_bits(scheme: str, learn_scales: bool) -> None:
    plain, model = MLP(), MLP()
    model.load_state_dict(plain.state_dict())
    prepare(plain, scheme, learn_scales=learn_scales).train()
    repeated = Checkpointed(prepare(model, scheme, learn_scales=learn_scales)).train()
    for step in range(3):
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step)) * (step + 1)
        plain(x).square().sum().backward()
        repeated(x).square().sum().backward()
    for expected, actual in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(expected.grad, actual.grad)
    if scheme == "w8a8-static":
        assert model.up.fake_quantizer.observer.batches == 3
        assert torch.equal(model.up.fake_quantizer.observer.absmax, plain.up.fake_quantizer.observer.absmax)
