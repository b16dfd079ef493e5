"""Loading a causal language model and its tokenizer from a local transformers directory, checked before training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from qat_plugin.errors import DataError
from qat_plugin.qlora.source import (
    check_shards,
    check_vocabulary,
    load_tokenizer,
    load_whole,
    quiet_transformers,
    read_config,
)

__all__ = ["load_causal_lm", "quiet_transformers"]


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
    read_config(folder)
    check_shards(folder)
    tokenizer = load_tokenizer(folder)
    model = load_whole(folder, dtype)
    check_vocabulary(folder, model, tokenizer)
    return model, tokenizer
