"""The benchmarks' Llama for llama.cpp: its weights as a GGUF file in F16, and quantized by llama.cpp itself."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.gguf import Options
from qat_plugin.exporting.gguf.write import write_file

TYPES = {"f16": None, "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}


def write_f16(model: nn.Module, file: Path) -> Path:
    """A transformers Llama as a GGUF file; matrices in F16, norms in F32, no vocabulary."""
    write_file(Exportable(model, ()), file, Options(float_type="f16"), lambda written: None)
    return file


def quantized(file: Path, kind: str) -> Path:
    """llama.cpp's own quantization of an F16 file."""
    import llama_cpp

    if TYPES[kind] is None:
        return file
    target = file.with_name(f"{kind}.gguf")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, str(TYPES[kind]))
    if llama_cpp.llama_model_quantize(str(file).encode(), str(target).encode(), parameters):
        raise RuntimeError(f"llama.cpp could not quantize to {kind}")
    return target


class LlamaCpp:
    """One file in llama.cpp: seconds of a prompt, and of a token after it."""

    def __init__(self, file: Path, threads: int, context: int) -> None:
        from llama_cpp import Llama

        self.model = Llama(str(file), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)

    def prefill(self, ids: list[int]) -> float:
        """Seconds of a prompt in an empty cache."""
        self.model.reset()
        began = time.perf_counter()
        self.model.eval(ids)
        return time.perf_counter() - began

    def decode(self, tokens: int) -> float:
        """Median seconds of a token, after :meth:`prefill`."""
        taken = []
        for token in range(tokens):
            began = time.perf_counter()
            self.model.eval([token])
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)


def as_list(ids: Tensor) -> list[int]:
    return [int(token) for token in ids.flatten().to(torch.int64)]
