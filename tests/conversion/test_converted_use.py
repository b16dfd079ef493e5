"""A converted model in use: copies, compilation, inference mode, casts, and what it refuses."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import nn

from qat_plugin import convert, is_converted, load_converted, prepare, proof_of, save_converted
from qat_plugin.errors import ConversionError
from qat_plugin.kernels.weight import CastWeight, QuantizedWeight
from tests.qat.models import FAMILIES, MLP, batch, output

SCHEMES = ["w8a16", "w8a8", "w4a16-g32", "w4a8-g32", "w3a16-g32-asym"]


@pytest.mark.parametrize("scheme", [*SCHEMES, "fp16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_deep_copy_is_converted_and_independent(scheme: str, dtype: torch.dtype) -> None:
    model, x = convert(MLP(), scheme, dtype=dtype), batch("mlp").to(dtype)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert is_converted(twin)
    assert proof_of(twin) == proof_of(model)
    assert torch.equal(twin(x), expected)
    twin.load_state_dict(MLP().state_dict())
    assert not torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_deep_copy_keeps_ties(family: str) -> None:
    model, x = convert(FAMILIES[family](), {"default": "w8a8", "embedding": "w8a16"}), batch(family)
    twin = copy.deepcopy(model)
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight
    assert torch.equal(output(twin, x), output(model, x))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["mlp", "gpt2"])
def test_torch_compile(scheme: str, family: str) -> None:
    torch._dynamo.reset()
    model, x = convert(FAMILIES[family](), scheme), batch(family)
    with torch.no_grad():
        expected = output(model, x)
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(output(compiled, x), expected, rtol=1e-5, atol=1e-5)


def test_a_compiled_child_is_converted_in_its_place() -> None:
    torch._dynamo.reset()
    model, x = MLP(), batch("mlp")
    model.up = torch.compile(model.up, backend="aot_eager")  # type: ignore[assignment]
    prepare(model, "w8a8")
    expected = model(x).detach()
    convert(model)
    assert [layer.name for layer in proof_of(model).layers] == ["up", "down"]
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", [*SCHEMES, "fp16"])
@pytest.mark.parametrize("family", ["mlp", "llama"])
def test_inference_mode(scheme: str, family: str) -> None:
    model, x = convert(FAMILIES[family](), scheme), batch(family)
    with torch.no_grad():
        expected = output(model, x)
    with torch.inference_mode():
        assert torch.equal(output(model, x), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast_and_other_shapes(scheme: str) -> None:
    model = convert(MLP(), scheme)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(batch("mlp"))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), model(batch("mlp")), rtol=0.1, atol=0.05)
    for shape in ((64,), (0, 64), (1, 64), (2, 3, 5, 64), (70, 64)):
        x = torch.randn(shape)
        assert model(x).shape == shape
        torch.testing.assert_close(model(x).reshape(-1, 64), model(x.reshape(-1, 64)), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="63 features"):
        model(torch.randn(2, 63))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_to_another_type_keeps_the_integers(scheme: str) -> None:
    model = convert(MLP(), scheme)
    before = model.up.weight.integers()
    model.to(torch.bfloat16)
    assert isinstance(model.up.weight, QuantizedWeight)
    after = model.up.weight.integers()
    assert torch.equal(after.q, before.q)
    assert torch.equal(after.scale, before.scale)
    assert model(batch("mlp").bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_is_refused_where_the_gradient_reaches_integers(scheme: str) -> None:
    model = convert(MLP(), scheme).train()
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ConversionError, match="a converted model cannot be trained"):
        model(batch("mlp")).sum().backward()
    x = batch("mlp").requires_grad_()
    with pytest.raises(ConversionError, match=f"a converted model cannot be trained.*{scheme}"):
        model(x).sum().backward()
    head = nn.Linear(64, 2)  # what follows can be trained, what comes before cannot
    head(model.eval()(batch("mlp"))).sum().backward()
    assert head.weight.grad is not None
    with pytest.raises(ConversionError, match="cannot be trained"):
        model(nn.Linear(64, 64)(batch("mlp"))).sum().backward()


def test_training_a_converted_llama_or_a_loaded_model_is_refused(tmp_path: Path) -> None:
    model = convert(FAMILIES["llama"](), "w4a8-g32").train()
    ids = batch("llama")
    with pytest.raises(ConversionError, match="a converted model cannot be trained"):
        model(ids, labels=ids).loss.backward()
    loaded = load_converted(FAMILIES["llama"](), save_converted(model, tmp_path)).train()
    with pytest.raises(ConversionError, match="a converted model cannot be trained"):
        loaded(ids, labels=ids).loss.backward()
    with pytest.raises(ConversionError, match="a converted model cannot be trained"):
        copy.deepcopy(model)(ids, labels=ids).loss.backward()
    assert not model.eval()(ids).logits.requires_grad  # in eval mode no graph is kept
    with torch.no_grad():
        assert not model.train()(ids).logits.requires_grad


def test_conversion_does_not_depend_on_the_mode_it_runs_in() -> None:
    state, x = MLP().state_dict(), batch("mlp")
    expected = None
    for context in (torch.enable_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        model = MLP()
        model.load_state_dict(state)
        with context:
            convert(model, "w8a8")
        model.load_state_dict(state)  # in place: impossible on tensors made in inference mode
        expected = model(x) if expected is None else expected
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "encoder"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_norms_may_be_cast(family: str, dtype: torch.dtype | None) -> None:
    model, x = prepare(FAMILIES[family](), {"norm": "bf16", "default": "w8a8"}), batch(family)
    expected = output(model, x).detach()
    convert(model, dtype=dtype)
    x = x.to(dtype) if dtype is not None and x.is_floating_point() else x
    torch.testing.assert_close(output(model, x).float(), expected, rtol=0.05, atol=0.1 if dtype else 1e-4)
    cast = [layer for layer in proof_of(model).layers if layer.scheme == "bf16"]
    assert len(cast) >= 3
    assert all(layer.weight_difference == 0 for layer in cast)


def test_nothing_of_fake_quantization_is_left() -> None:
    model = convert(prepare(MLP(), "w4a8-g32", learn_scales=True))
    assert {type(m) for m in model.modules()} == {MLP, nn.Linear}
    assert set(dict(model.named_parameters())) == set(dict(MLP().named_parameters()))
    assert set(model.state_dict()) == set(MLP().state_dict())


@pytest.mark.parametrize("scheme", ["w4a8-g32", "w8a16", "fp16"])
def test_a_pickled_converted_model_computes_the_same(scheme: str) -> None:
    model, x = convert(MLP(), scheme), batch("mlp")
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    assert torch.equal(loaded(x), model(x))
    assert isinstance(loaded.up.weight, CastWeight | QuantizedWeight)


def test_a_model_that_is_one_layer() -> None:
    for layer, x in ((nn.Linear(64, 64), torch.randn(2, 64)), (nn.Embedding(10, 32), torch.arange(4))):
        policy = "w8a16" if isinstance(layer, nn.Linear) else {"embedding": "w8a16"}
        expected = prepare(layer, policy)(x).detach()
        convert(layer)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
        assert is_converted(layer)
