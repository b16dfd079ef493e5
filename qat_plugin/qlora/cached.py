"""Quantized models kept on disk, so that a base is quantized once.

One directory for each source, plan, backend and float type: shards of safetensors with every tensor of the quantized
model, and ``index.json`` with what it was made from and a content sum of each tensor. It is used when the source's
files are what they were; else, or when it is damaged, it is made anew. It is built beside its place and moved there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from qat_plugin.errors import ConfigError
from qat_plugin.policy import Plan
from qat_plugin.qlora.fingerprint import tensor_sum
from qat_plugin.qlora.nf4 import is_nf4, state_tensors
from qat_plugin.qlora.shell import Shell
from qat_plugin.qlora.source import Source, first_line, shards

_FORMAT: Final = 1
_INDEX: Final = "index.json"
_BUILDING: Final = ".building-"
_SHARD_BYTES: Final = 256 << 20


@dataclass(frozen=True)
class Cache:
    """The place of one quantized model.

    Attributes:
        folder: where it is, or will be.
        made_from: what must be equal for it to be used.
    """

    folder: Path
    made_from: dict[str, Any]

    @classmethod
    def of(cls, source: Source, plan: Plan, backend: str, dtype: torch.dtype, root: str | os.PathLike[str]) -> Cache:
        """The place below ``root`` of one source quantized in one way.

        Raises:
            ConfigError: when nothing can be written there.
        """
        layers = {layer.name: str(layer.scheme) for layer in plan if layer.scheme and layer.scheme.kind == "nf4"}
        origin = source.name if source.revision else str(source.folder.resolve())
        identity = [origin, backend, str(dtype), sorted(layers.items())]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        place = Path(root).expanduser()
        try:
            place.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            raise ConfigError(
                f"the quantized model cannot be kept in {place} ({error.strerror}); give cache= another directory, or "
                "none"
            ) from error
        made_from = {
            "format": _FORMAT, "source": origin, "backend": backend, "dtype": str(dtype), "layers": layers,
            "version": importlib.metadata.version(backend),
            "files": {file.name: _signature(file) for file in (source.folder / "config.json", *shards(source.folder))},
        }  # fmt: skip
        return cls(place / f"nf4-{source.folder.resolve().name[:40]}-{key}", made_from)

    def restore(self, shell: Shell) -> tuple[dict[str, str] | None, str]:
        """Put the kept weights into ``shell``.

        Returns:
            The content sums of the source's tensors, or ``None`` when nothing was kept or it cannot be used; and why
            it cannot.
        """
        from safetensors import SafetensorError

        if not self.folder.exists():
            return None, ""
        try:
            index = json.loads((self.folder / _INDEX).read_text(encoding="utf-8"))
            changed = [name for name, value in self.made_from.items() if index["made_from"].get(name) != value]
            if changed:
                return None, f"the cached model {self.folder} is of another {_what(changed[0])}: it is made anew"
            put = set(_put_all(shell, self.folder, index["shards"]))
            shell.finish(shell.names - put)
            return dict(index["sums"]), ""
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            return None, f"the cached model {self.folder} is damaged ({first_line(error)}): it is made anew"

    def store(self, model: nn.Module, sums: Mapping[str, str]) -> None:
        """Keep a quantized model; when that fails (a full disk), say so and go on.

        Args:
            model: whole.
            sums: content sums of the source's tensors.
        """
        building = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=_BUILDING))
        try:
            written = {file: _write(building / file, part) for file, part in _shards(model)}
            index = {"made_from": self.made_from, "sums": dict(sums), "shards": written}
            (building / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
            if self.folder.exists():
                os.replace(self.folder, Path(tempfile.mkdtemp(dir=building)) / "old")
            os.replace(building, self.folder)
        except OSError as error:
            print(f"the quantized model could not be kept in {self.folder}: {first_line(error)}", file=sys.stderr)
        finally:
            shutil.rmtree(building, ignore_errors=True)


Part = tuple[str, dict[str, Tensor], bool]
"""A name, its tensors, and whether it is an NF4 layer (then with the state of its weight) or a single tensor."""


def _parts(model: nn.Module) -> Iterator[Part]:
    """Everything a quantized model keeps; shared parameters once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        quantized = is_nf4(module)
        if quantized:
            yield path, state_tensors(module), True
        saved = [*module._parameters.items(), *module._buffers.items()]
        for leaf, tensor in saved:
            skipped = leaf in module._non_persistent_buffers_set or (quantized and leaf == "weight")
            if tensor is not None and not skipped and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{leaf}".lstrip("."), {"": tensor.detach()}, False


def _shards(model: nn.Module) -> Iterator[tuple[str, list[Part]]]:
    """File names and what goes into them: at most :data:`_SHARD_BYTES`, or one part that is larger."""
    shard: list[Part] = []
    size = number = 0
    for part in _parts(model):
        more = sum(tensor.nbytes for tensor in part[1].values())
        if shard and size + more > _SHARD_BYTES:
            yield f"model-{number:05d}.safetensors", shard
            shard, size, number = [], 0, number + 1
        shard.append(part)
        size += more
    yield f"model-{number:05d}.safetensors", shard


def _write(file: Path, parts: list[Part]) -> dict[str, Any]:
    """Write one shard; returns the content sums of its tensors."""
    from safetensors.torch import save_file

    tensors = {
        f"{name}:{key}" if key else name: tensor.contiguous() for name, each, _ in parts for key, tensor in each.items()
    }
    save_file(tensors, file)
    return {
        "layers": {name: {key: tensor_sum(t) for key, t in each.items()} for name, each, nf4 in parts if nf4},
        "tensors": {name: tensor_sum(each[""]) for name, each, nf4 in parts if not nf4},
    }


def _put_all(shell: Shell, folder: Path, written: Mapping[str, Any]) -> Iterator[str]:
    """Put everything into ``shell``, shard by shard; yields the names that were put."""
    from safetensors import safe_open

    for file, content in written.items():
        with safe_open(folder / file, framework="pt") as opened:
            for path, sums in content["layers"].items():
                state = {key: _checked(opened, f"{path}:{key}", expected) for key, expected in sums.items()}
                shell.put_state(path, state)
                yield f"{path}.weight"
            for name, expected in content["tensors"].items():
                shell.put(name, _checked(opened, name, expected))
                yield name


def _checked(opened: Any, name: str, expected: str) -> Tensor:
    tensor: Tensor = opened.get_tensor(name)
    if tensor_sum(tensor) != expected:
        raise ValueError(f"{name} is not what was written")
    return tensor


def _signature(file: Path) -> list[Any]:
    """Size, time of the last change, and SHA-256 of a safetensors file's header (of the whole of any other file)."""
    status = file.stat()
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little") if file.suffix == ".safetensors" else status.st_size
        opened.seek(0)
        head = opened.read(8 + length)
    return [status.st_size, status.st_mtime_ns, hashlib.sha256(head).hexdigest()]


def _what(changed: str) -> str:
    return {"format": "version of this package", "files": "state of the source's files"}.get(changed, changed)
