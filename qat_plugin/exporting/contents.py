"""What there is to export: a converted network taken apart into tensors, none of them dequantized before its turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin import qlora
from qat_plugin.conversion import is_converted
from qat_plugin.conversion.convert import conversion_of
from qat_plugin.errors import ExportError
from qat_plugin.kernels.weight import CastWeight, QuantizedWeight
from qat_plugin.numerics import Quantized
from qat_plugin.policy import Plan
from qat_plugin.qat import is_prepared
from qat_plugin.scheme import Scheme


@dataclass(frozen=True)
class Layer:
    """One quantized weight, by the name of its parameter.

    Attributes:
        name: the layer's, as the plan spells it (``model.layers.0.mlp.up_proj``).
        weight: the converted weight; :attr:`integers` unpacks it.
    """

    name: str
    weight: QuantizedWeight

    @property
    def scheme(self) -> Scheme:
        """Of the integers."""
        return self.weight.scheme

    @property
    def integers(self) -> Quantized:
        """[out_features, in_features], unpacked anew at each call and on the CPU: hold it for one tensor at a time."""
        held = self.weight.integers()
        zero_point = None if held.zero_point is None else held.zero_point.cpu()
        return Quantized(held.q.cpu(), held.scale.cpu(), zero_point, held.scheme)

    @property
    def outline(self) -> Quantized:
        """The same without contents, on the meta device: shapes and types of what :attr:`integers` will give."""
        scheme, (rows, columns) = self.scheme, (self.weight.out_features, self.weight.in_features)
        groups = (1, 1) if scheme.per_tensor else (rows, columns // (scheme.group_size or columns))
        q = torch.empty(rows, columns, dtype=torch.int8 if scheme.symmetric else torch.uint8, device="meta")
        scale = torch.empty(groups, device="meta")
        return Quantized(q, scale, None if scheme.symmetric else scale.to(torch.uint8), scheme)


@dataclass(frozen=True)
class Exportable:
    """A converted network with what belongs to it.

    Attributes:
        network: converted, in eval mode; a transformers model, or any other module. Of formats for adapters: with these
            on a frozen base.
        sample: keyword arguments (a mapping) or positional ones (a tuple) of one call of ``network``: what exporters
            trace, and what outputs are compared on.
        tokenizer: of a language model, or ``None``.
    """

    network: nn.Module
    sample: Mapping[str, Tensor] | tuple[Tensor, ...]
    tokenizer: Any = None

    @cached_property
    def plan(self) -> Plan:
        """What the network was converted by; of one with adapters, the plan of its base."""
        if not is_converted(self.network) and qlora.is_prepared(self.network):
            return qlora.prepared_of(self.network).plan
        return conversion_of(self.network).plan

    @property
    def config(self) -> Any:
        """The transformers configuration, or ``None``."""
        return getattr(self.network, "config", None)

    @cached_property
    def ties(self) -> dict[str, str]:
        """Name of a parameter that is another one -> that one's name."""
        first: dict[int, str] = {}
        found = {}
        for name, parameter in self.network.named_parameters(remove_duplicate=False):
            leader = first.setdefault(id(parameter), name)
            if leader != name:
                found[name] = leader
        return found

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """Name of the parameter -> quantized layer; tied ones once, under the first name."""
        return {
            name: Layer(name.removesuffix(".weight"), parameter)
            for name, parameter in self.network.named_parameters()
            if isinstance(parameter, QuantizedWeight)
        }

    def floats(self) -> Iterator[tuple[str, Tensor]]:
        """All other tensors of the state as they are stored (a cast weight in its own type), on the CPU, in order."""
        for name, tensor in self.floats_in_place():
            yield name, tensor.cpu()

    def floats_in_place(self) -> Iterator[tuple[str, Tensor]]:
        """The same on the device that holds them: what can be kept without a copy."""
        for name, tensor in self.network.state_dict(keep_vars=True).items():
            if name in self.ties or name in self.layers:
                continue
            yield name, (tensor.data_ if isinstance(tensor, CastWeight) else tensor).detach()

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """What the network gives for :attr:`sample`: logits, float32 on the CPU."""
        return outputs_of(self.network, self.sample)


@torch.no_grad()
def outputs_of(network: nn.Module, sample: Mapping[str, Tensor] | tuple[Tensor, ...]) -> Tensor:
    """The first output (logits, of a transformers model) of a call, float32 on the CPU."""
    device = next(network.parameters()).device
    if isinstance(sample, tuple):
        given = network(*(value.to(device) for value in sample))
    else:
        given = network(**{name: value.to(device) for name, value in sample.items()})
    given = getattr(given, "logits", given)
    if isinstance(given, (tuple, list)):
        given = given[0]
    if not isinstance(given, Tensor):
        raise ExportError(f"{type(network).__name__} returns {type(given).__name__}: outputs cannot be compared")
    return given.detach().float().cpu()


def language_model_in(network: nn.Module) -> nn.Module:
    """The transformers model that a wrapper (a LightningModule, a compiled module) holds; any other module as it is."""
    network = network._modules.get("_orig_mod") or network  # torch.compile's, which answers for what it wraps
    found = [module for module in network.modules() if hasattr(module, "generation_config")]
    own = {id(parameter) for parameter in found[0].parameters()} if found else set()
    whole = bool(found) and all(id(parameter) in own for parameter in network.parameters())
    return found[0] if whole and not hasattr(network, "generation_config") else network


def check_adapted(network: nn.Module) -> None:
    """Raise unless a network has the adapters of QLoRA on a frozen base.

    Raises:
        ExportError: for any other.
    """
    if not qlora.is_prepared(network):
        raise ExportError(
            f"{type(network).__name__} has no adapters on a frozen base: this format is for what QLoRA leaves; a "
            "converted model goes into one of the others"
        )


def check_converted(network: nn.Module) -> None:
    """Raise unless a network is converted.

    Raises:
        ExportError: for a float or a prepared one.
    """
    if qlora.is_prepared(network) and not is_converted(network):
        raise ExportError(
            f"{type(network).__name__} has adapters on a frozen base: formats for those are peft and bitsandbytes; for "
            "another one merge it first (merge.scheme=w4a16-g32 in a recipe, or qlora.merge and convert)"
        )
    if is_prepared(network):
        raise ExportError(
            f"{type(network).__name__} is prepared for training: convert(model) first; what is exported are the "
            "integers that conversion has proven"
        )
    if not is_converted(network):
        raise ExportError(
            f"{type(network).__name__} is not converted: convert(model, scheme) first, or a run of a recipe"
        )
