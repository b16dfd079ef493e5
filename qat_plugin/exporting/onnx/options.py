"""What can be set of an ONNX file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from qat_plugin.errors import ConfigError

LEAST_OPSET: Final = 21
_CHOICES: Final[dict[str, tuple[object, ...]]] = {
    "target": ("onnxruntime", "tensorrt"),
    "int4": ("auto", "matmulnbits", "dequantize"),
    "int8": ("auto", "cast", "matmulnbits", "dequantize"),
    "accuracy_level": (0, 1, 4),
    "external_data": (None, True, False),
}


@dataclass(frozen=True)
class Options:
    """How the layers are spelled, and how the file is cut.

    Raises:
        ConfigError: for a value that there is none of, or two that exclude each other.
    """

    target: str = field(
        default="onnxruntime",
        metadata={
            "help": "onnxruntime, or tensorrt: standard operators alone, symmetric, QuantizeLinear/DequantizeLinear"
        },
    )
    int4: str = field(
        default="auto",
        metadata={
            "help": "weights of 2 to 4 bits: matmulnbits (ONNX Runtime's operator; the default for it) or dequantize "
            "(standard DequantizeLinear on INT4)"
        },
    )
    int8: str = field(
        default="auto",
        metadata={
            "help": "w8a16: cast (standard operators that compute what was trained; the default for ONNX Runtime), "
            "dequantize (DequantizeLinear on INT8), or matmulnbits"
        },
    )
    accuracy_level: int = field(
        default=0,
        metadata={
            "help": "of MatMulNBits: 0 or 1 leaves its inputs as they are; 4 lets ONNX Runtime round them to INT8 per "
            "block, which is faster and not what was trained"
        },
    )
    opset: int = field(default=LEAST_OPSET, metadata={"help": f"of the standard operators, {LEAST_OPSET} or more"})
    dynamic: bool = field(
        default=True, metadata={"help": "leave the batch, and of a language model the sequence, free in the file"}
    )
    cache: bool = field(
        default=False,
        metadata={
            "help": "of a language model: take and give past keys and values (past_key_values.N.key, present.N.key), "
            "to generate token by token"
        },
    )
    external_data: bool | None = field(
        default=None,
        metadata={"help": "tensors in a file of their own, model.onnx.data; by default above 1.5 GB"},
    )

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                listed = ", ".join(str(value) for value in allowed)
                raise ConfigError(f"{name} of format=onnx is one of {listed}, not {getattr(self, name)!r}")
        if self.opset < LEAST_OPSET:
            raise ConfigError(
                f"opset {self.opset} has neither INT4 nor blocks; format=onnx needs {LEAST_OPSET} or more"
            )
        if self.cache and not self.dynamic:
            raise ConfigError("cache=True lets the past grow: it needs dynamic=True")
        if self.target == "tensorrt":
            for name in ("int4", "int8"):
                if getattr(self, name) not in ("auto", "dequantize"):
                    raise ConfigError(
                        f"target=tensorrt reads DequantizeLinear alone: leave {name} out, or give {name}=dequantize"
                    )

    @property
    def spelling_of_int4(self) -> str:
        """``matmulnbits`` or ``dequantize``."""
        if self.int4 != "auto":
            return self.int4
        return "dequantize" if self.target == "tensorrt" else "matmulnbits"

    @property
    def spelling_of_int8(self) -> str:
        """``cast``, ``dequantize`` or ``matmulnbits``."""
        if self.int8 != "auto":
            return self.int8
        return "dequantize" if self.target == "tensorrt" else "cast"
