"""Content sums: what must change them, what must not."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qat_plugin.errors import CheckpointError
from qat_plugin.qlora.fingerprint import _CHUNK, _PRIME, _multipliers_on, directory_fingerprint, fingerprint, tensor_sum
from qat_plugin.qlora.nf4 import nf4_linear
from qat_plugin.scheme import Scheme

DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_dtype_and_size_has_a_sum(dtype: torch.dtype) -> None:
    tensors = [torch.arange(n).remainder(2).to(dtype) for n in (0, 1, 2, 3, 5, 64)]
    sums = [tensor_sum(tensor) for tensor in tensors]
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in sums)
    assert len(set(sums)) == len(sums)
    assert sums == [tensor_sum(tensor.clone()) for tensor in tensors]


def test_every_bit_counts() -> None:
    tensor = torch.randint(0, 256, (11,), dtype=torch.uint8)  # two words and three single bytes
    sums = {tensor_sum(tensor)}
    for place, bit in itertools.product(range(11), range(8)):
        changed = tensor.clone()
        changed[place] ^= 1 << bit
        sums.add(tensor_sum(changed))
    assert len(sums) == 1 + 11 * 8


def test_the_order_counts_within_and_across_chunks() -> None:
    tensor = torch.randn(3, _CHUNK)  # a row is a chunk
    sums = {tensor_sum(tensor[list(order)]) for order in itertools.permutations(range(3))}
    assert len(sums) == 6
    assert tensor_sum(tensor) != tensor_sum(tensor.roll(1, dims=1))
    assert tensor_sum(tensor[0]) != tensor_sum(tensor[0].flip(0))


def test_shape_and_dtype_count() -> None:
    zeros = torch.zeros(4, 6)
    views = [zeros, zeros.reshape(6, 4), zeros.reshape(24), zeros.view(torch.int32), zeros.bfloat16()]
    assert len({tensor_sum(view) for view in views}) == len(views)


def test_memory_layout_does_not_count() -> None:
    tensor = torch.randn(8, 6)
    assert tensor_sum(tensor.t()) == tensor_sum(tensor.t().contiguous())
    assert tensor_sum(tensor[1:, 1:]) == tensor_sum(tensor[1:, 1:].clone())
    halves = torch.randn(9).bfloat16()
    assert tensor_sum(halves[1:]) == tensor_sum(halves[1:].clone())  # starts within a 32-bit word
    assert tensor_sum(torch.ones(1, 4)[:, 2]) == tensor_sum(torch.ones(1))


def test_the_sum_is_the_formula_in_exact_integers() -> None:
    import hashlib

    tensor = torch.randint(-(2**31), 2**31, (_CHUNK + 5,), dtype=torch.int32)
    words, multipliers = tensor.tolist(), _multipliers_on(torch.device("cpu")).tolist()
    total = 0
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK]
        total = (total * _PRIME + sum(x * m for x, m in zip(part, multipliers, strict=False))) % 2**64
    head = f"torch.int32 [{_CHUNK + 5}] {total}"
    assert tensor_sum(tensor) == hashlib.sha256(head.encode()).hexdigest()[:16]


def base() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.Linear(128, 128))
    model.requires_grad_(False)
    return model


@pytest.mark.parametrize("backend", ["bitsandbytes", "torchao"])
def test_a_forward_and_a_copy_do_not_change_a_quantized_base(backend: str) -> None:
    model = base().bfloat16()
    model[2] = nf4_linear(model[2], Scheme.parse("nf4-dq"), backend=backend)
    before = fingerprint(model)
    with torch.no_grad():
        model[2](torch.randn(4, 128))
    assert fingerprint(model) == before
    assert fingerprint(copy.deepcopy(model)) == before


def test_what_is_frozen_counts() -> None:
    model = base()
    model[2] = nf4_linear(model[2], Scheme.parse("nf4-dq"))
    prints = {fingerprint(model)}
    for change in (
        lambda m: m[0].weight[0, 0].add_(1),
        lambda m: m[1].running_mean.add_(1),
        lambda m: m[2].weight.data[0].bitwise_xor_(1),
        lambda m: m[2].weight.quant_state.absmax[0].bitwise_xor_(1),
        lambda m: m[2].weight.quant_state.offset.add_(1),
        lambda m: m[2].bias[0].add_(1),
    ):
        changed = copy.deepcopy(model)
        change(changed)
        prints.add(fingerprint(changed))
    assert len(prints) == 7


def test_what_trains_and_what_is_not_saved_does_not_count() -> None:
    model = base()
    model[0].weight.requires_grad_(True)
    model.register_buffer("mask", torch.zeros(3), persistent=False)
    before = fingerprint(model)
    with torch.no_grad():
        model[0].weight.add_(1)
        model.mask.add_(1)
    assert fingerprint(model) == before


def test_adapters_do_not_change_the_fingerprint_of_the_base() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = base()
    model[2] = nf4_linear(model[2], Scheme.parse("nf4-dq"))
    before = fingerprint(model)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["0", "2"]), model)
    assert fingerprint(model) == before
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(False).add_(1)
    assert fingerprint(model) == before


def test_a_directory_has_a_sum_for_each_tensor_of_its_shards(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5), "b": torch.randn(3, 4).bfloat16(), "c": torch.tensor(7)}
    save_file({"a": tensors["a"]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": tensors["b"], "c": tensors["c"]}, tmp_path / "model-00002-of-00002.safetensors")
    assert directory_fingerprint(tmp_path) == {name: tensor_sum(tensor) for name, tensor in tensors.items()}


def test_a_directory_without_shards_or_with_a_truncated_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no"):
        directory_fingerprint(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(64, 64)}, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        directory_fingerprint(tmp_path)
