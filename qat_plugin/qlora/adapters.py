"""Which layers get an adapter, and putting it there with peft, in place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from qat_plugin.errors import ConfigError, PrepareError, did_you_mean
from qat_plugin.policy import Candidate, Rule, candidates
from qat_plugin.policy.rules import check_pattern
from qat_plugin.qlora.extra import import_extra
from qat_plugin.qlora.layers import ADAPTER, extend, keep_full_precision, lora_layers

if TYPE_CHECKING:
    from peft import LoraConfig

ALL_LINEAR: Final = "all-linear"
_INITS: Final = ("gaussian", "olora", "orthogonal", "pissa", "loftq", "eva", "corda")
_NOT_ON_QUANTIZED: Final = {
    "pissa": "PiSSA takes the base apart by its singular values and has to change it",
    "olora": "OLoRA subtracts its start from the base and has to change it",
    "loftq": "LoftQ quantizes the base itself",
    "corda": "CorDA takes the base apart and has to change it",
}
_NEEDS_DATA: Final = ("eva", "corda")


@dataclass(frozen=True)
class AdapterOptions:
    """What the adapters are; see :func:`qat_plugin.qlora.prepare`."""

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    rslora: bool = False
    dora: bool = False
    init: bool | str = True

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"rank={self.rank!r} is not allowed: it is a whole number, at least 1 (8 to 64 is usual)")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(
                f"alpha={self.alpha} is not allowed: it must be above 0 (the update is scaled by alpha / rank)"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} is not allowed: it is a probability, at least 0 and below 1")
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        if not self.targets:
            raise ConfigError('targets is empty: give "all-linear", or names, globs or roles of linear layers')
        if isinstance(self.init, str) and self.init.split("_niter_")[0] not in _INITS:
            near = did_you_mean(self.init, _INITS)
            raise ConfigError(f"init={self.init!r} is not one of True, False, {', '.join(_INITS)}.{near}")
        if str(self.init) in _NEEDS_DATA:
            raise ConfigError(f"init={self.init!r} needs batches of data before training, which is not supported here")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        return {
            "rank": self.rank, "alpha": float(self.alpha), "dropout": self.dropout, "targets": targets,
            "rslora": self.rslora, "dora": self.dora, "init": self.init,
        }  # fmt: skip


def target_layers(model: nn.Module, targets: str | Sequence[str]) -> list[Candidate]:
    """The linear layers that get an adapter.

    Args:
        model: any module, before adapters are put in.
        targets: ``"all-linear"`` (all but output heads), or patterns as in a policy's rules: names (``q_proj``), globs,
            ``re:...``, roles (``attention``, ``ffn``).

    Raises:
        ConfigError: when a pattern matches no linear layer; the message lists what there is.
    """
    found = candidates(model)
    linears = [c for c in found if c.kind in ("linear", "conv1d")]
    if not linears:
        raise ConfigError(f"{type(model).__name__} has no linear layer that could carry an adapter")
    if linears[0].module is model:
        raise ConfigError(f"the model is a single {type(model).__name__}: wrap it, as in nn.Sequential(layer)")
    if targets == ALL_LINEAR:
        chosen = [c for c in linears if "head" not in c.roles]
        return chosen or linears
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    wanted: set[str] = set()
    for pattern in patterns:
        rule = Rule(check_pattern(pattern), None)
        matched = {c.name for c in linears if rule.matches(c)}
        if not matched:
            raise ConfigError(_unmatched(model, pattern, linears, [c for c in found if rule.matches(c)]))
        wanted |= matched
    return [c for c in linears if c.name in wanted]


def _unmatched(model: nn.Module, pattern: str, linears: list[Candidate], others: list[Candidate]) -> str:
    leaves = list(dict.fromkeys(c.name.rsplit(".", 1)[-1] for c in linears))
    roles = sorted({role for c in linears for role in c.roles})
    what = f"matches no linear layer of {type(model).__name__}"
    if others:
        what = (
            f"matches only {others[0].name} ({type(others[0].module).__name__}), which can carry no LoRA adapter here"
        )
    return (
        f"targets: {pattern!r} {what}.{did_you_mean(pattern, [*leaves, *roles])} "
        f"Linear layers end in {', '.join(leaves[:12])}; roles: {', '.join(roles) or 'none'}; or all-linear"
    )


def lora_config(model: nn.Module, chosen: Sequence[Candidate], options: AdapterOptions) -> LoraConfig:
    """peft's configuration that puts adapters on just these layers."""
    peft = import_extra("peft")
    conv1d = {c.kind == "conv1d" for c in chosen}
    if len(conv1d) > 1:
        raise ConfigError(
            "targets mix Linear and transformers' Conv1D layers, which one peft adapter cannot; choose one kind, or "
            "give the Conv1D layers the scheme nf4-dq, which makes them Linear"
        )
    config: LoraConfig = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=_spelled(model, [c.path for c in chosen]),
        use_rslora=options.rslora,
        use_dora=options.dora,
        init_lora_weights=options.init,
        fan_in_fan_out=conv1d == {True},
        bias="none",
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
    )
    return config


def _spelled(model: nn.Module, paths: list[str]) -> list[str]:
    """Module names as short as peft's matching by suffix allows: ``q_proj`` where all of that name are meant."""
    every = [name for name, module in model.named_modules() if name]
    leaves = sorted({path.rsplit(".", 1)[-1] for path in paths})
    by_leaf = {name for name in every if name.rsplit(".", 1)[-1] in leaves}
    return leaves if by_leaf == set(paths) else sorted(paths)


def check_init(options: AdapterOptions, *, quantized: bool) -> None:
    """Raise when adapters are to start from a base that is quantized and cannot give what they need.

    Raises:
        ConfigError: saying why.
    """
    name = str(options.init).split("_niter_")[0]
    if quantized and name in _NOT_ON_QUANTIZED:
        raise ConfigError(
            f"init={options.init!r} does not go with a quantized base: {_NOT_ON_QUANTIZED[name]}. Use init=True "
            '(zero update), "gaussian" or "orthogonal"'
        )


def inject(model: nn.Module, config: LoraConfig, *, dtype: torch.dtype) -> None:
    """Put adapters into a model, in place; they alone require gradients afterwards.

    Args:
        model: its other parameters are frozen.
        config: peft's configuration.
        dtype: of the adapters, which they keep whatever the model is cast to.

    Raises:
        PrepareError: when there are adapters already, or peft refuses a layer.
    """
    if lora_layers(model):
        raise PrepareError(f"{type(model).__name__} has adapters already; merge() or remove them first")
    peft = import_extra("peft")
    modes = {module: module.training for module in model.modules()}
    try:
        peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    except (ValueError, TypeError, ImportError) as error:
        raise PrepareError(f"peft cannot put adapters into {type(model).__name__}: {error}") from error
    for module, mode in modes.items():
        module.training = mode
    model.requires_grad_(False)
    for layer in lora_layers(model).values():
        layer.train(layer.get_base_layer().training)
        for parameter in adapter_parameters(layer):
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)
        keep_full_precision(layer)
        extend(layer)


def adapter_parameters(layer: Any) -> list[nn.Parameter]:
    """The parameters of a LoRA layer that are not its base's."""
    return [parameter for name, parameter in layer.named_parameters() if not name.startswith("base_layer.")]
