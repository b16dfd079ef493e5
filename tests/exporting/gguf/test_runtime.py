"""What stands in for the runtime: rounding of inputs, and rotary frequencies, against other people's code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from qat_plugin import Policy, convert
from qat_plugin.errors import ConfigError
from qat_plugin.exporting import Verification, export_model
from qat_plugin.exporting.contents import Exportable, outputs_of
from qat_plugin.exporting.gguf import Options
from qat_plugin.exporting.gguf.copies import float_copy
from qat_plugin.exporting.gguf.fits import Misfit, check_numbers
from qat_plugin.exporting.gguf.layout import interleaved, layout
from qat_plugin.exporting.gguf.rope import frequency_factors
from qat_plugin.exporting.gguf.runtime_rounding import rounded, rounding_inputs
from qat_plugin.numerics import Quantized, round_to_nearest
from qat_plugin.scheme import Scheme
from tests.exporting.gguf.families import LLAMA3, network


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_inputs_are_rounded_as_ggufs_q8_0_is(kind: str) -> None:
    x = torch.randn(3, 5, 96) * torch.rand(3, 5, 1).exp()
    x[0, 0, :32] = 0
    wanted = gguf.dequantize(gguf.quantize(x.reshape(15, 96).numpy(), Type.Q8_0), Type.Q8_0)
    assert np.allclose(rounded(x, kind).reshape(15, 96).numpy(), wanted, rtol=0, atol=1e-6)
    assert torch.equal(rounded(x, "F16"), x.half().float()) and torch.equal(rounded(x, "F32"), x)


def test_rounding_is_put_around_every_product_and_taken_away_again() -> None:
    model = Exportable(convert(network("Gemma2"), Policy({"attention": "w8a16", "ffn": "w4a16-g32-asym"})), ())
    entries = layout(model, Options())
    copy, sample = float_copy(model, entries), {"input_ids": torch.arange(12)[None]}
    before = outputs_of(copy, sample)
    with rounding_inputs(copy, model, entries):
        error = (outputs_of(copy, sample) - before).norm() / before.norm()
    assert 1e-3 < error < 5e-2
    assert torch.equal(outputs_of(copy, sample), before)


def test_llama_3s_factors_are_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = network("Llama", head_dim=64, rope_parameters=LLAMA3).config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = frequency_factors(config)
    assert factors is not None and len(set(factors.tolist())) > 3
    plain = LLAMA3["rope_theta"] ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    torch.testing.assert_close((plain / factors).float(), scaled, rtol=1e-6, atol=0)


def test_rows_are_ordered_as_transformers_orders_them_back() -> None:
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    weight = np.arange(48 * 3).reshape(48, 3)
    processor = LlamaTensorProcessor({"num_attention_heads": 4, "num_key_value_heads": 4})
    back = processor.process(weight[interleaved(48, 4)], "blk.0.attn_q.weight").weights
    assert np.array_equal(back, weight)


@pytest.mark.parametrize(
    ("scheme", "factor"), [("w8a16-g32", 1 + 2**-12), ("w4a16-g32", 1e-9), ("w4a16-g32-asym", 1e5)]
)
def test_scales_that_fp16_cannot_hold_are_a_misfit(scheme: str, factor: float) -> None:
    held = round_to_nearest(torch.randn(4, 64), Scheme.parse(scheme))
    check_numbers(held)
    with pytest.raises(Misfit):
        check_numbers(Quantized(held.q, held.scale * factor, held.zero_point, held.scheme))


def test_zero_points_times_scales_must_be_held_too() -> None:
    scale: Tensor = torch.full((1, 1), 1 + 2**-10)  # 11 bits: fp16 holds it, but not 13 times it
    held = Quantized(torch.zeros(1, 32, dtype=torch.uint8), scale, torch.full((1, 1), 13, dtype=torch.uint8),
                     Scheme.parse("w4a16-g32-asym"))  # fmt: skip
    with pytest.raises(Misfit) as misfit:
        check_numbers(held)
    assert misfit.value.nearest == "w4a16-g32"


def test_files_quantized_anew_are_told_not_demanded_to_be_equal() -> None:
    told = Verification("a reader", 3, 0, 0, rounded=0.05, error=0.2, exact=False)
    assert told.check("file") is told and "the trained grid is NOT kept" in str(told)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="llama-cpp-python is installed")
def test_k_quants_without_llama_cpp_say_what_to_install(tmp_path: Path) -> None:
    model = convert(network("Llama", num_hidden_layers=1), "w4a16-g32")
    with pytest.raises(ConfigError, match=r'pip install "qat-plugin\[gguf-k\]"'):
        export_model(model, "gguf", tmp_path / "model", options={"kquant": "Q4_K_M"})
