"""llama.cpp's own quantization (K-quants and others) of the dequantized model: the trained grid is **not** kept."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from qat_plugin.errors import ConfigError, ExportError, did_you_mean
from qat_plugin.exporting.gguf.options import Options

_PREFIXES = ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_")


def check_kquant(options: Options) -> None:
    """Raise unless llama.cpp is there and knows the names.

    Raises:
        ConfigError: otherwise.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise ConfigError(
            f'kquant={options.kquant} is made by llama.cpp: pip install ".[gguf-k]" in a checkout of the project, or '
            'pip install "qat-plugin[gguf-k]" (builds llama-cpp-python: some minutes, and cmake)'
        )
    _known("kquant", options.kquant, _file_types())
    for name in ("output_type", "embedding_type"):
        if given := getattr(options, name):
            _known(name, given, _tensor_types())


def requantize(source: Path, target: Path, options: Options) -> None:
    """Have llama.cpp quantize a float file.

    Raises:
        ExportError: when it fails, with what it said.
    """
    import llama_cpp

    settings: Any = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = _file_types()[options.kquant]
    if options.output_type:
        settings.output_tensor_type = _tensor_types()[options.output_type]
    if options.embedding_type:
        settings.token_embedding_type = _tensor_types()[options.embedding_type]
    said = StringIO()
    with redirect_stderr(said), _talking():
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings)
    if failed:
        last = (said.getvalue().strip().splitlines() or [f"code {failed}"])[-1]
        raise ExportError(f"llama.cpp could not quantize to {options.kquant}: {last}")


@contextmanager
def _talking() -> Iterator[None]:
    """With llama.cpp's messages, which a model that was opened quietly turned off for all."""
    logger = logging.getLogger("llama-cpp-python")
    level = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(level)


def _known(name: str, given: str, known: dict[str, int]) -> None:
    if given not in known:
        raise ConfigError(
            f"{name}={given!r} is none of llama.cpp's.{did_you_mean(given, known)} Known: {', '.join(known)}"
        )


def _file_types() -> dict[str, int]:
    import llama_cpp

    return {
        name.removeprefix(prefix): int(value)
        for prefix in _PREFIXES
        for name, value in vars(llama_cpp).items()
        if name.startswith(prefix)
    }


def _tensor_types() -> dict[str, int]:
    import gguf

    return {kind.name: int(kind.value) for kind in gguf.GGMLQuantizationType}
