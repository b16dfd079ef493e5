"""The numbers that a weight has in NF4, some rows at a time."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from qat_plugin.qlora.extra import import_extra
from qat_plugin.qlora.nf4 import Backend, dequantized, nf4_linear
from qat_plugin.scheme import Scheme

_BLOCK: Final = 64


class Nf4Rows:
    """Float32 values of ``NF4(weight)``; half a byte per weight is held, and what is asked for.

    Widths that are not multiples of the block of 64, and torchao's NF4, are dequantized as a whole, once.

    Args:
        weight: [out_features, in_features], any float type; quantized as training quantizes its base.
        scheme: ``nf4`` or ``nf4-dq``.
        backend: who quantizes.
    """

    def __init__(self, weight: Tensor, scheme: Scheme, backend: Backend) -> None:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        self.layer = nf4_linear(linear, scheme, backend=backend)
        self.shape = tuple(weight.shape)
        self.state: Any = getattr(self.layer.weight, "quant_state", None)
        # only rows that start with a block can be taken by themselves
        in_pieces = self.state is not None and weight.shape[1] % _BLOCK == 0
        self.scales = self._scales() if in_pieces else None
        self.whole = None if in_pieces else dequantized(self.layer)

    def _scales(self) -> Tensor:
        """One float32 absmax per block; double-quantized ones taken back, as bitsandbytes does on each use."""
        absmax: Tensor = self.state.absmax
        if self.state.nested:
            functional = import_extra("bitsandbytes.functional")
            absmax = functional.dequantize_blockwise(absmax, self.state.state2) + self.state.offset
        return absmax.float()

    def values(self, rows: slice = slice(None)) -> Tensor:
        """Float32 [rows, in_features], equal to the same rows of the whole dequantized weight."""
        start, stop, _ = rows.indices(self.shape[0])
        columns = self.shape[1]
        first, last = start * columns, stop * columns
        if self.scales is None:
            assert self.whole is not None
            return self.whole[rows]
        codes = self.layer.weight.data.reshape(-1)[first // 2 : last // 2]
        scales = self.scales[first // _BLOCK : last // _BLOCK]
        count = (stop - start) * columns  # as one row: see nf4_product
        values: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, _BLOCK, "nf4", (1, count), torch.float32)
        return values.reshape(stop - start, columns)
