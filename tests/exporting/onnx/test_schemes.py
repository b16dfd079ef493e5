"""Every scheme as an operator: the integers in the file, and what ONNX Runtime computes with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from qat_plugin import Policy, convert
from qat_plugin.exporting import Exported, export_model
from qat_plugin.exporting.contents import Exportable
from qat_plugin.numerics import Quantized
from qat_plugin.scheme import Scheme
from tests.exporting.onnx.runtime import ROWS, Beside, run

WEIGHT_ONLY = [
    "w4a16-g32", "w4a16-g16-asym", "w4a16-g48", "w4a16", "w4a16-asym", "w4a16-tensor", "w4a16-g4", "w4a16-g3-asym",
    "w3a16-g32", "w3a16-g32-asym", "w2a16-g16-asym", "w8a16", "w8a16-asym", "w8a16-tensor", "w8a16-g32",
    "w8a16-g12-asym",
]  # fmt: skip
DYNAMIC = ["w8a8", "w8a8-asym", "w8a8-tensor", "w8a8-g32", "w4a8-g32", "w4a8-g32-asym"]
CAST = ["fp16", "bf16"]
SCHEMES = [*WEIGHT_ONLY, *DYNAMIC, *CAST]
TABLES = [*WEIGHT_ONLY, *CAST]


def key(scheme: str) -> str:
    return f"{scheme}_"


@pytest.fixture(scope="module")
def model() -> Beside:
    torch.manual_seed(1)
    made = Beside([key(scheme) for scheme in SCHEMES], [key(scheme) for scheme in TABLES])
    rules = {f"linear.{key(scheme)}": scheme for scheme in SCHEMES}
    rules |= {f"embedding.{key(scheme)}": scheme for scheme in TABLES}
    return convert(made, Policy(rules)).eval()  # type: ignore[return-value]


def inputs(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 96, generator=generator)
    x[0] = 0  # a row of zeros has no absmax
    x[1, :3] = torch.tensor([127.0, 0.5, 1.5])  # its scale is 1 (or less than 127 is its greatest): halves are ties
    return x, torch.randint(ROWS, (rows,), generator=generator)


@pytest.fixture(scope="module", params=["auto", "dequantize", "matmulnbits"])
def exported(request: pytest.FixtureRequest, model: Beside, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    options = {"int4": request.param, "int8": request.param}
    return export_model(
        model, "onnx", tmp_path_factory.mktemp("onnx") / "out", sample=inputs(3), options=options, progress=False
    )


def reference(model: Beside, x: Tensor, ids: Tensor) -> Tensor:
    """float64 products of the integers' numbers, activations on numpy's own rounding."""
    layers = Exportable(model, ()).layers
    rows = []
    for scheme in SCHEMES:
        layer = model.linear[key(scheme)]
        given = x.double().numpy()
        if Scheme.parse(scheme).quantizes_activations:
            step = np.abs(x.numpy()).max(axis=1, keepdims=True) / np.float32(127)
            step[step == 0] = 1
            given = np.rint(x.numpy() / step).astype(np.float64) * step
        weight = layer.weight.dequantize().double() if scheme in CAST else numbers(layers, f"linear.{key(scheme)}")
        rows.append(torch.from_numpy(given) @ weight.T + layer.bias.double())
    for scheme in TABLES:
        table = model.embedding[key(scheme)].weight
        weight = table.dequantize().double() if scheme in CAST else numbers(layers, f"embedding.{key(scheme)}")
        rows.append(weight[ids])
    return torch.stack(rows, dim=1)


def numbers(layers: dict, name: str) -> Tensor:  # type: ignore[type-arg]
    held: Quantized = layers[f"{name}.weight"].integers
    scale = held.scale.double().expand(held.q.shape[0], -1)
    zero = torch.zeros(()) if held.zero_point is None else held.zero_point.double().expand(held.q.shape[0], -1)
    size = held.q.shape[1] // scale.shape[1]
    spread = [value.repeat_interleave(size, dim=1) if value.dim() else value for value in (scale, zero)]
    return (held.q.double() - spread[1]) * spread[0]


def test_the_integers_of_every_scheme_are_read_back(exported: Exported, model: Beside) -> None:
    found = exported.verification
    assert found is not None
    assert (found.integers, found.scales) == (0, 0)
    assert found.tensors == len(WEIGHT_ONLY) * 2 + len(DYNAMIC)


def test_onnx_runtime_computes_what_the_integers_stand_for_in_any_batch(exported: Exported, model: Beside) -> None:
    for rows in (2, 7):
        x, ids = inputs(rows)
        found = run(exported.path, x, ids, session__qdq_matmulnbits_accuracy_level="0")[0].double()
        wanted = reference(model, x, ids)
        for i, scheme in enumerate([*SCHEMES, *TABLES]):
            error = float((found[:, i] - wanted[:, i]).norm() / wanted[:, i].norm())
            assert error < 2e-6, f"{scheme}: {error:.1e}"


def test_a_plain_session_computes_it_too_unless_dequantize_was_asked_for(exported: Exported, model: Beside) -> None:
    x, ids = inputs(5)
    error = (run(exported.path, x, ids)[0].double() - reference(model, x, ids)).norm(dim=(0, 2))
    file = onnx.load(exported.path / "model.onnx")
    dequantized = any(node.op_type == "DequantizeLinear" for node in file.graph.node)
    assert bool((error < 1e-4).all()) != dequantized  # ONNX Runtime rounds the inputs of those products to INT8


def test_dequantize_needs_no_operator_of_onnx_runtime(model: Beside, tmp_path: Path) -> None:
    small = torch.nn.Sequential(torch.nn.Linear(64, 32))
    made = export_model(
        convert(small, "w4a16-g32-asym"), "onnx", tmp_path / "out", sample=(torch.ones(2, 64),),
        options={"int4": "dequantize"}, progress=False,
    )  # fmt: skip
    file = onnx.load(made.path / "model.onnx")
    assert {entry.domain for entry in file.opset_import} == {""}
    types = {entry.name: entry.data_type for entry in file.graph.initializer}
    assert types["0.weight.q"] == types["0.weight.zero_point"] == onnx.TensorProto.UINT4
