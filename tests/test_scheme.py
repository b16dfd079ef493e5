"""Schemes: every spelling is read, printed back and counted; every other is refused with the grammar."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat_plugin import Scheme
from qat_plugin.errors import SchemeError
from qat_plugin.scheme import EXAMPLES


@st.composite
def spellings(draw: st.DrawFn) -> str:
    parts = [f"w{draw(st.sampled_from([8, 4, 3, 2]))}"]
    activation = draw(st.sampled_from([16, 8]))
    parts[0] += f"a{activation}"
    if activation == 8 and draw(st.booleans()):
        parts.append("static")
    granularity = draw(st.one_of(st.none(), st.just("tensor"), st.integers(1, 4096).map(lambda n: f"g{n}")))
    parts += [granularity] if granularity else []
    parts += ["asym"] if draw(st.booleans()) else []
    return "-".join(parts)


@given(spellings())
def test_every_spelling_is_printed_back(spelling: str) -> None:
    scheme = Scheme.parse(spelling)
    assert str(scheme) == spelling
    assert Scheme.parse(scheme) is scheme
    assert {scheme: 1}[Scheme.parse(spelling.upper())] == 1


@pytest.mark.parametrize("spelling", EXAMPLES)
def test_the_examples_are_spellings(spelling: str) -> None:
    assert str(Scheme.parse(spelling)) == spelling


@pytest.mark.parametrize(
    ("spelling", "in_features", "bits"),
    [
        ("fp32", None, 32), ("bf16", None, 16), ("fp16", None, 16),
        ("w8a16", None, 8), ("w8a16", 64, 8 + 16 / 64), ("w8a16-g32", None, 8.5), ("w8a8", 4096, 8 + 16 / 4096),
        ("w4a16-g32", None, 4.5), ("w4a16-g128", None, 4.125), ("w4a8-g32-asym", None, 4 + 24 / 32),
        ("w3a16-g32", None, 3.5), ("w2a16-g32-asym", None, 2.75), ("w8a8-tensor", 64, 8),
        ("nf4", None, 4.5), ("nf4-dq", None, 4 + 8 / 64 + 32 / (64 * 256)),
    ],
)  # fmt: skip
def test_bits_per_weight(spelling: str, in_features: int | None, bits: float) -> None:
    assert Scheme.parse(spelling).bits_per_weight(in_features) == bits


@pytest.mark.parametrize(
    ("spelling", "qmin", "qmax"),
    [("w8a8", -127, 127), ("w4a16-g32", -8, 7), ("w3a16-g32", -4, 3), ("w2a16-g32", -2, 1), ("w4a16-g32-asym", 0, 15)],
)
def test_integer_ranges(spelling: str, qmin: int, qmax: int) -> None:
    scheme = Scheme.parse(spelling)
    assert (scheme.qmin, scheme.qmax) == (qmin, qmax)


@pytest.mark.parametrize(
    ("spelling", "text"),
    [
        ("int4", "unknown scheme 'int4'. Did you mean 'w4a16-g32'"),
        ("INT-8", "Did you mean 'w8a8'"),
        ("bfloat16", "Did you mean 'bf16'"),
        ("w4a16g32", "Did you mean 'w4a16-g32'"),
        ("w5a8", "5-bit weights.*8, 4, 3 and 2"),
        ("w4a4", "4-bit activations"),
        ("w4a8-g0", "group size 0.*at least 1"),
        ("w4a8-g-32", "unknown scheme"),
        ("w4a8-asym-g32", "'-g32' is not understood there"),
        ("w4a8-g32-tensor", "'-tensor' is not understood"),
        ("w8a16-static", "needs 8-bit activations"),
        ("w4a8-g32-fast", "'-fast'"),
        ("", "unknown scheme"),
        (None, "not NoneType"),
        (4, "not int"),
    ],
)
def test_other_spellings_are_refused_with_what_is_allowed(spelling: str, text: str) -> None:
    with pytest.raises(SchemeError, match=text):
        Scheme.parse(spelling)


def test_a_scheme_knows_its_float_type() -> None:
    assert Scheme.parse("bf16").float_dtype is torch.bfloat16
    with pytest.raises(SchemeError, match="no float storage type"):
        _ = Scheme.parse("w8a8").float_dtype


def test_the_weight_format_leaves_activations_out() -> None:
    assert Scheme.parse("w8a8-static").weight_format == Scheme.parse("w8a8").weight_format == Scheme.parse("w8a16")
