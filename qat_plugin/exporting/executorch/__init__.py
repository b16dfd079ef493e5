"""ExecuTorch's ``.pte``: INT8 and INT4 layers on XNNPACK, with the integers, scales and activation grid of training.

::

    converted network -> the same network in operators that XNNPACK knows (skeleton, layers, columns)
                      -> torch.export (trace) -> XNNPACK's graphs and their constants (lower) -> .pte
    .pte -> constants read back (payload) and run by the Python runtime (proving)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.executorch import chains, refusing
from qat_plugin.exporting.executorch.lowering import lower, quiet, trace
from qat_plugin.exporting.executorch.options import Options
from qat_plugin.exporting.executorch.proving import verify
from qat_plugin.exporting.executorch.refusing import refusals
from qat_plugin.exporting.executorch.rounding import Rounding, register_operators
from qat_plugin.exporting.executorch.skeleton import arguments, is_language_model, limits, skeleton
from qat_plugin.exporting.formats import Told
from qat_plugin.exporting.refusal import check_refusals
from qat_plugin.exporting.verification import Verification

__all__ = ["Options", "Verification", "refusals", "usage", "verify", "write"]


def write(model: Exportable, path: Path, options: Options, progress: Told) -> None:
    """Trace, lower and write; the whole file is in memory for it, as ExecuTorch lowers it there."""
    register_operators()
    roundings: dict[str, Rounding] = {}
    if any(layer.scheme.static for layer in model.layers.values()):
        roundings = chains.roundings(_traced(model, options, None))
        check_refusals(refusing.unchained(model, roundings), "ExecuTorch with XNNPACK")
    edge = lower(_traced(model, options, roundings), static=bool(roundings))
    with quiet():
        made = edge.to_executorch()
    with path.open("wb") as file:
        made.write_to_file(file)


def _traced(model: Exportable, options: Options, roundings: dict[str, Rounding] | None) -> Any:
    return trace(skeleton(model, roundings), arguments(model, options), *limits(model, options))


def usage(model: Exportable, path: Path, options: Options) -> str:
    """How it is loaded."""
    given = "torch.tensor([[1, 2, 3]])" if is_language_model(model) else "torch.zeros(...)"
    return (
        "from executorch.runtime import Runtime\n"
        f'method = Runtime.get().load_program("{path.name}").load_method("forward")\n'
        f"outputs = method.execute([{given}])"
    )
