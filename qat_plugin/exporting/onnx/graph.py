"""A traced graph while quantized operators are put into it: nodes, and tensors that are made when they are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qat_plugin.exporting.formats import Told


class Graph:
    """Of one model.

    Args:
        model: as traced.
        progress: told the number of tensors made so far.
    """

    def __init__(self, model: ir.Model, progress: Told) -> None:
        self.model, self.graph = model, model.graph
        self.once: dict[Any, Any] = {}
        """What was put in for one value and can serve again."""
        self._progress, self._made = progress, set[str]()
        self._new: list[ir.Node] = []
        self._names: dict[str, int] = {}

    def emit(
        self, op: str, inputs: Sequence[ir.Value | None], name: str, *, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """One node more.

        Args:
            op: its operator.
            inputs: of it.
            name: whose it is; the node is called ``<name>/<op>``.
            domain: of the operator; empty for standard ones.
            attributes: of it.

        Returns:
            Its output.
        """
        title = self._unique(f"{name}/{op}")
        node = ir.node(op, list(inputs), attributes, domain=domain, name=title)
        node.outputs[0].name = title
        if domain:
            self.model.opset_imports.setdefault(domain, 1)
        self._new.append(node)
        return node.outputs[0]

    def tensor(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], make: Callable[[], np.ndarray[Any, Any]]
    ) -> ir.Value:
        """An initializer that is made when the file is written; one for each name.

        Args:
            name: of it.
            dtype: of its elements.
            shape: of it.
            make: gives the array; 4-bit types one element each, whatever the array's type.
        """
        if name in self.graph.initializers:
            return self.graph.initializers[name]

        def made() -> ir.TensorProtocol:
            self._made.add(name)
            self._progress(len(self._made))
            return ir.Tensor(np.ascontiguousarray(make().astype(dtype.numpy())), dtype=dtype, name=name)

        lazy = ir.LazyTensor(made, dtype, ir.Shape(shape), name=name)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=lazy)
        self.graph.register_initializer(value)
        return value

    def constant(self, value: Any, dtype: ir.DataType) -> ir.Value:
        """A small tensor, by what it holds."""
        array = np.asarray(value, dtype=dtype.numpy())
        label = "x".join(str(item) for item in array.reshape(-1).tolist()) or "none"
        kind = f"{dtype.name.lower()}{list(array.shape) if array.ndim else ''}"
        name = f"constant/{kind}/{label}"
        if name not in self.graph.initializers:
            self.graph.register_initializer(
                ir.Value(
                    name=name,
                    shape=ir.Shape(array.shape),
                    type=ir.TensorType(dtype),
                    const_value=ir.Tensor(array, dtype=dtype, name=name),
                )
            )
        return self.graph.initializers[name]

    def floats(self, *values: float) -> ir.Value:
        """A float32 scalar of one value, or a vector."""
        return self.constant(values[0] if len(values) == 1 else values, ir.DataType.FLOAT)

    def integers(self, *values: int) -> ir.Value:
        """An int64 vector."""
        return self.constant(values, ir.DataType.INT64)

    def replace(self, node: ir.Node, output: ir.Value) -> None:
        """Put what was emitted since the last call in the place of a node."""
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], self._new, node.outputs, [output])
        self._new = []

    def _unique(self, name: str) -> str:
        count = self._names[name] = self._names.get(name, 0) + 1
        return name if count == 1 else f"{name}/{count}"
