"""A BatchNorm that was folded into the layer before it: what it computes, and how it loads float weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat_plugin.errors import DataError

FOLD = "batch_norm_fold"


@dataclass(eq=False)
class Fold:
    """A folded norm and its layer; both modules hold it.

    Attributes:
        layer, norm: the modules.
        above: the least module that holds both.
        names: their names in the model that was folded.
        absorbed: the layer's kernel adds the shift, and the norm passes its input through.
    """

    layer: nn.Module
    norm: _BatchNorm
    above: nn.Module
    names: tuple[str, str]
    absorbed: bool = False

    @property
    def shift(self) -> Tensor:
        """What the norm adds to each channel, [channels]."""
        norm = self.norm
        if norm.affine:
            return norm.bias
        assert norm.running_mean is not None
        return -norm.running_mean


class FoldedNorm:
    """The forward of a folded BatchNorm, in every mode: add the shift, unless the layer's kernel does."""

    def forward(self, input: Tensor) -> Tensor:
        """The input, shifted; [batch, channels, ...].

        Raises:
            DataError: without a batch dimension. BatchNorm1d would take [channels, length] for [batch, channels] and
                normalise along the length, which is not what was folded; the others refuse it too.
        """
        fold: Fold = self.__dict__[FOLD]
        if input.dim() != fold.layer.weight.dim():  # type: ignore[operator]
            raise DataError(
                f"{fold.names[1]}: an input of {list(input.shape)} has no batch dimension, without which its norm "
                f"cannot be folded into {fold.names[0]}: give the model x.unsqueeze(0), or keep {fold.names[0]} in "
                "float (keep=[...] in the policy)"
            )
        if fold.absorbed:
            return input
        return input + fold.shift.reshape(-1, *[1] * (input.dim() - 2)).to(input.dtype)

    def train(self, mode: bool = True) -> Any:
        """Stay in evaluation mode: the statistics are frozen."""
        return super().train(False)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by the user's own class: ours is made at run time."""
        return _rebuild, (own_class(self),), self.__dict__


def own_class(module: object) -> type[nn.Module]:
    """The user's class of a folded norm."""
    return next(c for c in type(module).__mro__ if issubclass(c, nn.Module) and not issubclass(c, FoldedNorm))


@functools.cache
def _folded_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Folded{base.__name__}", (FoldedNorm, base), {"__module__": __name__})


def _rebuild(base: type[nn.Module]) -> nn.Module:
    return base.__new__(_folded_class(base))  # type: ignore[arg-type]


def folds(model: nn.Module) -> list[Fold]:
    """The folded norms of a model, in module order."""
    return [module.__dict__[FOLD] for module in model.modules() if isinstance(module, FoldedNorm)]


def mark(model: nn.Module, names: tuple[str, str]) -> Fold:
    """Make a norm one that is folded; its numbers and those of its layer must say so already.

    Args:
        model: holds both.
        names: of the layer and of the norm in it.
    """
    layer, norm = (model.get_submodule(name) for name in names)
    parts = [name.split(".") for name in names]
    shared = next(i for i, (a, b) in enumerate(zip(*parts, strict=False)) if a != b)  # neither contains the other
    fold = Fold(layer, cast(_BatchNorm, norm), model.get_submodule(".".join(parts[0][:shared])), names)
    if fold.norm.affine:
        fold.norm.weight.grad = None  # nothing reads it any more: optimizers leave it at 1
    if not any(other.above is fold.above for other in folds(fold.above)):
        fold.above.register_load_state_dict_pre_hook(_fold_incoming)
    for module in (layer, norm):
        module.__dict__[FOLD] = fold
    norm.__class__ = _folded_class(type(norm))  # type: ignore[arg-type]
    norm.training = False
    return fold


def unmark(fold: Fold) -> None:
    """Give a folded norm its own class back; the numbers stay folded, so that it computes the same in evaluation."""
    fold.norm.__class__ = own_class(fold.norm)  # type: ignore[assignment]
    fold.norm.train(fold.layer.training)
    for module in (fold.layer, fold.norm):
        del module.__dict__[FOLD]
    if not any(other.above is fold.above for other in folds(fold.above)):
        hooks = fold.above._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is _fold_incoming]:
            del hooks[key]


def gain_and_shift(norm: _BatchNorm, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """``gamma / sigma`` and ``beta - gamma mu / sigma`` in float64, [channels] each; ``None`` when folded already.

    Args:
        norm: for its eps.
        state: the norm's tensors by their own names.
    """
    mean, variance = state["running_mean"].double(), state["running_var"]
    weight, bias = state.get("weight"), state.get("bias")
    one = torch.equal(variance, torch.full_like(variance, 1 - norm.eps)) and (
        weight is None or bool((weight == 1).all())
    )
    if one and (bias is None or not mean.any()):
        return None
    gain = (variance.double() + norm.eps).rsqrt() * (1.0 if weight is None else weight.double())
    return gain, (0.0 if bias is None else bias.double()) - gain * mean


def folded_state(norm: _BatchNorm, state: Mapping[str, Tensor], shift: Tensor) -> dict[str, Tensor]:
    """The tensors of a norm that does nothing but add ``shift``."""
    variance = torch.full_like(state["running_var"], 1 - norm.eps)
    if "bias" not in state:
        return {"running_mean": (-shift).to(state["running_mean"].dtype), "running_var": variance}
    return {
        "running_mean": torch.zeros_like(state["running_mean"]),
        "running_var": variance,
        "weight": torch.ones_like(state["weight"]),
        "bias": shift.to(state["bias"].dtype),
    }


def scaled_rows(weight: Tensor, gain: Tensor) -> Tensor:
    """A weight whose output channels are multiplied by ``gain``, computed in float64 and rounded once."""
    return (weight.double() * gain.to(weight.device).reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)


@torch.no_grad()
def fold_state_dict(fold: Fold, state_dict: dict[str, Any], layer: str, norm: str) -> None:
    """Fold what a state_dict holds of a pair, in place; one that is folded, or lacks a part, is left alone.

    Args:
        fold: the pair.
        state_dict: float weights.
        layer, norm: the prefixes of the two modules in it, each ending in a dot.
    """
    state = {name: state_dict[norm + name] for name in fold.norm.state_dict() if norm + name in state_dict}
    weight = state_dict.get(f"{layer}weight")
    if (
        weight is None
        or type(weight) not in (Tensor, nn.Parameter)
        or not {"running_mean", "running_var"} <= state.keys()
    ):
        return
    found = gain_and_shift(fold.norm, state)
    if found is None:
        return
    gain, shift = found
    state_dict[f"{layer}weight"] = scaled_rows(weight, gain)
    if (bias := state_dict.get(f"{layer}bias")) is not None:
        state_dict[f"{layer}bias"] = scaled_rows(bias, gain)
    state_dict |= {norm + name: value for name, value in folded_state(fold.norm, state, shift).items()}


def _fold_incoming(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A load_state_dict pre-hook of what holds a layer and its norm: weights of before the fold are folded first."""
    names = {part: name for name, part in module.named_modules()}
    for fold in folds(module):
        if fold.layer in names:
            fold_state_dict(fold, state_dict, f"{prefix}{names[fold.layer]}.", f"{prefix}{names[fold.norm]}.")
