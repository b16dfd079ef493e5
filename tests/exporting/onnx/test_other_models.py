"""Models beyond the plain case: kept input scales, 16-bit floats, calibrated linear layers, encoders."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from qat_plugin import Policy, convert
from qat_plugin.exporting import export_model
from qat_plugin.exporting.contents import Exportable
from qat_plugin.ptq import calibrate
from tests.exporting.onnx.runtime import run


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 48))


def uneven(rows: int) -> torch.Tensor:
    """Inputs with a few large features: what AWQ scales for."""
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
    x[:, ::16] *= 20
    return x


@pytest.mark.parametrize(("scheme", "method"), [("w4a16-g32", "awq"), ("w8a8", "smoothquant")])
def test_kept_input_scales_divide_the_inputs(tmp_path: Path, scheme: str, method: str) -> None:
    network = convert(calibrate(mlp(), scheme, [uneven(32)], method=method, progress=False))
    kept = [layer for layer in Exportable(network, ()).layers.values() if layer.weight.input_scale is not None]
    assert kept
    made = export_model(network, "onnx", tmp_path / "out", sample=(uneven(4),), progress=False)
    file = onnx.load(made.path / "model.onnx")
    arrays = {entry.name: onnx.numpy_helper.to_array(entry) for entry in file.graph.initializer}
    for layer in kept:
        assert arrays[f"{layer.name}.weight.input_scale"].tolist() == layer.weight.input_scale.tolist()  # type: ignore[union-attr]
    with torch.no_grad():
        torch.testing.assert_close(run(made.path, uneven(5))[0], network(uneven(5)), rtol=1e-3, atol=1e-3)


def test_calibrated_linear_layers_go_through_quantize_linear(tmp_path: Path) -> None:
    network = convert(calibrate(mlp(), "w8a8-static", [uneven(32)], progress=False))
    made = export_model(network, "onnx", tmp_path / "out", sample=(uneven(4),), progress=False)
    kinds = [node.op_type for node in onnx.load(made.path / "model.onnx").graph.node]
    assert (kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear"), kinds.count("MatMul")) == (2, 4, 2)
    far = 3 * uneven(6)
    with torch.no_grad():
        torch.testing.assert_close(run(made.path, far)[0], network(far), rtol=1e-4, atol=1e-4)


def test_a_model_in_bf16_keeps_its_integers_and_computes_in_float32(tmp_path: Path) -> None:
    network = convert(mlp().to(torch.bfloat16), Policy({"0": "w4a16-g32", "2": "w8a8"}))
    sample = (uneven(4).to(torch.bfloat16),)
    made = export_model(network, "onnx", tmp_path / "out", sample=sample, progress=False)
    assert made.verification is not None and any("computes in float32" in note for note in made.verification.notes)
    assert (made.verification.integers, made.verification.scales) == (0, 0)
    assert run(made.path, uneven(3))[0].dtype is torch.float32


def test_an_encoder_is_exported_with_its_mask(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, vocab_size=80)
    network = convert(BertForSequenceClassification(config).eval(), "w8a8")
    made = export_model(network, "onnx", tmp_path / "out", progress=False)
    ids, mask = torch.randint(80, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, 5:] = 0
    with torch.no_grad():
        torch.testing.assert_close(
            run(made.path, ids, mask)[0], network(ids, attention_mask=mask).logits, rtol=2e-2, atol=2e-2
        )
