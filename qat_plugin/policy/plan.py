"""A policy resolved against one model: what becomes of each layer, why, what it costs and which kernel runs it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from qat_plugin.errors import PolicyError, did_you_mean
from qat_plugin.scheme import Scheme


@dataclass(frozen=True)
class LayerPlan:
    """The plan for one layer.

    Attributes:
        name: the module's name without wrappers.
        type: its class name.
        roles: its roles.
        shape: [out_features, in_features] of its weight (as stored, for layers that stay; [out_channels, in_channels /
            groups x kernel] of a convolution).
        scheme: what it becomes; ``None`` when it stays as it is.
        rule: the rule that decided.
        reason: why it stays, or why its scheme is not the one the rule asked for; else empty.
        kernel: the kernel that will run it here; ``"float"`` when it stays.
        note: what to know about that kernel.
        bytes_before, bytes_after: bytes of the weight in memory; a tied weight counts where it is seen first.
        tied_to: the layer whose Parameter this one shares, or ``None``.
        untied_bytes: bytes that conversion adds because tied layers take different schemes.
        usage: how the weight is read: ``"linear"``, ``"embedding"``, ``"both"`` or ``"conv"``.
    """

    name: str
    type: str
    roles: tuple[str, ...]
    shape: tuple[int, ...]
    scheme: Scheme | None
    rule: str
    reason: str = ""
    kernel: str = "float"
    note: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    tied_to: str | None = None
    untied_bytes: int = 0
    usage: str = "linear"

    @property
    def remark(self) -> str:
        """Everything a reader of the table should know beyond the columns."""
        tied = f"tied to {self.tied_to}" if self.tied_to else ""
        untied = f"untied by conversion: +{human_bytes(self.untied_bytes)}" if self.untied_bytes else ""
        return "; ".join(text for text in (self.reason, tied, untied, self.note) if text)


@dataclass(frozen=True)
class Plan:
    """What becomes of each layer of one model; prints as a table, saves as plain lists.

    Attributes:
        layers: one entry per layer, in module order, kept ones included.
        model: the model's class name.
    """

    layers: tuple[LayerPlan, ...]
    model: str = "model"

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerPlan:
        for layer in self.layers:
            if layer.name == name:
                return layer
        names = [layer.name for layer in self.layers]
        raise KeyError(f"the plan has no layer {name!r}.{did_you_mean(name, names)}")

    def __contains__(self, name: object) -> bool:
        return any(layer.name == name for layer in self.layers)

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        """Layers that change: integer and float-cast ones."""
        return tuple(layer for layer in self.layers if layer.scheme is not None)

    @property
    def kept(self) -> tuple[LayerPlan, ...]:
        """Layers that stay as they are, each with its reason."""
        return tuple(layer for layer in self.layers if layer.scheme is None)

    @property
    def bytes_before(self) -> int:
        """Bytes of all listed weights now."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of all listed weights after conversion."""
        return sum(layer.bytes_after for layer in self.layers)

    def without_kernels(self) -> Plan:
        """The same decisions without what depends on this machine; equal plans mean equal training."""
        layers = (replace(layer, kernel="", note="", bytes_before=0, bytes_after=0) for layer in self.layers)
        return Plan(tuple(layers), self.model)

    def summary(self) -> str:
        """One line: how many layers change and stay, and the bytes."""
        schemes: dict[str, int] = {}
        for layer in self.quantized:
            schemes[str(layer.scheme)] = schemes.get(str(layer.scheme), 0) + 1
        parts = ", ".join(f"{count} x {scheme}" for scheme, count in schemes.items()) or "nothing"
        size = f"{human_bytes(self.bytes_before)} -> {human_bytes(self.bytes_after)}"
        return f"{parts}; {len(self.kept)} kept; weights {size}"

    def to_list(self) -> list[dict[str, Any]]:
        """Plain values (str, int, list, None), one dict per layer."""
        return [
            {**asdict(layer), "scheme": None if layer.scheme is None else str(layer.scheme),
             "roles": list(layer.roles), "shape": list(layer.shape)}
            for layer in self.layers
        ]  # fmt: skip

    @classmethod
    def from_list(cls, layers: Sequence[Mapping[str, Any]], model: str = "model") -> Plan:
        """The inverse of :meth:`to_list`.

        Raises:
            PolicyError: when an entry has unknown or missing fields.
        """
        try:
            return cls(tuple(_layer_from(entry) for entry in layers), model)
        except (TypeError, KeyError) as error:
            raise PolicyError(f"this is not a saved plan: {error}") from error

    def __str__(self) -> str:
        return self.table()

    def table(self, *, collapse: bool = True) -> str:
        """A readable table; ``collapse`` folds layers that differ only by their block's index into one row."""
        header = ("layer", "type", "scheme", "rule", "bytes", "kernel here", "remark")
        rows = [
            header,
            *(_cells(name, layer) for name, layer in (_folded(self.layers) if collapse else _plain(self.layers))),
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * w for w in [*widths, len(header[-1])]))
        return "\n".join([*lines, self.summary()])


def human_bytes(count: int) -> str:
    """Bytes in the unit a person reads: ``"1.5 MiB"``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _layer_from(entry: Mapping[str, Any]) -> LayerPlan:
    values = dict(entry)
    values["scheme"] = None if values["scheme"] is None else Scheme.parse(values["scheme"])
    values["roles"], values["shape"] = tuple(values["roles"]), tuple(values["shape"])
    return LayerPlan(**values)


def _plain(layers: Sequence[LayerPlan]) -> list[tuple[str, LayerPlan]]:
    return [(layer.name, layer) for layer in layers]


def _folded(layers: Sequence[LayerPlan]) -> list[tuple[str, LayerPlan]]:
    """Rows for layers that are equal but for one index in their names, shown as ``layers.{0..7}.q_proj``."""
    groups: dict[Any, list[LayerPlan]] = {}
    for layer in layers:
        pattern = re.sub(r"\b\d+\b", "#", layer.name, count=1)
        key = (pattern, replace(layer, name="", tied_to=None, roles=()), layer.tied_to)
        groups.setdefault(key, []).append(layer)
    rows = []
    for (pattern, *_), members in groups.items():
        if len(members) == 1:
            rows.append((members[0].name, members[0]))
            continue
        indices = [int(match[0]) for member in members if (match := re.search(r"\b\d+\b", member.name))]
        total = replace(
            members[0],
            bytes_before=sum(m.bytes_before for m in members),
            bytes_after=sum(m.bytes_after for m in members),
        )
        rows.append((pattern.replace("#", "{" + _ranges(indices) + "}"), total))
    return rows


def _ranges(indices: list[int]) -> str:
    """``0..3,5`` for 0, 1, 2, 3, 5."""
    spans: list[list[int]] = []
    for index in sorted(indices):
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in spans)


def _cells(name: str, layer: LayerPlan) -> tuple[str, ...]:
    size = f"{human_bytes(layer.bytes_before)} -> {human_bytes(layer.bytes_after)}"
    return (name, layer.type, str(layer.scheme or "kept"), layer.rule, size, layer.kernel, layer.remark)
