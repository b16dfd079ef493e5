"""Which layers a model can least afford to quantize: the damage of each, one at a time, in each candidate scheme."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Literal, get_args

from torch import nn

from qat_plugin.errors import CheckpointError, ConfigError
from qat_plugin.measure.progress import Progress, progressing
from qat_plugin.scheme import Scheme
from qat_plugin.sensitivity.damage import Measure
from qat_plugin.sensitivity.fused import Grouping
from qat_plugin.sensitivity.gradient import gradient_damage
from qat_plugin.sensitivity.options import CANDIDATES, Choices, choices_of

Method = Literal["kl", "gradient"]
METHODS: Final[tuple[str, ...]] = get_args(Method)


@dataclass(frozen=True)
class Entry:
    """One group of layers in one scheme.

    Attributes:
        group: name of the group.
        layers: names of its layers.
        scheme: what they become; ``"keep"`` for nothing.
        damage: mean KL to the float model in nats a prediction, all other layers in float (or an estimate of it).
        bytes: what the group's weights take in the file then.
        weights: number of distinct weights.
    """

    group: str
    layers: tuple[str, ...]
    scheme: str
    damage: float
    bytes: int
    weights: int

    @property
    def bits_per_weight(self) -> float:
        """Bits that one weight takes, scales and zero points included."""
        return 8 * self.bytes / self.weights


@dataclass(frozen=True)
class Sensitivity:
    """The damage of each group in each scheme.

    Attributes:
        entries: in the order of the model's groups, within a group from the fewest bytes to the most.
        method: ``"kl"`` (measured) or ``"gradient"`` (estimated).
        quantize: how weights became integers.
        tokens: predictions that it was measured on.
        passes: forward passes of one batch that it took.
    """

    entries: tuple[Entry, ...]
    method: str = "kl"
    quantize: str = "rtn"
    tokens: int = 0
    passes: int = field(default=0, compare=False)

    def damage(self, group: str, scheme: str) -> float:
        """The damage of one group in one scheme.

        Raises:
            KeyError: when it was not ranked.
        """
        for entry in self.entries:
            if (entry.group, entry.scheme) == (group, scheme):
                return entry.damage
        raise KeyError(f"{group} was not ranked in {scheme}")

    def ranked(self, scheme: str | None = None) -> tuple[Entry, ...]:
        """Entries of one scheme (by default of all), the most damaging first."""
        chosen = [entry for entry in self.entries if scheme in (None, entry.scheme)]
        return tuple(sorted(chosen, key=lambda entry: (-entry.damage, entry.group, entry.bytes)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "entries": [{**asdict(e), "layers": list(e.layers)} for e in self.entries]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sensitivity:
        """The inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: when the values are of another form.
        """
        try:
            entries = tuple(entry_from(entry) for entry in values["entries"])
            return cls(**{f.name: values[f.name] for f in fields(cls) if f.name != "entries"}, entries=entries)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"this is no saved sensitivity: {error}") from error

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """One row a group, the most sensitive first, one column a number of bits; damage in units of 1e-3 nats."""
        header, rows = self.cells()
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = ["  ".join(_aligned(row, widths)).rstrip() for row in (header, *rows)]
        lines.insert(1, "  ".join("-" * width for width in widths))
        kind = "mean KL to the float model" if self.method == "kl" else "estimated from gradients"
        note = f"damage in 1e-3 nats a prediction ({kind}), one group at a time, on {self.tokens} predictions"
        return "\n".join([*lines, note])

    def cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and rows of the table, the groups that suffer most (over all schemes) first."""
        groups: dict[str, dict[str, Entry]] = {}
        for entry in self.entries:
            groups.setdefault(entry.group, {})[entry.scheme] = entry
        schemes = dict.fromkeys(e.scheme for e in sorted(self.entries, key=lambda e: (-e.bits_per_weight, e.scheme)))
        ordered = sorted(groups.items(), key=lambda item: -sum(e.damage for e in item[1].values()))
        rows = []
        for name, found in ordered:
            weights = next(iter(found.values())).weights
            cells = [_cell(found[scheme]) if scheme in found else "" for scheme in schemes]
            rows.append((name, f"{weights:,}", *cells))
        return ("group", "weights", *schemes), rows


def _cell(entry: Entry) -> str:
    return f"{1e3 * entry.damage:.4g} ({entry.bits_per_weight:.2f} bits)"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]


def entry_from(values: Mapping[str, Any]) -> Entry:
    """An entry from plain values."""
    return Entry(**{**values, "layers": tuple(values["layers"])})


def rank_layers(
    model: nn.Module,
    batches: Iterable[Any],
    candidates: Sequence[str | Scheme] = CANDIDATES,
    *,
    method: Method = "kl",
    quantize: str = "rtn",
    groups: Grouping = "fused",
    keep: Sequence[str] = (),
    embeddings: bool = False,
    progress: Progress | bool = True,
) -> Sensitivity:
    """Measure what each layer's quantization does to a model's predictions, one group of layers at a time.

    ``method="kl"`` switches fake quantization on in one group, leaves all others in float, and compares the
    predictions with the float model's: one pass over the batches for each group and scheme. ``"gradient"`` estimates
    the same figures from one forward and backward pass over the batches in all (see
    :mod:`qat_plugin.sensitivity.gradient`). Both give the same numbers each time.

    Args:
        model: the float model (a causal language model or a classifier); as it was afterwards.
        batches: calibration data; see :func:`qat_plugin.ptq.feeding.feed` for the form. A few hundred sequences do.
        candidates: the schemes; a group size that does not divide a layer becomes the nearest divisor there.
        method: measured or estimated.
        quantize: how weights become integers; see :func:`~qat_plugin.calibrate`.
        groups: ``"fused"``: layers that one kernel computes together (query, key and value; gate and up) take one
            scheme; ``"layers"``: each by itself. Layers that share a Parameter are one group in both.
        keep: patterns of layers that stay in float.
        embeddings: rank embeddings and output heads too.
        progress: a bar on stderr, nothing, or a callback(done, total).

    Raises:
        ConfigError: for an unknown method.
        DataError: when there is no batch.
        PolicyError: when there is nothing to rank.

    Example::

        print(rank_layers(model, batches, ("w8a16", "w4a16-g32-asym")))
    """
    chosen = choices_of(model, candidates, groups=groups, keep=keep, embeddings=embeddings)
    measure = Measure(model, batches, plans=chosen.plans.values(), quantize=quantize)
    return ranked(measure, chosen, method=method, progress=progress)


def ranked(
    measure: Measure,
    choices: Choices,
    *,
    method: Method = "kl",
    progress: Progress | bool = True,
    known: Iterable[Entry] = (),
    on_entry: Callable[[Entry], None] | None = None,
) -> Sensitivity:
    """As :func:`rank_layers`, on a model whose float predictions are known.

    Args:
        measure: of the model.
        choices: what to rank.
        method: measured or estimated.
        progress: a bar on stderr, nothing, or a callback(done, total).
        known: entries of an earlier session, which are not measured again.
        on_entry: told each new entry.

    Raises:
        ConfigError: for an unknown method.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r} is not one of {', '.join(METHODS)}")
    before = measure.passes
    found = {(entry.group, entry.scheme): entry.damage for entry in known}
    if method == "gradient":
        found = gradient_damage(measure, choices.groups, progress=progress)
    pairs = [(group, option) for group in choices.groups for option in group.options]
    entries = []
    with progressing(progress, "measuring sensitivity", len(pairs)) as advance:
        for index, (group, option) in enumerate(pairs):
            damage = found.get((group.name, option.scheme))
            new = damage is None
            entry = Entry(
                group.name,
                group.layers,
                option.scheme,
                measure.of(option.layers).kl if damage is None else damage,
                option.bytes,
                group.weights,
            )
            if new and on_entry is not None:
                on_entry(entry)
            entries.append(entry)
            advance(index + 1)
    return Sensitivity(tuple(entries), method, measure.quantize, measure.tokens, measure.passes - before)
