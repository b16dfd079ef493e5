"""Post-training quantization as one callback: after a fit, or before an evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, Final, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from qat_plugin.callbacks.calibration_data import (
    Source,
    TransferredBatches,
    evaluation_source,
    first_batches,
    network_of,
    training_source,
)
from qat_plugin.callbacks.guards import check_launcher, check_strategy
from qat_plugin.callbacks.qat import QuantizationAwareTraining
from qat_plugin.conversion import convert, dequantized_state_dict, is_converted, proof_of
from qat_plugin.errors import ConfigError, did_you_mean
from qat_plugin.measure.evaluating import evaluating
from qat_plugin.observers.spelling import DEFAULT_FOR_CALIBRATION, ObserverSpec
from qat_plugin.policy import Plan, Policy, PolicyLike
from qat_plugin.ptq import METHODS, calibrate
from qat_plugin.ptq.feeding import feed
from qat_plugin.qat import capture_inputs, is_prepared, observing, prepare, unprepare
from qat_plugin.qat.folding import Unfolded, foldable

_DTYPES: Final[dict[str, torch.dtype]] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SET_HERE: Final = frozenset({"model", "plan", "batches", "method", "observer"})


class PostTrainingQuantization(Callback):
    """Quantize without training: calibrate on real batches, then run on integer kernels.

    With ``trainer.fit`` it calibrates when the fit has ended, on the first batches of the train dataloader. With
    ``trainer.validate``, ``test`` and ``predict`` it calibrates before the loop, which then measures the quantized
    model: on ``dataloader``, or else the train dataloader of the datamodule or module, or else the first batches of the
    very loader of that loop, and says which. Random generators and the order of the training data are left alone.
    Batches pass through the module's own transfer hooks and, as :func:`qat_plugin.ptq.feeding.feed` describes, through
    its ``forward``; a module without one is calibrated through the single model that it holds.

    Checkpoints stay float. A module that is converted already is left as it is.

    Args:
        policy: a scheme, a mapping of rules, a :class:`~qat_plugin.policy.Policy` or a ready Plan.
        method: how weights become integers, see :func:`qat_plugin.calibrate`.
        batches: number of batches to calibrate on, at most.
        observer: what static activation scales are found by: ``minmax``, ``moving-average`` (``:momentum``),
            ``percentile`` (``:99.99``), ``mse`` or ``entropy``.
        convert: convert to integer kernels; without it the module stays fake-quantized with frozen scales.
        dtype: the float type that the converted model runs in; by default the module's own.
        dataloader: what to calibrate on in place of the train dataloader.
        **options: of :func:`qat_plugin.calibrate`.

    Raises:
        ConfigError: for an argument that is not allowed; for a fit of a converted module, a strategy that shards or
            spawns, or :class:`~qat_plugin.QuantizationAwareTraining` in the same trainer.
        DataError: when there is no batch, or the module does not take it.
        PolicyError: when the policy does not fit the module.

    Example::

        Trainer(callbacks=[PostTrainingQuantization("w8a8-static")]).test(module, data)
    """

    def __init__(
        self,
        policy: PolicyLike | Plan = "w8a8-static",
        *,
        method: str = "rtn",
        batches: int = 32,
        observer: str = DEFAULT_FOR_CALIBRATION,
        convert: bool = True,
        dtype: Literal["fp32", "bf16", "fp16"] | None = None,
        dataloader: Iterable[Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise ConfigError(f"method={method!r} is not one of {', '.join(METHODS)}.{did_you_mean(method, METHODS)}")
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
            raise ConfigError(f"batches={batches!r} is not allowed: give a number of batches, at least 1")
        if dtype is not None and dtype not in _DTYPES:
            raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(_DTYPES)}")
        _check_options(options)
        self._policy = policy if isinstance(policy, Plan) else Policy.coerce(policy)
        self._method, self._batches, self._options = method, batches, options
        self._observer = ObserverSpec.parse(observer)
        self._convert = convert
        self._dtype = None if dtype is None else _DTYPES[dtype]
        self._dataloader = dataloader
        self._calibrated: nn.Module | None = None  # the module that this callback prepared and did not convert
        self._unfolded: Unfolded | None = None  # its numbers before BatchNorms were folded

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        check_strategy(trainer)
        check_launcher(trainer)
        if stage != "fit":
            return
        if any(isinstance(other, QuantizationAwareTraining) for other in trainer.callbacks):  # type: ignore[attr-defined]
            raise ConfigError(
                "PostTrainingQuantization and QuantizationAwareTraining would both quantize the module: give the "
                "trainer one of them"
            )
        if is_converted(pl_module):
            raise ConfigError(
                f"{type(pl_module).__name__} is converted to integers and cannot be trained on. Build a fresh module "
                "and resume it from a checkpoint (ckpt_path=...), or pass convert=False to what came before"
            )
        if self._calibrated is pl_module and is_prepared(pl_module):
            unprepare(pl_module)
            self._take_folds_back(pl_module, self._unfolded)
        if is_prepared(pl_module):
            raise ConfigError(
                f"{type(pl_module).__name__} is prepared for quantization-aware training: use that callback, or "
                "qat_plugin.unprepare(module) first"
            )
        self._calibrated = self._unfolded = None

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        before = pl_module.device
        pl_module.to(trainer.strategy.root_device)  # the strategy has moved it to the CPU by now
        try:
            self._quantize(trainer, pl_module)
        finally:
            pl_module.to(before)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._before_loop(trainer, pl_module)

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._before_loop(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._before_loop(trainer, pl_module)

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint saved after conversion is float too: it holds the numbers that the integers stand for."""
        if is_converted(pl_module):
            checkpoint["state_dict"] = dequantized_state_dict(pl_module)

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A float checkpoint into a converted module is rounded to nearest there, whatever the method was."""
        if is_converted(pl_module) and self._method != "rtn":
            rank_zero_warn(
                f"the checkpoint's float weights are rounded to nearest as they are loaded into this converted module, "
                f"not by {self._method}: load it into a fresh module to quantize it so"
            )

    def _before_loop(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" or self._calibrated is pl_module:
            return
        with torch.inference_mode(False), torch.no_grad():  # what is made here outlives the loop
            self._quantize(trainer, pl_module)

    def _quantize(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if is_converted(pl_module):
            return
        if is_prepared(pl_module):
            raise ConfigError(
                f"{type(pl_module).__name__} is prepared already: call qat_plugin.unprepare(module) first"
            )
        plan = self._plan(trainer, pl_module)
        unfolded = Unfolded(pl_module)
        prepare(pl_module, plan, observer=self._observer)
        try:
            basis, inputs = self._calibrate(trainer, pl_module)
            if self._convert:
                convert(pl_module, inputs=inputs, dtype=self._dtype)
        except BaseException:
            unprepare(pl_module)
            self._take_folds_back(pl_module, unfolded)
            raise
        self._calibrated, self._unfolded = (None, None) if self._convert else (pl_module, unfolded)
        result = proof_of(pl_module) if self._convert else plan.summary()
        rank_zero_info(f"PostTrainingQuantization: {self._method}, {basis}: {result}")

    def _take_folds_back(self, pl_module: L.LightningModule, unfolded: Unfolded | None) -> None:
        """Give BatchNorms and their layers the numbers that they had; call it when nothing is prepared any more.

        Methods with input scales have moved these between layers: one of them alone cannot be put back.
        """
        if unfolded is None:
            return
        if METHODS[self._method].scaling is None:
            unfolded.restore()
        elif foldable(pl_module):
            rank_zero_warn(
                f"{self._method} has moved scales between layers: what it folded of {type(pl_module).__name__} stays "
                "folded; load its weights anew before you train it"
            )

    def _calibrate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[str, dict[str, torch.Tensor]]:
        """Calibrate a prepared module; on what it was, and a few real inputs of its layers."""
        network, options = network_of(pl_module), {"progress": trainer.is_global_zero, **self._options}
        if self._method == "rtn" and not observing(pl_module):
            calibrate(network, None, (), **options)
            return "which needs no data", {}
        source = self._source(trainer, pl_module)
        batches = TransferredBatches(first_batches(source, self._batches), trainer, pl_module)
        with trainer.precision_plugin.forward_context():
            calibrate(network, None, batches, method=self._method, **options)
            with evaluating(network), capture_inputs(network) as inputs:
                feed(network, next(iter(batches)))
        what = f"{self._observer} on " if observing(pl_module) else ""
        return f"{what}{len(batches)} batch{'es' if len(batches) > 1 else ''} of {source.name}", inputs

    def _source(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Source:
        if self._dataloader is not None:
            return Source(self._dataloader, "the given dataloader")
        return training_source(trainer) if trainer.state.fn == "fit" else evaluation_source(trainer, pl_module)

    def _plan(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Plan:
        if isinstance(self._policy, Plan):
            return self._policy
        return self._policy.plan(pl_module, device=trainer.strategy.root_device, dtype=self._dtype)


def _check_options(options: dict[str, Any]) -> None:
    allowed = [name for name in inspect.signature(calibrate).parameters if name not in _SET_HERE]
    for name in options:
        if name not in allowed:
            raise ConfigError(
                f"PostTrainingQuantization has no argument {name!r}; beside its own it takes those of calibrate(): "
                f"{', '.join(allowed)}.{did_you_mean(name, allowed)}"
            )
