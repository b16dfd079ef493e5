"""Where a pretrained model comes from: a transformers directory or a hub name, checked before anything is trained.

Weights are safetensors, never pickles; code that lies in a directory is never run.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from qat_plugin.errors import CheckpointError, ConfigError, DataError
from qat_plugin.kernels.torchao_import import known_noise_dropped

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED: Final = (
    "config.json", "generation_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    "tokenizer*", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
)  # fmt: skip
_PICKLED: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Source:
    """A model's files.

    Attributes:
        folder: local directory that holds them.
        name: the hub's name ("org/name"), or the directory as a string.
        revision: the hub's commit (40 hexadecimal digits); ``None`` for a local directory.
    """

    folder: Path
    name: str
    revision: str | None = None


def find_source(path: str | os.PathLike[str], *, revision: str | None = None) -> Source:
    """A local directory where there is one, else a download from the hub ("org/name"), pinned to its commit.

    Only configuration, tokenizer and safetensors files are downloaded; huggingface_hub keeps them in its own cache.

    Args:
        path: directory, or a hub name given as a string.
        revision: branch, tag or commit on the hub; not for a local directory.

    Raises:
        DataError: when there is no such directory and it is no hub name, or the hub does not give it.
        ConfigError: when ``revision`` is given for a local directory.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(
                f"revision {revision!r} was given for the local directory {folder}: only models on the hub have "
                "revisions; drop it, or give the hub's name"
            )
        return Source(folder, str(folder))
    if folder.is_file():
        raise DataError(
            f"{folder} is a file, and a transformers directory is needed here; the float numbers of a GGUF file come "
            "from qat_plugin.load(path, dequantize=True)"
        )
    if not isinstance(path, str) or not _HUB_NAME.fullmatch(path):
        raise DataError(
            f"there is no model directory {folder} (looked for {folder.absolute()}); give a local transformers "
            "directory with config.json, safetensors weights and a tokenizer, or a hub name such as 'org/name'"
        )
    return _from_hub(path, revision)


def _from_hub(name: str, revision: str | None) -> Source:
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=list(_WANTED)))
    except Exception as error:  # the hub's own errors, and those of whichever HTTP library it uses
        at = f" at revision {revision!r}" if revision else ""
        raise DataError(
            f"there is no local directory {name!r}, and the hub did not give the model {name!r}{at}: "
            f"{first_line(error)}; check the name and the connection, log in if the model is gated, or give a local "
            "directory"
        ) from error
    return Source(snapshot, name, snapshot.name)


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a transformers directory.

    Raises:
        CheckpointError: when it is missing or is not a JSON object.
    """
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


def shards(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights, as the index names them; they may be missing.

    Raises:
        CheckpointError: when there is neither an index nor a single file, or the index is malformed.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not an index of shards: {error}") from error
        if any(Path(str(name)).name != name for name in names):
            raise CheckpointError(f"{index} names shards outside its directory")
        return [folder / name for name in sorted(names)]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickled = " It has pickled weights, which are not loaded: convert them to safetensors." if (
        any(any(folder.glob(pattern)) for pattern in _PICKLED)
    ) else ""  # fmt: skip
    raise CheckpointError(f"{folder} has no model.safetensors and no model.safetensors.index.json.{pickled}")


def check_shards(folder: Path) -> None:
    """Every shard is there and whole; reads headers only.

    Raises:
        CheckpointError: naming the shard that is missing, truncated or corrupt.
    """
    from safetensors import SafetensorError, safe_open

    for file in shards(folder):
        if not file.is_file():
            raise CheckpointError(f"{folder} lacks {file.name}, which its index names; copy the shard again")
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            size = file.stat().st_size
            raise CheckpointError(f"{file} is truncated or corrupt ({error}; {size} bytes); copy it again") from error


def check_complete(folder: Path, loaded: Mapping[str, Any]) -> None:
    """Refuse what transformers only warns about: weights that are not in the files, which it draws at random.

    Args:
        folder: what was loaded, for the message.
        loaded: ``missing_keys`` and ``mismatched_keys`` of ``from_pretrained(output_loading_info=True)``.

    Raises:
        CheckpointError: naming the weights.
    """
    # a mismatch is (name, shape in the file, shape in the model)
    misfits = sorted(
        f"{name} ({list(stored)} in the file, {list(own)} in the model)"
        for name, stored, own in loaded["mismatched_keys"]
    )
    absent = sorted(loaded["missing_keys"])
    if misfits:
        raise CheckpointError(
            f"{folder}: weights do not fit config.json: {some(misfits)}; the two do not belong together"
        )
    if absent:
        raise CheckpointError(
            f"{folder}: its files lack {len(absent)} of the model's weights: {some(absent)}; copy it again"
        )


def load_whole(folder: Path, dtype: torch.dtype) -> Any:
    """The causal language model by transformers' own loader, in eval mode on the CPU; all its weights at once.

    Raises:
        CheckpointError: when it is none that transformers knows, or weights are missing or do not fit.
    """
    kind = read_config(folder).get("model_type")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    with quiet_transformers(), known_noise_dropped():
        from transformers import AutoModelForCausalLM

        try:
            model, loaded = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **options
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder} does not load as a causal language model (model_type {kind!r}): {first_line(error)}"
            ) from error
    check_complete(folder, loaded)
    return model


def load_tokenizer(folder: Path) -> Any:
    """The directory's tokenizer; reaches no hub and runs no code of the directory.

    Raises:
        CheckpointError: when there is none that can be loaded.
    """
    with quiet_transformers(), known_noise_dropped():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder} has no tokenizer that can be loaded: {first_line(error)}") from error


def check_vocabulary(folder: Path, model: Any, tokenizer: Any) -> None:
    """Every token has a row of the embedding; looks at shapes only.

    Raises:
        CheckpointError: when the tokenizer has more tokens than the model embeds.
    """
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


def some(names: list[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class when it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__
