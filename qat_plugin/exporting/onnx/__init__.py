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

Products of bytes (``w8a8``, and ``w8a8-static`` where it runs in integers) are exact on x86 processors with VNNI; ONNX
Runtime's documentation says that without it they can overflow.

For TensorRT every weight goes through DequantizeLinear (INT4 and INT8 elements, opset 21), activations through
QuantizeLinear with zero point 0. It is not run here. Its documentation asks for positive scales of QuantizeLinear and
says nothing of DequantizeLinear's, which carry a sign in this project's symmetric grids below 8 bits.
"""

from __future__ import annotations

from pathlib import Path

from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.onnx.options import Options
from qat_plugin.exporting.onnx.refusals import refusals
from qat_plugin.exporting.onnx.verify import EXACT, verify
from qat_plugin.exporting.onnx.write import FILE, write

__all__ = ["Options", "refusals", "usage", "verify", "write"]


def usage(model: Exportable, path: Path, options: Options) -> str:
    """How it is loaded."""
    if options.target == "tensorrt":
        return f"trtexec --onnx={path.name}/{FILE} --stronglyTyped"
    settings, given = "", ""
    if "dequantize" in (options.spelling_of_int4, options.spelling_of_int8):
        entry = next(iter(EXACT.items()))
        settings = (
            "options = onnxruntime.SessionOptions()  # without this entry inputs are rounded to INT8, which is faster "
            f"and not what was trained\noptions.add_session_config_entry{entry}\n"
        )
        given = ", options"
    return (
        f"import onnxruntime\n{settings}"
        f'session = onnxruntime.InferenceSession("{path.name}/{FILE}"{given})\n'
        "session.run(None, {entry.name: ... for entry in session.get_inputs()})"
    )
