"""Converted models on disk: the same integers come back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from qat_plugin import Policy, convert, is_converted, load_converted, prepare, proof_of, save_converted
from qat_plugin.conversion import conversion_of
from qat_plugin.errors import CheckpointError, ConversionError
from qat_plugin.kernels.weight import CastWeight, QuantizedWeight
from tests.qat.models import FAMILIES, MLP, batch, encoder, llama, output

SCHEMES = ["w8a16", "w8a16-g32", "w8a16-tensor", "w8a8", "w8a8-static", "w4a16-g32", "w4a16-g32-asym", "w4a8-g32",
           "w3a16-g32", "w2a16-g32-asym", "fp16"]  # fmt: skip
WEIGHTS = "model.safetensors"


def converted(family: str, policy: Any, dtype: torch.dtype | None = None) -> nn.Module:
    model = prepare(FAMILIES[family](), policy).train()
    output(model, batch(family))
    return convert(model.eval(), dtype=dtype)


def integers(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, QuantizedWeight):
            parts = parameter.integers()
            found |= {f"{name}.q": parts.q, f"{name}.scale": parts.scale}
            if parts.zero_point is not None:
                found[f"{name}.zero_point"] = parts.zero_point
            if parameter.activation_scale is not None:
                found[f"{name}.activation_scale"] = parameter.activation_scale
        elif isinstance(parameter, CastWeight):
            found[name] = parameter.data_
        else:
            found[name] = parameter
    return found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("family", ["mlp", "llama", "gpt2", "encoder", "own_forwards"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_and_integers_come_back_equal(family: str, scheme: str, tmp_path: Path) -> None:
    model, x = converted(family, scheme), batch(family)
    assert save_converted(model, tmp_path) == tmp_path
    loaded = FAMILIES[family]()
    assert load_converted(loaded, tmp_path) is loaded
    assert is_converted(loaded)
    with torch.no_grad():
        assert torch.equal(output(loaded, x), output(model, x))
    assert_same(integers(loaded), integers(model))
    assert proof_of(loaded) == proof_of(model)
    assert conversion_of(loaded).plan == conversion_of(model).plan
    assert not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(ConversionError, match="already converted"):
        load_converted(loaded, tmp_path)


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a8-g32", "w8a16", "w8a8"])
def test_bf16_models_come_back_on_the_same_kernels(scheme: str, tmp_path: Path) -> None:
    model, x = converted("mlp", scheme, torch.bfloat16), batch("mlp").bfloat16()
    loaded = load_converted(MLP(), save_converted(model, tmp_path))
    assert torch.equal(loaded(x), model(x))
    assert loaded.up.weight.kernel_name == model.up.weight.kernel_name
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_ties_are_stored_once_and_come_back(tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):
        model, x = converted(family, {"default": "w4a16-g32", "embedding": "w4a16-g32"}), batch(family)
        save_converted(model, tmp_path / family)
        names = safetensors.torch.load_file(tmp_path / family / WEIGHTS)
        assert not [name for name in names if name.startswith("lm_head")]
        loaded = load_converted(FAMILIES[family](), tmp_path / family)
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert torch.equal(output(loaded, x), output(model, x))


def test_parted_ties_come_back_parted(tmp_path: Path) -> None:
    model, x = converted("llama", {"embed_tokens": "fp16", "lm_head": "w4a8-g32"}), batch("llama")
    loaded = load_converted(llama(), save_converted(model, tmp_path))
    assert torch.equal(output(loaded, x), output(model, x))
    assert isinstance(loaded.model.embed_tokens.weight, CastWeight)
    assert isinstance(loaded.lm_head.weight, QuantizedWeight)


BYTES = {"w8a16": 8, "w8a8": 8, "w4a16-g32": 4, "w4a8-g32": 4, "w3a16-g32": 3, "w2a16-g32": 2}


@pytest.mark.parametrize("scheme", BYTES)
def test_a_weight_takes_its_bits_on_disk(scheme: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    count = model[0].weight.numel()
    save_converted(convert(model, scheme), tmp_path)
    scales = count // 32 if "-g32" in scheme else 512
    tensors = count * BYTES[scheme] // 8 + scales * 2
    assert 0 <= os.path.getsize(tmp_path / WEIGHTS) - tensors < 4096  # the header


@pytest.mark.parametrize("length", range(1, 18))
def test_what_is_loaded_is_aligned_for_the_kernels_wherever_it_lies_in_the_file(length: int, tmp_path: Path) -> None:
    """A file's header has any length; kernels that load 16 aligned bytes at a time crash on what it shifts."""

    def net() -> nn.Module:
        return nn.ModuleDict({"x" * length: nn.Linear(48, 5), "y" * length: nn.Linear(48, 48)})

    loaded = load_converted(net(), save_converted(convert(net(), "w8a16", dtype=torch.bfloat16), tmp_path))
    for parameter in loaded.parameters():
        for tensor in (parameter.data_, parameter.scale) if isinstance(parameter, QuantizedWeight) else (parameter,):
            assert tensor.data_ptr() % 64 == 0


def test_the_file_is_plain_safetensors_and_the_plan_is_readable(tmp_path: Path) -> None:
    model = converted("mlp", {"up": "w4a16-g32", "down": "w8a8"})
    save_converted(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [WEIGHTS, "plan.json"]
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "up.weight.q": (torch.uint8, (128, 32)),
        "up.weight.scale": (torch.bfloat16, (128, 2)),
        "up.bias": (torch.float32, (128,)),
        "down.weight.q": (torch.int8, (64, 128)),
        "down.weight.scale": (torch.bfloat16, (64, 1)),
        "down.bias": (torch.float32, (64,)),
    }
    low = (tensors["up.weight.q"] & 0xF).to(torch.int8)
    low = torch.where(low > 7, low - 16, low)
    assert torch.equal(low, model.up.weight.integers().q[:, ::2])  # the first weight of a pair in the low nibble
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [(entry["name"], entry["scheme"]) for entry in plan] == [("up", "w4a16-g32"), ("down", "w8a8")]
    raw = (tmp_path / WEIGHTS).read_bytes()
    assert b"cpickle" not in raw
    assert b"torch\n" not in raw
    assert raw[8:9] == b"{"


class TestMeta:
    @pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8", "fp16"])
    def test_a_skeleton_without_storage_is_filled(self, scheme: str, tmp_path: Path) -> None:
        model = converted("mlp", scheme)
        save_converted(model, tmp_path)
        with torch.device("meta"):
            skeleton = MLP()
        load_converted(skeleton, tmp_path)
        assert {p.device.type for p in skeleton.parameters()} == {"cpu"}
        assert torch.equal(skeleton(batch("mlp")), model(batch("mlp")))

    def test_buffers_that_no_file_holds_are_named(self, tmp_path: Path) -> None:
        save_converted(converted("llama", "w8a8"), tmp_path)
        with torch.device("meta"):
            skeleton = llama()
        with pytest.raises(CheckpointError, match=r"rotary_emb.inv_freq.*non-persistent buffers on the meta device"):
            load_converted(skeleton, tmp_path)
        assert not is_converted(skeleton)

    def test_a_skeleton_with_real_buffers_runs(self, tmp_path: Path) -> None:
        model, x = converted("llama", "w8a8"), batch("llama")
        save_converted(model, tmp_path)
        skeleton = llama()
        for module in skeleton.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"))
        load_converted(skeleton, tmp_path)
        assert torch.equal(output(skeleton, x), output(model, x))


class TestBuffers:
    def test_batch_statistics_are_saved(self, tmp_path: Path) -> None:
        def net() -> nn.Module:
            return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))

        model = net().train()
        model(torch.randn(16, 64) * 3 + 1)
        convert(model.eval(), "w8a8")
        loaded = load_converted(net().eval(), save_converted(model, tmp_path))
        assert torch.equal(loaded(batch("mlp")), model(batch("mlp")))
        assert torch.equal(loaded[1].num_batches_tracked, model[1].num_batches_tracked)

    def test_state_that_is_no_tensor_cannot_be_saved(self, tmp_path: Path) -> None:
        class Counting(MLP):
            def get_extra_state(self) -> Any:
                return {"steps": 3}

            def set_extra_state(self, state: Any) -> None:
                pass

        with pytest.raises(ConversionError, match=r"_extra_state.*is a dict: only tensors"):
            save_converted(convert(Counting(), "w8a8"), tmp_path)
        assert not list(tmp_path.iterdir())


def test_saving_a_loaded_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for i, policy in enumerate(["w4a16-g32-asym", {"linear1": "w8a8-static", "linear2": "w3a16-g32"}]):
        model = converted("encoder", policy)
        save_converted(model, tmp_path / f"{i}a")
        save_converted(load_converted(encoder(), tmp_path / f"{i}a"), tmp_path / f"{i}b")
        assert (tmp_path / f"{i}a" / WEIGHTS).read_bytes() == (tmp_path / f"{i}b" / WEIGHTS).read_bytes()


def test_the_models_own_tensors_are_not_changed_by_saving(tmp_path: Path) -> None:
    model = converted("mlp", Policy({"up": "w4a16-g32"}))
    parameters = {name: id(p) for name, p in model.named_parameters()}
    save_converted(model, tmp_path)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
