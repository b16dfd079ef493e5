"""The ladder: one model as it is, quantized with and without training, converted, and read back from disk.

Each rung is measured against the float model it starts from and stored in the run's folder when it is done, so that
the same command goes on where it stopped. A training rung leaves ``checkpoints/<stage>/last.ckpt`` (float weights) and
the later rungs read that file, whether it was written a minute or a day ago: there is one path, not two.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import lightning as L
import torch
from torch import nn

from qat_plugin import report as reporting
from qat_plugin.callbacks import ExactResume, QuantizationAwareTraining
from qat_plugin.config.schema import Config
from qat_plugin.conversion import convert, load_converted, proof_of, save_converted
from qat_plugin.measure import file_bytes, model_bytes, model_latency, parameter_count, sqnr_by_layer
from qat_plugin.policy import Plan, clean_name
from qat_plugin.qat import calibrating, capture_inputs, load_quantizer_state, prepare, quantizer_state
from qat_plugin.report import Report, Row
from qat_plugin.runs.atomic import replacing
from qat_plugin.runs.bf16 import in_bf16
from qat_plugin.runs.folder import RunFolder
from qat_plugin.runs.interruption import Interruptions
from qat_plugin.runs.journal import say
from qat_plugin.runs.record import StageRecord
from qat_plugin.runs.subject import Subject, name_prefix, network_of
from qat_plugin.runs.training import LAST, read_checkpoint, train

CONVERTED_BF16: Final = "converted, bf16"
_QUANTIZERS: Final = "quantizers.pt"
_TITLES: Final = {
    "float": reporting.FLOAT,
    "ptq": reporting.PTQ,
    "fine-tuned": reporting.FINE_TUNED,
    "fine-tuned-ptq": reporting.FINE_TUNED_PTQ,
    "qat": reporting.QAT,
    "converted": reporting.CONVERTED,
    "reloaded": reporting.RELOADED,
}


class Ladder:
    """Climbs the rungs of one run.

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

    def climb(self) -> Report:
        """Do every rung that is not done yet; the report is on disk after each."""
        rungs: dict[str, Callable[[], None]] = {
            "float": self._float,
            "ptq": self._ptq,
            "fine-tuned": self._fine_tuned,
            "fine-tuned-ptq": self._fine_tuned_ptq,
            "qat": self._qat,
            "converted": self._converted,
            "reloaded": self._reloaded,
            "latency": self._latency,
        }
        for stage in self.config.task.stages:
            if stage in self.folder.record.stages:
                say(f"{stage}: done in an earlier session")
                continue
            self._rung(stage, rungs[stage])
        return self.report

    def _rung(self, stage: str, work: Callable[[], None]) -> None:
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
        record.stages[stage] = StageRecord(seconds, _metrics(self.report.row(_TITLES.get(stage, ""))))
        self.folder.save()
        say(f"{stage}: {_in_short(record.stages[stage])}")

    @cached_property
    def _reference(self) -> nn.Module:
        """The float model that everything is compared with."""
        return network_of(self.subject.build()).eval()

    def _float(self) -> None:
        network = self._reference
        self._add(Row(reporting.FLOAT, self.subject.evaluate(network, None), model_bytes(network)))
        self.report = replace(self.report, parameters=parameter_count(network), plan=tuple(self.plan.to_list()))

    def _ptq(self) -> None:
        self._measure(reporting.PTQ, self._quantized())

    def _fine_tuned(self) -> None:
        module = self.subject.build()
        self._train(module, "fine-tuned", [ExactResume()])
        self._measure(reporting.FINE_TUNED, self._trained("fine-tuned"))

    def _fine_tuned_ptq(self) -> None:
        weights = read_checkpoint(self._checkpoints("fine-tuned") / LAST)["state_dict"]
        self._measure(reporting.FINE_TUNED_PTQ, self._quantized(weights))

    def _qat(self) -> None:
        module = self.subject.build()
        self._train(module, "qat", [quantization_aware_training(self.config, self.plan, name_prefix(module))])
        state = _renamed(quantizer_state(module), name_prefix(module))
        with replacing(self._checkpoints("qat") / _QUANTIZERS) as temporary:
            torch.save(state, temporary)
        self._measure(reporting.QAT, self._prepared())

    def _converted(self) -> None:
        network = self._prepared() if "qat" in self.config.task.stages else self._quantized()
        floats = {name: weight.clone() for name, weight in self._weights(network).items()}
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
            sqnr=sqnr_by_layer(floats, self._weights(network)),
        )

    def _reloaded(self) -> None:
        network = self._from_disk()
        metrics = self.subject.evaluate(network, self._reference)
        self._add(Row(reporting.RELOADED, metrics, model_bytes(network), file_bytes(self.folder.converted)))

    def _latency(self) -> None:
        measure = self.config.measure
        timed = model_latency(
            self._timed_models(),
            self.subject.workloads(measure.latency_tokens),
            rounds=measure.latency_rounds,
            budget_s=measure.latency_budget,
        )
        self.report = replace(
            self.report,
            latency=reporting.latency_rows(timed),
            environment=reporting.environment(next(self._reference.parameters()).device),
        )

    def _timed_models(self) -> dict[str, nn.Module]:
        """The float and the converted model as trained, and both in bf16 where that is another type."""
        trained_in_bf16 = next(self._reference.parameters()).dtype == torch.bfloat16
        models = {reporting.BF16 if trained_in_bf16 else reporting.FLOAT: self._reference}
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

    def _weights(self, network: nn.Module) -> dict[str, torch.Tensor]:
        """The weights that the plan changes, by the names of their layers."""
        layers = {clean_name(path): module for path, module in network.named_modules()}
        return {layer.name: layers[layer.name].get_parameter("weight").detach() for layer in self.plan.quantized}

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

    def _trained(self, stage: str) -> nn.Module:
        """The network of a training stage, from its checkpoint."""
        module = self.subject.build()
        module.load_state_dict(read_checkpoint(self._checkpoints(stage) / LAST)["state_dict"])
        return network_of(module).eval()

    def _prepared(self) -> nn.Module:
        """The network of the QAT stage as training ended with it: float weights behind its own scales."""
        network = self._trained("qat")
        state = read_checkpoint(self._checkpoints("qat") / _QUANTIZERS)
        prepare(network, self.plan, learn_scales=self.config.qat.learn_scales)
        load_quantizer_state(network, state)
        return network

    def _quantized(self, weights: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
        """A network with these weights (its first ones by default), rounded to nearest, static scales calibrated."""
        module = self.subject.build()
        if weights is not None:
            module.load_state_dict(weights)
        network = prepare(network_of(module).eval(), self.plan)
        if any(layer.scheme is not None and layer.scheme.static for layer in self.plan.quantized):
            with calibrating(network):
                batches = self.subject.training_batches(self.config.ptq.calibration_batches)
                self.subject.evaluate(network, None, batches)
        return network

    def _from_disk(self) -> nn.Module:
        network = network_of(self.subject.build()).eval()
        device = next(network.parameters()).device
        return load_converted(network, self.folder.converted).to(device)

    def _measure(self, name: str, network: nn.Module) -> None:
        self._add(Row(name, self.subject.evaluate(network, self._reference), note=_NOTES.get(name, "")))

    def _add(self, row: Row) -> None:
        rows = [other for other in self.report.rows if other.name != row.name]
        self.report = replace(self.report, rows=(*rows, row))


_NOTES: Final = {
    reporting.PTQ: "rounded to nearest, no training",
    reporting.FINE_TUNED: "float, trained for the same steps on the same data as QAT",
}


def quantization_aware_training(config: Config, plan: Plan, prefix: str) -> QuantizationAwareTraining:
    """The callback that trains by this very plan, its names as they are inside the LightningModule."""
    layers = [
        replace(layer, name=prefix + layer.name, tied_to=layer.tied_to and prefix + layer.tied_to) for layer in plan
    ]
    return QuantizationAwareTraining(
        Plan(tuple(layers), plan.model),
        start=config.qat.start,
        freeze=config.qat.freeze,
        learn_scales=config.qat.learn_scales,
        convert=False,
    )


def _renamed(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A LightningModule's quantizer state under the names of its network."""

    def own(name: str | None) -> str | None:
        return None if name is None else name.removeprefix(prefix)

    plan = [{**layer, "name": own(layer["name"]), "tied_to": own(layer["tied_to"])} for layer in state["plan"]]
    return {**state, "plan": plan, "layers": {own(name): layer for name, layer in state["layers"].items()}}


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
