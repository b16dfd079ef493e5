"""What every ladder of a run does: climb rungs one by one, remember those that are done, measure, keep the report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import lightning as L
import torch
from torch import nn

from qat_plugin import report as reporting
from qat_plugin.config.schema import Config
from qat_plugin.conversion import convert, load_converted, proof_of, save_converted
from qat_plugin.measure import file_bytes, model_bytes, model_latency, parameter_count, sqnr_by_layer
from qat_plugin.policy import Plan, clean_name
from qat_plugin.ptq.methods import method_named
from qat_plugin.ptq.results import Calibration
from qat_plugin.qat import capture_inputs, folds
from qat_plugin.report import Report, Row
from qat_plugin.runs.bf16 import in_bf16
from qat_plugin.runs.exporting import export_from
from qat_plugin.runs.folder import RunFolder
from qat_plugin.runs.interruption import Interruptions
from qat_plugin.runs.journal import say
from qat_plugin.runs.record import StageRecord
from qat_plugin.runs.subject import Subject, network_of
from qat_plugin.runs.training import train

CONVERTED_BF16: Final = "converted, bf16"


class Rungs:
    """The rungs of one run.

    Args:
        config: the recipe.
        subject: model and data.
        plan: the policy resolved against the subject's network.
        folder: the run's.
        interruptions: what stops training.
        report: what earlier sessions found.
    """

    def __init__(
        self,
        config: Config,
        subject: Subject,
        plan: Plan,
        folder: RunFolder,
        interruptions: Interruptions,
        report: Report,
    ) -> None:
        self.config = config
        self.subject = subject
        self.plan = plan
        self.folder = folder
        self.interruptions = interruptions
        self.report = report

    def rungs(self) -> dict[str, tuple[str, Callable[[], None]]]:
        """Stage -> the report's row that says most about it (or an empty string), and its work."""
        raise NotImplementedError

    def climb(self) -> Report:
        """Do every rung that is not done yet; the report is on disk after each."""
        rungs = self.rungs()
        for stage in self.config.task.stages:
            if stage in self.folder.record.stages:
                say(f"{stage}: done in an earlier session")
                continue
            self._rung(stage, *rungs[stage])
        return self.report

    def _rung(self, stage: str, title: str, work: Callable[[], None]) -> None:
        record, started = self.folder.record, time.monotonic()
        before = record.seconds_spent.pop(stage, 0.0)
        L.seed_everything(self.config.trainer.seed, workers=True, verbose=False)  # no rung depends on those before it
        try:
            work()
        except BaseException:
            record.seconds_spent[stage] = before + time.monotonic() - started
            self.folder.save()
            raise
        seconds = before + time.monotonic() - started
        self.report = reporting.with_verdict(self.report)
        reporting.write_report(self.report, self.folder.path)
        record.stages[stage] = StageRecord(seconds, _metrics(self.report.row(title)))
        self.folder.save()
        say(f"{stage}: {_in_short(record.stages[stage])}")

    @cached_property
    def _reference(self) -> nn.Module | None:
        """The float model that everything is compared with, where the recipe measures it."""
        return network_of(self.subject.build()).eval() if "float" in self.config.task.stages else None

    def _float(self) -> None:
        network = self._reference
        assert network is not None
        self._add(Row(reporting.FLOAT, self.subject.evaluate(network, None), model_bytes(network)))
        self.report = replace(self.report, parameters=parameter_count(network), plan=tuple(self.plan.to_list()))

    def _convert(self, network: nn.Module, plan: Plan | None = None) -> None:
        """Convert a network (prepared, or by a plan), save it, and measure what was saved."""
        planned = self.plan if plan is None else plan
        floats = self._floats(network, planned)
        with capture_inputs(network) as inputs:
            self.subject.evaluate(network, None, self.subject.training_batches(1))
        convert(network, inputs=inputs)
        save_converted(network, self.folder.converted)
        metrics = self.subject.evaluate(network, self._reference)
        self._add(Row(reporting.CONVERTED, metrics, model_bytes(network), file_bytes(self.folder.converted)))
        self.report = replace(
            self.report,
            plan=tuple(json.loads((self.folder.converted / "plan.json").read_text(encoding="utf-8"))),
            proof=tuple(proof_of(network).to_list()),
            sqnr=sqnr_by_layer(floats, _weights(network, planned)),
        )

    def _floats(self, network: nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
        """The float weights that integers are compared with, by layer; before ``network`` is converted.

        Calibration has written its numbers into the network, whose float weights are those of a new one. Left out are
        layers that are no longer comparable with these: behind which a BatchNorm was folded, and all of a method
        that moves scales between layers.
        """
        calibration = getattr(network, "_qat_calibration", None)
        if not isinstance(calibration, Calibration):
            return {name: weight.clone() for name, weight in _weights(network, plan).items()}
        fresh = self._reference if self._reference is not None else network_of(self.subject.build())
        weights = _weights(fresh, plan)
        if method_named(calibration.method).scaling is not None:
            compared = {}
        else:
            folded = {clean_name(fold.names[0]) for fold in folds(network)}
            compared = {name: weight.clone() for name, weight in weights.items() if name not in folded}
        if left_out := len(weights) - len(compared):
            say(
                f"SQNR of the weights: without {left_out} of {len(weights)} layers, whose weights were scaled or folded"
            )
        return compared

    def _reloaded(self) -> None:
        network = self._from_disk()
        metrics = self.subject.evaluate(network, self._reference)
        self._add(Row(reporting.RELOADED, metrics, model_bytes(network), file_bytes(self.folder.converted)))

    def _exported(self) -> None:
        made = export_from(self.folder.path, self.config, self.subject, self.report)
        self._add(Row(f"{reporting.EXPORTED}, {made.format}", bytes_disk=made.bytes, note=str(made)))

    def _latency(self) -> None:
        measure, models = self.config.measure, self._timed_models()
        timed = model_latency(
            models,
            self.subject.workloads(measure.latency_tokens),
            rounds=measure.latency_rounds,
            budget_s=measure.latency_budget,
        )
        device = next(next(iter(models.values())).parameters()).device
        self.report = replace(
            self.report, latency=reporting.latency_rows(timed), environment=reporting.environment(device)
        )

    def _timed_models(self) -> dict[str, nn.Module]:
        """The float and the converted model as trained, and both in bf16 where that is another type."""
        models: dict[str, nn.Module] = {}
        trained_in_bf16 = self.config.trainer.precision == "bf16-true"
        if self._reference is not None:
            models[reporting.BF16 if trained_in_bf16 else reporting.FLOAT] = self._reference
            if not trained_in_bf16:
                models[reporting.BF16] = in_bf16(network_of(self.subject.build()))
        if "converted" in self.config.task.stages:
            models[reporting.CONVERTED] = self._from_disk()
            if not trained_in_bf16:
                models[CONVERTED_BF16] = self._in_bf16()
        return models

    def _in_bf16(self) -> nn.Module:
        """The converted model, everything but its integers in bf16; its quality is a row of its own."""
        network = in_bf16(self._from_disk())
        note = "the converted model with all that is not integer in bf16, for which more kernels exist"
        metrics = self.subject.evaluate(network, self._reference)
        self._add(Row(CONVERTED_BF16, metrics, model_bytes(network), note=note))
        return network

    def _train(self, module: Any, stage: str, callbacks: list[Any]) -> None:
        train(
            module,
            self.subject.data,
            self.config.trainer,
            stage=stage,
            folder=self._checkpoints(stage),
            callbacks=callbacks,
            interruptions=self.interruptions,
        )

    def _checkpoints(self, stage: str) -> Path:
        return self.folder.checkpoints / stage

    def _from_disk(self) -> nn.Module:
        network = network_of(self.subject.build()).eval()
        device = next(network.parameters()).device
        return load_converted(network, self.folder.converted).to(device)

    def _measure(
        self, name: str, network: nn.Module, note: str = "", *, memory: bool = False, steps: tuple[int, ...] = ()
    ) -> None:
        metrics = self.subject.evaluate(network, self._reference)
        self._add(Row(name, metrics, model_bytes(network) if memory else None, note=note, steps=steps))

    def _add(self, row: Row) -> None:
        rows = [other for other in self.report.rows if other.name != row.name]
        self.report = replace(self.report, rows=(*rows, row))


def _weights(network: nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    """The weights that a plan changes, by the names of their layers."""
    layers = {clean_name(path): module for path, module in network.named_modules()}
    return {layer.name: layers[layer.name].get_parameter("weight").detach() for layer in plan.quantized}


def _metrics(row: Row | None) -> dict[str, Any]:
    """The figures of a row that say most."""
    if row is None or row.metrics is None:
        return {}
    names = ("loss", "perplexity", "accuracy", "kl", "top1_agreement")
    found = {name: getattr(row.metrics, name) for name in names if getattr(row.metrics, name, None) is not None}
    return found | {name: value for name in ("bytes_memory", "bytes_disk") if (value := getattr(row, name)) is not None}


def _in_short(done: StageRecord) -> str:
    figures = [
        f"{label} {done.metrics[name]:{form}}"
        for name, label, form in (
            ("perplexity", "perplexity", ".4f"),
            ("accuracy", "accuracy", ".2%"),
            ("kl", "KL to float", ".4g"),
            ("top1_agreement", "top-1 agreement", ".2%"),
        )
        if name in done.metrics
    ]
    return ", ".join([*figures, f"{done.seconds:.0f} s"])
