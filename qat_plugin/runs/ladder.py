"""The ladder: one model as it is, quantized with and without training, converted, and read back from disk.

Each rung is measured against the float model it starts from and stored in the run's folder when it is done, so that
the same command goes on where it stopped. A training rung leaves ``checkpoints/<stage>/last.ckpt`` (float weights) and
the later rungs read that file, whether it was written a minute or a day ago: there is one path, not two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import lightning as L
import torch
from torch import nn

from qat_plugin import report as reporting
from qat_plugin.atomic import replacing
from qat_plugin.callbacks import ExactResume, QuantizationAwareTraining, QuantizationMonitor
from qat_plugin.config.schema import FINE_TUNED, Config
from qat_plugin.errors import ConfigError
from qat_plugin.policy import Plan
from qat_plugin.ptq import GptqOptions, calibrate, calibration_of
from qat_plugin.qat import Phase, load_quantizer_state, low_bit_advice, prepare, quantizer_state
from qat_plugin.qat.state import observer_in
from qat_plugin.runs.journal import say
from qat_plugin.runs.rungs import Rungs
from qat_plugin.runs.subject import casting_inputs, name_prefix, network_of
from qat_plugin.runs.training import LAST, read_checkpoint

_QUANTIZERS: Final = "quantizers.pt"


class Ladder(Rungs):
    """The rungs of post-training quantization and quantization-aware training."""

    def rungs(self) -> dict[str, tuple[str, Callable[[], None]]]:
        """Stage -> row and work."""
        return {
            "float": (reporting.FLOAT, self._float),
            "ptq": (reporting.PTQ, self._ptq),
            "fine-tuned": (reporting.FINE_TUNED, self._fine_tuned),
            "fine-tuned-ptq": (reporting.FINE_TUNED_PTQ, self._fine_tuned_ptq),
            "further": (reporting.FURTHER, self._further),
            "further-ptq": (reporting.FURTHER_PTQ, self._further_ptq),
            "qat": (reporting.QAT, self._qat),
            "converted": (reporting.CONVERTED, self._converted),
            "reloaded": (reporting.RELOADED, self._reloaded),
            "exported": ("", self._exported),
            "latency": ("", self._latency),
        }

    def _ptq(self) -> None:
        network = self._quantized()
        how = "rounded to nearest" if self.config.ptq.method == "rtn" else calibration_of(network).summary()
        self._measure(reporting.PTQ, network, f"{how}, no training")

    def _fine_tuned(self) -> None:
        module, steps = self.subject.build(), self._steps(1)
        self._train(module, "fine-tuned", [ExactResume()])
        note = "float, trained for the same steps on the same data as QAT"
        if self._begins_fine_tuned:
            note = f"float, trained for {steps[0]} steps; QAT begins from these weights"
        self._measure(reporting.FINE_TUNED, self._trained("fine-tuned"), note, steps=steps)

    def _fine_tuned_ptq(self) -> None:
        network = self._quantized("fine-tuned-ptq", self._weights("fine-tuned"))
        self._measure(reporting.FINE_TUNED_PTQ, network, steps=self._steps(1))

    def _further(self) -> None:
        module, steps = self.subject.build(), self._steps(2)
        module.load_state_dict(self._weights("fine-tuned"))
        self._train(module, "further", [ExactResume()])
        note = f"float, {steps[0]} + {steps[1]} steps: from the fine-tuned weights, on the same data as QAT"
        self._measure(reporting.FURTHER, self._trained("further"), note, steps=steps)

    def _further_ptq(self) -> None:
        network = self._quantized("further-ptq", self._weights("further"))
        self._measure(reporting.FURTHER_PTQ, network, steps=self._steps(2))

    @property
    def _begins_fine_tuned(self) -> bool:
        """Whether QAT starts from the fine-tuned rung."""
        return self.config.qat.begin == FINE_TUNED

    def _steps(self, trainings: int) -> tuple[int, ...]:
        """Optimizer steps of so many trainings, one from where the other ended."""
        return (self.config.trainer.max_steps,) * trainings

    def _weights(self, stage: str) -> dict[str, torch.Tensor]:
        """What a training stage ended with, under the LightningModule's names."""
        weights: dict[str, torch.Tensor] = read_checkpoint(self._checkpoints(stage) / LAST)["state_dict"]
        return weights

    def _qat(self) -> None:
        module = self._student()
        if advice := low_bit_advice(self.plan):
            say(f"qat: {advice}")
        monitors = monitors_of(self.config)
        callbacks = [quantization_aware_training(self.config, self.plan, name_prefix(module)), *monitors]
        self._train(module, "qat", callbacks)
        for monitor in monitors:
            say(f"qat: {monitor.advice}")
        state = _renamed(quantizer_state(module), name_prefix(module))
        with replacing(self._checkpoints("qat") / _QUANTIZERS) as temporary:
            torch.save(state, temporary)
        steps = self._steps(2 if self._begins_fine_tuned else 1)
        self._measure(reporting.QAT, self._prepared(), self._how_qat_began(steps), steps=steps)

    def _how_qat_began(self, steps: tuple[int, ...]) -> str:
        """A footnote on what is not as usual; empty where all is."""
        parts = []
        if self._begins_fine_tuned:
            parts.append(
                f"{steps[0]} + {steps[1]} steps: it began from the fine-tuned weights, and the last are its own"
            )
        if self.config.qat.initial == "gptq":
            parts.append("its weights and scales began as GPTQ's")
        return "; ".join(parts)

    def _student(self) -> L.LightningModule:
        """The module that is trained; its teacher, if any, is the float model or the ladder's fine-tuned one."""
        distill, module = self.config.distill, self.subject.build_student()
        if self._begins_fine_tuned:
            network_of(module).load_state_dict(self._network_weights("fine-tuned", module))
        if not distill.weight:
            return module
        teacher = getattr(getattr(module, "objective", None), "teacher", None)
        if teacher is None:
            raise ConfigError(
                "distill.weight is for language models (model=embedded or transformers): set it to 0 here"
            )
        if distill.teacher == FINE_TUNED:
            if FINE_TUNED not in self.config.task.stages:
                raise ConfigError("distill.teacher=fine-tuned needs 'fine-tuned' among task.stages, which trains it")
            teacher.load_state_dict(self._network_weights("fine-tuned", module))
        return module

    def _network_weights(self, stage: str, module: L.LightningModule) -> dict[str, torch.Tensor]:
        """What a training stage ended with, under the names of the network in such a module."""
        prefix = name_prefix(module)
        return {name.removeprefix(prefix): value for name, value in self._weights(stage).items()}

    def _converted(self) -> None:
        self._convert(self._prepared() if "qat" in self.config.task.stages else self._quantized())

    def _trained(self, stage: str) -> nn.Module:
        """The network of a training stage, from its checkpoint."""
        module = self.subject.build()
        module.load_state_dict(self._weights(stage))
        return network_of(module).eval()

    def _prepared(self) -> nn.Module:
        """The network of the QAT stage as training ended with it: float weights behind its own scales."""
        network = self._trained("qat")
        state = read_checkpoint(self._checkpoints("qat") / _QUANTIZERS)
        qat, observer = self.config.qat, observer_in(state)
        learning: dict[str, Any] = {"learn_scales": qat.learn_scales, "learn_zero_points": qat.learn_zero_points}
        prepare(network, self.plan, phase=Phase.FLOAT, observer=observer, **learning)
        load_quantizer_state(network, state)
        return network

    def _quantized(
        self,
        stage: str = "ptq",
        weights: Mapping[str, torch.Tensor] | None = None,
        *,
        method: str | None = None,
        plan: Plan | None = None,
    ) -> nn.Module:
        """A network with these weights (its first ones by default), quantized without training.

        By the recipe's method and plan unless others are given. Finished blocks are kept in the run's folder: a stopped
        run goes on there, and converting reads them.
        """
        module, ptq = self.subject.build(), self.config.ptq
        if weights is not None:
            module.load_state_dict(weights)
        network, chosen = network_of(module).eval(), method or ptq.method
        L.seed_everything(self.config.trainer.seed, workers=True, verbose=False)  # the same batches each time
        with casting_inputs(network):
            return calibrate(
                network,
                plan or self.plan,
                self.subject.training_batches(ptq.calibration_batches),
                method=chosen,
                observer=ptq.observer,
                gptq=gptq_options(self.config),
                resume=None if chosen == "rtn" else self.folder.path / "calibration" / stage,
            )


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
        observer=config.qat.observer,
        learn_zero_points=config.qat.learn_zero_points,
        initial=config.qat.initial,  # type: ignore[arg-type]
        calibration_batches=config.ptq.calibration_batches,
        gptq=gptq_options(config),
        scale_learning_rate=config.qat.scale_learning_rate,
        convert=False,
    )


def gptq_options(config: Config) -> GptqOptions:
    """GPTQ as a recipe wants it."""
    ptq = config.ptq
    return GptqOptions(ptq.damping, ptq.correct, ptq.act_order, sweeps=ptq.sweeps)


def monitors_of(config: Config) -> list[QuantizationMonitor]:
    """The monitor that a recipe asks for, if any."""
    every = config.qat.monitor
    if every is False:
        return []
    return [QuantizationMonitor() if every is True else QuantizationMonitor(every)]


def _renamed(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A LightningModule's quantizer state under the names of its network."""

    def own(name: str | None) -> str | None:
        return None if name is None else name.removeprefix(prefix)

    plan = [{**layer, "name": own(layer["name"]), "tied_to": own(layer["tied_to"])} for layer in state["plan"]]
    folded = [[own(name) for name in pair] for pair in state["folded"]]
    return {
        **state,
        "plan": plan,
        "folded": folded,
        **({"phases": {own(name): phase for name, phase in state["phases"].items()}} if "phases" in state else {}),
        "layers": {own(name): layer for name, layer in state["layers"].items()},
    }
