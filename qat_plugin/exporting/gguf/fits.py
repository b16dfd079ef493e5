"""Which of GGUF's block types holds a quantized layer as it is, or why none does."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qat_plugin.errors import ExportError
from qat_plugin.exporting.contents import Layer
from qat_plugin.exporting.gguf.blocks import WEIGHTS, fp16_holds
from qat_plugin.exporting.refusal import Refusal
from qat_plugin.kernels.weight import QuantizedWeight
from qat_plugin.numerics import Quantized
from qat_plugin.scheme import Scheme

_WAY_OUT = " (the option indivisible=float writes floats of exactly the same numbers)"


@dataclass(eq=False)
class Misfit(Exception):
    """Why a layer does not fit.

    Attributes:
        reason: a few words.
        nearest: spelling of the nearest scheme that fits, or empty.
        tiling: blocks of 32 do not tile it, so that its numbers could be written as floats.
    """

    reason: str
    nearest: str = ""
    tiling: bool = False

    def refusal(self, layer: Layer) -> Refusal:
        """For the message."""
        return Refusal(layer.name, str(layer.scheme), self.reason, self.nearest)


def block_type(layer: Layer) -> str:
    """``Q8_0``, ``Q4_0`` or ``Q4_1`` for a layer, by its scheme and shape alone.

    Raises:
        Misfit: when none of them holds it.
    """
    scheme, weight, columns = layer.scheme, layer.weight, layer.weight.in_features
    if weight.usage == "conv":
        raise Misfit("convolutions have no place in these architectures")
    if weight.transposed:
        raise Misfit("weights that are stored transposed are of no architecture known here")
    if weight.input_scale is not None:
        raise Misfit("inputs are divided by a scale of their own, which has no place in the file; fold it away "
                     "(SmoothQuant and AWQ do where the layer before is linear)")  # fmt: skip
    if scheme.static:
        raise Misfit("a calibrated activation scale has no place in the file", str(replace(scheme, static=False)))
    if not scheme.is_integer:
        raise Misfit("its numbers are on no grid of GGUF", "w4a16-g32")
    if scheme.weight_bits == 8 and not scheme.symmetric:
        raise Misfit("8-bit blocks have no zero point", str(_tiled(replace(scheme, symmetric=True), columns)))
    if columns % WEIGHTS:
        raise Misfit(f"rows of {columns} weights are not whole blocks of {WEIGHTS}{_WAY_OUT}", "fp16", tiling=True)
    if scheme.group_size is not None and scheme.group_size % WEIGHTS:
        reason = f"groups of {scheme.group_size} are not whole blocks of {WEIGHTS}{_WAY_OUT}"
        raise Misfit(reason, str(_tiled(scheme, columns)), tiling=True)
    if scheme.weight_bits == 8:
        return "Q8_0"
    return "Q4_0" if scheme.symmetric else "Q4_1"


def check_numbers(held: Quantized) -> None:
    """Raise unless fp16 holds every scale, and with zero points every product of both, exactly.

    Raises:
        Misfit: otherwise.
    """
    if not fp16_holds(held.scale.numpy()):
        raise Misfit("fp16 does not hold every scale exactly")
    if held.zero_point is not None and not fp16_holds((held.zero_point.float() * held.scale).numpy()):
        raise Misfit(
            "fp16 does not hold every zero point times its scale exactly", str(replace(held.scheme, symmetric=True))
        )


def float_type(weight: QuantizedWeight) -> str:
    """``F16`` when it holds each number that a weight stands for exactly, else ``F32``."""
    return "F16" if fp16_holds(weight.dequantize(torch.float32).cpu().numpy()) else "F32"


def refusal_of(layer: Layer, indivisible: str) -> Refusal | None:
    """Why a layer cannot be written, or ``None``."""
    try:
        block_type(layer)
        check_numbers(layer.integers)
    except Misfit as misfit:
        return None if misfit.tiling and indivisible == "float" else misfit.refusal(layer)
    return None


def written_type(layer: Layer, indivisible: str) -> str:
    """The type a layer is written in: one of blocks, or of floats where that was asked for.

    Raises:
        ExportError: when it cannot be written.
    """
    try:
        return block_type(layer)
    except Misfit as misfit:
        if misfit.tiling and indivisible == "float":
            return float_type(layer.weight)
        raise ExportError(str(misfit.refusal(layer))) from misfit


def _tiled(scheme: Scheme, columns: int) -> Scheme:
    """The same with the greatest groups, no greater than they are, that blocks tile."""
    size = scheme.group_size
    if size is None or size % WEIGHTS == 0:
        return scheme
    fitting = [groups for groups in (256, 128, 64) if columns % groups == 0 and groups <= size]
    return replace(scheme, group_size=max([WEIGHTS, *fitting]))
