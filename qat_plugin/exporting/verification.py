"""What reading an exported file back has shown: the same integers and scales, and outputs within a stated tolerance."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qat_plugin.errors import ExportError
from qat_plugin.numerics import Quantized, row_chunks

_CHUNK = 1 << 22
_ROUNDING = 2.0**-8  # relative, of bf16, the coarsest type that a file holds floats in; more has left the type's range


@dataclass(frozen=True)
class Verification:
    """Of one file.

    Attributes:
        reader: what read it, with its version: an independent reader, or the runtime itself.
        tensors: quantized tensors compared.
        integers: the largest difference of integers (zero points included); must be 0.
        scales: the largest difference of scales, absolute; must be 0.
        floats: float tensors compared.
        rounded: the largest relative difference of float tensors that the file holds in a narrower type; 0 where it
            holds them as they are.
        error: ``|file's outputs - model's| / |model's|`` (Euclidean norms over all outputs), or ``None`` where nothing
            here runs the file.
        tolerance: what ``error`` may be.
        reason: why it is not 0, or why nothing ran the file, in a few words.
        notes: what else was checked, or what the file does not hold.
        exact: whether the file is to hold the model's integers; otherwise differences are told, not demanded to be 0.
    """

    reader: str
    tensors: int
    integers: float
    scales: float
    floats: int = 0
    rounded: float = 0.0
    error: float | None = None
    tolerance: float = 0.0
    reason: str = ""
    notes: tuple[str, ...] = ()
    exact: bool = True

    def __str__(self) -> str:
        """One line."""
        if not self.exact:
            anew = f"{self.tensors} tensors read by {self.reader}, quantized anew: the trained grid is NOT kept"
            parts = [f"{anew}, weights differ by at most {self.rounded:.1e} relative"]
            if self.error is not None:
                parts.append(f"outputs by {self.error:.1e}")
            return "; ".join([*parts, *self.notes])
        if self.tensors:
            same = (
                f"{self.tensors} quantized tensors read by {self.reader}: integers differ by at most {self.integers:g}"
            )
            parts, kind = [f"{same}, scales by {self.scales:g}"], "float tensors"
        else:  # of adapters and NF4 bases, whose codes are compared as they are
            parts, kind = [f"read by {self.reader}"], "tensors"
        if self.floats:
            parts.append(f"{self.floats} {kind} by {self.rounded:.1e} relative" if self.rounded else
                         f"{self.floats} {kind} equal")  # fmt: skip
        if self.error is None:
            parts.append(f"outputs not compared: {self.reason}")
        else:
            why = f", {self.reason}" if self.reason else ""
            parts.append(f"outputs by {self.error:.1e} relative (allowed {self.tolerance:g}{why})")
        return "; ".join([*parts, *self.notes])

    def check(self, path: object) -> Verification:
        """Itself.

        Raises:
            ExportError: when the file does not hold what was trained.
        """
        if not self.exact:
            return self
        if self.integers != 0 or self.scales != 0:
            raise ExportError(f"{path} does not hold the model's integers and scales: {self}")
        if not self.rounded <= _ROUNDING:
            raise ExportError(f"{path} holds float tensors in a type that their numbers do not fit in: {self}")
        if self.error is not None and not self.error <= self.tolerance:
            raise ExportError(f"{path} holds the model's integers, but computes something else: {self}")
        return self


@dataclass
class Comparison:
    """Differences gathered tensor by tensor.

    ::

        seen = Comparison()
        for name, layer in model.layers.items():
            seen.quantized(name, layer.integers, q, scale, zero_point)
        return seen.verification("transformers 5.23", error=..., tolerance=...)
    """

    _so_far: Verification = field(default_factory=lambda: Verification("", 0, 0.0, 0.0))

    def quantized(self, name: str, held: Quantized, q: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """One quantized tensor as the file has it, all in the model's own orientation and granularity.

        Args:
            name: for the message.
            held: the model's.
            q: integers [out_features, in_features], any integer type.
            scale: [out_features, groups], any float type that holds the file's own values.
            zero_point: of the scale's shape, where the scheme has zero points.

        Raises:
            ExportError: when shapes differ, or one side has zero points.
        """
        if (
            q.shape != held.q.shape
            or scale.shape != held.scale.shape
            or (zero_point is None) != (held.zero_point is None)
        ):
            raise ExportError(
                f"{name}: the file has integers {tuple(q.shape)} and scales {tuple(scale.shape)}, the model "
                f"{tuple(held.q.shape)} and {tuple(held.scale.shape)}"
            )
        integers = _largest(q, held.q, torch.int64)
        if zero_point is not None and held.zero_point is not None:
            integers = max(integers, _largest(zero_point, held.zero_point, torch.int64))
        scales = _largest(scale, held.scale, torch.float64)
        so_far = self._so_far
        self._so_far = replace(
            so_far, tensors=so_far.tensors + 1, integers=_worse(so_far.integers, integers),
            scales=_worse(so_far.scales, scales),
        )  # fmt: skip

    def plain(self, name: str, held: Tensor, read: Tensor, dtype: torch.dtype | None = None) -> None:
        """One float tensor as the file has it, of the model's shape: the model's own numbers, rounded to its type.

        Args:
            name: for the message.
            held: the model's.
            read: the file's.
            dtype: the type that the file holds it in, where ``read`` was widened from it; by default ``read``'s.

        Raises:
            ExportError: when shapes differ, or a number is another one.
        """
        _check_shape(name, held, read)
        kind = read.dtype if dtype is None else dtype
        pairs = zip(held.reshape(-1).split(_CHUNK), read.reshape(-1).split(_CHUNK), strict=True)
        if not all(_same(own.to(kind), other.to(kind)) for own, other in pairs):
            raise ExportError(f"{name}: the file holds other numbers than the model's in {_name(kind)}")
        self._float(0.0 if kind == held.dtype else relative_difference(read, held))

    def requantized(self, name: str, held: Tensor, read: Tensor) -> None:
        """One tensor of a file that was quantized anew: how far its numbers are from the model's.

        Raises:
            ExportError: when shapes differ.
        """
        _check_shape(name, held, read)
        self._float(relative_difference(read, held))

    def _float(self, error: float) -> None:
        so_far = self._so_far
        self._so_far = replace(so_far, floats=so_far.floats + 1, rounded=_worse(so_far.rounded, error))

    def verification(
        self,
        reader: str,
        *,
        error: float | None = None,
        tolerance: float = 0.0,
        reason: str = "",
        notes: tuple[str, ...] = (),
    ) -> Verification:
        """All of it."""
        return replace(self._so_far, reader=reader, error=error, tolerance=tolerance, reason=reason, notes=notes)


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """``|found - wanted| / |wanted|``, Euclidean norms in float64; infinite where one is NaN.

    Raises:
        ValueError: when they have other shapes.
    """
    if found.shape != wanted.shape:
        raise ValueError(f"shapes {tuple(found.shape)} and {tuple(wanted.shape)} cannot be compared")
    difference = norm = 0.0
    for ours, theirs in zip(wanted.reshape(-1).split(_CHUNK), found.reshape(-1).split(_CHUNK), strict=True):
        own = ours.to(torch.float64)
        norm += float(own.square().sum())
        difference += float((theirs.to(torch.float64) - own).square().sum())
    if difference == 0:
        return 0.0
    error = math.sqrt(difference / norm) if norm else math.inf
    return error if error == error else math.inf


def _check_shape(name: str, held: Tensor, read: Tensor) -> None:
    if held.shape != read.shape:
        raise ExportError(f"{name}: the file has {tuple(read.shape)}, the model {tuple(held.shape)}")


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _largest(a: Tensor, b: Tensor, dtype: torch.dtype) -> float:
    """Of the differences of two matrices, which are widened some rows at a time."""
    found = 0.0
    for rows in row_chunks(a):
        difference = a[rows].to(dtype) - b[rows].to(dtype)
        if difference.numel():
            found = _worse(found, float(difference.abs().max()))
    return found


def _worse(a: float, b: float) -> float:
    return float("inf") if a != a or b != b else max(a, b)
