"""What vLLM takes of a compressed-tensors directory: from its sources; it is not run here."""

from __future__ import annotations

import re
from typing import Final

from torch import nn

from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.refusal import Refusal
from qat_plugin.scheme import Scheme

_FUSED: Final = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_GROUPS: Final = (None, 32, 64, 128)


def notes(model: Exportable) -> list[str]:
    """What it would not take, or not as it is."""
    found = []
    if unequal := _unequal(model):
        more = f" and {len(unequal) - 1} more groups" if len(unequal) > 1 else ""
        found.append(f"vLLM fuses {', '.join(unequal[0])}{more}, whose schemes differ here; transformers loads it")
    odd = sorted({str(layer.scheme) for layer in model.layers.values() if not _has_kernel(layer.scheme)})
    if odd:
        found.append(f"vLLM (not run here) may have no kernel for {', '.join(odd)}; transformers loads it")
    if any(re.search(r"(^|\.)lm_head$", layer.name) for layer in model.layers.values()):
        found.append("vLLM (not run here) may take a float head only; transformers loads it")
    return found


def fused_refusals(model: Exportable) -> list[Refusal]:
    """Layers that it computes as one and whose schemes differ."""
    found = []
    for names in _unequal(model):
        schemes = [_scheme(model, name) for name in names]
        spellings = [str(scheme) for scheme in schemes if scheme is not None]
        together = ", ".join(name.rpartition(".")[2] for name in names)
        for name, scheme in zip(names, schemes, strict=True):
            found.append(
                Refusal(
                    name,
                    "float" if scheme is None else str(scheme),
                    f"vLLM computes {together} of one block as one layer, which has one scheme",
                    max(spellings, key=spellings.count),
                )
            )
    return found


def _unequal(model: Exportable) -> list[list[str]]:
    groups: dict[tuple[str, int], list[str]] = {}
    for name, module in model.network.named_modules():
        block, _, last = name.rpartition(".")
        for number, members in enumerate(_FUSED):
            if isinstance(module, nn.Linear) and last in members:
                groups.setdefault((block, number), []).append(name)
    return [names for names in groups.values() if len({_scheme(model, name) for name in names}) > 1]


def _scheme(model: Exportable, name: str) -> Scheme | None:
    layer = model.layers.get(f"{name}.weight")
    return None if layer is None else layer.scheme


def _has_kernel(scheme: Scheme) -> bool:
    if scheme.quantizes_activations:
        return scheme.symmetric and (scheme.weight_bits, scheme.group_size) == (8, None)
    return scheme.weight_bits in (4, 8) and scheme.group_size in _GROUPS and not scheme.per_tensor
