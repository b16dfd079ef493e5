"""What a verification demands of float tensors, and what it only tells."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qat_plugin.errors import ConfigError, ExportError
from qat_plugin.exporting.formats import FORMATS, format_named
from qat_plugin.exporting.verification import Comparison, relative_difference


def test_a_float_tensor_with_one_other_number_is_an_error() -> None:
    held = torch.linspace(-1, 1, 4096)
    read = held.clone()
    read[1234] += 1e-7
    Comparison().plain("norm.weight", held, held.clone())
    with pytest.raises(ExportError, match=r"norm\.weight: the file holds other numbers than the model's in float32"):
        Comparison().plain("norm.weight", held, read)
    with pytest.raises(ExportError, match="other numbers"):
        Comparison().plain("codes", torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([1, 3], dtype=torch.uint8))


def test_rounding_to_the_files_type_is_told_and_nothing_else_allowed() -> None:
    held = torch.linspace(-1, 1, 4097)
    seen = Comparison()
    seen.plain("embedding", held, held.bfloat16().float(), torch.bfloat16)
    found = seen.verification("reader")
    assert found.check("file") is found and 1e-4 < found.rounded < 2**-8
    with pytest.raises(ExportError, match="in float16"):
        Comparison().plain("embedding", held, held.bfloat16().float(), torch.float16)


def test_numbers_outside_the_files_type_are_an_error() -> None:
    held = torch.tensor([1.0, 1e6])
    seen = Comparison()
    seen.plain("embedding", held, held.half().float(), torch.float16)
    with pytest.raises(ExportError, match="do not fit in"):
        seen.verification("reader").check("file")


def test_nan_that_is_held_is_no_difference() -> None:
    held = torch.tensor([1.0, float("nan"), float("-inf")])
    seen = Comparison()
    seen.plain("mask", held, held.clone())
    assert seen.verification("reader").check("file").rounded == 0


def test_files_quantized_anew_are_told_how_far_they_are() -> None:
    seen = Comparison()
    seen.requantized("weight", torch.ones(8), torch.full((8,), 1.5))
    found = replace(seen.verification("reader"), exact=False)
    assert found.check("file").rounded == pytest.approx(0.5)


def test_relative_difference_is_of_norms_in_float64() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 700, 2100), torch.randn(3, 700, 2100)
    wanted = float((a.double() - b.double()).norm() / b.double().norm())
    assert relative_difference(a, b) == pytest.approx(wanted, rel=1e-12)
    assert relative_difference(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")
    assert relative_difference(torch.ones(1), torch.zeros(1)) == float("inf")


@pytest.mark.parametrize("given", [{"kquant": 5}, {"name": 5}, {"name": None}, {"outputs": "no"}, {"outputs": 1}])
def test_options_of_another_type_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"option {next(iter(given))}=.* is of type .*; it takes"):
        format_named("gguf").options(given)


def test_every_option_is_of_a_type_that_is_checked() -> None:
    from dataclasses import fields
    from typing import get_type_hints

    for entry in FORMATS.values():
        if not entry.missing:
            kind = entry.writer().Options
            assert set(get_type_hints(kind).values()) <= {str, bool, int, bool | None}
            entry.options({field.name: getattr(kind(), field.name) for field in fields(kind)})
