"""Reads models back: this project's exports, and files of the same formats made elsewhere."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from qat_plugin.conversion.files import PLAN, WEIGHTS
from qat_plugin.errors import CheckpointError, ConfigError, DataError
from qat_plugin.models.loading import load_causal_lm
from qat_plugin.qlora.architecture import empty_from_config, empty_model
from qat_plugin.qlora.source import read_config

_GGUF: Final = "gguf"
_FLOAT: Final = "float"
_READERS: Final = {
    "converted": "native",
    _GGUF: "gguf.read",
    "torchao": "torchao_read",
    "compressed-tensors": "compressed_read",
}
_KNOWN: Final = ", ".join(name for name in _READERS if name not in ("converted", _GGUF))


def load(
    path: str | Path, *, dtype: torch.dtype = torch.float32, checksums: bool = True, dequantize: bool = False
) -> tuple[nn.Module, Any]:
    """A language model from a file or folder, on this project's kernels where the grids agree.

    What a file holds on one of our grids (GGUF's Q4_0, Q4_1, Q8_0; compressed-tensors' and torchao's INT4 and INT8)
    keeps its integers and scales; everything else becomes float numbers. A GGUF file that this project sealed gives the
    schemes that were trained, its activations and groups included. The result can be evaluated, or exported again
    without loss.

    Args:
        path: a ``.gguf`` file, or a folder: an export of this project, a transformers directory whose
            ``quantization_config`` is torchao's or compressed-tensors', or a plain float one.
        dtype: the float type to run in; this project's own folders (``converted``) keep that of their conversion.
        checksums: of a GGUF file that this project sealed: refuse it when it was changed. Programs that quantize such a
            file anew copy its keys: ``False`` reads theirs.

    Returns:
        ``(model, tokenizer)``, the model in eval mode on the CPU; the tokenizer is ``None`` where the file has none.

    Raises:
        ConfigError: when ``dtype`` is no float type.
        DataError: when nothing is there.
        CheckpointError: when it is truncated, corrupt, or none of these.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype={dtype!r} is no float type of torch; give torch.float32 or torch.bfloat16")
    place = Path(path).expanduser()
    kind = kind_of(place)
    if kind == _FLOAT:
        return load_causal_lm(place, dtype=dtype)
    module: Any = importlib.import_module(f"qat_plugin.exporting.{_READERS[kind]}")
    options = {"checksums": checksums} if kind == _GGUF else {}
    model, tokenizer = module.read(place, dtype, **options)
    if dequantize:
        from qat_plugin.exporting.dequantized import as_float

        return as_float(model, dtype), tokenizer
    return model, tokenizer


def outline(path: Path, dtype: torch.dtype) -> nn.Module:
    """The float model of a quantized file or folder with its parameters on the meta device: no weight is read.

    Raises:
        CheckpointError: when its description cannot be read.
    """
    if kind_of(path) == _GGUF:
        from qat_plugin.exporting.gguf.header import read_header
        from qat_plugin.exporting.gguf.read_config import config_of

        network: nn.Module = empty_from_config(config_of(read_header(path)), dtype)
    else:
        network = empty_model(path, dtype, quantized=True)
    return network


def is_quantized(path: Path) -> bool:
    """Whether a GGUF file or a folder of quantized tensors lies there; ``False`` of nothing, and of no model.

    Raises:
        CheckpointError: when it is quantized by a method that is not read here.
    """
    return is_gguf(path) if path.is_file() else (path / "config.json").is_file() and kind_of(path) != _FLOAT


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def kind_of(path: Path) -> str:
    """What lies at a path: a key of the readers.

    Raises:
        DataError: when nothing is there.
        CheckpointError: when it is nothing that can be read.
    """
    if path.is_file():
        if is_gguf(path):
            return _GGUF
        raise CheckpointError(
            f"{path} is no GGUF file (it does not begin with GGUF); what else can be read are folders: {_KNOWN}"
        )
    if not path.is_dir():
        raise DataError(f"there is nothing at {path} (looked for {path.absolute()}); give a .gguf file or a folder")
    if (path / PLAN).is_file() and (path / WEIGHTS).is_file():
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path} holds converted weights without the model's configuration: build the float model and call "
                f"qat_plugin.load_converted(model, {str(path)!r}), or export it with format='converted'"
            )
        return "converted"
    if not (path / "config.json").is_file():
        if (path / "recipe.yaml").is_file() and (path / "run.json").is_file():
            raise CheckpointError(
                f"{path} is a run's folder: load what was exported of it ({path / 'exported'}), or write it: qat "
                f"task=export run={path} format=converted"
            )
        if any(path.glob("*.onnx")):
            raise CheckpointError(f"{path} holds ONNX, which is not read back; what can be read: GGUF, {_KNOWN}")
    method = (read_config(path).get("quantization_config") or {}).get("quant_method")
    if method is None:
        return _FLOAT
    if method not in _READERS:
        raise CheckpointError(f"{path} is quantized by {method!r}; what can be read here: GGUF, {_KNOWN}")
    return str(method)
