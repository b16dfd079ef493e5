"""Convolutions whose output is rounded by all that reads it on one calibrated scale: they run in integers.

::

    Conv -> [Relu] -> QuantizeLinear of the next layer      becomes
    Conv -> QuantizeLinear -> Max (the zero point; -127 without a ReLU) -> DequantizeLinear -> the next layer

Rounding and a ReLU can change places, so the next layer gets the same integers; ONNX Runtime makes QLinearConv of it.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import onnx_ir as ir

from qat_plugin.exporting.contents import Exportable, Layer
from qat_plugin.exporting.onnx.options import Options
from qat_plugin.exporting.onnx.standin import PENDING

_READERS: Final = ("Conv", "Linear")


class Handed(NamedTuple):
    """To whom a convolution hands integers.

    Attributes:
        reader: name of the weight whose layer reads them; others that read them have the same scale.
        relu: between the two, or ``None``.
    """

    reader: str
    relu: ir.Node | None


def handed(node: ir.Node, model: Exportable, options: Options) -> Handed | None:
    """Where the output of a pending convolution goes, or ``None`` where it stays float.

    Args:
        node: in the traced graph.
        model: whose layers the pending nodes are.
        options: of the file.
    """
    layer = model.layers[node.attributes["weight"].as_string()]
    scheme = layer.scheme
    whole = scheme.static and scheme.weight_bits == 8 and scheme.symmetric and scheme.group_size is None
    if options.target != "onnxruntime" or not whole or not _is_known(node):
        return None
    value, relu = node.outputs[0], None
    uses = list(value.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Relu" and not value.is_graph_output():
        relu = uses[0].node
        value = relu.outputs[0]
    readers = [(_reader(use.node, use.idx, model), use.node) for use in value.uses()]
    steps = {None if read is None else float(_step(read)) for read, _ in readers}
    if value.is_graph_output() or len(steps) != 1 or None in steps:
        return None
    return Handed(readers[0][1].attributes["weight"].as_string(), relu)


def _is_known(node: ir.Node) -> bool:
    """Whether the bias is there while the file is written: it becomes integers."""
    bias = node.inputs[1] if len(node.inputs) > 1 else None
    return bias is None or bias.const_value is not None


def _reader(node: ir.Node, index: int, model: Exportable) -> Layer | None:
    if node.domain != PENDING or node.op_type not in _READERS or index != 0:
        return None
    layer = model.layers.get(node.attributes["weight"].as_string())
    return None if layer is None or not layer.scheme.static or layer.weight.input_scale is not None else layer


def _step(layer: Layer) -> float:
    assert layer.weight.activation_scale is not None
    return float(layer.weight.activation_scale)
