"""Pending nodes become quantized operators."""

from __future__ import annotations

import onnx_ir as ir

from qat_plugin.errors import ExportError
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.formats import Told
from qat_plugin.exporting.onnx.chaining import handed
from qat_plugin.exporting.onnx.convolutions import Reader, convolution
from qat_plugin.exporting.onnx.graph import Graph
from qat_plugin.exporting.onnx.layout import Array, Unpacked
from qat_plugin.exporting.onnx.lookups import lookup
from qat_plugin.exporting.onnx.options import Options
from qat_plugin.exporting.onnx.products import product
from qat_plugin.exporting.onnx.standin import PENDING
from qat_plugin.exporting.onnx.weights import FLOAT, Weight
from qat_plugin.kernels.weight import CastWeight

_CAST_TYPES = {"torch.float16": ir.DataType.FLOAT16, "torch.bfloat16": ir.DataType.BFLOAT16, "torch.float32": FLOAT}


def rewrite(traced: ir.Model, model: Exportable, options: Options, progress: Told) -> None:
    """Put the quantized operators of a model into its traced graph.

    Args:
        traced: changed in place.
        model: whose integers they read, when the graph is written.
        options: of the file.
        progress: told the number of tensors made.

    Raises:
        ExportError: when the call that was traced does not reach every quantized layer.
    """
    graph, unpacked = Graph(traced, progress), Unpacked()
    parameters = dict(model.network.named_parameters())
    reached = set()
    for node in list(traced.graph):
        if node.domain != PENDING:
            continue
        name = node.attributes["weight"].as_string()
        reached.add(name)
        held = parameters[name]
        if isinstance(held, CastWeight):
            output = _cast(graph, node, name, held)
        else:
            weight = Weight(graph, name, model.layers[name], unpacked)
            chain = handed(node, model, options) if node.op_type == "Conv" else None
            reader = None
            if chain is not None:
                reader = Reader(Weight(graph, chain.reader, model.layers[chain.reader], unpacked), bool(chain.relu))
            output = _quantized(graph, node, weight, options, reader)
            if chain is not None and chain.relu is not None:
                graph.replace(node, output)
                graph.replace(chain.relu, output)
                continue
        graph.replace(node, output)
    traced.opset_imports.pop(PENDING, None)
    for name, value in list(traced.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del traced.graph.initializers[name]  # biases that are integers now
    missing = [layer.name for name, layer in model.layers.items() if name not in reached]
    if missing:
        raise ExportError(
            f"the traced call does not use {', '.join(missing[:8])}{' and more' if len(missing) > 8 else ''}: give a "
            "sample= that reaches every quantized layer, or keep these float in the policy"
        )


def _quantized(graph: Graph, node: ir.Node, weight: Weight, options: Options, reader: Reader | None) -> ir.Value:
    inputs = [value for value in node.inputs if value is not None]
    if node.op_type == "Embedding":
        return lookup(graph, inputs[0], weight, options)
    if node.op_type == "Linear":
        return product(graph, inputs[0], weight, options)
    attributes = {name: list(node.attributes[name].as_ints()) for name in ("strides", "pads", "dilations")}
    group = node.attributes["group"].as_int()
    bias = inputs[1] if len(inputs) > 1 else None
    return convolution(graph, inputs[0], bias, weight, {**attributes, "group": group}, options, reader)


def _cast(graph: Graph, node: ir.Node, name: str, held: CastWeight) -> ir.Value:
    """A float weight in its own type, widened where it is used."""
    label, data = name.removesuffix(".weight"), held.data_
    table = graph.tensor(name, _CAST_TYPES[str(data.dtype)], tuple(data.shape), lambda: _array(held))
    if node.op_type == "Embedding":
        table = graph.emit("Gather", [table, node.inputs[0]], label, axis=0)
    return graph.emit("Cast", [table], label, to=FLOAT)


def _array(held: CastWeight) -> Array:
    array: Array = held.data_.detach().cpu().float().numpy()
    return array
