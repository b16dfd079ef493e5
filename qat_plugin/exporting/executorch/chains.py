"""Which static layers hand INT8 to the next one: found in the traced graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from qat_plugin.exporting.executorch.rounding import Rounding

_PRODUCTS = ("aten.conv2d.default", "aten.linear.default")
_RELU = ("aten.relu.default", "aten.relu_.default")
_QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"
_DEQUANTIZE = "quantized_decomposed.dequantize_per_tensor.default"


def roundings(program: Any) -> dict[str, Rounding]:
    """Name of a static layer in the traced network -> how it is to be lowered.

    Args:
        program: the exported program of the network with each static layer chained.
    """
    names = program.graph_signature.inputs_to_buffers
    layers: dict[Any, str] = {}
    for node in program.graph.nodes:
        if str(node.target) in _PRODUCTS and str(getattr(node.args[0], "target", "")) == _DEQUANTIZE:
            layers[node] = names[node.args[1].args[0].name].removesuffix(".q")
    inputs = {_source(product): product for product in layers}
    made: dict[str, list[Rounding]] = {}
    fed = {inputs[quantize] for product in layers for quantize in _handed(product) if quantize in inputs}
    for product, name in layers.items():
        chained = any(quantize in inputs for quantize in _handed(product))
        made.setdefault(name, []).append(Rounding(chained, product in fed))
    # a layer that is called twice is what all its calls allow
    return {name: found[0] if len(set(found)) == 1 else Rounding() for name, found in made.items()}


def _source(product: torch.fx.Node) -> Any:
    """The node that quantizes a product's input."""
    return product.args[0].args[0]  # type: ignore[union-attr]


def _handed(product: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """The quantizing node behind a product and a ReLU, where nothing else reads either."""
    relu = _only(product)
    if relu is not None and str(relu.target) in _RELU:
        quantize = _only(relu)
        if quantize is not None and str(quantize.target) == _QUANTIZE:
            yield quantize


def _only(node: torch.fx.Node) -> torch.fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None
