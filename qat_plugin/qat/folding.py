"""BatchNorm folded into the layer before it, with frozen statistics (arXiv:1806.08342, section 3.2.2).

``gamma (W x + b - mu) / sigma + beta`` becomes ``W' x + b' + shift`` with ``W' = W gamma / sigma``, ``b' = b gamma /
sigma`` and ``shift = beta - gamma mu / sigma``. The layer keeps its Parameter objects and both modules their names: the
norm is left with mean 0, variance 1 - eps, weight 1 and bias ``shift``, which any BatchNorm in evaluation mode computes
as ``x + shift``; so a float state_dict loads without this package. From then on the norm stays in evaluation mode, its
bias is trained and its weight has no gradient: a DistributedDataParallel that wrapped the model before the fold needs
``find_unused_parameters=True``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat_plugin.errors import CheckpointError, PrepareError
from qat_plugin.policy.roles import clean_name
from qat_plugin.qat.folded import (
    Fold,
    FoldedNorm,
    folded_state,
    folds,
    gain_and_shift,
    mark,
    scaled_rows,
    unmark,
)
from qat_plugin.qat.layers import ATTRIBUTE, FakeQuantized, has_stock_forward
from qat_plugin.qat.pairs import norm_pairs

Pair = tuple[nn.Module, _BatchNorm, tuple[str, str]]
"""A layer, the norm behind it, and their names in the model."""


@torch.no_grad()
def fold_norms(model: nn.Module) -> list[Fold]:
    """Fold each BatchNorm that alone follows a prepared layer of a static scheme, in place.

    Left as they are: norms that saw no batch yet (their statistics mean nothing), that keep no statistics or have a
    forward of their own; layers that have one, or whose weight is shared, sharded or on the meta device; nn.Linear,
    whose channels a BatchNorm1d normalises in [batch, features] and not in [batch, length, features], of which no
    graph tells. Neither is a pair folded whose layer has a forward hook, or its norm any hook, or either a backward
    one: they would see other numbers; a warning names it.

    Under ``torch.distributed`` each rank must call; the statistics of rank 0 are folded on all.

    Returns:
        The folds that were made now.

    Raises:
        PrepareError: when a layer to fold into has fixed scales, which would be those of another weight; nothing is
            changed then.
    """
    pairs = [
        (layer, norm, names)
        for layer, norm, names in _sound_pairs(model)
        if isinstance(layer, FakeQuantized) and layer.fake_quantizer.scheme.static
    ]
    for layer, norm, names in pairs:
        if seen_by := _seen_by_hooks(layer, norm, names):
            message = f"{names[1]} is not folded into {names[0]}: {seen_by} has a hook, which would see other numbers"
            warnings.warn(message, stacklevel=3)
    pairs = [pair for pair in pairs if not _seen_by_hooks(*pair)]
    _check_no_fixed_scales(pairs)
    _agree([norm for _, norm, _ in pairs])
    return [_fold(model, *pair) for pair in pairs]


def _agree(norms: Sequence[_BatchNorm]) -> None:
    """Give every rank the statistics of rank 0: each saw its own batches, and a weight must be the same on all."""
    if not norms or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    on_device = dist.get_backend() == dist.Backend.NCCL
    device = torch.device("cuda", torch.cuda.current_device()) if on_device else torch.device("cpu")
    own = [cast(Tensor, statistic) for norm in norms for statistic in (norm.running_mean, norm.running_var)]
    message = torch.cat([statistic.double().to(device) for statistic in own])
    dist.broadcast(message, src=0)
    for statistic, agreed in zip(own, message.split([len(statistic) for statistic in own]), strict=True):
        statistic.copy_(agreed)


def _check_no_fixed_scales(pairs: Sequence[Pair]) -> None:
    for layer, _, (name, norm) in pairs:
        if getattr(layer, ATTRIBUTE).frozen_scale is not None:
            raise PrepareError(
                f"{name} holds fixed scales (hold(), Phase.FROZEN), and folding {norm} into it would leave them to "
                "another weight: begin fake quantization first (set_phase(model, Phase.FAKE_QUANTIZED)), which folds, "
                "and fix scales after it"
            )


def foldable(model: nn.Module) -> list[Pair]:
    """Layer, norm and their names, of each pair of a model that can be folded and is not."""
    return [pair for pair in _sound_pairs(model) if not _seen_by_hooks(*pair)]


def _seen_by_hooks(layer: nn.Module, norm: _BatchNorm, names: tuple[str, str]) -> str:
    """The module of a pair that has a hook which sees what a fold changes: what flows between the two; "" for none."""
    backward = ("_backward_hooks", "_backward_pre_hooks")
    seeing = ((layer, ("_forward_hooks", *backward)), (norm, ("_forward_pre_hooks", "_forward_hooks", *backward)))
    found = (name for name, (module, kinds) in zip(names, seeing, strict=True) if any(map(module.__dict__.get, kinds)))
    return next(found, "")


def _sound_pairs(model: nn.Module) -> list[Pair]:
    norms = [
        module for module in model.modules() if isinstance(module, _BatchNorm) and not isinstance(module, FoldedNorm)
    ]
    if not norms:
        return []
    names = {module: name for name, module in model.named_modules()}
    uses: dict[int, int] = {}
    for module in names:
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    pairs = norm_pairs(model)
    return [
        (layer, cast(_BatchNorm, norm), (names[layer], names[norm]))
        for layer, norm in pairs.items()
        if not isinstance(norm, FoldedNorm) and _can_fold(layer, cast(_BatchNorm, norm), uses)
    ]


def _can_fold(layer: nn.Module, norm: _BatchNorm, uses: Mapping[int, int]) -> bool:
    weight, statistics = layer._parameters.get("weight"), (norm.running_mean, norm.running_var)
    if isinstance(layer, nn.Linear) or not has_stock_forward(layer):  # another axis; or not linear in its weight
        return False
    if weight is None or weight.device.type == "meta" or uses.get(id(weight), 0) != 1 or weight.dim() < 2:
        return False
    if any(statistic is None for statistic in statistics) or type(norm).forward not in _FORWARDS:
        return False
    seen = norm.num_batches_tracked
    return len(weight) == norm.num_features and (seen is None or bool(seen > 0))


_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def _fold(model: nn.Module, layer: nn.Module, norm: _BatchNorm, names: tuple[str, str]) -> Fold:
    state = {name: tensor for name, tensor in norm.state_dict().items() if name != "num_batches_tracked"}
    found = gain_and_shift(norm, state)
    if found is not None:
        gain, shift = found
        for parameter in (layer._parameters["weight"], layer._parameters.get("bias")):
            if parameter is not None:
                parameter.copy_(scaled_rows(parameter, gain))
        for name, value in folded_state(norm, state, shift).items():
            state[name].copy_(value)
        _follow_learned_scales(layer, gain)
    return mark(model, names)


def _follow_learned_scales(layer: nn.Module, gain: Tensor) -> None:
    """Learned scales grow with the channels that they are of; one for the whole weight starts anew."""
    quantizer = getattr(layer, ATTRIBUTE)
    if quantizer.grid is None:
        return
    if quantizer.scheme.per_tensor:
        quantizer.begin(layer._parameters["weight"])
    else:
        quantizer.grid.follow(gain)


def fold_names(model: nn.Module) -> list[list[str]]:
    """[layer, norm] of each fold of a model, for a checkpoint: names as plans have them, without wrappers."""
    names = {module: clean_name(path) for path, module in model.named_modules()}
    return [[names[fold.layer], names[fold.norm]] for fold in folds(model) if fold.layer in names]


def set_folds(model: nn.Module, wanted: Sequence[Sequence[str]]) -> None:
    """Make exactly these pairs folded ones; their numbers come from the checkpoint that says so.

    Raises:
        CheckpointError: when the model has no such modules.
    """
    modules = {clean_name(path): module for path, module in model.named_modules()}  # what is wrapped comes last
    paths = {module: path for path, module in model.named_modules()}
    pairs = [(clean_name(str(layer)), clean_name(str(norm))) for layer, norm in wanted]
    for layer, norm in pairs:
        if layer not in modules or not isinstance(modules.get(norm), _BatchNorm):
            raise CheckpointError(
                f"the checkpoint folded {norm} into {layer}, which {type(model).__name__} does not have"
            )
    for fold in folds(model):
        unmark(fold)
    for layer, norm in pairs:
        if seen_by := _seen_by_hooks(modules[layer], cast(_BatchNorm, modules[norm]), (layer, norm)):
            message = f"{seen_by} has a hook, and the checkpoint folded {norm} into {layer}: it will see other numbers"
            warnings.warn(message, stacklevel=3)
        mark(model, (paths[modules[layer]], paths[modules[norm]]))


class Unfolded:
    """The numbers of a model's foldable pairs, to take a fold back to the bit.

    Args:
        model: about to be prepared and folded.
    """

    def __init__(self, model: nn.Module) -> None:
        parts = [part for layer, norm, _ in foldable(model) for part in (layer, norm)]
        self._tensors: list[tuple[Any, Any]] = [
            (tensor, tensor.detach().clone())
            for part in parts
            for tensor in (*part._parameters.values(), *part._buffers.values())
            if tensor is not None
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Write the numbers back; call it when no fold is left (:func:`~qat_plugin.qat.unprepare`)."""
        for tensor, numbers in self._tensors:
            tensor.copy_(numbers)

    def forget(self) -> None:
        """Keep nothing any more: there is no way back."""
        self._tensors.clear()
