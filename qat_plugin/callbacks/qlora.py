"""QLoRA fine-tuning as one callback on an unmodified Lightning script."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from qat_plugin import qlora
from qat_plugin.callbacks.adapter_state import adapters_only, check_keys
from qat_plugin.callbacks.guards import check_other_callbacks, check_strategy
from qat_plugin.callbacks.resuming import ResumingCallback, after_configure_model
from qat_plugin.conversion import convert, is_converted, proof_of
from qat_plugin.errors import CheckpointError, ConfigError
from qat_plugin.policy import Policy, PolicyLike
from qat_plugin.qat import is_prepared as is_fake_quantized
from qat_plugin.qat import load_quantizer_state, quantizer_state
from qat_plugin.qlora.adapters import AdapterOptions

AtEnd = Literal["keep", "merge", "convert"]
_MERGED: Final = "_qlora_merged"
_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class QLoRAFinetuning(ResumingCallback):
    """Fine-tune adapters on a frozen NF4 base; checkpoints hold the adapters only.

    The module needs no change: its layers may come from ``__init__``, ``setup`` or ``configure_model``, and its
    optimizer may be given all parameters (the frozen ones are taken out again). A checkpoint names the base by path and
    fingerprint; a run resumed on another base is refused, one resumed on the same continues to the bit on CPU.

    Args:
        base: policy of the base: ``"nf4-dq"``, ``"nf4"``, rules, or an integer scheme for QAT + LoRA; see
            :func:`qat_plugin.qlora.prepare`, as for ``rank`` to ``init``, ``neftune_alpha``, ``train_also``,
            ``learn_scales`` and ``backend``.
        gradient_checkpointing: recompute transformers' blocks in the backward pass.
        offload_activations: keep what is saved for the backward pass in host memory (CUDA).
        adapter_dtype: ``"fp32"``, ``"bf16"`` or ``"fp16"``; kept under ``precision="bf16-true"`` too.
        at_end: when the fit ends, ``"keep"`` the adapters, ``"merge"`` them into a float model, or merge and
            ``"convert"`` to integer kernels, for which the base needs an integer scheme.
        exact_resume: save generators and data position, so that a resumed run continues to the bit.

    Raises:
        ConfigError: for an argument that is not allowed; at the start of a fit, for targets that match nothing, an
            optimizer that lacks a trained parameter, a strategy that shards.
        PrepareError: for a module that is quantized already.

    Example::

        Trainer(callbacks=[QLoRAFinetuning(rank=16)], precision="bf16-true").fit(module, data)
        qat_plugin.qlora.save_adapter(module.model, "adapter")
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        targets: str | Sequence[str] = "all-linear",
        base: PolicyLike | None = "nf4-dq",
        *,
        backend: Literal["bitsandbytes", "torchao"] = "bitsandbytes",
        rslora: bool = False,
        dora: bool = False,
        init: bool | str = True,
        neftune_alpha: float | None = None,
        gradient_checkpointing: bool = True,
        offload_activations: bool = False,
        train_also: Sequence[str] = (),
        learn_scales: bool = False,
        adapter_dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
        at_end: AtEnd = "keep",
        exact_resume: bool = True,
    ) -> None:
        super().__init__(exact_resume=exact_resume)
        if at_end not in get_args(AtEnd):
            raise ConfigError(f"at_end={at_end!r} is not one of {', '.join(get_args(AtEnd))}")
        if adapter_dtype not in _DTYPES:
            raise ConfigError(f"adapter_dtype={adapter_dtype!r} is not one of {', '.join(_DTYPES)}")
        if at_end == "convert" and not _has_integers(base):
            raise ConfigError(
                f"at_end='convert' needs a base with an integer scheme, such as base='w4a16-g32', not {base!r}; merge "
                "with at_end='merge' and convert afterwards, or keep the adapters"
            )
        targets = targets if isinstance(targets, str) else tuple(targets)
        train_also = (train_also,) if isinstance(train_also, str) else tuple(train_also)
        self._adapters = AdapterOptions(rank, alpha, dropout, targets, rslora, dora, init)
        self._options: dict[str, Any] = {
            "base": base, "backend": backend, "neftune_alpha": neftune_alpha, "train_also": train_also,
            "gradient_checkpointing": gradient_checkpointing, "learn_scales": learn_scales,
            "adapter_dtype": _DTYPES[adapter_dtype],
        }  # fmt: skip
        self._offload, self._at_end = offload_activations, at_end
        self._offloading: AbstractContextManager[Any] | None = None
        self._module: L.LightningModule | None = None
        self._loaded: dict[str, Any] = {}

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._module = pl_module
        if is_converted(pl_module):
            if stage == "fit":
                raise ConfigError(
                    f"{type(pl_module).__name__} was converted to integers and cannot be trained; build a fresh module"
                )
            return
        if stage == "fit":
            check_strategy(trainer)
            check_other_callbacks(trainer, self)
        if qlora.is_prepared(pl_module):
            self._check_prepared(pl_module)
            adapters_only(pl_module)
            qlora.base_fingerprint(pl_module)
        elif stage == "fit" or not pl_module.__dict__.get(_MERGED):
            after_configure_model(pl_module, lambda: self._prepare(trainer, pl_module))

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _check_optimizers(trainer, pl_module)
        pl_module.train()  # Lightning does not, and from_pretrained returns eval mode: no checkpointing, no dropout

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._offload:
            self._offloading = qlora.offloading(pl_module)
            self._offloading.__enter__()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_offloading()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop_offloading()

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._at_end == "keep" or not qlora.is_prepared(pl_module):
            return
        qlora.merge(pl_module)
        pl_module.__dict__[_MERGED] = True
        rank_zero_info("QLoRAFinetuning: adapters merged")
        if self._at_end == "convert":
            convert(pl_module)
            rank_zero_info(f"QLoRAFinetuning: {proof_of(pl_module)}")

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop_offloading()
        super().teardown(trainer, pl_module, stage)

    @override
    def state_dict(self) -> dict[str, Any]:
        module = self._module
        if module is None or not qlora.is_prepared(module):
            return self._loaded
        quantizers = quantizer_state(module) if is_fake_quantized(module) else None
        return {
            "adapters": self._adapters.to_dict(),
            "base": {"path": _path_of(module), "fingerprint": qlora.base_fingerprint(module)},
            "quantizers": quantizers,
            "resume": self.resume_state(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a checkpoint's state.

        Raises:
            CheckpointError: when it was trained on another base.
        """
        self._loaded = state_dict
        self.load_resume_state(state_dict.get("resume", {}))
        module = self._module
        if module is None or not qlora.is_prepared(module) or "base" not in state_dict:
            return
        was, now = state_dict["base"], qlora.base_fingerprint(module)
        if was["fingerprint"] != now:
            raise CheckpointError(
                f"the checkpoint's adapters were trained on another base: {was['path'] or 'a base without a path'} "
                f"with fingerprint {was['fingerprint'][:12]}, here is {_path_of(module) or 'one'} with {now[:12]}. "
                "Load the base that they were trained on"
            )
        if state_dict["quantizers"] is not None:
            load_quantizer_state(module, state_dict["quantizers"])

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if qlora.is_prepared(pl_module):
            check_keys(pl_module, checkpoint["state_dict"])

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Before the callback's own state is loaded.

        Raises:
            CheckpointError: when training is to resume with other adapters than the checkpoint's.
        """
        saved = checkpoint.get("callbacks", {}).get(self.state_key)
        if trainer.state.fn != "fit" or saved is None:
            return
        was, now = saved.get("adapters", {}), self._adapters.to_dict()
        if different := [f"{key} was {was.get(key)!r} and is {now[key]!r}" for key in now if was.get(key) != now[key]]:
            raise CheckpointError(f"the checkpoint was trained with other adapters: {'; '.join(different)}")

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        network = network_in(pl_module)
        device = trainer.strategy.root_device
        adapters = {name: getattr(self._adapters, name) for name in self._adapters.__dataclass_fields__}
        qlora.prepare(
            network,
            **adapters,
            **self._options,
            compute_dtype=_compute_dtype(trainer),
            device=device if device.type == "cuda" else None,
            record=getattr(pl_module, "base_record", None),
        )
        adapters_only(pl_module)
        qlora.base_fingerprint(pl_module)  # now: a precision plugin casts what is not quantized later
        rank_zero_info(f"QLoRAFinetuning: {qlora.summary(network)}")
        if self._options["gradient_checkpointing"] and not qlora.prepared_of(network).gradient_checkpointing:
            rank_zero_info(
                f"QLoRAFinetuning: {type(network).__name__} has no gradient_checkpointing_enable(): activations of "
                "all its layers are kept. Wrap its blocks in torch.utils.checkpoint yourself if memory is short"
            )

    def _check_prepared(self, pl_module: L.LightningModule) -> None:
        there, here = qlora.prepared_of(pl_module).options.to_dict(), self._adapters.to_dict()
        if different := [f"{key} is {there[key]!r}, not {here[key]!r}" for key in here if there[key] != here[key]]:
            raise ConfigError(
                f"the module is prepared already with other adapters: {'; '.join(different)}. Use the same arguments"
            )
        if self._at_end == "convert" and not is_fake_quantized(pl_module):
            raise ConfigError(
                "at_end='convert' needs a base with an integer scheme, and the module was prepared without one: use "
                "qlora.prepare(model, 'w4a16-g32'), or at_end='merge'"
            )

    def _stop_offloading(self) -> None:
        if self._offloading is not None:
            self._offloading.__exit__(None, None, None)
            self._offloading = None


def network_in(pl_module: L.LightningModule) -> nn.Module:
    """The one transformers model among the module's children, as adapter files have its names; else the module."""
    weighty = [child for child in pl_module.children() if next(child.parameters(), None) is not None]
    transformers = [child for child in weighty if hasattr(child, "save_pretrained") and hasattr(child, "config")]
    return transformers[0] if len(transformers) == len(weighty) == 1 else pl_module


def _has_integers(base: PolicyLike | None) -> bool:
    """Whether a policy's words make some layer integer."""
    policy = Policy.coerce({} if base is None else base)
    schemes = [policy.default, *(rule.scheme for rule in policy.rules)]
    return any(scheme is not None and scheme.is_integer for scheme in schemes)


def _compute_dtype(trainer: L.Trainer) -> torch.dtype | None:
    precision = str(trainer.precision)
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else None


def _path_of(module: nn.Module) -> str:
    """Where the base was loaded from, as far as it is known."""
    record = qlora.prepared_of(module).base
    if record is not None:
        return str(record.path)
    paths = (getattr(getattr(part, "config", None), "_name_or_path", "") for part in module.modules())
    return next((str(path) for path in paths if path), "")


def _check_optimizers(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Take frozen parameters out of the optimizers; raise when a trained one is in none.

    Raises:
        ConfigError: naming parameters that no optimizer would train.
    """
    held: set[int] = set()
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
            held |= {id(parameter) for parameter in group["params"]}
    trained = {name: parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}
    if trainer.optimizers and (lost := [name for name, parameter in trained.items() if id(parameter) not in held]):
        raise ConfigError(
            f"{len(lost)} of {len(trained)} trained parameters are in no optimizer, such as {', '.join(lost[:3])}: "
            "configure_optimizers must take self.parameters(), after adapters were put in"
        )
