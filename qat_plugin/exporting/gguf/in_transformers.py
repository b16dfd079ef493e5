"""The file as transformers reads it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from qat_plugin.errors import ExportError
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.gguf.families import family_of
from qat_plugin.exporting.gguf.rope import rope_of
from qat_plugin.exporting.gguf.strings import compare_tokens
from qat_plugin.qlora.source import quiet_transformers

_UNREAD = (
    "head_dim", "rope_parameters", "query_pre_attn_scalar", "sliding_window", "layer_types", "attention_bias",
    "mlp_bias", "attn_logit_softcapping", "final_logit_softcapping",
)  # fmt: skip
_READ = {"llama": ("head_dim",), "gemma2": ("head_dim", "sliding_window"), "gemma3": ("head_dim", "sliding_window")}
"""What it does read of them, by architecture: never set by hand, so that a wrong key in the file shows."""


def version(package: str) -> str:
    """Of an installed package."""
    return importlib.metadata.version(package)


def unable(model: Exportable) -> str:
    """Why transformers cannot read the file, or nothing."""
    family = family_of(model.config, model.network)
    if not family.transformers:
        return f"transformers does not read GGUF files of {family.architecture}"
    if importlib.util.find_spec("accelerate") is None:
        return "transformers reads GGUF files only where accelerate is installed"
    return ""


@contextmanager
def alone(path: Path) -> Iterator[tuple[str, str]]:
    """The file as the only one of a folder: ``(folder, name)``. What lies beside it is not to be read."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        try:
            os.link(path, Path(folder) / "model.gguf")
        except OSError:  # a file system without hard links
            os.symlink(path.absolute(), Path(folder) / "model.gguf")
        yield folder, "model.gguf"


def load(model: Exportable, path: Path) -> tuple[Any, list[str]]:
    """The file's model in float32, and which settings had to be given to transformers, as it does not read them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet_transformers(), alone(path) as (folder, name):
        config = AutoConfig.from_pretrained(folder, gguf_file=name, local_files_only=True)
        given = []
        _check_base(config, model, path)
        read = _READ.get(family_of(model.config, model.network).architecture, ())
        for setting in _UNREAD:
            own = getattr(model.config, setting, None)
            if setting in read or not (hasattr(config, setting) and hasattr(model.config, setting)):
                continue
            if _differs(getattr(config, setting), own):
                setattr(config, setting, own)
                given.append(setting)
        with redirect_stderr(StringIO()):  # a progress bar that nothing else turns off; warnings are logged elsewhere
            network = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=name, config=config, dtype=torch.float32, local_files_only=True
            )
    told = [f"transformers does not read {', '.join(given)} from GGUF: given to it by hand"] if given else []
    return network.eval(), told


def tokenizer_notes(model: Exportable, path: Path) -> list[str]:
    """How transformers' tokenizer of the file agrees with the model's own."""
    if model.tokenizer is None:
        return []
    from transformers import AutoTokenizer

    try:
        with quiet_transformers(), alone(path) as (folder, name):
            read = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
    except Exception as error:  # whatever it meets in a vocabulary that it does not know
        return [f"transformers cannot read the vocabulary ({type(error).__name__}: {error})"]
    return [compare_tokens("transformers", model.tokenizer, lambda text: list(read.encode(text)))]


def _check_base(config: Any, model: Exportable, path: Path) -> None:
    """The base of rotation is read from the file, its scaling is not."""
    read, own = (rope_of(settings).get("rope_theta") for settings in (config, model.config))
    if _differs(read, own):
        raise ExportError(f"{path.name} says rope.freq_base {read}, the model has {own}")


def _differs(read: Any, own: Any) -> bool:
    if isinstance(own, dict) and isinstance(read, dict):
        keys = {key for key, value in {**own, **read}.items() if value is not None}
        return any(_differs(read.get(key), own.get(key)) for key in keys)
    if isinstance(own, float) and isinstance(read, (int, float)):
        return abs(own - read) > 1e-6 * abs(own)
    return bool(read != own)
