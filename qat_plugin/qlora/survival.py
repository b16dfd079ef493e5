"""What of an update survives in the weights that are stored: a cosine per layer and choice.

The true update D is what training added to a base weight W. A choice of storage rounds the base to Q(W) and the merged
weight to Q(W + D), so that the stored weight has changed by Q(W + D) - Q(W). The cosine of the two is 1 when all of the
update is there; a small update on a coarse grid moves hardly any weight to another level, and the cosine goes to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor

from qat_plugin.errors import ConfigError, QatError
from qat_plugin.numerics import round_to_nearest
from qat_plugin.policy import largest_divisor
from qat_plugin.qlora.nf4 import Backend
from qat_plugin.qlora.nf4_rows import Nf4Rows
from qat_plugin.qlora.updates import Update
from qat_plugin.scheme import Scheme

_CHUNK: Final = 1 << 22  # elements taken to float64 at a time


@dataclass(frozen=True)
class Survival:
    """One layer's row of the table.

    Attributes:
        name: the layer.
        size: ``|D| / |W|``, the Frobenius norm of the update over that of the base weight.
        cosines: choice -> cosine between what the stored weight changed by and the true update. The choices are
            ``"original"`` (into the 16-bit weights), ``"nf4-exact"`` (dequantized base plus update, stored in 16 bits)
            and the spelling of each scheme that was asked for.
    """

    name: str
    size: float
    cosines: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def survival(reference: Tensor, merged: Tensor, delta: Tensor) -> float:
    """Cosine between what a stored weight changed by and the true update, in float64.

    Args:
        reference: the stored weight without the update, any shape and float type.
        merged: the stored weight with it.
        delta: the true update.

    Returns:
        1 when the change is the update (up to its length), 0 when nothing changed; 1 when there was no update and
        nothing changed.

    Raises:
        QatError: when the shapes differ, or a value is NaN or infinite.
    """
    if not reference.shape == merged.shape == delta.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (reference, merged, delta))
        raise QatError(f"survival compares tensors of one shape, got {shapes}")
    product = change = update = 0.0
    flat = [tensor.detach().reshape(-1) for tensor in (reference, merged, delta)]
    for start in range(0, delta.numel(), _CHUNK):
        before, after, true = (part[start : start + _CHUNK].to("cpu", torch.float64) for part in flat)
        moved = after - before
        product += torch.dot(moved, true).item()
        change += moved.square().sum().item()
        update += true.square().sum().item()
    if not math.isfinite(product + change + update):
        raise QatError("survival is not defined: a tensor has NaN or infinite values")
    if change == 0.0 or update == 0.0:
        return 1.0 if change == update else 0.0
    return product / math.sqrt(change * update)


def survival_table(
    layers: Iterable[tuple[str, Tensor, Update]],
    schemes: Sequence[str | Scheme] = (),
    *,
    base: str | Scheme = "nf4-dq",
    dtype: torch.dtype = torch.bfloat16,
    backend: Backend = "bitsandbytes",
) -> tuple[Survival, ...]:
    """What each choice of storage keeps of each layer's update.

    Args:
        layers: (name, original weight [out, in], its adapter), one at a time; :func:`~qat_plugin.qlora.merge_files.
            updated_weights` reads them from a base directory and an adapter.
        schemes: integer schemes, from the original weight; and ``nf4`` or ``nf4-dq`` for quantizing again what was
            trained on NF4: there the base lies on its grid already, and an update must be about half a step of the
            grid to move it.
        base: the scheme that the adapter was trained on.
        dtype: the 16-bit type that merged weights are stored in.
        backend: for NF4.

    Returns:
        One row per layer. Where a scheme's groups do not divide a layer, they are the largest that do.

    Raises:
        ConfigError: when a scheme is a float one.
    """
    asked = [Scheme.parse(scheme) for scheme in schemes]
    for scheme in asked:
        if scheme.is_float:
            raise ConfigError(f"survival in {scheme}: give dtype={scheme.float_dtype} instead")
    trained_on = Scheme.parse(base)
    rows = []
    for name, weight, update in layers:
        original = weight.float()
        merged = update.merged(weight)
        delta = merged - original
        cosines = {"original": survival(original, merged.to(dtype), delta)}
        nf4 = (original, merged, delta)
        if trained_on.kind == "nf4":
            start = _rounded(original, trained_on, backend)
            nf4 = (start, update.merged(start), update.merged(start) - start)
            cosines["nf4-exact"] = survival(start, nf4[1].to(dtype), nf4[2])
        for scheme in asked:
            before, after, true = nf4 if scheme.kind == "nf4" else (original, merged, delta)
            stored = (_rounded(before, scheme, backend), _rounded(after, scheme, backend))
            cosines[str(scheme)] = survival(*stored, true)
        size = torch.linalg.vector_norm(delta) / torch.linalg.vector_norm(original)
        rows.append(Survival(name, float(size), cosines))
    return tuple(rows)


def mean_cosines(table: Sequence[Survival]) -> dict[str, float]:
    """Choice -> mean cosine over the layers that have it."""
    names = dict.fromkeys(choice for row in table for choice in row.cosines)
    return {
        name: math.fsum(found) / len(found)
        for name in names
        if (found := [row.cosines[name] for row in table if name in row.cosines])
    }


def check_requantization(
    scheme: str | Scheme,
    layers: Iterable[tuple[str, Tensor, Update]] | Callable[[], Iterable[tuple[str, Tensor, Update]]],
    *,
    accept_loss: bool = False,
    backend: Backend = "bitsandbytes",
) -> Mapping[str, float]:
    """Refuse to quantize merged weights into NF4 again, with what would be left of the update.

    Args:
        scheme: what the merged weights shall become; any but ``nf4`` and ``nf4-dq`` pass.
        layers: as :func:`survival_table` takes them.
        accept_loss: measure, and do not refuse.
        backend: for NF4.

    Returns:
        Layer -> measured cosine; empty for other schemes.

    Raises:
        ConfigError: for NF4 without ``accept_loss``, quoting the mean and the least cosine.
    """
    target = Scheme.parse(scheme)
    if target.kind != "nf4":
        return {}
    table = survival_table(layers() if callable(layers) else layers, [target], base=target, backend=backend)
    cosines = {row.name: row.cosines[str(target)] for row in table}
    if accept_loss or not cosines:
        return cosines
    worst = min(cosines, key=cosines.__getitem__)
    mean = math.fsum(cosines.values()) / len(cosines)
    raise ConfigError(
        f"merging into {target} again would erase much of what was learned: the cosine between what the stored weights "
        f"change by and the true update is {mean:.3f} on average and {cosines[worst]:.3f} at least ({worst}), 1 would "
        "lose nothing. Merge into 16 bits and keep that, convert to an integer scheme that was trained (QAT + LoRA), "
        "serve the adapter beside the NF4 base, or accept the loss (accept_loss=True; "
        "merge.accept_loss=true for qat)"
    )


def _rounded(weight: Tensor, scheme: Scheme, backend: Backend) -> Tensor:
    """The float32 values of a weight stored in a scheme."""
    if scheme.kind == "nf4":
        return Nf4Rows(weight, scheme, backend).values()
    if scheme.group_size is not None:  # as a policy does by default
        scheme = scheme.with_group_size(largest_divisor(weight.shape[1], scheme.group_size))
    return round_to_nearest(weight, scheme).dequantize()
