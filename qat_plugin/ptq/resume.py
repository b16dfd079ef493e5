"""Finished blocks on disk, so that a killed calibration goes on after the last of them, to the same integers.

A folder holds ``settings.json`` (fingerprints of model, data and settings) and one safetensors file a part: the
integers of each layer packed to their bits, scales, zero points, observers, and the other parameters of the block,
which folding may have changed. Files are replaced atomically; one that is cut or altered is refused by its sum.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from qat_plugin.errors import CheckpointError
from qat_plugin.kernels.packing import pack, unpack
from qat_plugin.numerics import Quantized
from qat_plugin.ptq.ranks import failing_together, from_every
from qat_plugin.ptq.results import LayerResult
from qat_plugin.ptq.walker import Store
from qat_plugin.qat import LayerQuantizer, Phase, hold, quantizers
from qat_plugin.qat.layers import ATTRIBUTE, FakeQuantized, current_weight

_SETTINGS: Final = "settings.json"
_VERSION: Final = 1


def open_store(
    folder: str | os.PathLike[str] | None, model: nn.Module, batches: Sequence[Any], settings: Mapping[str, Any]
) -> Store:
    """The store in a folder, or one that keeps nothing for ``None``.

    Raises:
        CheckpointError: when the folder holds the blocks of another model, of other data or settings, naming which.
    """
    if folder is None:
        return Store()
    prints = {
        "version": str(_VERSION),
        "model": _sum_of(dict(model.state_dict())),
        "data": _sum_of(batches),
        "settings": _sum_of({name: str(value) for name, value in settings.items()}),
        "state": _sum_of({name: quantizer.export_state() for name, quantizer in quantizers(model).items()}),
    }
    path = _own(Path(folder).expanduser()) / _SETTINGS
    if path.exists():
        _check_same(path, prints)
    else:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, json.dumps(prints, indent=1).encode() + b"\n")
        except OSError as error:
            raise CheckpointError(f"cannot keep finished blocks in {path.parent}: {error.strerror}") from error
    return _Folder(path.parent, _sum_of(prints))


def _own(folder: Path) -> Path:
    """The folder, or that of this process where several calibrate together."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if several and torch.distributed.get_world_size() > 1 else None
    return folder if rank is None else folder / f"rank-{rank}"


def _check_same(path: Path, prints: Mapping[str, str]) -> None:
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name, value in prints.items() if there[name] != value]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete the folder to start again") from error
    if other:
        raise CheckpointError(
            f"{path.parent} holds finished blocks of another {' and other '.join(other)}; give another folder, or "
            "delete it to start again"
        )


class _Folder(Store):
    """Parts as files of one folder."""

    def __init__(self, folder: Path, belongs: str) -> None:
        self._folder, self._belongs = folder, belongs

    def has(self, part: str) -> bool:
        return all(from_every(self._path(part).exists()))  # another rank may have been killed before it kept the part

    def load(self, part: str, layers: Mapping[str, nn.Module], changed: nn.Module | None) -> list[LayerResult] | None:
        with failing_together():
            return self._loaded(self._path(part), layers, changed)

    def _loaded(self, path: Path, layers: Mapping[str, nn.Module], changed: nn.Module | None) -> list[LayerResult]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["qat_plugin"])
                names = list(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
            if header["sum"] != _sum_of(tensors) or header["of"] != self._belongs:
                raise CheckpointError(f"{path} is not what this calibration wrote; delete it to do that block again")
            results = [LayerResult(**result) for result in header["results"]]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is damaged ({error}); delete it to do that block again") from error
        _restore(layers, changed, tensors, {result.name for result in results if result.written})
        return results

    def save(
        self, part: str, layers: Mapping[str, nn.Module], changed: nn.Module | None, results: Sequence[LayerResult]
    ) -> None:
        from safetensors.torch import save

        tensors = _taken(layers, changed)
        header = {"sum": _sum_of(tensors), "of": self._belongs, "results": [asdict(result) for result in results]}
        _write(self._path(part), save(tensors, metadata={"qat_plugin": json.dumps(header)}))

    def _path(self, part: str) -> Path:
        return self._folder / f"{part}.safetensors"


def _taken(layers: Mapping[str, nn.Module], changed: nn.Module | None) -> dict[str, Tensor]:
    """What a part left: integers and states of its layers, and the block's other parameters."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
        weight = current_weight(layer)
        if quantizer.scheme.is_integer:
            found = quantizer.integers(weight)
            tensors[f"{name}:q"] = pack(found.q.reshape(len(found.q), -1).cpu(), quantizer.scheme.weight_bits)
        tensors |= {f"{name}:state:{key}": value for key, value in quantizer.export_state().items()}
        if quantizer.scheme.is_integer:
            tensors[f"{name}:held_scale"] = found.scale.cpu()
            if found.zero_point is not None:
                tensors[f"{name}:held_zero_point"] = found.zero_point.cpu()
    for key, parameter in _others(changed).items():
        tensors[f"other:{key}"] = parameter.detach().cpu()
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _others(changed: nn.Module | None) -> dict[str, nn.Parameter]:
    """The parameters that folding may have changed: all but the weights that are integers now."""
    if changed is None:
        return {}
    layers = [module for module in changed.modules() if isinstance(module, FakeQuantized)]
    weights = {id(current_weight(m)) for m in layers if m.fake_quantizer.scheme.is_integer}
    return {
        name: parameter
        for name, parameter in changed.named_parameters()
        if id(parameter) not in weights and "fake_quantizer" not in name
    }


@torch.no_grad()
def _restore(
    layers: Mapping[str, nn.Module], changed: nn.Module | None, tensors: Mapping[str, Tensor], written: set[str]
) -> None:
    for key, parameter in _others(changed).items():
        parameter.copy_(tensors[f"other:{key}"])
    for name, layer in layers.items():
        quantizer: LayerQuantizer = getattr(layer, ATTRIBUTE)
        weight = current_weight(layer)
        prefix = f"{name}:state:"
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        phase = Phase.FLOAT if quantizer.learns_scales else Phase.FROZEN
        quantizer.check_state(state, phase)
        quantizer.import_state(state, phase, weight.device)
        if not quantizer.scheme.is_integer:
            continue
        rows, scheme = quantizer.rows(weight), quantizer.scheme
        q = unpack(tensors[f"{name}:q"], scheme.weight_bits, rows.shape[1], signed=scheme.symmetric)
        scale, zero_point = tensors[f"{name}:held_scale"], tensors.get(f"{name}:held_zero_point")
        hold(layer, Quantized(q.to(weight.device), scale, zero_point, scheme), write=name in written)
        if quantizer.learns_scales:
            quantizer.phase = Phase.FAKE_QUANTIZED


def _write(path: Path, content: bytes) -> None:
    """Replace a file in one step."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _sum_of(value: Any) -> str:
    """SHA-256 of tensors, containers of them and plain values, in their order."""
    digest = hashlib.sha256()
    _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{key}=".encode())
            _add(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _add(digest, item)
    else:
        digest.update(repr(value).encode())
