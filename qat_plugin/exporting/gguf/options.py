"""What can be set of a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass, field

from qat_plugin.errors import ConfigError, did_you_mean

FLOAT_TYPES = ("exact", "f16", "bf16", "f32")
INDIVISIBLE = ("refuse", "float")


@dataclass(frozen=True)
class Options:
    """Of one file.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    name: str = field(default="", metadata={"help": "general.name; by default the model's own name or its class"})
    float_type: str = field(
        default="exact",
        metadata={
            "help": "of matrices that are not quantized: exact (their own 16-bit type, or the narrowest of F16, BF16 "
            "and F32 that holds them as they are), f16, bf16 or f32; norms and biases are always F32"
        },
    )
    indivisible: str = field(
        default="refuse",
        metadata={
            "help": "quantized layers that blocks of 32 do not tile: refuse, or float (written as F16 or F32 that hold "
            "exactly the same numbers, and noted)"
        },
    )
    pre_tokenizer: str = field(
        default="",
        metadata={"help": "tokenizer.ggml.pre of byte-level tokenizers; by default found by the tokenizer's pattern"},
    )
    kquant: str = field(
        default="",
        metadata={
            "help": "a type of llama.cpp, such as Q4_K_M: it quantizes the dequantized model anew (the trained grid is "
            "not kept); needs llama-cpp-python, the extra gguf-k"
        },
    )
    output_type: str = field(default="", metadata={"help": "with kquant: type of the head, such as Q8_0"})
    embedding_type: str = field(default="", metadata={"help": "with kquant: type of the embedding, such as Q8_0"})
    outputs: bool = field(
        default=True,
        metadata={
            "help": "verify outputs too: run the file in transformers (needs the model in float32) and, where "
            "llama-cpp-python is installed, in llama.cpp"
        },
    )

    def __post_init__(self) -> None:
        _check("float_type", self.float_type, FLOAT_TYPES)
        _check("indivisible", self.indivisible, INDIVISIBLE)
        if (self.output_type or self.embedding_type) and not self.kquant:
            raise ConfigError("output_type and embedding_type belong to kquant: the plan decides the others' types")


def _check(name: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise ConfigError(
            f"{name}={given!r} is not allowed for format=gguf.{did_you_mean(str(given), allowed)} "
            f"Allowed: {', '.join(allowed)}"
        )
