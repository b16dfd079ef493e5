"""ONNX: a folder with ``model.onnx`` for ONNX Runtime or TensorRT; batch and sequence stay free.

::

    converted network -> stand-ins for its quantized weights -> torch.onnx.export -> pending nodes
                      -> quantized operators, whose tensors are unpacked one by one while the file is written

What each scheme becomes for ONNX Runtime, in the order of exactness first and speed second:

========================= ==========================================================================================
``w4a16``, ``w3``, ``w2`` MatMulNBits (groups that are multiples of a power of two of at least 16), else plain
                          arithmetic on the INT4 tensor
``w8a16``                 Cast, Mul, MatMul: ONNX Runtime would round the inputs of DequantizeLinear + MatMul to INT8
``w8a8``                  per-token integers in standard operators, MatMulInteger
``w8a8-static``           QuantizeLinear, DequantizeLinear; convolutions that another layer reads hand it INT8
``w4a8``, grouped ``w8a8`` per-token numbers in standard operators, then the product of the weight alone
========================= ==========================================================================================

For TensorRT every weight goes through DequantizeLinear (INT4 and INT8 elements, opset 21), activations through
QuantizeLinear with zero point 0. It is not run here. Its documentation asks for positive scales of QuantizeLinear and
says nothing of DequantizeLinear's, which carry a sign in this project's symmetric grids below 8 bits.
"""

from __future__ import annotations

from pathlib import Path

from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.onnx.options import Options
from qat_plugin.exporting.onnx.refusals import refusals
from qat_plugin.exporting.onnx.verify import EXACT, PRECISE, verify
from qat_plugin.exporting.onnx.write import FILE, write

__all__ = ["Options", "refusals", "usage", "verify", "write"]


def usage(model: Exportable, path: Path, options: Options) -> str:
    """How it is loaded."""
    if options.target == "tensorrt":
        return f"trtexec --onnx={path.name}/{FILE} --stronglyTyped"
    entries = []
    if "dequantize" in (options.spelling_of_int4, options.spelling_of_int8):
        entries.append(
            (
                "without this entry inputs are rounded to INT8, which is faster and not what was trained",
                next(iter(EXACT.items())),
            )
        )
    if any(layer.scheme.weight_bits == 8 and layer.scheme.quantizes_activations for layer in model.layers.values()):
        entries.append(("sums that cannot overflow, on x86 processors without VNNI", next(iter(PRECISE.items()))))
    settings = "options = onnxruntime.SessionOptions()\n" if entries else ""
    settings += "".join(f"# {why}\noptions.add_session_config_entry{entry}\n" for why, entry in entries)
    given = ", options" if entries else ""
    return (
        f"import onnxruntime\n{settings}"
        f'session = onnxruntime.InferenceSession("{path.name}/{FILE}"{given})\n'
        "session.run(None, {entry.name: ... for entry in session.get_inputs()})"
    )
