"""The keys of a recipe's sections ``lora`` and ``merge``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qat_plugin.config.fields import absolute, check_above, check_at_least, check_choice, help_text, option


@dataclass
class LoraSection:
    """Adapters on a frozen base; the base's schemes are the policy's."""

    enabled: bool = option(False, "train adapters; set by lora=OPTION")
    rank: int = option(16, "rank of the update")
    alpha: float = option(32.0, "the update is scaled by alpha / rank")
    dropout: float = option(0.0, "on the input of the adapters, in training")
    targets: Any = field(
        default="all-linear",
        metadata=help_text("layers with an adapter: all-linear, or a list of names, globs and roles"),
    )
    rslora: bool = option(False, "scale by alpha / sqrt(rank)")
    dora: bool = option(False, "learn magnitude and direction apart (DoRA)")
    init: Any = field(
        default=True, metadata=help_text("how adapters begin: true (zero update), gaussian, orthogonal, pissa ...")
    )
    backend: str = option("bitsandbytes", "who holds NF4 weights: bitsandbytes or torchao")
    dtype: str = option("fp32", "of the adapters: fp32, bf16 or fp16")
    neftune_alpha: float | None = option(None, "noise on the embedding's output in training, 5 is usual; null for none")
    gradient_checkpointing: bool = option(True, "recompute blocks in the backward pass")
    offload_activations: bool = option(False, "keep what is saved for the backward pass in host memory (CUDA)")

    def __post_init__(self) -> None:
        check_at_least("lora.rank", self.rank, 1)
        check_above("lora.alpha", self.alpha, 0)
        check_at_least("lora.dropout", self.dropout, 0)
        check_choice("lora.backend", self.backend, ("bitsandbytes", "torchao"))
        check_choice("lora.dtype", self.dtype, ("fp32", "bf16", "fp16"))


@dataclass
class MergeConfig:
    """Folding adapters into weights."""

    into: str = option(
        "nf4", "nf4: into the dequantized weights that adapters were trained on; original: the float ones"
    )
    scheme: str | None = option(None, "then convert to this scheme; null for no conversion")
    compare: list[str] = field(
        default_factory=lambda: ["w8a16", "w4a16-g32"],
        metadata=help_text("schemes whose cost is measured beside, each on the merged weights"),
    )
    adapter: str | None = option(None, "task=merge: folder of the adapter; null for that of run=DIR")
    out: str | None = option(
        None,
        "task=merge: folder to write, which must be new; null for merged-nf4/ or merged-original/ in the run's folder. "
        "With merge.scheme the converted model goes beside it, into OUT-SCHEME/",
    )
    evaluate: bool | None = option(
        None, "task=merge: measure the adapter on its base and each form of the merge; null where memory is enough"
    )
    accept_loss: bool = option(
        False, "task=merge: measure NF4 as merge.scheme all the same, where it erases small updates"
    )

    def __post_init__(self) -> None:
        check_choice("merge.into", self.into, ("original", "nf4"))
        self.adapter = None if self.adapter is None else absolute(self.adapter)
        self.out = None if self.out is None else absolute(self.out)
