"""Where a loaded base came from and what loading it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from qat_plugin.errors import CheckpointError, did_you_mean

LOADED: Final = "_qlora_loaded"
"""Attribute of a loaded model that holds its record."""


@dataclass(frozen=True)
class BaseRecord:
    """Plain values; goes into a run's record and into checkpoints.

    Attributes:
        path: the directory as it was given, or the hub's name.
        revision: the hub's commit; ``None`` for a local directory.
        backend: who holds the NF4 weights.
        dtype: float type of the rest ("bfloat16").
        plan: the base's plan, as :meth:`~qat_plugin.policy.Plan.to_list` gives it.
        fingerprint: of the quantized base, where it was taken; else empty.
        sums: content sum of each source tensor, by its name in the files.
        cached: whether the quantized model came from the cache.
        streamed: whether tensors were quantized one by one as they were read.
        note: why they were not streamed, or why the cache was made anew; else empty.
        seconds: of loading.
        peak_host_bytes: by how much anonymous host memory grew at most while weights were read, quantized and kept;
            ``None`` where the system does not say.
        largest_tensor_bytes: of the source, as stored.
        quantized_bytes: of the loaded model in memory.
    """

    path: str
    revision: str | None = None
    backend: str = "bitsandbytes"
    dtype: str = "bfloat16"
    plan: tuple[dict[str, Any], ...] = ()
    fingerprint: str = ""
    sums: dict[str, str] = field(default_factory=dict)
    cached: bool = False
    streamed: bool = True
    note: str = ""
    seconds: float = 0.0
    peak_host_bytes: int | None = None
    largest_tensor_bytes: int = 0
    quantized_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Strings, numbers, lists and dicts."""
        return asdict(self) | {"plan": [dict(layer) for layer in self.plan]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BaseRecord:
        """The inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: when it is the record of something else.
        """
        known = {each.name for each in fields(cls)}
        for name in values:
            if name not in known:
                raise CheckpointError(
                    f"this is not a base's record: unknown field {name!r}.{did_you_mean(name, known)}"
                )
        if "path" not in values:
            raise CheckpointError("this is not a base's record: it has no path")
        return cls(**{**values, "plan": tuple(values.get("plan", ()))})
