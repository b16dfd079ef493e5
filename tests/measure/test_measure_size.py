from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import LlamaConfig, LlamaForCausalLM

from qat_plugin.errors import CheckpointError, QatError
from qat_plugin.measure import file_bytes, model_bytes, parameter_count


def llama(*, tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


LLAMA_LAYER = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 48 * 32 + 2 * 32  # q, k, v, o, gate, up, down, norms
LLAMA_BODY = 64 * 32 + 2 * LLAMA_LAYER + 32


@settings(max_examples=20, deadline=None)
@given(
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    bias=st.booleans(),
)
def test_a_plain_model_takes_its_elements_times_their_width(widths: list[int], dtype: torch.dtype, bias: bool) -> None:
    model = nn.Sequential(*(nn.Linear(a, b, bias=bias, dtype=dtype) for a, b in pairwise(widths)))
    weights = sum(a * b + b * bias for a, b in pairwise(widths))
    assert model_bytes(model) == weights * dtype.itemsize
    assert parameter_count(model) == weights


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_count_once(tied: bool) -> None:
    weights = LLAMA_BODY + (0 if tied else 64 * 32)
    model = llama(tied=tied)
    assert parameter_count(model) == weights
    assert model_bytes(model, non_persistent=False) == 4 * weights
    assert model_bytes(model.bfloat16(), non_persistent=False) == 2 * weights


def test_modules_that_share_data_without_sharing_the_parameter_count_once() -> None:
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    second.weight = nn.Parameter(first.weight.detach())
    assert second.weight is not first.weight
    assert model_bytes(nn.ModuleList([first, second])) == 8 * 8 * 4


def test_buffers_count_and_non_persistent_ones_on_request() -> None:
    model = nn.Module()
    model.register_buffer("kept", torch.zeros(10))
    model.register_buffer("scratch", torch.zeros(100, dtype=torch.int64), persistent=False)
    assert model_bytes(model) == 10 * 4 + 100 * 8
    assert model_bytes(model, non_persistent=False) == 10 * 4
    assert model_bytes(nn.BatchNorm1d(5)) == 4 * 5 * 4 + 8


def test_a_view_keeps_its_whole_storage_alive_and_counts_as_such() -> None:
    flat = torch.zeros(1000)
    model = nn.Module()
    model.register_buffer("head", flat[:10])
    model.register_buffer("tail", flat[990:])
    assert model_bytes(model) == 4000


def bytes_per_row(linear: nn.Linear) -> int:
    """What torchao keeps per output channel beside the integers: a scale, and a zero point although it is symmetric."""
    assert linear.weight.scale.numel() == linear.weight.zero_point.numel() == linear.out_features
    return linear.weight.scale.element_size() + linear.weight.zero_point.element_size()


@pytest.mark.parametrize("config", [Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()])
def test_int8_weights_count_their_integers_and_scales_not_the_shape_they_show(config: object) -> None:
    model = nn.Sequential(nn.Linear(64, 128, dtype=torch.bfloat16), nn.ReLU(), nn.Linear(128, 32, dtype=torch.bfloat16))
    before = parameter_count(model)
    quantize_(model, config)
    integers, outputs = 64 * 128 + 128 * 32, 128 + 32
    assert model_bytes(model) == integers + outputs * bytes_per_row(model[0]) + outputs * 2  # biases stay bf16
    assert parameter_count(model) == before


def test_an_int8_head_that_torchao_untied_counts_beside_the_embedding() -> None:
    model = llama(tied=True).bfloat16()
    quantize_(model, Int8WeightOnlyConfig())
    linear = LLAMA_BODY - 64 * 32 - 5 * 32 + 64 * 32  # embedding and norms stay, the head is a second copy
    rows = 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32) + 64
    width = bytes_per_row(model.lm_head)
    assert model_bytes(model, non_persistent=False) == linear + rows * width + 2 * (64 * 32 + 5 * 32)


def test_subclasses_inside_subclasses_are_opened_and_shared_parts_count_once() -> None:
    a, b = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    model = nn.Module()
    model.register_buffer("nested", TwoTensor(TwoTensor(a, b), TwoTensor(a, a)))
    assert model_bytes(model) == 2 * 6 * 8


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_and_onednn_tensors_count_what_they_hold() -> None:
    model = nn.Module()
    model.register_buffer("coo", torch.eye(5).to_sparse())
    assert model_bytes(model) == 2 * 5 * 8 + 5 * 4
    rows, columns, values = torch.arange(6), torch.arange(5), torch.ones(5, dtype=torch.float64)
    model.register_buffer("csr", torch.sparse_csr_tensor(rows, columns, values, (5, 5)))
    assert model_bytes(model) == 100 + 6 * 8 + 5 * 8 + 5 * 8
    packed = nn.Module()
    packed.register_buffer("weight", torch.zeros(16, 16).to_mkldnn())
    assert model_bytes(packed) >= 16 * 16 * 4


def test_a_meta_model_has_the_size_it_would_have() -> None:
    with torch.device("meta"):
        imagined = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    assert model_bytes(imagined) == 2 * 10_100 * 4


def test_a_lazy_module_without_a_shape_is_named() -> None:
    with pytest.raises(QatError, match=r"'0\.weight'.*run one batch"):
        model_bytes(nn.Sequential(nn.LazyLinear(3)))


def test_file_bytes_of_a_file_and_of_a_tree(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 11)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "b").write_bytes(b"x" * 700)
    assert file_bytes(tmp_path / "a") == 11
    assert file_bytes(str(tmp_path)) == 711


def test_links_are_not_counted_twice(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "elsewhere").write_bytes(b"x" * 5000)
    (folder / "weights").write_bytes(b"x" * 100)
    os.link(folder / "weights", folder / "same")
    (folder / "symbolic").symlink_to(tmp_path / "elsewhere")
    assert file_bytes(folder) == 100


def test_a_missing_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        file_bytes(tmp_path / "nothing")
