"""The vocabulary of representations: how one layer's weight and activation are stored and computed.

A :class:`Scheme` is a frozen value that is spelled as the field spells it, parsed from that spelling and printed back::

    fp32  bf16  fp16                  stored as that float type
    w8a16  w8a16-g32                  INT8 weight-only: a scale per output channel, or per group of 32 inputs
    w8a8                              INT8 weight per channel, INT8 activation per token (dynamic)
    w8a8-static                       INT8 weight per channel, INT8 activation per tensor (calibrated)
    w4a16-g32  w4a8-g32               INT4 weight per group; activation 16 bits or INT8 per token
    w3a16-g32  w2a16-g32              below four bits
    ...-asym                          a zero point per scale        ...-tensor   one scale for the whole weight
    nf4  nf4-dq                       QLoRA's base, without and with double quantization
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch

from qat_plugin.errors import SchemeError, did_you_mean

FLOAT_DTYPES: Final[dict[str, torch.dtype]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

EXAMPLES: Final[tuple[str, ...]] = (
    *FLOAT_DTYPES,
    "w8a16", "w8a16-g32", "w8a8", "w8a8-static",
    "w4a16-g32", "w4a16-g64", "w4a16-g128", "w4a16-g32-asym", "w4a8-g32",
    "w3a16-g32", "w3a16-g32-asym", "w2a16-g32", "w2a16-g32-asym",
    "nf4", "nf4-dq",
)  # fmt: skip

# What people say, and the schemes it may stand for.
_COLLOQUIAL: Final[dict[str, str]] = {
    **dict.fromkeys(("int4", "4bit", "w4", "q40"), "'w4a16-g32' (INT4 weights) or 'w4a8-g32' (and INT8 activations)"),
    **dict.fromkeys(("int8", "8bit", "w8", "q80"), "'w8a8' (INT8 weights and activations) or 'w8a16' (weights only)"),
    **dict.fromkeys(("float32", "float", "fp"), "'fp32'"),
    **dict.fromkeys(("bfloat16",), "'bf16'"),
    **dict.fromkeys(("float16", "half"), "'fp16'"),
}
_SPELLING = re.compile(r"w(?P<w>\d+)a(?P<a>\d+)(?P<suffixes>(?:-[a-z0-9]+)*)")
_GRAMMAR = (
    "a scheme is fp32, bf16, fp16, nf4, nf4-dq or w{8,4,3,2}a{16,8} followed, in this order, by any of "
    "-static, -gN (N >= 1 weights a group) or -tensor, -asym; for example " + ", ".join(EXAMPLES[3:])
)

Granularity = Literal["tensor", "channel", "group"]


@dataclass(frozen=True)
class Scheme:
    """How one layer is represented.

    Attributes:
        kind: ``"float"``, ``"integer"`` or ``"nf4"``.
        float_name: ``"fp32"``, ``"bf16"`` or ``"fp16"`` for ``kind="float"``, else ``None``.
        weight_bits: bits of one stored weight (integer schemes: 8, 4, 3 or 2; NF4: 4).
        activation_bits: 8 for INT8 activations, 16 for "left in the model's float type".
        group_size: weights of one row that share a scale; ``None`` for one scale per output channel.
        per_tensor: one scale for the whole weight.
        symmetric: no zero point.
        static: the activation scale is calibrated, one per tensor; otherwise it is computed per token.
        double_quant: NF4 only: the scales themselves are quantized to 8 bits (QLoRA, arXiv:2305.14314, section 3).

    Raises:
        SchemeError: for a combination of fields that no spelling stands for.
    """

    kind: Literal["float", "integer", "nf4"]
    float_name: str | None = None
    weight_bits: int = 16
    activation_bits: int = 16
    group_size: int | None = None
    per_tensor: bool = False
    symmetric: bool = True
    static: bool = False
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.kind == "float":
            if self.float_name not in FLOAT_DTYPES:
                raise SchemeError(f"float scheme {self.float_name!r} is not one of {', '.join(FLOAT_DTYPES)}")
            return
        if self.kind == "nf4":
            return
        if self.weight_bits not in (8, 4, 3, 2):
            raise SchemeError(f"{self.weight_bits}-bit weights are not supported; allowed are 8, 4, 3 and 2")
        if self.activation_bits not in (16, 8):
            raise SchemeError(f"{self.activation_bits}-bit activations are not supported; allowed are 16 (float) and 8")
        if self.group_size is not None and self.group_size < 1:
            raise SchemeError(f"group size {self.group_size} is not allowed; give at least 1, for example g32")
        if self.group_size is not None and self.per_tensor:
            raise SchemeError(f"-g{self.group_size} and -tensor exclude each other: choose one granularity")
        if self.static and self.activation_bits != 8:
            raise SchemeError(f"-static needs 8-bit activations, this scheme has {self.activation_bits}-bit ones")

    @classmethod
    def parse(cls, spelling: str | Scheme) -> Scheme:
        """Parse a spelling such as ``"w4a8-g32"``; a Scheme is returned as it is.

        Raises:
            SchemeError: when the spelling is not one; the message gives the grammar and the closest known spelling.
        """
        if isinstance(spelling, Scheme):
            return spelling
        if not isinstance(spelling, str):
            raise SchemeError(f"a scheme is a string such as 'w4a8-g32', not {type(spelling).__name__} ({spelling!r})")
        text = spelling.strip().lower()
        if text in FLOAT_DTYPES:
            return cls("float", float_name=text, weight_bits=FLOAT_DTYPES[text].itemsize * 8)
        if text in ("nf4", "nf4-dq"):
            return cls("nf4", weight_bits=4, group_size=64, double_quant=text == "nf4-dq")
        match = _SPELLING.fullmatch(text)
        if match is None:
            colloquial = _COLLOQUIAL.get(text.replace("-", "").replace("_", ""))
            hint = f" Did you mean {colloquial}?" if colloquial else did_you_mean(text, EXAMPLES)
            raise SchemeError(f"unknown scheme {spelling!r}.{hint} In general, {_GRAMMAR}")
        fields = _parse_suffixes(spelling, [part for part in match["suffixes"].split("-") if part])
        return cls("integer", weight_bits=int(match["w"]), activation_bits=int(match["a"]), **fields)  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self.kind == "float":
            return str(self.float_name)
        if self.kind == "nf4":
            return "nf4-dq" if self.double_quant else "nf4"
        parts = [f"w{self.weight_bits}a{self.activation_bits}"]
        if self.static:
            parts.append("static")
        if self.group_size is not None:
            parts.append(f"g{self.group_size}")
        if self.per_tensor:
            parts.append("tensor")
        if not self.symmetric:
            parts.append("asym")
        return "-".join(parts)

    @property
    def is_float(self) -> bool:
        """Whether the weight is stored as a float type."""
        return self.kind == "float"

    @property
    def is_integer(self) -> bool:
        """Whether the weight is stored as integers with scales."""
        return self.kind == "integer"

    @property
    def float_dtype(self) -> torch.dtype:
        """The storage type of a float scheme.

        Raises:
            SchemeError: on an integer or NF4 scheme.
        """
        if self.float_name is None:
            raise SchemeError(f"scheme {self} has no float storage type")
        return FLOAT_DTYPES[self.float_name]

    @property
    def granularity(self) -> Granularity:
        """Which weights share a scale: ``"tensor"``, ``"channel"`` or ``"group"``."""
        if self.per_tensor:
            return "tensor"
        return "channel" if self.group_size is None else "group"

    @property
    def quantizes_activations(self) -> bool:
        """Whether the layer's input is rounded to INT8."""
        return self.is_integer and self.activation_bits == 8

    @property
    def qmin(self) -> int:
        """Least stored integer: -127 for symmetric INT8, -2^(b-1) for other symmetric, 0 for asymmetric."""
        if not self.symmetric:
            return 0
        return -127 if self.weight_bits == 8 else -(1 << (self.weight_bits - 1))

    @property
    def qmax(self) -> int:
        """Greatest stored integer: 2^(b-1) - 1 for symmetric, 2^b - 1 for asymmetric."""
        return (1 << self.weight_bits) - 1 if not self.symmetric else (1 << (self.weight_bits - 1)) - 1

    @property
    def weight_format(self) -> Scheme:
        """The part that the weight alone decides: the same scheme with activations left alone."""
        return replace(self, activation_bits=16, static=False) if self.is_integer else self

    def with_group_size(self, group_size: int) -> Scheme:
        """The same scheme with another group size."""
        return replace(self, group_size=group_size)

    def bits_per_weight(self, in_features: int | None = None) -> float:
        """Bits stored per weight, scales (16 bits) and zero points (8 bits) included.

        Args:
            in_features: weights that share one per-channel scale. Without it a per-channel or per-tensor scale counts
                as nothing, which is what it costs in a large layer.
        """
        if self.is_float:
            return float(self.weight_bits)
        if self.kind == "nf4":  # 32-bit absmax per 64 weights; double-quantized: 8 bits, and 32 bits per 256 of them
            return 4 + (8 / 64 + 32 / (64 * 256) if self.double_quant else 32 / 64)
        shared = self.group_size if self.group_size is not None else (None if self.per_tensor else in_features)
        overhead = 16 + (0 if self.symmetric else 8)
        return self.weight_bits + (overhead / shared if shared else 0.0)


def _parse_suffixes(spelling: str, suffixes: list[str]) -> dict[str, int | bool]:
    """Read ``-static``, ``-gN`` or ``-tensor``, ``-asym``, in that order."""
    fields: dict[str, int | bool] = {}
    rest = list(suffixes)
    if rest and rest[0] == "static":
        fields["static"] = True
        rest.pop(0)
    if rest and re.fullmatch(r"g\d+", rest[0]):
        fields["group_size"] = int(rest.pop(0)[1:])
    elif rest and rest[0] == "tensor":
        fields["per_tensor"] = True
        rest.pop(0)
    if rest and rest[0] == "asym":
        fields["symmetric"] = False
        rest.pop(0)
    if rest:
        raise SchemeError(f"unknown scheme {spelling!r}: '-{rest[0]}' is not understood there; {_GRAMMAR}")
    return fields
