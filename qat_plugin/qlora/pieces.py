"""A weight in pieces of bounded size, for quantizers whose blocks are independent."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qat_plugin.errors import PrepareError


def flat_pieces(weight: Tensor, size: int, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """The flattened weight, ``size`` numbers at a time.

    Only whole rows are moved and cast, so that a transposed weight (Conv1D) is never copied as a whole.

    Args:
        weight: [out_features, in_features], with any strides.
        size: numbers in a piece; the last one is shorter.
        device, dtype: of the pieces.

    Yields:
        Where the piece starts in the flattened weight, and the piece, [size].

    Raises:
        PrepareError: for NaN or infinity, in the weight or after the cast.
    """
    columns = weight.shape[1]
    for start in range(0, weight.numel(), size):
        stop = min(start + size, weight.numel())
        first, last = start // columns, -(-stop // columns)
        rows = weight[first:last].to(device, dtype).reshape(-1)
        piece = rows[start - first * columns : stop - first * columns]
        if not torch.isfinite(piece).all():
            raise PrepareError("the weight holds NaN or infinity, which has no NF4 form")
        yield start, piece
