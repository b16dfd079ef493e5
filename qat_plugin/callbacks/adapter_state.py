"""A LightningModule whose state_dict holds what is trained and not the frozen base.

Lightning takes the module's ``state_dict()`` for every kind of checkpoint, ``save_weights_only=True`` included, and
loads it strictly. Two hooks on the module make both speak of the trained entries alone; the network inside keeps its
whole ``state_dict()``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from qat_plugin import qlora
from qat_plugin.errors import CheckpointError

_MARK = "_qlora_adapters_only"


def adapters_only(module: nn.Module) -> None:
    """Let ``module.state_dict()`` hold, and ``load_state_dict()`` expect, what is trained; once is enough."""
    if module.__dict__.get(_MARK):
        return
    module.__dict__[_MARK] = True
    module.register_state_dict_post_hook(_drop_frozen)
    module.register_load_state_dict_pre_hook(_check_arriving)
    module.register_load_state_dict_post_hook(_forgive_frozen)


def trained_keys(module: nn.Module) -> set[str]:
    """Keys of what is trained: parameters by name, and saved buffers (running statistics)."""
    prefix = next(
        name for name, part in module.named_modules() if isinstance(part.__dict__.get("_qlora"), qlora.Prepared)
    )
    record = qlora.prepared_of(module)
    names = {f"{prefix}.{name}" if prefix else name for name in record.trained}
    inside = f"{prefix}." if prefix else ""
    names |= {name for name, p in module.named_parameters() if not name.startswith(inside) and p.requires_grad}
    for path, part in module.named_modules():
        for name in part._buffers.keys() - part._non_persistent_buffers_set:
            if part._buffers[name] is not None:
                names.add(f"{path}.{name}".lstrip("."))
    return {name for name in names if ".fake_quantizer." not in name}


def check_keys(module: nn.Module, keys: Iterable[str]) -> None:
    """Raise unless ``keys`` are exactly those of what is trained.

    Raises:
        CheckpointError: naming some that are missing or too many.
    """
    due, given = trained_keys(module), set(keys)
    if due != given:
        raise CheckpointError(
            f"adapters and checkpoint differ: {_some(due - given)} missing from the checkpoint, {_some(given - due)} "
            "unknown here; use the same targets, rank and model that it was trained with"
        )


def _drop_frozen(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    if not qlora.is_prepared(module):
        return
    kept = {prefix + key for key in trained_keys(module)}
    for key in [key for key in state_dict if key.startswith(prefix) and key not in kept]:
        del state_dict[key]


def _check_arriving(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    if not qlora.is_prepared(module):
        if any(".lora_" in key for key in state_dict):
            raise CheckpointError(
                f"a checkpoint of adapters arrives at {type(module).__name__}, whose adapters were merged: evaluate "
                "the module as it is (ckpt_path=None), or load the checkpoint into a fresh one"
            )
        return
    arriving = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    check_keys(module, arriving)
    shapes = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for key, value in arriving.items():
        if isinstance(value, Tensor) and value.shape != shapes[key].shape:
            raise CheckpointError(
                f"{key} has shape {list(value.shape)} in the checkpoint and {list(shapes[key].shape)} here: was it "
                "trained with another rank?"
            )


def _forgive_frozen(module: nn.Module, incompatible: Any) -> None:
    if not qlora.is_prepared(module):
        return
    due = trained_keys(module)
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key in due]


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return (", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")) or "nothing"
