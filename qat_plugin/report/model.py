"""The one model of a run's results; every rendering is made from it and none measures or recomputes anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from qat_plugin.errors import QatError
from qat_plugin.measure import ClassifierMetrics, Latency, LMMetrics

FLOAT: Final = "float"
PTQ: Final = "PTQ"
FINE_TUNED: Final = "fine-tuned"
FINE_TUNED_PTQ: Final = "fine-tuned, then PTQ"
FURTHER: Final = "fine-tuned further"
FURTHER_PTQ: Final = "fine-tuned further, then PTQ"
QAT: Final = "QAT"
CONVERTED: Final = "converted"
RELOADED: Final = "reloaded"
EXPORTED: Final = "exported"
BASE: Final = "base"
NF4_BASE: Final = "NF4 base"
QLORA: Final = "QLoRA"
QAT_LORA: Final = "QAT + LoRA"
MERGED: Final = "merged"
BF16: Final = "bf16"
"""Names of the ladders' rows, and of the models in the latency table (float, bf16, converted)."""

LADDER: Final = (FLOAT, PTQ, FINE_TUNED, FINE_TUNED_PTQ, FURTHER, FURTHER_PTQ, QAT, CONVERTED, RELOADED)
ADAPTER_LADDER: Final = (FLOAT, NF4_BASE, QLORA, MERGED, CONVERTED, RELOADED)

Metrics = LMMetrics | ClassifierMetrics


@dataclass(frozen=True)
class Row:
    """One rung of the ladder: a model in one form.

    Attributes:
        name: one of ``LADDER`` or ``ADAPTER_LADDER``, or a name of your own for a further baseline.
        metrics: its quality on the held-out data; ``None`` when it was not evaluated.
        bytes_memory: bytes of its parameters and buffers in memory.
        bytes_disk: bytes of its file or folder on disk; ``None`` when it was not saved.
        note: a remark shown below the table.
        steps: optimizer steps that made its weights from the float row's, training by training: ``(200, 100)`` for 100
            steps that began where 200 had ended; empty where it is not known.
    """

    name: str
    metrics: Metrics | None = None
    bytes_memory: int | None = None
    bytes_disk: int | None = None
    note: str = ""
    steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))

    @property
    def quality(self) -> float | None:
        """Perplexity of a language model, accuracy of a classifier."""
        if self.metrics is None:
            return None
        return self.metrics.perplexity if isinstance(self.metrics, LMMetrics) else self.metrics.accuracy


@dataclass(frozen=True)
class LatencyRow:
    """Latency of one model on one workload.

    Attributes:
        workload: what was run, in words that fit after "at": "batch 1, 1 token", "batch 1, 128 tokens".
        model: ``FLOAT`` (as trained), ``BF16``, ``CONVERTED`` or a name of your own.
        latency: seconds, from rounds interleaved with the other models of that workload.
    """

    workload: str
    model: str
    latency: Latency


@dataclass(frozen=True)
class Report:
    """Everything a run found out. Lists and mappings are plain values, so that it can be saved as JSON.

    Attributes:
        title: one line.
        recipe: name of the recipe or script.
        command: the command that reproduces the run; empty when there is none.
        rows: the ladder, in the order in which it is shown; names are unique.
        parameters: number of weights of the float model, for bits per weight.
        plan: ``Plan.to_list()``, one mapping a layer.
        proof: ``Proof.to_list()``, one mapping a converted layer.
        latency: all workloads and models.
        sqnr: layer -> dB of its quantized weight against the float weight it was made from.
        survival: per layer, what of the adapter's update is left in each form the merged weights can be stored in
            (``Survival.to_dict()``).
        environment: name -> value: versions, device, threads.
        verdict: sentences; see ``report.verdict_of``.
    """

    title: str
    recipe: str = ""
    command: str = ""
    rows: tuple[Row, ...] = ()
    parameters: int | None = None
    plan: tuple[Mapping[str, Any], ...] = ()
    proof: tuple[Mapping[str, Any], ...] = ()
    latency: tuple[LatencyRow, ...] = ()
    sqnr: Mapping[str, float] = field(default_factory=dict)
    survival: tuple[Mapping[str, Any], ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    verdict: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("rows", "plan", "proof", "latency", "survival", "verdict"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise QatError(f"a report has one row of a name, {', '.join(map(repr, twice))} occurs more than once")

    def row(self, name: str) -> Row | None:
        """The row of that name, or ``None``."""
        return next((row for row in self.rows if row.name == name), None)

    def bits_per_weight(self, row: Row) -> float | None:
        """Bits of memory per weight of the float model, everything that is not a weight included."""
        if row.bytes_memory is None or not self.parameters:
            return None
        return 8 * row.bytes_memory / self.parameters

    def delta(self, row: Row) -> float | None:
        """Quality of ``row`` minus that of the float row: perplexity or accuracy, ``None`` where one is missing."""
        base = self.row(FLOAT)
        if base is None or base.quality is None or row.quality is None:
            return None
        return row.quality - base.quality

    def workloads(self) -> tuple[str, ...]:
        """The workloads of the latency table, in order."""
        return tuple(dict.fromkeys(entry.workload for entry in self.latency))

    def latency_of(self, workload: str, model: str) -> Latency | None:
        """The latency of one model on one workload, or ``None``."""
        return next((e.latency for e in self.latency if (e.workload, e.model) == (workload, model)), None)


def latency_rows(measured: Mapping[str, Mapping[str, Latency]]) -> tuple[LatencyRow, ...]:
    """Rows of the latency table from what ``measure.model_latency`` returns (workload -> model -> Latency)."""
    return tuple(
        LatencyRow(workload, model, latency)
        for workload, by_model in measured.items()
        for model, latency in by_model.items()
    )
