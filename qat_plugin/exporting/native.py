"""This project's own files as a folder of their own: ``save_converted``'s, with the configuration and the tokenizer.

The folder is what :func:`qat_plugin.load` reads without the float model being built first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat_plugin.conversion import load_converted, save_converted
from qat_plugin.conversion.files import WEIGHTS
from qat_plugin.errors import ExportError
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.directory import tokenizer_of, write_companions
from qat_plugin.exporting.formats import Told
from qat_plugin.exporting.refusal import Refusal
from qat_plugin.exporting.verification import Comparison, Verification
from qat_plugin.kernels.packing import unpack
from qat_plugin.qlora.architecture import empty_model


@dataclass(frozen=True)
class Options:
    """There is nothing to set."""


def refusals(model: Exportable, options: Options) -> list[Refusal]:
    """None: these files hold everything."""
    return []


def write(model: Exportable, path: Path, options: Options, progress: Told) -> None:
    """Fill the folder."""
    save_converted(model.network, path)
    write_companions(model, path, model.config)


def verify(model: Exportable, path: Path, options: Options) -> Verification:
    """Read the tensors with safetensors alone."""
    import safetensors

    seen = Comparison()
    with safetensors.safe_open(path / WEIGHTS, framework="pt") as file:
        names = set(file.keys())
        for name, layer in model.layers.items():
            held = layer.integers
            zero: Tensor | None = file.get_tensor(f"{name}.zero_point") if f"{name}.zero_point" in names else None
            q = unpack(
                file.get_tensor(f"{name}.q"),
                held.scheme.weight_bits,
                held.q.shape[1],
                signed=held.q.dtype is torch.int8,
            )
            seen.quantized(name, held, q, file.get_tensor(f"{name}.scale"), zero)
            for part in ("activation_scale", "input_scale"):
                kept = getattr(layer.weight, part)
                if (kept is not None) != (f"{name}.{part}" in names):
                    raise ExportError(f"{name}: the file {'lacks' if kept is not None else 'has'} an {part}")
                if kept is not None:
                    seen.plain(f"{name}.{part}", kept.detach().cpu(), file.get_tensor(f"{name}.{part}"))
        for name, tensor in model.floats():
            seen.plain(name, tensor, file.get_tensor(name))
    return seen.verification(f"safetensors {safetensors.__version__}", reason="no other runtime reads these files")


def read(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and its tokenizer, where the folder has one.

    Raises:
        CheckpointError: when the folder has no configuration, or its weights are another model's.
    """
    network = load_converted(empty_model(path, dtype), path, dtype=dtype)
    return network.eval(), tokenizer_of(path)


def usage(model: Exportable, path: Path, options: Options) -> str:
    """How it is loaded."""
    if model.config is None:
        return f'from qat_plugin import load_converted\nmodel = load_converted(build_the_float_model(), "{path.name}")'
    return f'import qat_plugin\nmodel, tokenizer = qat_plugin.load("{path.name}")\nmodel.generate(...)'
