"""Merging an adapter into a base directory, tensor by tensor: a new directory of the same shards.

    into="original"   W + update                      the files' own weights, in their own type
    into="nf4"        dequantized(NF4(W)) + update    the model that was trained, but for rounding to the stored type

Host memory holds a few megabytes of one tensor at a time (Conv1D layers of the GPT-2 family: one whole layer), and half
a byte for each weight of one layer where NF4 is taken.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from qat_plugin.errors import CheckpointError, ConfigError
from qat_plugin.measure import Progress, progressing
from qat_plugin.measure.host_memory import AnonymousMemory
from qat_plugin.policy import PolicyLike, human_bytes
from qat_plugin.qlora.adapter_file import AdapterFile, read_adapter
from qat_plugin.qlora.fingerprint import tensor_sum
from qat_plugin.qlora.merge_targets import Target, find_targets, updated_weights
from qat_plugin.qlora.nf4 import Backend
from qat_plugin.qlora.nf4_rows import Nf4Rows
from qat_plugin.qlora.shard_file import FLOAT_NAMES, Entry, ShardWriter
from qat_plugin.qlora.source import first_line, read_config, shards, some

__all__ = ["Into", "MergeRecord", "merge_directory", "updated_weights"]

Into = Literal["original", "nf4"]

_INDEX: Final = "model.safetensors.index.json"
_COPIED: Final = {".json", ".txt", ".model", ".jinja", ".tiktoken"}  # configuration and tokenizer; no code, no pickles
_PIECE: Final = 1 << 19  # weights merged at a time


@dataclass(frozen=True)
class MergeRecord:
    """What a merge did; plain values.

    Attributes:
        base, adapter, out: the directories.
        into: ``"original"`` or ``"nf4"``.
        dtype: float type of all weights where one was asked for; ``None`` where each kept its own.
        merged: layers whose weight has an update in it now.
        requantized: layers whose NF4 values were taken for their weight, with or without an update.
        tensors, shards: of the directory.
        bytes_written: of the weights.
        largest_shard_bytes: of the base.
        verified: whether the base was compared with the sums that the adapter's files have of it: all its tensors, or
            (without a record of :func:`~qat_plugin.qlora.load_base`) the weights of the layers that merging changes.
        seconds: of merging.
        peak_host_bytes: by how much anonymous host memory grew at most; ``None`` where the system does not say.
    """

    base: str
    adapter: str
    out: str
    into: str
    dtype: str | None
    merged: int
    requantized: int
    tensors: int
    shards: int
    bytes_written: int
    largest_shard_bytes: int
    verified: bool
    seconds: float
    peak_host_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Strings, numbers, None."""
        return asdict(self)


def merge_directory(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    into: Into = "original",
    scheme: PolicyLike | None = None,
    backend: Backend | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | bool = True,
) -> MergeRecord:
    """Write a transformers directory with the adapter merged into its weights.

    The result appears at once when all is written; a failed or killed merge leaves nothing at ``out``. It warns when
    the adapter's files do not say which weights it was trained on (a foreign adapter).

    Args:
        base: the directory that the adapter was trained on.
        adapter: a folder written by :func:`~qat_plugin.qlora.save_adapter` or by peft.
        out: a directory that does not exist, or is empty.
        into: ``"original"``: into the weights as they are in the files. ``"nf4"``: into the values that they had in
            NF4 while the adapter was trained, which loses nothing but the rounding to the files' type (with
            ``dtype=torch.float32`` nothing at all).
        scheme: for ``"nf4"``, the policy of the base in training; by default what the adapter's files say, and
            ``"nf4-dq"`` where they say nothing.
        backend: for ``"nf4"``: who quantized the base; by default what the adapter's files say, else bitsandbytes.
        dtype: store every weight in this float type; by default each in its own.
        progress: shown while tensors are merged, as in :func:`~qat_plugin.measure.progressing`.

    Raises:
        ConfigError: when ``out`` is there already, an argument is not allowed, or nothing was NF4 in training.
        CheckpointError: when the base or the adapter is damaged, they do not belong together, or the disk is too small.

    Example::

        merge_directory("llama", "runs/adapter", "llama-merged", into="nf4")
    """
    source, target = Path(base), Path(out)
    _check_arguments(source, target, into, dtype)
    started, file = time.perf_counter(), read_adapter(adapter)
    job = _Job(
        source,
        file,
        find_targets(source, file, trained_base=into == "nf4", scheme=scheme),
        backend or file.base.get("backend") or "bitsandbytes",
        getattr(torch, str(file.base.get("dtype"))) if file.base.get("dtype") else None,
        dtype,
    )
    if into == "nf4" and not job.requantized:
        raise ConfigError(
            f"no layer was NF4 when the adapter in {file.folder} was trained, its plan says: merge into='original', or "
            "give the policy that it was trained with (scheme='nf4-dq')"
        )
    job.check_disk(target)
    with AnonymousMemory() as memory, _appearing(target) as partial:
        job.write(partial, progress)
    if not job.verified:
        warnings.warn(not_verified(source, file.folder), stacklevel=2)
    return MergeRecord(
        base=str(source), adapter=str(file.folder), out=str(target), into=into,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        merged=sum(each.update is not None for each in job.targets.values()),
        requantized=job.requantized,
        tensors=job.tensors, shards=len(job.files), bytes_written=job.bytes,
        largest_shard_bytes=max(shard.stat().st_size for shard in job.files),
        verified=job.verified, seconds=time.perf_counter() - started, peak_host_bytes=memory.growth,
    )  # fmt: skip


class _Job:
    """One merge: reads the base's shards in turn and writes theirs."""

    def __init__(
        self, base: Path, adapter: AdapterFile, targets: dict[str, Target], backend: Backend,
        quantized_from: torch.dtype | None, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        self.base, self.adapter, self.targets, self.backend = base, adapter, targets, backend
        self.quantized_from, self.dtype = quantized_from, dtype
        self.files = shards(base)
        self.sums: dict[str, str] = dict(adapter.base.get("sums") or {})
        self.requantized = sum(each.scheme is not None and each.scheme.kind == "nf4" for each in targets.values())
        self.tensors = self.bytes = 0

    def check_disk(self, out: Path) -> None:
        """Raise when what will be written has no room.

        Raises:
            CheckpointError: with both figures.
        """
        needed = sum(file.stat().st_size for file in self.files) * (2 if self.dtype == torch.float32 else 1)
        place = next(parent for parent in out.absolute().parents if parent.is_dir())
        if (free := shutil.disk_usage(place).free) < needed:
            raise CheckpointError(
                f"{place} has {human_bytes(free)} free, and the merged model needs {human_bytes(needed)}"
            )

    def write(self, folder: Path, progress: Progress | bool) -> None:
        """Write everything into a directory that is there and empty."""
        seen: set[str] = set()
        with progressing(progress, "merging shards", len(self.files)) as advance:
            for done, file in enumerate(self.files, 1):
                seen |= self._shard(file, folder / file.name)
                advance(done)
        if absent := sorted(self.sums.keys() - seen):
            raise CheckpointError(
                f"the adapter was trained on another base: {self.base} lacks {len(absent)} tensors: {some(absent)}"
            )
        self.tensors = len(seen)
        for file in sorted(self.base.iterdir()):
            if file.is_file() and file.suffix in _COPIED and file.name not in (_INDEX, "config.json"):
                shutil.copyfile(file, folder / file.name)
        self._describe(folder)

    def _shard(self, file: Path, target: Path) -> set[str]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                names = list(opened.offset_keys())
                entries = {name: self._entry(opened, name) for name in names}
                with ShardWriter(target, entries, opened.metadata()) as writer:
                    for name in names:
                        tensor = opened.get_tensor(name)
                        self._check_sum(name, tensor)
                        writer.write(name, self._pieces(name, tensor))
                        del tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be merged into {target.parent}: {first_line(error)}") from error
        self.bytes += sum(entry.size for entry in entries.values())
        return set(names)

    def _entry(self, opened: Any, name: str) -> Entry:
        tensor = opened.get_tensor(name)
        if tensor.dtype in FLOAT_NAMES:
            return Entry.of(tensor, self.dtype or tensor.dtype)
        return Entry(opened.get_slice(name).get_dtype(), tuple(tensor.shape), tensor.numel() * tensor.element_size())

    @property
    def verified(self) -> bool:
        """Whether the adapter's files have sums of all that merging changes."""
        return bool(self.sums) or all(target.sum for target in self.targets.values())

    def _check_sum(self, name: str, tensor: Tensor) -> None:
        target = self.targets.get(name)
        if self.sums:
            same = self.sums.get(name) == tensor_sum(tensor)
        else:
            same = target is None or not target.sum or target.sum == tensor_sum(self._as_trained(tensor))
        if not same:
            path = self.adapter.base.get("path") or self.adapter.config.get("base_model_name_or_path")
            trained = f", trained on {path}" if path else ""
            raise CheckpointError(
                f"the adapter was trained on another base: {name} in {self.base} is not what it was then "
                f"(adapter {self.adapter.folder}{trained})"
            )

    def _as_trained(self, tensor: Tensor) -> Tensor:
        """In the type that it was loaded in, before it was quantized."""
        return tensor.to(self.quantized_from or tensor.dtype)

    def _pieces(self, name: str, tensor: Tensor) -> Iterator[Tensor]:
        """The tensor as it will be stored, in contiguous pieces."""
        target = self.targets.get(name)
        dtype = (self.dtype or tensor.dtype) if tensor.dtype in FLOAT_NAMES else tensor.dtype
        if target is None:
            flat = tensor.reshape(-1)
            yield from (piece.to(dtype) for piece in flat.split(_PIECE) if piece.numel())
            return
        weight = tensor.t().contiguous() if target.transposed else tensor
        values = self._values(weight, target)
        step = weight.shape[0] if target.transposed else max(64, _PIECE // max(weight.shape[1], 1) // 64 * 64)
        for start in range(0, weight.shape[0], step):
            rows = slice(start, min(start + step, weight.shape[0]))
            piece = values(rows) if target.update is None else target.update.merged(values(rows), rows)
            yield (piece.t() if target.transposed else piece).to(dtype).contiguous()

    def _values(self, weight: Tensor, target: Target) -> Any:
        """Rows -> the base weight's values that the update is added to."""
        scheme = target.scheme
        if scheme is None:
            return lambda rows: weight[rows]
        if scheme.is_float:
            return lambda rows: weight[rows].to(scheme.float_dtype)
        return Nf4Rows(self._as_trained(weight), scheme, self.backend).values

    def _describe(self, folder: Path) -> None:
        """The configuration, and the index where there is one."""
        config = read_config(self.base)
        if self.dtype is not None:
            config = {key: value for key, value in config.items() if key != "torch_dtype"}
            config["dtype"] = str(self.dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if (self.base / _INDEX).is_file():
            index = json.loads((self.base / _INDEX).read_text(encoding="utf-8"))
            index["metadata"] = {**(index.get("metadata") or {}), "total_size": self.bytes}
            (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def not_verified(base: Path | str, adapter: Path | str) -> str:
    """What to know of a merge that could not be verified."""
    return (
        f"the base is NOT VERIFIED: the files in {adapter} do not say which weights the adapter was trained on, and "
        f"{base} was taken as it is. On another base the merged model is wrong; measure it before it is used"
    )


def _check_arguments(base: Path, out: Path, into: str, dtype: torch.dtype | None) -> None:
    if into not in ("original", "nf4"):
        raise ConfigError(f"into={into!r} is not one of 'original' (the files' weights) and 'nf4' (those trained on)")
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype={dtype} is not one of torch.bfloat16, torch.float16, torch.float32")
    if not base.is_dir():
        raise CheckpointError(f"there is no base directory {base} (looked for {base.absolute()})")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"{out} is there already and not empty: name a new directory; nothing is overwritten")


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A directory beside ``out`` that takes its name when the block ends well, and vanishes otherwise."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, out)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
