"""Quantization-aware training as one callback on an unmodified Lightning script."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from qat_plugin.callbacks.beginning import Beginning, Beginnings
from qat_plugin.callbacks.guards import (
    best_checkpoint_callback,
    check_averaging,
    check_other_callbacks,
    check_strategy,
    saves_nothing,
)
from qat_plugin.callbacks.resuming import ResumingCallback, after_configure_model
from qat_plugin.callbacks.scale_groups import check_rate, split_scales
from qat_plugin.callbacks.schedule import Schedule, Steps, total_steps
from qat_plugin.callbacks.weight_reuse import TrainerReuse
from qat_plugin.conversion import convert, dequantized_state_dict, is_converted, proof_of, reload_float
from qat_plugin.errors import CheckpointError, ConfigError
from qat_plugin.observers.spelling import DEFAULT_FOR_TRAINING, ObserverSpec
from qat_plugin.policy import Plan, Policy, PolicyLike
from qat_plugin.ptq import GptqOptions
from qat_plugin.qat import (
    Phase,
    begin_scales,
    capture_inputs,
    folds,
    get_phase,
    grid_parameters,
    is_prepared,
    load_quantizer_state,
    low_bit_advice,
    observer_of,
    plan_of,
    prepare,
    quantizer_state,
    set_phase,
    synchronize_observers,
)
from qat_plugin.qat.state import observer_in

Weights = Literal["last", "best"]
_DTYPES: Final[dict[str, torch.dtype]] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class QuantizationAwareTraining(ResumingCallback):
    """Train with fake quantization, and end with real integer kernels.

    The module needs no change: its layers may come from ``__init__``, ``setup`` or ``configure_model``. Checkpoints
    stay float and load without this package; scales, phase and observers travel in the callback's own state, with what
    it takes to resume to the bit (:class:`~qat_plugin.callbacks.ExactResume`).

    BatchNorms behind layers of a static scheme (``"w8a8-static"``, which is for convolutions too) are folded when fake
    quantization starts, with the statistics of that step: a network trained from scratch needs a later ``start``.

    Args:
        policy: a scheme, a mapping of rules, a :class:`~qat_plugin.policy.Policy` or a ready Plan.
        start: when fake quantization starts: an optimizer step (int) or a fraction of training (float).
        freeze: when scales stop moving, likewise; ``None`` for never.
        convert: convert to integer kernels when the fit ends.
        weights: convert the ``"last"`` weights, or those of the ``"best"`` checkpoint of a ``ModelCheckpoint``.
        learn_scales: learn the scales (LSQ); they get optimizer groups of their own, without weight decay.
        learn_zero_points: learn the zero points with them (LSQ+); see :func:`~qat_plugin.prepare`.
        initial: where learned scales begin: ``"minmax"``, ``"mse"`` (least squared error), or ``"gptq"``, which
            calibrates on training batches right before the first fake-quantized step (in one process), and leaves data
            order and generators alone; weights become the numbers of its integers. A resumed run does not repeat it.
        calibration_batches: training batches for ``initial="gptq"``, at most.
        gptq: its options.
        scale_learning_rate: of learned scales, where the weights have the rate that their optimizer was given; a
            schedule changes both by the same factor. Scales are learned relative to where they begin, so that the
            weights' own rate, the default, suits Adam; SGD wants a larger one.
        dtype: the float type that the converted model runs in (``"bf16"`` for the fast INT4 kernels on CPU); by
            default the module's own.
        observer: what static schemes calibrate their activations with, on training batches before ``freeze``:
            ``moving-average`` (``:momentum``), ``minmax``, ``percentile`` (``:99.99``), ``mse`` or ``entropy``. Ranks
            agree after each batch.
        exact_resume: save generators and data position, so that a resumed run continues to the bit.

    Raises:
        ConfigError: for an argument that is not allowed; at the start of a fit, for a schedule that ends after
            training, a strategy that shards before this callback, or callbacks in an order that cannot work.
        PolicyError: when the policy does not fit the module.

    Example::

        Trainer(callbacks=[QuantizationAwareTraining("w4a8-g32", start=0.1)]).fit(module, data)
    """

    def __init__(
        self,
        policy: PolicyLike | Plan = "w4a8-g32",
        *,
        start: int | float = 0,
        freeze: int | float | None = None,
        convert: bool = True,
        weights: Weights = "last",
        learn_scales: bool = False,
        learn_zero_points: bool = False,
        initial: Beginning = "minmax",
        calibration_batches: int = 32,
        gptq: GptqOptions | None = None,
        scale_learning_rate: float | None = None,
        dtype: Literal["fp32", "bf16", "fp16"] | None = None,
        observer: str = DEFAULT_FOR_TRAINING,
        exact_resume: bool = True,
    ) -> None:
        super().__init__(exact_resume=exact_resume)
        if weights not in get_args(Weights):
            raise ConfigError(f"weights={weights!r} is not one of {', '.join(get_args(Weights))}")
        if dtype is not None and dtype not in _DTYPES:
            raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(_DTYPES)}")
        self._policy = policy if isinstance(policy, Plan) else Policy.coerce(policy)
        self._schedule = Schedule(start, freeze)
        self._convert, self._weights, self._learn_scales = convert, weights, learn_scales
        self._begin = Beginnings(initial, calibration_batches, gptq)
        check_rate(scale_learning_rate)
        if not learn_scales and (initial != "minmax" or learn_zero_points or scale_learning_rate is not None):
            raise ConfigError(
                "initial, learn_zero_points and scale_learning_rate are of learned scales: they need learn_scales=True"
            )
        self._scale_learning_rate = scale_learning_rate
        self._learning: dict[str, Any] = {"learn_scales": learn_scales, "learn_zero_points": learn_zero_points}
        self._dtype = None if dtype is None else _DTYPES[dtype]
        self._observer = ObserverSpec.parse(observer)
        self._steps: Steps | None = None
        self._module: L.LightningModule | None = None
        self._loaded: dict[str, Any] | None = None
        self._capture: AbstractContextManager[dict[str, Tensor]] | None = None
        self._inputs: dict[str, Tensor] = {}
        self._reuse = TrainerReuse()

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            policy=str(self._policy.summary() if isinstance(self._policy, Plan) else self._policy)
        )

    def phase_at(self, trainer: L.Trainer, steps: Steps) -> Phase:
        """The phase that training should be in now; override it for a schedule of your own.

        A pure function of the trainer's state, or a resumed run will not be where it was.
        """
        return steps.phase(trainer.global_step)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._module = pl_module
        if stage != "fit":
            return
        self._check_fit(trainer, pl_module)
        if is_prepared(pl_module):
            self._check_prepared(trainer, pl_module)
        else:
            after_configure_model(pl_module, lambda: self._prepare(trainer, pl_module))

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._learn_scales:
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            split_scales(trainer.optimizers, schedulers, grid_parameters(pl_module), self._scale_learning_rate)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._steps = self._schedule.resolve(total_steps(trainer), observe=_observes(pl_module))
        self._follow_schedule(trainer, pl_module)
        super().on_train_start(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._follow_schedule(trainer, pl_module)
        self._reuse.accumulating(trainer, pl_module)
        if not self._inputs and get_phase(pl_module) in (Phase.FAKE_QUANTIZED, Phase.FROZEN):
            self._capture = capture_inputs(pl_module)
            self._inputs = self._capture.__enter__()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_capture()
        if get_phase(pl_module) in (Phase.OBSERVING, Phase.FAKE_QUANTIZED):
            synchronize_observers(pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._reuse.drop()

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._reuse.close()

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if is_prepared(pl_module) and trainer.state.fn == "fit":
            self._follow_schedule(trainer, pl_module)
        self._reuse.evaluating(pl_module)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._reuse.evaluated()

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._reuse.evaluating(pl_module)

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._reuse.evaluated()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._reuse.close()
        self._stop_capture()

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._convert or not is_prepared(pl_module):
            return
        if self._weights == "best" and not saves_nothing(trainer):
            self._load_best(trainer, pl_module)
        if get_phase(pl_module) in (Phase.FLOAT, Phase.OBSERVING):
            late = "; GPTQ's turn never came" if self._begin.calibrates else ""
            rank_zero_warn(f"fake quantization never ran on these weights: this is post-training quantization{late}")
            set_phase(pl_module, Phase.FAKE_QUANTIZED)  # folds BatchNorms, whose weights learned scales begin from
            begin_scales(pl_module)
        convert(pl_module, inputs=self._inputs, dtype=self._dtype)
        rank_zero_info(f"QuantizationAwareTraining: {proof_of(pl_module)}")

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._reuse.close()
        self._stop_capture()
        self._inputs = {}
        super().teardown(trainer, pl_module, stage)

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._module is None or not is_prepared(self._module):
            return {} if self._loaded is None else self._loaded
        return {"quantizers": quantizer_state(self._module), "resume": self.resume_state()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict
        self.load_resume_state(state_dict.get("resume", {}))
        if self._module is None or is_converted(self._module) or "quantizers" not in state_dict:
            return
        if not is_prepared(self._module):  # a checkpoint evaluated in a new process sees what it was trained with
            plan, observer = Plan.from_list(state_dict["quantizers"]["plan"]), observer_in(state_dict["quantizers"])
            prepare(
                self._module, plan, phase=Phase.FLOAT, initial=self._begin.initial, observer=observer, **self._learning
            )
        load_quantizer_state(self._module, state_dict["quantizers"])

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint saved after conversion is float too: it holds the numbers that the integers stand for."""
        if is_converted(pl_module):
            checkpoint["state_dict"] = dequantized_state_dict(pl_module)

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A float checkpoint into a converted module: with the scales of that checkpoint (Lightning #12896).

        Raises:
            CheckpointError: when training is to resume from a checkpoint of another policy; Lightning would warn, and
                start with scales and phase of a new run.
        """
        if trainer.state.fn == "fit":
            self._check_same_policy(trainer, checkpoint)
        state = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("quantizers")
        if is_converted(pl_module) and state is not None:
            reload_float(pl_module, checkpoint["state_dict"], state)

    def _check_fit(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if is_converted(pl_module):
            raise ConfigError(
                f"{type(pl_module).__name__} was converted to integers by an earlier fit and cannot be trained on. "
                "Build a fresh module and resume it from a checkpoint (ckpt_path=...), or pass "
                "convert=False to the earlier fit"
            )
        check_strategy(trainer)
        self._begin.check(trainer)
        check_other_callbacks(trainer, self)
        if self._weights == "best" and not saves_nothing(trainer):
            best_checkpoint_callback(trainer)

    def _check_prepared(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise when a module that was prepared before is to be trained otherwise than it was prepared."""
        check_averaging(trainer, pl_module, self._schedule)
        there = {layer.name: layer.scheme for layer in plan_of(pl_module).quantized}
        here = {layer.name: layer.scheme for layer in self._plan(trainer, pl_module).quantized}
        way = "Use the same arguments, or qat_plugin.unprepare(module) first"
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                was, wanted = there.get(name) or "not quantized", here.get(name) or "not quantized"
                raise ConfigError(
                    f"{name} is prepared already as {was}, and this callback's policy says {wanted}. {way}"
                )
        observer = observer_of(pl_module)
        if observer not in (None, self._observer):
            raise ConfigError(
                f"the module is prepared already with observer={str(observer)!r}, not {str(self._observer)!r}. {way}"
            )
        learned = bool(grid_parameters(pl_module))
        if learned != self._learn_scales:
            raise ConfigError(
                f"the module is prepared already with learn_scales={learned}, not {self._learn_scales}. {way}"
            )
        self._begin.warn_if_late(pl_module)

    def _check_same_policy(self, trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
        saved = [key for key in checkpoint.get("callbacks", {}) if key.startswith(type(self).__qualname__ + "{")]
        if saved and self.state_key not in saved:
            raise CheckpointError(
                f"the checkpoint was trained by {saved[0]}, this is {self.state_key}: resume with the policy that "
                "it was made with, or load only its weights (module.load_state_dict) to start anew from them"
            )

    def _plan(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Plan:
        if isinstance(self._policy, Plan):
            return self._policy
        return self._policy.plan(pl_module, device=trainer.strategy.root_device, dtype=self._dtype)

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        plan = self._plan(trainer, pl_module)
        phase = Phase.FAKE_QUANTIZED if self._schedule.start == 0 else Phase.FLOAT
        prepare(pl_module, plan, phase=phase, initial=self._begin.initial, observer=self._observer, **self._learning)
        check_averaging(trainer, pl_module, self._schedule)
        self._begin.wait(pl_module)
        rank_zero_info(f"QuantizationAwareTraining: {plan.summary()}{_folded(pl_module)}")
        if advice := low_bit_advice(plan):
            rank_zero_warn(f"QuantizationAwareTraining: {advice}")

    def _follow_schedule(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._steps is None:
            return  # the sanity check before the first step: prepared in the phase of step 0
        phase, before = self.phase_at(trainer, self._steps), get_phase(pl_module)
        if phase is before:
            return
        if before in (Phase.FLOAT, Phase.OBSERVING):
            self._begin(trainer, pl_module)
        set_phase(pl_module, phase)
        moved = f"{before.value} -> {phase.value}{_folded(pl_module)}"
        rank_zero_info(f"QuantizationAwareTraining: step {trainer.global_step}: {moved}")

    def _stop_capture(self) -> None:
        if self._capture is not None:
            self._capture.__exit__(None, None, None)
            self._capture = None

    def _load_best(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = best_checkpoint_callback(trainer).best_model_path
        if not path:
            raise CheckpointError("weights='best': ModelCheckpoint saved nothing; did validation run?")
        checkpoint: Mapping[str, Any] = torch.load(Path(path), map_location="cpu", weights_only=True)
        pl_module.load_state_dict(checkpoint["state_dict"])
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is None:
            raise CheckpointError(f"weights='best': {path} holds no state of this callback (save_weights_only=True?)")
        load_quantizer_state(pl_module, state["quantizers"])
        rank_zero_info(f"QuantizationAwareTraining: converting the best checkpoint, {path}")


def _folded(pl_module: L.LightningModule) -> str:
    count = len(folds(pl_module))
    return f"; {count} BatchNorms folded, their statistics frozen" if count else ""


def _observes(pl_module: L.LightningModule) -> bool:
    return any(layer.scheme is not None and layer.scheme.static for layer in plan_of(pl_module))
