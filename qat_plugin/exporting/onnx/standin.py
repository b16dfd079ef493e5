"""A converted network whose quantized weights are stand-ins: what can be traced without any weight being dequantized.

A stand-in has a name and a shape, no numbers. The operators that read it (``F.linear``, ``torch.addmm``,
``F.conv1d/2d``, ``F.embedding``) leave a node of the domain :data:`PENDING` in the graph, which says which weight and
how it is read; :mod:`~qat_plugin.exporting.onnx.rewriting` puts the quantized operator in its place. Everything else
in the network is traced as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_plugin.errors import ExportError
from qat_plugin.exporting.contents import Exportable
from qat_plugin.kernels.weight import CastWeight, QuantizedWeight, is_converted_weight

PENDING: Final = "qat_plugin.pending"


class StandIn:
    """In the place of one converted weight.

    Attributes:
        name: of the parameter.
        weight: the converted weight itself.
    """

    requires_grad = False
    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, name: str, weight: Tensor) -> None:
        self.name, self.weight, self.shape = name, weight, torch.Size(weight.shape)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{self.__dict__.get('name')} is a quantized weight and read as .{name}, which has no quantized form in "
            "ONNX; keep the layer float in the policy"
        )

    def size(self, dim: int | None = None) -> Any:
        """As a tensor's."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As a tensor's."""
        return len(self.shape)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Leave a pending node in the place of an operator that reads a stand-in."""
        kwargs = kwargs or {}
        answer = _ANSWERS.get(function)
        if function is F.embedding:
            return _embedding(*args, **kwargs)
        standins = [value for value in (*args, *kwargs.values()) if isinstance(value, StandIn)]
        if all(isinstance(standin.weight, CastWeight) for standin in standins):
            args, kwargs = _with_numbers(args), dict(zip(kwargs, _with_numbers(kwargs.values()), strict=True))
            return function(*args, **kwargs)
        if answer is None:
            name = getattr(function, "__name__", str(function))
            raise ExportError(
                f"{standins[0].name} ({standins[0].weight!r}) is read by {name}, which has no quantized form in ONNX; "
                "keep the layer float in the policy"
            )
        return answer(*args, **kwargs)


def skeleton(model: Exportable) -> nn.Module:
    """A copy of a converted network with stand-ins, its other tensors shared (or widened to float32).

    Args:
        model: its network is left as it is.
    """
    memo: dict[int, Any] = {}
    for name, tensor in (*model.network.named_parameters(), *model.network.named_buffers()):
        if is_converted_weight(tensor):
            memo[id(tensor)] = StandIn(name, tensor)
        else:
            memo[id(tensor)] = _widened(tensor)
    copied = copy.deepcopy(model.network, memo)
    for module in copied.modules():
        held: dict[str, Any] = dict(module._parameters)
        for name, parameter in held.items():
            if isinstance(parameter, StandIn):
                del module._parameters[name]
                module.__dict__[name] = parameter
    return copied.eval()


def _widened(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    plain = tensor.detach().to(device="cpu", dtype=dtype)
    return nn.Parameter(plain, requires_grad=False) if isinstance(tensor, nn.Parameter) else plain


def _linear(x: Tensor, weight: StandIn, bias: Tensor | None = None) -> Tensor:
    held = _quantized(weight)
    if x.dim() < 2:  # the quantized operators take matrices
        return _linear(x.unsqueeze(0), weight, bias).squeeze(0)
    y = _pending("Linear", weight, x, (*x.shape[:-1], held.out_features))
    return y if bias is None else y + bias  # an addition of its own: Gemm has no quantized form


def _addmm(input: Tensor, mat1: Tensor, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if not isinstance(mat2, StandIn) or beta != 1 or alpha != 1 or not _quantized(mat2).transposed:
        raise ExportError("torch.addmm on a quantized weight is exported as bias + x @ weight with an [in, out] weight")
    return _linear(mat1, mat2, input)


def _embedding(
    input: Tensor,
    weight: StandIn,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None:
        raise ExportError(f"{weight.name}: an embedding with max_norm rewrites its rows and cannot be exported")
    return _pending("Embedding", weight, input, (*input.shape, weight.shape[1]))


def _convolution(
    input: Tensor, weight: StandIn, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    _quantized(weight)
    size = weight.shape[2:]
    if input.dim() == len(size) + 1:
        return _convolution(input.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0)
    strides, dilations = _each(stride, len(size)), _each(dilation, len(size))
    begins, ends = _pads(padding, dilations, size)
    out = [
        (n + begin + end - d * (k - 1) - 1) // s + 1
        for n, begin, end, d, k, s in zip(input.shape[2:], begins, ends, dilations, size, strides, strict=True)
    ]
    attributes = {"strides": strides, "pads": [*begins, *ends], "dilations": dilations, "group": groups}
    return _pending("Conv", weight, input, (input.shape[0], weight.shape[0], *out), bias, **attributes)


def _pads(padding: Any, dilations: list[int], size: torch.Size) -> tuple[list[int], list[int]]:
    """Before and after each axis; PyTorch's "same" gives the odd one to the far side."""
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilations, size, strict=True)]
        return [total // 2 for total in totals], [total - total // 2 for total in totals]
    amounts = [0] * len(size) if padding == "valid" else _each(padding, len(size))
    return amounts, amounts


def _each(value: Any, dimensions: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dimensions if len(values) == 1 else values


def _quantized(weight: StandIn) -> QuantizedWeight:
    assert isinstance(weight.weight, QuantizedWeight)
    return weight.weight


def _with_numbers(values: Iterable[Any]) -> tuple[Any, ...]:
    """Stand-ins of cast weights as tensors that a node makes."""
    return tuple(
        _pending("Numbers", value, None, tuple(value.shape)) if isinstance(value, StandIn) else value
        for value in values
    )


def _pending(kind: str, weight: StandIn, x: Tensor | None, shape: Any, *others: Any, **attributes: Any) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{PENDING}::{kind}",
        () if x is None else (x, *(other for other in others if other is not None)),
        {"weight": weight.name, **attributes},
        dtype=torch.float32,
        shape=shape,
        version=1,
    )


_ANSWERS: Final[dict[Any, Callable[..., Tensor]]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
}
