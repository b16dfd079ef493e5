"""A model whose weights are still to come: NF4 layers in their places, every parameter on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.errors import CheckpointError, PrepareError
from qat_plugin.policy import Plan
from qat_plugin.policy.roles import is_conv1d
from qat_plugin.qlora.nf4 import Backend, empty_nf4_linear, from_state_tensors, nf4_weight
from qat_plugin.qlora.source import some
from qat_plugin.scheme import Scheme


class Shell:
    """Takes the tensors of a model one at a time, in any order.

    Attributes:
        model: the model, its planned layers replaced by empty NF4 ones.
        names: of its parameters and saved buffers, before any layer was replaced.
        nf4: name of each NF4 layer -> its scheme.
        backend: who holds the NF4 weights.
        device: where weights are put.

    Args:
        model: from :func:`~qat_plugin.qlora.architecture.empty_model`.
        plan: of that model.
        dtype: float type that NF4 weights are quantized from and multiplied in.
    """

    def __init__(self, model: Any, plan: Plan, *, backend: Backend, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.backend, self.device = model, backend, device
        self.names = frozenset(model.state_dict())
        self._dtype = dtype
        self.nf4: dict[str, Scheme] = {}
        self._transposed: set[str] = set()
        for layer in plan:
            if layer.scheme is not None and layer.scheme.kind == "nf4":
                self._empty(layer.name, layer.scheme)

    def _empty(self, name: str, scheme: Scheme) -> None:
        given = self.model.get_submodule(name)
        rows, columns = given.weight.shape
        if is_conv1d(given):  # its weight is [in, out]
            self._transposed.add(name)
            rows, columns = columns, rows
        layer = empty_nf4_linear(
            columns, rows, bias=given.bias is not None, scheme=scheme, backend=self.backend, compute_dtype=self._dtype
        )
        if given.bias is not None:
            layer.bias = given.bias
        self.model.set_submodule(name, layer.train(given.training))
        self.nf4[name] = scheme

    def put(self, name: str, tensor: Tensor) -> None:
        """Put one tensor of the float model where it belongs; an NF4 layer's weight is quantized.

        Args:
            name: parameter or buffer of the model.
            tensor: in the float model's shape; one on the host may be mapped from a file, so it is copied.
        """
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if path in self.nf4 and leaf == "weight":
            weight = tensor.to(self.device, self._dtype)
            weight = weight.t() if path in self._transposed else weight
            module.weight = self._quantized(path, weight)
            return
        given = getattr(module, leaf)
        dtype = given.dtype if tensor.is_floating_point() else tensor.dtype
        value = tensor.to(device=self.device, dtype=dtype, copy=tensor.device.type == "cpu")
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=given.requires_grad)
        else:
            module._buffers[leaf] = value

    def _quantized(self, path: str, weight: Tensor) -> nn.Parameter:
        try:
            return nf4_weight(
                weight, self.nf4[path], backend=self.backend, device=self.device, compute_dtype=self._dtype
            )
        except PrepareError as error:  # NaN in the file, a size that the backend does not take
            raise PrepareError(f"{self.model.name_or_path}: {path}: {error}") from error

    def put_state(self, path: str, state: Mapping[str, Tensor]) -> None:
        """Put the quantized weight of an NF4 layer, as :func:`~qat_plugin.qlora.nf4.state_tensors` gave it."""
        moved = {key: tensor.to(device=self.device, copy=True) for key, tensor in state.items()}
        layer = self.model.get_submodule(path)
        layer.weight = from_state_tensors(moved, self.nf4[path], backend=self.backend)

    def finish(self, missing: Set[str]) -> None:
        """Tie what shares a weight, and move the buffers that no file holds.

        Args:
            missing: names that were not put, because they are tied to one that was.

        Raises:
            CheckpointError: when a parameter has no weight after all.
        """
        self.model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
        for module in self.model.modules():
            for leaf, buffer in module.named_buffers(recurse=False):
                module._buffers[leaf] = buffer.to(self.device)
        empty = [name for name, parameter in self.model.named_parameters() if parameter.is_meta]
        if empty:
            raise CheckpointError(
                f"{self.model.name_or_path}: its files lack {len(empty)} of the model's weights: {some(empty)}"
            )
