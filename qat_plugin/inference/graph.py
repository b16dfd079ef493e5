"""What is changed in the graph of a compiled step, after torch.compile and before its code is made."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default)
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
_FEW_ROWS = 4  # up to which a float product is bound by reading its weight


class OneProductPerInput(CustomGraphPass):
    """Integer layers that take the same input become one operator; float products of few rows read rows of weights.

    One operator quantizes the input once and divides the channels of all its layers among the threads.
    """

    def __call__(self, graph: Graph) -> None:
        """Rewrite in place."""
        _share_views(graph)
        _merge_linears(graph)
        _replace_products(graph)
        graph.lint()

    def uuid(self) -> bytes:
        """Of this file: compiled code is cached by it."""
        return get_hash_for_files((__file__,))


def _share_views(graph: Graph) -> None:
    """Each layer flattens its input for itself: the same view of the same tensor once is enough."""
    seen: dict[Hashable, Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _VIEWS:
            first = seen.setdefault((node.target, node.args[0], tuple(node.args[1])), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _merge_linears(graph: Graph) -> None:
    groups: dict[Hashable, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.qat_plugin_native.linear.default:
            x, _, scale, _, fixed, _, k, bits, integer = node.args
            groups.setdefault((x, fixed, k, bits, integer, scale.meta["val"].shape[1]), []).append(node)
    for nodes in groups.values():
        if len(nodes) > 1 and all(_comes_before(part, nodes[0]) for node in nodes for part in node.all_input_nodes):
            _merge(graph, nodes)


def _comes_before(node: Node, other: Node) -> bool:
    return node.op == "placeholder" or node < other


def _merge(graph: Graph, nodes: list[Node]) -> None:
    _, data, scale, bias, _, n, *_ = map(list, zip(*(node.args for node in nodes), strict=True))
    x, _, _, _, fixed, _, k, bits, integer = nodes[0].args
    with graph.inserting_before(nodes[0]):
        product = torch.ops.qat_plugin_native.linears.default
        merged = graph.call_function(product, (x, data, scale, bias, fixed, n, k, bits, integer))
        merged.meta["val"] = [node.meta["val"] for node in nodes]
        parts = [graph.call_function(operator.getitem, (merged, index)) for index in range(len(nodes))]
    for node, part in zip(nodes, parts, strict=True):
        part.meta.update(node.meta)
        node.replace_all_uses_with(part)
        graph.erase_node(node)


def _replace_products(graph: Graph) -> None:
    """``x @ weight.t() (+ bias)`` of few rows, where the weight is a parameter as nn.Linear holds it."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _PRODUCTS:
            continue
        bias, x, turned = node.args if len(node.args) == 3 else (None, *node.args)
        weight = _as_linear_holds_it(turned)
        rows = x.meta["val"].shape[0]
        plain = bias is None or (bias.meta["val"].dim() == 1 and not node.kwargs)
        if weight is None or not plain or not isinstance(rows, int) or rows > _FEW_ROWS:
            continue
        with graph.inserting_before(node):
            product = graph.call_function(torch.ops.qat_plugin_native.dense.default, (x, weight, bias))
        product.meta.update(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)


def _as_linear_holds_it(turned: Any) -> Node | None:
    """The parameter [out, in] of which ``turned`` is the transpose; on CPU, in a type the operator takes."""
    if not isinstance(turned, Node) or turned.target is not torch.ops.aten.permute.default or turned.args[1] != [1, 0]:
        return None
    weight = turned.args[0]
    if not isinstance(weight, Node) or weight.op != "placeholder":
        return None
    value = weight.meta["val"]
    fits = value.device.type == "cpu" and value.is_contiguous() and value.dtype in _FLOATS
    return weight if fits else None
