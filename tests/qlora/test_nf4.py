"""NF4 layers against bitsandbytes' and torchao's own functions, and against codes taken apart by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_plugin.errors import CheckpointError, ConfigError, PrepareError
from qat_plugin.measure.size import model_bytes
from qat_plugin.qlora import nf4_bitsandbytes, nf4_torchao
from qat_plugin.qlora.extra import import_extra
from qat_plugin.qlora.nf4 import (
    dequantized,
    empty_nf4_linear,
    from_state_tensors,
    guard,
    is_nf4,
    nf4_bytes,
    nf4_linear,
    nf4_weight,
    state_tensors,
)
from qat_plugin.scheme import Scheme

NF4, DQ = Scheme.parse("nf4"), Scheme.parse("nf4-dq")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 128), (48, 96), (33, 7), (65, 129), (1, 2), (3, 1000)]  # 96 is 32 modulo 64
functional = import_extra("bitsandbytes.functional")


def codes_taken_apart(weight: nn.Parameter) -> Tensor:
    """float32 [out, in] from the packed bytes, without bitsandbytes' 4-bit kernels."""
    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        blocks = torch.arange(len(absmax)) // 256
        absmax = state.state2.code[absmax.long()] * state.state2.absmax[blocks] + state.offset
    packed = weight.data.reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[: state.shape.numel()]
    table = functional.get_4bit_type("nf4", device="cpu")
    return (table[codes.long()] * absmax[torch.arange(len(codes)) // 64]).reshape(state.shape)


@pytest.mark.parametrize("scheme", [NF4, DQ], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantizing_in_pieces_equals_bitsandbytes_on_the_whole(
    shape: tuple[int, int], dtype: torch.dtype, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4_bitsandbytes, "_CHUNK", 128)
    weight = torch.randn(shape).to(dtype)
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=scheme.double_quant
    )
    mine = nf4_weight(weight, scheme)
    assert not mine.requires_grad
    assert torch.equal(mine.data, packed)
    expected, found = state.as_dict(packed=True), mine.quant_state.as_dict(packed=True)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert (mine.quant_state.shape, mine.quant_state.dtype, mine.quant_state.nested) == (shape, dtype, state.nested)


def test_a_weight_of_more_than_one_piece_of_the_usual_size() -> None:
    weight = torch.randn(1100, 1000).bfloat16()
    assert weight.numel() > nf4_bitsandbytes._CHUNK
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    mine = nf4_weight(weight, DQ)
    assert torch.equal(mine.data, packed)
    assert torch.equal(mine.quant_state.absmax, state.absmax)
    assert torch.equal(mine.quant_state.offset, state.offset)


@pytest.mark.parametrize("scheme", [NF4, DQ], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantized_numbers_are_code_times_scale(shape: tuple[int, int], dtype: torch.dtype, scheme: Scheme) -> None:
    layer = nn.Linear(shape[1], shape[0], bias=False).to(dtype)
    quantized = nf4_linear(layer, scheme)
    expected = codes_taken_apart(quantized.weight)
    assert torch.equal(dequantized(quantized), expected)
    assert torch.equal(dequantized(quantized, torch.bfloat16), expected.bfloat16())
    if shape[1] % 64 == 0:
        theirs = functional.dequantize_4bit(quantized.weight.data, quantized.weight.quant_state)
        assert torch.equal(dequantized(quantized, dtype), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchao_in_pieces_equals_to_nf4_on_the_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.quantization import to_nf4

    monkeypatch.setattr(nf4_torchao, "_CHUNK", 4096)
    weight = torch.randn(96, 512).to(dtype)
    expected, mine = to_nf4(weight, 64, 256), nf4_weight(weight, DQ, backend="torchao")
    for name in nf4_torchao._PARTS:
        assert torch.equal(getattr(mine.data, name), getattr(expected, name)), name
    assert (mine.shape, mine.dtype, mine.data.n_blocks) == (expected.shape, expected.dtype, expected.n_blocks)
    assert torch.equal(mine.data.get_original_weight(), expected.get_original_weight())


def test_a_conv1d_is_transposed() -> None:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(128, 64)
    nn.init.normal_(layer.bias)
    expected = layer(torch.ones(2, 64))
    quantized = nf4_linear(layer, DQ)
    assert (quantized.in_features, quantized.out_features) == (64, 128)
    whole, _ = functional.quantize_4bit(layer.weight.data.t().contiguous(), blocksize=64, quant_type="nf4")
    assert torch.equal(quantized.weight.data, whole)
    assert F.cosine_similarity(quantized(torch.ones(2, 64)), expected).min() > 0.98


@pytest.mark.parametrize("compute_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("width", [128, 96])
@pytest.mark.parametrize("scheme", [NF4, DQ], ids=str)
def test_after_an_eval_forward_gradients_are_those_of_the_dequantized_weight(
    scheme: Scheme, width: int, compute_dtype: torch.dtype | None
) -> None:
    layer = nn.Linear(width, 64).bfloat16()  # stored in bfloat16, used in float32
    quantized = nf4_linear(layer, scheme, compute_dtype=compute_dtype)
    weight, packed = dequantized(quantized), quantized.weight.data.clone()
    quantized.eval()
    with torch.no_grad():
        quantized(torch.randn(32, width))
    quantized.train()
    x = torch.randn(2, 8, width, requires_grad=True)
    reference = x.detach().clone().requires_grad_()
    out, expected = quantized(x), F.linear(reference, weight, layer.bias.float())
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(out, expected)
    assert torch.equal(x.grad, reference.grad)
    assert torch.equal(quantized.weight.data, packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_forward_leaves_the_bias_as_it_is(dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 32)
    bias, values = layer.bias, layer.bias.detach().clone()
    quantized = nf4_linear(layer, DQ)
    assert quantized(torch.randn(4, 64, dtype=dtype)).dtype == dtype
    assert quantized.bias is bias and bias.dtype == torch.float32 and not bias.requires_grad
    assert torch.equal(bias, values)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["bitsandbytes", "torchao"])
def test_the_mode_of_the_layer_is_kept(backend: str, training: bool) -> None:
    assert nf4_linear(nn.Linear(128, 128).train(training), DQ, backend=backend).training is training


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    pass


def test_a_forward_of_its_own_is_refused() -> None:
    from transformers.pytorch_utils import Conv1D

    patched = nn.Linear(64, 64)
    patched.forward = lambda x: x
    own = type("ScaledConv1D", (Conv1D,), {"forward": lambda self, x: x})(64, 64)
    for layer in (Scaled(64, 64), patched, own):
        with pytest.raises(PrepareError, match="has a forward of its own"):
            nf4_linear(layer, DQ)
    assert is_nf4(nf4_linear(Renamed(64, 64), DQ))


def test_layers_that_would_lose_something_are_refused() -> None:
    hooked = nn.Linear(64, 64)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(PrepareError, match="hooks"):
        nf4_linear(hooked, DQ)
    with pytest.raises(PrepareError, match="parametrization"):
        nf4_linear(nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)), DQ)
    with pytest.raises(PrepareError, match="Conv2d is no linear layer"):
        nf4_linear(nn.Conv2d(1, 1, 1), DQ)


@pytest.mark.parametrize("backend", ["bitsandbytes", "torchao"])
def test_a_quantized_layer_is_refused(backend: str) -> None:
    quantized = nf4_linear(nn.Linear(128, 128), DQ, backend=backend)
    with pytest.raises(PrepareError, match="NF4 already"):
        nf4_linear(quantized, DQ)
    with pytest.raises(PrepareError, match="not quantized yet"):
        nf4_weight(quantized.weight, DQ)


@pytest.mark.parametrize("backend", ["bitsandbytes", "torchao"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float, backend: str) -> None:
    weight = torch.randn(128, 128)
    weight[-1, -1] = value
    with pytest.raises(PrepareError, match="^the weight holds NaN or infinity"):
        nf4_weight(weight, DQ, backend=backend)


def test_what_is_no_float_matrix_is_refused() -> None:
    for weight in (torch.ones(8, 8, dtype=torch.int8), torch.ones(64), torch.ones(2, 2, 2)):
        with pytest.raises(PrepareError, match="NF4 takes a float matrix"):
            nf4_weight(weight, DQ)
    with pytest.raises(PrepareError, match="meta device"):
        nf4_weight(torch.ones(8, 8, device="meta"), DQ)
    with pytest.raises(PrepareError, match="empty"):
        nf4_weight(torch.ones(0, 8), DQ)
    with pytest.raises(PrepareError, match="multiples of 16384"):
        nf4_weight(torch.ones(64, 64), DQ, backend="torchao")


def test_arguments_that_are_not_allowed() -> None:
    weight = torch.ones(128, 128)
    with pytest.raises(ConfigError, match="w4a16-g32 is not nf4"):
        nf4_weight(weight, Scheme.parse("w4a16-g32"))
    with pytest.raises(ConfigError, match="one of bitsandbytes, torchao"):
        nf4_weight(weight, DQ, backend="gptq")
    with pytest.raises(ConfigError, match="float64"):
        nf4_linear(nn.Linear(64, 64), DQ, compute_dtype=torch.float64)
    with pytest.raises(ConfigError, match="always quantizes its scales"):
        nf4_weight(weight, NF4, backend="torchao")


CHANGES = {
    "to(bfloat16)": lambda layer: layer.to(dtype=torch.bfloat16),
    "half": lambda layer: layer.half(),
    "to(cpu)": lambda layer: layer.to("cpu"),
    "deepcopy": copy.deepcopy,
    "train, eval": lambda layer: layer.train().eval(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backend", ["bitsandbytes", "torchao"])
def test_casts_moves_and_copies_leave_the_quantized_weight(backend: str, change: str) -> None:
    quantized = nf4_linear(nn.Linear(128, 128), DQ, backend=backend)
    before = {name: tensor.clone() for name, tensor in state_tensors(quantized).items()}
    changed = CHANGES[change](nn.Sequential(quantized))[0]
    after = state_tensors(changed)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    assert changed(torch.randn(2, 128)).isfinite().all()


def test_a_copy_shares_nothing_and_does_not_hold_the_original() -> None:
    quantized = nf4_linear(nn.Linear(128, 128), DQ)
    twin = copy.deepcopy(quantized)
    mine, theirs = state_tensors(quantized), state_tensors(twin)
    assert all(mine[name].data_ptr() != theirs[name].data_ptr() for name in ("weight", "absmax", "nested_absmax"))
    assert twin.weight.module is None


def test_pickle_keeps_the_layer() -> None:
    quantized = nf4_linear(nn.Linear(96, 64), DQ)
    read = pickle.loads(pickle.dumps(quantized))
    x = torch.randn(3, 96)
    assert type(read) is type(quantized)
    assert torch.equal(read(x), quantized(x))


def test_the_state_dict_is_what_bitsandbytes_saves() -> None:
    quantized = nf4_linear(nn.Linear(128, 64), DQ)
    saved = quantized.state_dict()
    parts = state_tensors(quantized)
    assert saved.keys() == {"bias", "weight", *(f"weight.{name}" for name in parts if name != "weight")}
    assert torch.equal(saved["weight"], parts["weight"])
    assert torch.equal(saved["weight.nested_absmax"], parts["nested_absmax"])


@pytest.mark.parametrize(("backend", "scheme"), [("bitsandbytes", NF4), ("bitsandbytes", DQ), ("torchao", DQ)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_taken_apart_and_put_into_an_empty_layer(backend: str, scheme: Scheme, dtype: torch.dtype) -> None:
    quantized = nf4_linear(nn.Linear(256, 128, bias=False).to(dtype), scheme, backend=backend)
    empty = empty_nf4_linear(256, 128, bias=False, scheme=scheme, backend=backend)
    assert is_nf4(empty) and empty.weight.is_meta and not empty.weight.requires_grad
    empty.weight = from_state_tensors(state_tensors(quantized), scheme, backend=backend)
    x = torch.randn(4, 256, dtype=dtype)
    assert not empty.weight.requires_grad
    assert torch.equal(dequantized(empty), dequantized(quantized))
    assert torch.equal(empty(x), quantized(x))


def test_tensors_of_another_weight_are_refused() -> None:
    parts = state_tensors(nf4_linear(nn.Linear(128, 64), DQ))
    for broken in (
        {**parts, "weight": parts["weight"][:-1]},
        {**parts, "absmax": parts["absmax"][:-1]},
        {name: tensor for name, tensor in parts.items() if name != "weight"},
        {name: tensor for name, tensor in parts.items() if name != "quant_map"},
        {**parts, "quant_state.bitsandbytes__nf4": torch.zeros(8, dtype=torch.uint8)},
    ):
        with pytest.raises(CheckpointError, match="these are not the tensors"):
            from_state_tensors(broken, DQ)
    with pytest.raises(CheckpointError, match="in nf4:"):
        from_state_tensors(parts, NF4)
    parts = state_tensors(nf4_linear(nn.Linear(128, 128), DQ, backend="torchao"))
    with pytest.raises(CheckpointError, match="scaler_mean missing"):
        from_state_tensors({n: t for n, t in parts.items() if n != "scaler_mean"}, DQ, backend="torchao")
    with pytest.raises(CheckpointError, match="quantized_data has 4096 numbers, not 8192"):
        from_state_tensors({**parts, "quantized_data": parts["quantized_data"][:4096]}, DQ, backend="torchao")


def test_guard_lets_layers_that_others_made_train_after_an_eval_forward() -> None:
    bnb = import_extra("bitsandbytes")
    theirs = bnb.nn.Linear4bit(96, 64, compute_dtype=torch.float32, quant_type="nf4").bfloat16().to("cpu")
    model = nn.Sequential(theirs, nn.ReLU(), nf4_linear(nn.Linear(64, 64), DQ))
    assert guard(model) == 2 and guard(model) == 2
    weight, bias = dequantized(model[0]), model[0].bias.detach().clone()
    with torch.no_grad():
        model.eval()(torch.randn(4, 96))
    x = torch.randn(4, 96, requires_grad=True)
    model.train()[0](x).sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 64) @ weight)
    assert torch.equal(model[0].bias, bias) and model[0].bias.dtype == torch.bfloat16


def test_a_repacked_weight_is_refused() -> None:
    """What bitsandbytes' eval forward does on a CPU with AVX512-BF16."""
    quantized = nf4_linear(nn.Linear(128, 64), DQ)
    quantized.weight.data, quantized.weight.quant_state = functional._convert_weight_packed_for_cpu(
        quantized.weight.data, quantized.weight.quant_state
    )
    for use in (dequantized, state_tensors, guard):
        with pytest.raises(CheckpointError, match="repacked this weight"):
            use(quantized)


def test_a_weight_without_its_scales_is_refused() -> None:
    quantized = nf4_linear(nn.Linear(128, 64), DQ)
    quantized.weight = nn.Parameter(quantized.weight.data.clone(), requires_grad=False)
    for use in (dequantized, state_tensors):
        with pytest.raises(CheckpointError, match="has no scales"):
            use(quantized)
    with pytest.raises(PrepareError, match="Linear is not NF4"):
        dequantized(nn.Linear(4, 4))
    assert not is_nf4(nn.Linear(4, 4)) and not is_nf4(nn.ReLU())


@pytest.mark.parametrize("scheme", [NF4, DQ], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 257)], ids=str)
def test_bytes_are_those_of_the_storages(shape: tuple[int, int], scheme: Scheme) -> None:
    weight = nf4_weight(torch.randn(shape), scheme)
    state = weight.quant_state
    parts = [weight.data, state.absmax, state.code]
    if state.nested:
        parts += [state.offset, state.state2.absmax, state.state2.code]
    assert nf4_bytes(shape, scheme) == sum(part.untyped_storage().nbytes() for part in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_torchao_are_those_of_the_storages(dtype: torch.dtype) -> None:
    quantized = nf4_linear(nn.Linear(512, 96, bias=False).to(dtype), DQ, backend="torchao")
    assert nf4_bytes((96, 512), DQ, "torchao", dtype) == model_bytes(quantized)


def test_bytes_of_a_large_layer_are_as_published() -> None:
    """Half a byte, and 8 bits per 64 weights with 32 bits per 256 of them: 0.127 bit (arXiv:2305.14314, section 3)."""
    bits = 8 * nf4_bytes((8192, 28672), DQ) / (8192 * 28672)
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert 8 * nf4_bytes((8192, 28672), NF4) / (8192 * 28672) == pytest.approx(4.5, abs=1e-4)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantizing_on_cuda_equals_bitsandbytes_there(dtype: torch.dtype) -> None:
    weight = torch.randn(1100, 1000).to(dtype)
    packed, state = functional.quantize_4bit(weight.cuda(), blocksize=64, quant_type="nf4", compress_statistics=True)
    mine = nf4_weight(weight, DQ, device="cuda")
    assert torch.equal(mine.data, packed)
    assert torch.equal(mine.quant_state.absmax, state.absmax)
    assert torch.equal(mine.quant_state.offset, state.offset)
