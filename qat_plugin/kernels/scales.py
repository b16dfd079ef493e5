"""The float type that scales are held in: two bytes where those hold them exactly.

Scales of this project's own numerics are exact in bf16. Those of files made elsewhere need not be: GGUF has fp16 ones,
with three more significant bits. They are held as they are, and a kernel that only takes bf16 is passed over.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_DTYPE = torch.bfloat16  # that of every scale that this project chooses

ANY_SCALES = (torch.bfloat16, torch.float16, torch.float32)


def scale_dtype(scale: Tensor) -> torch.dtype:
    """The first of bf16, fp16 and float32 that holds float32 scales exactly."""
    if scale.is_meta:
        return SCALE_DTYPE
    for dtype in (SCALE_DTYPE, torch.float16):
        held = scale.to(dtype).to(scale.dtype)
        if bool(((held == scale) | scale.isnan()).all()):
            return dtype
    return torch.float32
