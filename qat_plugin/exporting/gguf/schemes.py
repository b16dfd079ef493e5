"""The trained schemes as a key of the file: what its blocks of 32 do not say.

A block holds integers and a scale. Whether a whole row had that one scale, whether the integers have fewer bits than
their place, and whether inputs are rounded to INT8 is in ``qat_plugin.schemes``: a JSON object of the spelling of each
tensor's scheme, which other readers pass over. It is believed in a sealed file alone: programs that quantize a file
anew copy its keys.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from qat_plugin.errors import CheckpointError, SchemeError
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.gguf.blocks import WEIGHTS
from qat_plugin.exporting.gguf.header import Header
from qat_plugin.exporting.gguf.layout import Entry
from qat_plugin.exporting.gguf.read_blocks import SCHEMES
from qat_plugin.numerics import Quantized
from qat_plugin.scheme import Scheme

KEY: Final = "qat_plugin.schemes"


def spelled(model: Exportable, entries: Sequence[Entry]) -> str:
    """The value of the key, of the tensors that hold integers."""
    return json.dumps({entry.name: str(model.layers[entry.source].scheme) for entry in entries if entry.blocks})


def schemes_of(header: Header) -> dict[str, Scheme]:
    """Name of a tensor in the file -> its scheme; empty for a file without the key.

    Raises:
        CheckpointError: when the key is no such object, or a scheme none that the tensor's blocks hold.
    """
    if KEY not in header.metadata:
        return {}
    try:
        given = json.loads(header.metadata[KEY])
        schemes = {str(name): Scheme.parse(spelling) for name, spelling in given.items()}
    except (TypeError, ValueError, AttributeError, RecursionError, SchemeError) as error:
        raise CheckpointError(f"{header.path} is damaged: {KEY} is no list of schemes ({error})") from error
    for name, scheme in schemes.items():
        info = header.tensors.get(name)
        if info is None or info.kind not in SCHEMES or not _fits(scheme, info.kind, info.shape):
            what = "is not there" if info is None else f"is {info.kind} {info.shape}"
            raise CheckpointError(f"{header.path} is damaged: {KEY} says {scheme} of {name}, which {what}")
    return schemes


def _fits(scheme: Scheme, kind: str, shape: tuple[int, ...]) -> bool:
    blocks = Scheme.parse(SCHEMES[kind])
    bits = {8} if blocks.weight_bits == 8 else {4, 3, 2}
    size = scheme.group_size
    tiled = size is None or (size % WEIGHTS == 0 and shape[-1] % size == 0)
    same = scheme.is_integer and scheme.symmetric == blocks.symmetric and not scheme.static
    return same and scheme.weight_bits in bits and tiled and len(shape) == 2


def regrouped(found: Quantized, scheme: Scheme) -> Quantized | None:
    """The integers of a scheme from those of its blocks: scales that repeat become one.

    Args:
        found: as blocks of 32 hold them.
        scheme: that fits them by type and shape.

    Returns:
        ``None`` when scales of one group differ, or an integer is outside the scheme: it is not theirs.
    """
    if int(found.q.min()) < scheme.qmin or int(found.q.max()) > scheme.qmax:
        return None
    rows = len(found.scale)
    groups = (1, 1) if scheme.per_tensor else (rows, found.q.shape[1] // (scheme.group_size or found.q.shape[1]))
    scale = _collapsed(found.scale, groups)
    zero_point = None if found.zero_point is None else _collapsed(found.zero_point, groups)
    if scale is None or (found.zero_point is not None and zero_point is None):
        return None
    return Quantized(found.q, scale, zero_point, scheme)


def _collapsed(blocks: Tensor, groups: tuple[int, int]) -> Tensor | None:
    """One number for each group, of equal ones."""
    grouped = blocks.reshape(*groups, -1)
    first = grouped[..., :1]
    return first[..., 0].contiguous() if torch.equal(grouped, first.expand_as(grouped)) else None
