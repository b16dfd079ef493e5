"""What the shards of a model hold, by their headers: compared with the model before any weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from qat_plugin.errors import CheckpointError
from qat_plugin.qlora.architecture import Names, may_be_missing, model_names
from qat_plugin.qlora.source import check_complete, check_shards, first_line, shards

_ITEM_BYTES: Final = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2}


class Contents:
    """The tensors of a transformers directory and where each goes.

    Attributes:
        names: which tensor of the files is which of the model.
        missing: names of the model that no file holds: tied to one that is there, or declared dispensable.
        largest_bytes: of one tensor, as stored.

    Args:
        model: from :func:`~qat_plugin.qlora.architecture.empty_model`, before any of its layers is replaced.
        folder: the directory.

    Raises:
        CheckpointError: when a shard is missing or truncated, or a tensor is missing, unknown or of another shape.
    """

    names: Names
    missing: set[str]
    largest_bytes: int

    def __init__(self, model: Any, folder: Path) -> None:
        check_shards(folder)
        self._folder, self._files = folder, shards(folder)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.largest_bytes = 0
        for file in self._files:
            self._read_header(file)
        self.names = model_names(model, self._shapes, folder)
        self.missing = set()
        if not self.names.converted:  # else only transformers knows what the tensors become
            self._compare(model)

    def _read_header(self, file: Path) -> None:
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            for name in opened.offset_keys():
                if name in self._shapes:
                    raise CheckpointError(f"{file} holds {name}, which another shard holds too; copy the model again")
                entry = opened.get_slice(name)
                self._shapes[name] = tuple(entry.get_shape())
                size = prod(self._shapes[name]) * _ITEM_BYTES.get(entry.get_dtype(), 1)
                self.largest_bytes = max(self.largest_bytes, size)

    def _compare(self, model: Any) -> None:
        own, targets = model.state_dict(), self.names.model
        name, count = max(Counter(targets.values()).items(), key=lambda item: item[1], default=("", 0))
        if count > 1:
            both = sorted(stored for stored, target in targets.items() if target == name)
            raise CheckpointError(f"{self._folder}: {' and '.join(both)} are both {name}; copy the model again")
        misfits = [
            (stored, self._shapes[stored], tuple(own[target].shape))
            for stored, target in targets.items()
            if self._shapes[stored] != tuple(own[target].shape)
        ]
        self.missing = set(own) - set(targets.values())
        groups: dict[str, set[str]] = {}
        for target, origin in model.all_tied_weights_keys.items():
            groups.setdefault(origin, {origin}).add(target)
        tied = {member for group in groups.values() if group - self.missing for member in group}
        absent = [name for name in self.missing - tied if not may_be_missing(model, name)]
        check_complete(self._folder, {"mismatched_keys": misfits, "missing_keys": absent})

    def __len__(self) -> int:
        """Number of tensors to read."""
        return len(self.names.model)

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """``(name in the files, name in the model, tensor)``, the tensor mapped from its file.

        Raises:
            CheckpointError: naming the file and the tensor that cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        for file in self._files:
            with safe_open(file, framework="pt") as opened:
                for stored in opened.offset_keys():
                    if stored not in self.names.model:
                        continue
                    try:
                        tensor = opened.get_tensor(stored)
                    except (SafetensorError, OSError, RuntimeError) as error:
                        raise CheckpointError(f"{file}: {stored} cannot be read: {first_line(error)}") from error
                    yield stored, self.names.model[stored], tensor
                    del tensor
