"""Loading a causal language model and its tokenizer from a local transformers directory, checked before training."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qat_plugin.errors import CheckpointError, DataError
from qat_plugin.kernels.torchao_import import known_noise_dropped


def load_causal_lm(path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a model and its tokenizer. Never reaches a hub, never runs code that lies in the directory.

    Args:
        path: directory with ``config.json``, safetensors weights and a tokenizer.
        dtype: float type of the weights.

    Returns:
        ``(model, tokenizer)``, the model in eval mode on the CPU.

    Raises:
        DataError: when there is no such directory.
        CheckpointError: when something in it is missing, truncated, or does not belong together.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"there is no model directory {folder} (looked for {folder.absolute()}); give a local transformers "
            "directory with config.json, safetensors weights and a tokenizer"
        )
    config = _config(folder)
    _check_weights(folder)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with quiet_transformers(), known_noise_dropped():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder} has no tokenizer that can be loaded: {_first_line(error)}") from error
        options |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
        try:
            model, loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            kind = config.get("model_type")
            raise CheckpointError(
                f"{folder} does not load as a causal language model (model_type {kind!r}): {_first_line(error)}"
            ) from error
    _check_complete(folder, loaded)
    _check_vocabulary(folder, model, tokenizer)
    return model, tokenizer


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        beside = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{folder} has no config.json, so it is no transformers model; it holds {beside}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a model's configuration")
    return config


def _check_weights(folder: Path) -> None:
    """Every shard is there and whole; reads headers only."""
    from safetensors import SafetensorError, safe_open

    for file in _shards(folder):
        if not file.is_file():
            raise CheckpointError(f"{folder} lacks {file.name}, which its index names; copy the shard again")
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            size = file.stat().st_size
            raise CheckpointError(f"{file} is truncated or corrupt ({error}; {size} bytes); copy it again") from error


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is not an index of shards: {error}") from error
        if any(Path(str(name)).name != name for name in names):
            raise CheckpointError(f"{index} names shards outside its directory")
        return [folder / name for name in sorted(names)]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickled = " It has pickled weights, which are not loaded: convert them to safetensors." if (
        any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
    ) else ""  # fmt: skip
    raise CheckpointError(f"{folder} has no model.safetensors and no model.safetensors.index.json.{pickled}")


def _check_complete(folder: Path, loaded: dict[str, Any]) -> None:
    """transformers only warns about weights that are not in the files, and draws them at random."""
    # a mismatch is (name, shape in the file, shape in the model)
    misfits = sorted(
        f"{name} ({list(stored)} in the file, {list(own)} in the model)"
        for name, stored, own in loaded["mismatched_keys"]
    )
    absent = sorted(loaded["missing_keys"])
    if misfits:
        raise CheckpointError(
            f"{folder}: weights do not fit config.json: {_some(misfits)}; the two do not belong together"
        )
    if absent:
        raise CheckpointError(
            f"{folder}: its files lack {len(absent)} of the model's weights: {_some(absent)}; copy it again"
        )


def _check_vocabulary(folder: Path, model: Any, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    tokens = 1 + max(tokenizer.get_vocab().values(), default=-1)  # len(tokenizer) is less where ids have gaps
    if tokens > rows:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokens} tokens and the model embeds {rows}: they do not belong together"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars; its warnings stay."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
