"""From integers that a file holds to a converted model on this project's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.conversion import Proof
from qat_plugin.conversion.convert import Conversion, remember, with_kernels
from qat_plugin.conversion.files import install_converted
from qat_plugin.errors import CheckpointError
from qat_plugin.kernels.weight import CastWeight, QuantizedWeight
from qat_plugin.numerics import Quantized
from qat_plugin.policy import Policy


@dataclass(frozen=True)
class Stored:
    """A quantized weight as a file holds it.

    Attributes:
        integers: [out_features, in_features], with the scheme it is to run in.
        activation_scale: float32 scalar, of static schemes.
    """

    integers: Quantized
    activation_scale: Tensor | None = None


def assemble(
    network: nn.Module,
    quantized: Mapping[str, Stored],
    floats: Mapping[str, Tensor],
    dtype: torch.dtype,
    origin: Path,
) -> nn.Module:
    """A converted model from the tensors of a file that this project did not write.

    Args:
        network: float, of the file's architecture, with its parameters on the meta device and its buffers real
            (:func:`~qat_plugin.qlora.architecture.empty_model`).
        quantized: name of a parameter -> its integers.
        floats: name -> every other tensor of the state; matrices of another float type than ``dtype`` that belong to
            embeddings and linear layers stay in their own (as a policy's ``fp16`` does). Names that are tied in
            ``network`` may be left out.
        dtype: the float type to run in.
        origin: where it was read, for messages.

    Returns:
        ``network``, converted, in eval mode; its proof is empty, as nothing was trained here. With no quantized weight
        at all it is a plain float model.

    Raises:
        CheckpointError: when names or shapes are not the network's.
    """
    ties = _ties(network, quantized.keys() | floats.keys())
    layers = {f"{name}.weight" if name else "weight": module for name, module in network.named_modules()}
    schemes: dict[str, str] = {}
    weights: dict[str, Tensor] = {}
    for name, stored in quantized.items():
        if name not in layers:
            raise CheckpointError(f"{origin} is another model's: {type(network).__name__} has no layer {name!r}")
        weights[name] = QuantizedWeight.from_integers(
            stored.integers, dtype, usage=_usage(layers, ties, name), activation_scale=stored.activation_scale
        )
        schemes[name.removesuffix(".weight")] = str(stored.integers.scheme)
    for name, tensor in floats.items():
        narrow = tensor.is_floating_point() and tensor.dtype != dtype and tensor.dim() > 1 and name in layers
        if narrow and tensor.element_size() <= torch.empty((), dtype=dtype).element_size():
            weights[name] = CastWeight(tensor, dtype)
            schemes[name.removesuffix(".weight")] = _FLOATS[tensor.dtype]
        else:
            weights[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    for name, leader in ties.items():
        if leader.removesuffix(".weight") in schemes:
            schemes[name.removesuffix(".weight")] = schemes[leader.removesuffix(".weight")]
    if not schemes:
        shared = {leader: nn.Parameter(weights[leader]) for leader in ties.values()}  # tied: one parameter
        network.load_state_dict({**weights, **shared, **{n: shared[t] for n, t in ties.items()}}, assign=True)
        return network.eval()
    plan = Policy({**schemes}).plan(network, device="cpu", dtype=dtype)
    made = install_converted(network, weights, ties, Conversion(plan, Proof(())), origin).eval()
    plan = with_kernels(plan, dict(made.named_modules()))  # scales made elsewhere can make kernels others
    remember(made, Conversion(plan, Proof(())))
    return made


_FLOATS = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def _ties(network: nn.Module, present: Any) -> dict[str, str]:
    """Names that share a parameter with one that the file holds."""
    groups: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    found: dict[str, str] = {}
    for names in groups.values():
        leader = next((name for name in names if name in present), names[0])
        found |= {name: leader for name in names if name != leader and name not in present}
    return found


def _usage(layers: Mapping[str, nn.Module], ties: Mapping[str, str], name: str) -> Any:
    sharing = [name, *(tied for tied, leader in ties.items() if leader == name)]
    kinds = {isinstance(layers[shared], nn.Embedding) for shared in sharing}
    return "both" if len(kinds) > 1 else "embedding" if kinds == {True} else "linear"
