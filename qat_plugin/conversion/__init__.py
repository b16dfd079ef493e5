"""Plan + prepared model -> real kernels; save and load them; each layer proven."""

from qat_plugin.conversion.convert import Conversion, conversion_of, convert, is_converted, proof_of
from qat_plugin.conversion.files import load_converted, save_converted
from qat_plugin.conversion.proof import LayerProof, Proof
from qat_plugin.conversion.reload import dequantized_state_dict, reload_float

__all__ = [
    "Conversion",
    "LayerProof",
    "Proof",
    "conversion_of",
    "convert",
    "dequantized_state_dict",
    "is_converted",
    "load_converted",
    "proof_of",
    "reload_float",
    "save_converted",
]
