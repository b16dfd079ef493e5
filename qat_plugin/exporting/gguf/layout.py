"""What the file will hold: each tensor's name, type and shape, in the order in which it is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qat_plugin.errors import ExportError
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.gguf.blocks import BYTES, WEIGHTS, pack_q4_0, pack_q4_1, pack_q8_0
from qat_plugin.exporting.gguf.families import Family, family_of
from qat_plugin.exporting.gguf.fits import float_type, written_type
from qat_plugin.exporting.gguf.options import Options
from qat_plugin.exporting.gguf.rope import frequency_factors
from qat_plugin.kernels.weight import CastWeight, QuantizedWeight
from qat_plugin.numerics import Quantized

ROPE_FACTORS = "rope_freqs.weight"
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""Float types by GGUF's name."""
_OPTIONS = {"f16": "F16", "bf16": "BF16", "f32": "F32"}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: in the file.
        source: the parameter it is of; empty for one that no parameter is.
        kind: GGUF's name of its type.
        shape: of the numbers, as PyTorch orders them.
        heads: rows are reordered within each of so many heads; 0 for not at all.
        offset: added to each number.
    """

    name: str
    source: str
    kind: str
    shape: tuple[int, ...]
    heads: int = 0
    offset: float = 0.0

    @property
    def blocks(self) -> bool:
        """Whether it holds integers."""
        return self.kind in BYTES

    @property
    def nbytes(self) -> int:
        """In the file."""
        count = int(np.prod(self.shape, dtype=np.int64))
        return count // WEIGHTS * BYTES[self.kind] if self.blocks else count * DTYPES[self.kind].itemsize

    def rows(self) -> NDArray[np.int64] | None:
        """Which row of the model stands at each row of the file; ``None`` for the same."""
        return None if not self.heads else interleaved(self.shape[0], self.heads)


def interleaved(rows: int, heads: int) -> NDArray[np.int64]:
    """Rows of q or k as llama.cpp rotates them: pairs side by side, not half a head apart."""
    order: NDArray[np.int64] = np.arange(rows).reshape(heads, 2, rows // heads // 2)
    return np.ascontiguousarray(order.swapaxes(1, 2)).reshape(rows)


def layout(model: Exportable, options: Options) -> list[Entry]:
    """All tensors of the file, by the names of the ``gguf`` package's map.

    Raises:
        ExportError: for parameters that the architecture has no name for.
    """
    family = family_of(model.config, model.network)
    names = _Names(model.config, family)
    entries, unknown = [], []
    for source, tensor in state(model).items():
        target = names.target(source)
        if target is None:
            unknown.append(source)
        elif source in model.layers:
            layer = model.layers[source]
            kind = float_type(layer.weight) if options.kquant else written_type(layer, options.indivisible)
            shape = (layer.weight.out_features, layer.weight.in_features)
            entries.append(Entry(target, source, kind, shape, names.heads(target)))
        else:
            kind = _float_kind(tensor, options.float_type)
            offset = family.norm_offset if source.endswith("norm.weight") else 0.0
            entries.append(Entry(target, source, kind, tuple(tensor.shape), names.heads(target), offset))
    if unknown:
        raise ExportError(
            f"GGUF's {family.architecture} has no place for {', '.join(unknown[:8])}"
            + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
        )
    factors = frequency_factors(model.config)
    if factors is not None:
        entries.append(Entry(ROPE_FACTORS, "", "F32", tuple(factors.shape)))
    return entries


def state(model: Exportable) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, tied ones once; cast weights as they are stored."""
    kept = model.network.state_dict(keep_vars=True)
    return {
        name: (tensor.data_ if isinstance(tensor, CastWeight) else tensor).detach()
        for name, tensor in kept.items()
        if name not in model.ties
    }


def integers(model: Exportable, entry: Entry) -> Quantized:
    """Of a quantized entry, rows in the file's order."""
    held = model.layers[entry.source].integers
    rows = entry.rows()
    if rows is None:
        return held
    taken = torch.from_numpy(rows)
    if held.scheme.per_tensor:
        return Quantized(held.q[taken], held.scale, held.zero_point, held.scheme)
    zero_point = None if held.zero_point is None else held.zero_point[taken]
    return Quantized(held.q[taken], held.scale[taken], zero_point, held.scheme)


def numbers(model: Exportable, entry: Entry, tensor: Tensor) -> Tensor:
    """The float numbers an entry stands for, before the file's type rounds them: rows in the file's order.

    Args:
        model: for the frequencies.
        entry: no block type.
        tensor: :func:`state`'s, of the entry's source.
    """
    if entry.name == ROPE_FACTORS:
        factors = frequency_factors(model.config)
        assert factors is not None
        return factors
    tensor = (tensor.dequantize(torch.float32) if isinstance(tensor, QuantizedWeight) else tensor).cpu()
    if entry.offset:
        tensor = tensor.float() + entry.offset
    rows = entry.rows()
    return tensor if rows is None else tensor[torch.from_numpy(rows)]


def arrays(model: Exportable, entries: list[Entry]) -> Iterator[NDArray[Any]]:
    """The bytes of each entry, one at a time, as numpy arrays of the file's type."""
    held = state(model)
    for entry in entries:
        if entry.blocks:
            quantized = integers(model, entry)
            yield _PACK[entry.kind](quantized)
        else:
            floats = numbers(model, entry, held.get(entry.source, torch.empty(0))).to(DTYPES[entry.kind])
            floats = floats.contiguous()
            yield floats.view(torch.int16).numpy() if entry.kind == "BF16" else floats.numpy()


_PACK = {
    "Q8_0": lambda held: pack_q8_0(held.q, held.scale),
    "Q4_0": lambda held: pack_q4_0(held.q, held.scale),
    "Q4_1": lambda held: pack_q4_1(held.q, held.scale, held.zero_point),
}


def _float_kind(tensor: Tensor, chosen: str) -> str:
    if tensor.dim() < 2:
        return "F32"  # what ggml's operators take: norms and biases
    if chosen != "exact":
        return _OPTIONS[chosen]
    own = next((name for name, dtype in DTYPES.items() if dtype == tensor.dtype), None)
    if own in ("F16", "BF16"):
        return own
    return next((name for name in ("F16", "BF16") if _holds(tensor, DTYPES[name])), "F32")


def _holds(tensor: Tensor, dtype: torch.dtype) -> bool:
    return all(torch.equal(rows.to(dtype).to(rows.dtype), rows) for rows in tensor.split(4096))


class _Names:
    """Names of parameters in the file."""

    def __init__(self, config: Any, family: Family) -> None:
        import gguf

        architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
        self._map = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
        self._family = family
        self._heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}

    def target(self, source: str) -> str | None:
        """``None`` where the architecture has no such tensor."""
        name, _, suffix = source.rpartition(".")
        if suffix == "bias" and name.rpartition(".")[2] not in self._family.biases:
            return None
        found = self._map.get_name(name) if suffix in ("weight", "bias") else None
        return None if found is None else f"{found}.{suffix}"

    def heads(self, target: str) -> int:
        """Of a tensor whose rows are reordered; else 0."""
        part = target.split(".")[-2]
        return self._heads.get(part, 0) if self._family.permutes else 0
