"""A GGUF file as a model on this project's kernels.

Q4_0, Q8_0 and, where its minima are zero points, Q4_1 keep their integers and scales; every other type becomes float
numbers, and is told. A file that carries checksums is held against them first; in one that this project wrote, layers
have the schemes that they were trained in again.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from qat_plugin.exporting.assemble import assemble
from qat_plugin.exporting.gguf.header import Header, read_header
from qat_plugin.exporting.gguf.read_config import config_of
from qat_plugin.exporting.gguf.read_tensors import Tensors, tensors_of
from qat_plugin.exporting.gguf.schemes import schemes_of
from qat_plugin.exporting.gguf.seal import check_seal, is_sealed
from qat_plugin.exporting.gguf.splitting import rebuild, split_as_written
from qat_plugin.kernels.torchao_import import known_noise_dropped
from qat_plugin.qlora.architecture import empty_from_config
from qat_plugin.qlora.source import first_line, quiet_transformers, some


def read(path: Path, dtype: torch.dtype, *, checksums: bool = True) -> tuple[Any, Any]:
    """The model in a file, in eval mode on the CPU, and its tokenizer, or ``None`` where it has none that can be built.

    Tensors are read one at a time: beside the model, memory holds the largest of them.

    Args:
        path: of a GGUF file of a Llama, Mistral, Qwen 2, Qwen 3 or Gemma 1 to 3.
        dtype: the float type to run in.
        checksums: hold the file against those it carries, and believe the trained schemes that it names beside them.

    Raises:
        CheckpointError: when the file is truncated, damaged, of another architecture, or of something that the model's
            class here does not compute.
    """
    header = read_header(path)
    if checksums:
        check_seal(header)
    with quiet_transformers(), known_noise_dropped():
        config = config_of(header)
        network = empty_from_config(config, dtype)
    sealed = checksums and is_sealed(header)
    trained = schemes_of(header) if sealed else {}
    tensors = tensors_of(header, network, network.config, trained)
    model = assemble(network, tensors.quantized, tensors.floats, dtype, path)
    _tell(path, tensors)
    return model, _tokenizer(header, sealed=sealed)


def _tell(path: Path, tensors: Tensors) -> None:
    """One line for each reason why integers became float numbers."""
    reasons: dict[str, list[str]] = {}
    for name, reason in tensors.notes.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        count = f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
        warnings.warn(f"{path.name}: read as float numbers: {count} ({some(names)}): {reason}", stacklevel=4)


def _tokenizer(header: Header, *, sealed: bool) -> Any:
    """The file's tokenizer, by transformers' own reading of it; one that cannot be built is told."""
    if "tokenizer.ggml.tokens" not in header.metadata:
        return None
    with quiet_transformers(), known_noise_dropped():
        from transformers import PreTrainedTokenizerFast

        try:
            with tempfile.TemporaryDirectory() as folder:  # beside the file may lie another model's tokenizer.json
                (Path(folder) / "model.gguf").symlink_to(header.path.absolute())
                tokenizer = PreTrainedTokenizerFast.from_pretrained(
                    folder, gguf_file="model.gguf", local_files_only=True
                )
            split_as_written(tokenizer, header, sealed=sealed)
        except Exception as error:  # of any kind: the tokenizers library raises its own
            warnings.warn(f"{header.path.name}: its tokenizer cannot be built ({first_line(error)})", stacklevel=4)
            return None
    tokenizer.name_or_path = str(header.path)
    rows = header.tensors["token_embd.weight"].shape[0]
    if any(number >= rows for number in tokenizer.get_vocab().values()):
        _drop_tokens(tokenizer, rows)
    return tokenizer


def _drop_tokens(tokenizer: Any, rows: int) -> None:
    """Take out tokens that the file does not have: classes of transformers add their own (``<|endoftext|>``)."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < rows]
    rebuild(tokenizer, described)
    if added := [token for token, number in tokenizer.get_vocab().items() if number >= rows]:
        warnings.warn(f"its tokenizer has tokens that the model has no rows for: {some(sorted(added))}", stacklevel=5)
