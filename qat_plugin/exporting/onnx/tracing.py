"""One call of a network as an ONNX graph, with stand-ins for its quantized weights."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor, nn

from qat_plugin.errors import ExportError, QatError
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.float32_runtime import widened
from qat_plugin.exporting.onnx.cache import cache_of, name_axes, past_of, present_names, tensors_of
from qat_plugin.exporting.onnx.options import Options
from qat_plugin.exporting.onnx.standin import skeleton

_PREFIX: Final = "network."
_TRACED_PAST: Final = 5


class _Call(nn.Module):
    """A network called with tensors in order; gives the tensors that outputs are compared on."""

    def __init__(self, network: nn.Module, names: tuple[str, ...] | None, fixed: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.names, self.fixed = network, names, fixed

    def forward(self, *values: Tensor) -> Any:
        if self.names is None:
            given = self.network(*values)
        else:
            named, past = dict(zip(self.names, values, strict=False)), values[len(self.names) :]
            cached = {"past_key_values": cache_of(past), "use_cache": True} if past else {}
            given = self.network(**named, **{**self.fixed, **cached})
            if past:
                return given.logits, *tensors_of(given.past_key_values)
        return getattr(given, "logits", given)


def inputs_of(model: Exportable) -> dict[str, Tensor]:
    """Names of the file's inputs -> the sample's tensors; a language model's with its attention mask."""
    if isinstance(model.sample, Mapping):
        named = dict(model.sample)
        if is_language_model(model) and "attention_mask" not in named and _takes(model.network, "attention_mask"):
            named["attention_mask"] = torch.ones_like(named["input_ids"])
        return named
    names = list(inspect.signature(model.network.forward).parameters)[: len(model.sample)]
    if len(names) < len(model.sample):
        names = [f"input_{i}" for i in range(len(model.sample))]
    return dict(zip(names, model.sample, strict=True))


def grown(inputs: Mapping[str, Tensor], *, batch: int, sequence: bool) -> dict[str, Tensor]:
    """The same inputs in other sizes: ``batch`` more rows, and one column of tokens less.

    Args:
        inputs: of the file.
        batch: rows to add, copies of the first ones in reverse order.
        sequence: whether the second axis is a sequence.
    """
    made = {}
    for name, value in inputs.items():
        if value.dim():
            rows = torch.arange(batch).remainder(value.shape[0]).flip(0)
            value = torch.cat([value, value[rows].flip(1) if sequence and name == "input_ids" else value[rows]])
        if sequence and value.dim() == 2 and value.shape[1] > 3:
            value = value[:, :-1]
        made[name] = value
    return made


def is_language_model(model: Exportable) -> bool:
    """Whether the second axis of the inputs is a sequence of tokens."""
    return model.config is not None and isinstance(model.sample, Mapping) and "input_ids" in model.sample


def _takes(network: nn.Module, name: str) -> bool:
    return name in inspect.signature(network.forward).parameters


def trace(model: Exportable, options: Options) -> ir.Model:
    """The graph of one call.

    Raises:
        ExportError: when PyTorch's exporter cannot follow it.
    """
    language = is_language_model(model)
    inputs = inputs_of(model)
    if options.dynamic:  # sizes of 1 would be taken for constants
        small = min(value.shape[0] for value in inputs.values() if value.dim())
        inputs = grown(inputs, batch=max(0, 2 - small), sequence=False)
    names = tuple(inputs) if isinstance(model.sample, Mapping) else None
    outputs = ["logits" if language else "output"]
    if options.cache:
        past = _past(model, inputs)
        outputs += present_names(list(past))
        inputs |= past
    call = _Call(
        skeleton(model), names, {"use_cache": False} if language and _takes(model.network, "use_cache") else {}
    ).eval()
    shapes = tuple(_axes(value, language, options.cache) for value in inputs.values()) if options.dynamic else None
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                call, tuple(widened(value) for value in inputs.values()), dynamo=True,
                opset_version=options.opset, verbose=False,
                input_names=list(inputs), output_names=outputs,
                dynamic_shapes=None if shapes is None else {"values": shapes},
            )  # fmt: skip
    except QatError:
        raise
    except Exception as error:
        refused = _refusal_behind(error)
        if refused is not None:
            raise refused from error
        told = _first_line(error)
        sizes = options.dynamic and any(word in told.lower() for word in ("constraint", "dynamic", "specializ"))
        advice = "; fixed sizes may work: options={'dynamic': False}" if sizes else ""
        raise ExportError(
            f"PyTorch's ONNX exporter cannot follow {type(model.network).__name__}: {told}{advice}"
        ) from error
    assert program is not None
    traced: ir.Model = program.model
    for value in list(traced.graph.initializers.values()):
        if value.name is not None and value.name.startswith(_PREFIX):
            value.name = value.name.removeprefix(_PREFIX)
    if options.cache:
        name_axes(traced.graph)
    _forget_the_source(traced.graph)
    return traced


def _forget_the_source(graph: ir.Graph) -> None:
    """Without the lines of Python that each node came from: they are most of a small file, and name this machine."""
    for node in graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()


def _past(model: Exportable, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A past to trace with; the attention mask of ``inputs`` grows by it."""
    if not is_language_model(model):
        raise ExportError(f"{type(model.network).__name__} is no transformers language model: leave cache=True out")
    mask = inputs["attention_mask"]
    inputs["attention_mask"] = torch.cat([torch.ones_like(mask[:, :1]).expand(-1, _TRACED_PAST), mask], dim=1)
    return past_of(model, mask.shape[0], _TRACED_PAST)


def _axes(value: Tensor, language: bool, cache: bool) -> dict[int, Any]:
    if cache:  # the mask's length is that of the past and the tokens: a sum, which has no name of its own
        free = torch.export.Dim.DYNAMIC
        return {0: free, 2: free} if value.dim() == 4 else {0: free, 1: free}
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    if not value.dim():
        return {}
    return {0: batch, 1: sequence} if language and value.dim() > 1 else {0: batch}


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _refusal_behind(error: BaseException | None) -> ExportError | None:
    while error is not None:
        if isinstance(error, ExportError):
            return error
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not installed and names it does not use."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
