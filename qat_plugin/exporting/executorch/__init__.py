"""ExecuTorch's ``.pte``: INT8 and INT4 layers on XNNPACK, with the integers, scales and activation grid of training.

::

    converted network -> the same network in operators that XNNPACK knows (skeleton, layers, columns)
                      -> torch.export (trace) -> XNNPACK's graphs and their constants (lower) -> .pte
    .pte -> constants read back (payload) and run by the Python runtime (proving)
"""

from __future__ import annotations

from pathlib import Path

from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.executorch.layers import register_operators
from qat_plugin.exporting.executorch.lower import lower, quiet, trace
from qat_plugin.exporting.executorch.options import Options
from qat_plugin.exporting.executorch.proving import verify
from qat_plugin.exporting.executorch.refusing import refusals
from qat_plugin.exporting.executorch.skeleton import arguments, is_language_model, limits, skeleton
from qat_plugin.exporting.formats import Told
from qat_plugin.exporting.verification import Verification

__all__ = ["Options", "Verification", "refusals", "usage", "verify", "write"]


def write(model: Exportable, path: Path, options: Options, progress: Told) -> None:
    """Trace, lower and write; the whole file is in memory for it, as ExecuTorch lowers it there."""
    register_operators()
    network = skeleton(model, lambda name, weight: "constants")
    program = trace(network, arguments(model, options), *limits(model, options))
    edge = lower(program, language=is_language_model(model))
    with quiet():
        made = edge.to_executorch()
    with path.open("wb") as file:
        made.write_to_file(file)


def usage(model: Exportable, path: Path, options: Options) -> str:
    """How it is loaded."""
    given = "torch.tensor([[1, 2, 3]])" if is_language_model(model) else "torch.zeros(...)"
    return (
        "from executorch.runtime import Runtime\n"
        f'method = Runtime.get().load_program("{path.name}").load_method("forward")\n'
        f"outputs = method.execute([{given}])"
    )
