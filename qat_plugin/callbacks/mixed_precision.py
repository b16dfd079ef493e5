"""Storage types by policy, without fake quantization."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from qat_plugin.callbacks.qat import QuantizationAwareTraining
from qat_plugin.conversion import convert, is_converted, proof_of
from qat_plugin.errors import ConfigError
from qat_plugin.policy import Policy, PolicyLike


class MixedPrecision(Callback):
    """Store each layer in the float type that a policy gives it, once training has ended.

    Training itself is untouched. A layer cast to fp16 or bf16 keeps computing in the model's type; it only takes half
    the memory, on disk and off.

    Args:
        policy: float schemes only, for example ``{"embedding": "fp16", "ffn": "bf16"}``.

    Raises:
        ConfigError: when the policy holds a scheme that is not a float type, the module is converted already, or the
            fit has a QuantizationAwareTraining as well.

    Example::

        Trainer(callbacks=[MixedPrecision({"embedding": "fp16"})]).fit(module, data)
    """

    def __init__(self, policy: PolicyLike) -> None:
        super().__init__()
        self._policy = Policy.coerce(policy)
        schemes = [rule.scheme for rule in self._policy.rules] + [self._policy.default]
        if wrong := [str(scheme) for scheme in schemes if scheme is not None and not scheme.is_float]:
            raise ConfigError(
                f"MixedPrecision only casts: {', '.join(wrong)} is not fp32, bf16 or fp16. For integers use "
                "QuantizationAwareTraining, or convert() without training"
            )

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        others: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, QuantizationAwareTraining) for callback in others):
            raise ConfigError(
                "MixedPrecision and QuantizationAwareTraining in one fit: give QuantizationAwareTraining one policy "
                'with the casts in it, for example {"embedding": "fp16", "ffn": "w4a8-g32"}'
            )
        if is_converted(pl_module):
            raise ConfigError(f"{type(pl_module).__name__} was converted by an earlier fit and cannot be trained on")

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        convert(pl_module, self._policy)
        rank_zero_info(f"MixedPrecision: {proof_of(pl_module)}")
