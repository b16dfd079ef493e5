"""The file as llama.cpp runs it (through llama-cpp-python): logits, perplexity, greedy text and tokens."""

from __future__ import annotations

import importlib.util
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat_plugin.errors import ExportError
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.gguf.reference import Reference, perplexity
from qat_plugin.exporting.gguf.strings import compare_tokens
from qat_plugin.exporting.verification import relative_difference

LOGITS = 5e-3
"""Allowed relative error of logits against the model that rounds the inputs of products as llama.cpp does.

In deep models an input on the border of two integers may fall to either side and move all that follow, so that twice
what the rounding itself moves the logits is allowed where that is more.
"""
PERPLEXITY = 2e-2
"""Allowed relative difference of perplexity against the model that does not round them."""


def installed() -> bool:
    """Whether llama-cpp-python is there."""
    return importlib.util.find_spec("llama_cpp") is not None


def check(model: Exportable, path: Path, reference: Reference, *, demand: bool = True) -> list[str]:
    """Run the file and say what was found.

    Args:
        model: the model.
        path: the file.
        reference: what it should compute.
        demand: the file holds the model's own numbers.

    Raises:
        ExportError: when logits or perplexity are further from the reference than rounding of activations explains.
    """
    import llama_cpp

    sample = model.sample["input_ids"] if not isinstance(model.sample, tuple) else model.sample[0]
    needed = max(sample.shape[1], len(reference.ids or ()), len(reference.prompt) + len(reference.greedy))
    runtime = _open(path, needed)
    name = f"llama.cpp ({llama_cpp.__version__})"
    found = torch.stack([_logits(runtime, row.tolist()) for row in sample])
    error, whole = (relative_difference(found, wanted) for wanted in (reference.rounded, reference.outputs))
    allowed = max(LOGITS, 2 * relative_difference(reference.rounded, reference.outputs))
    rounding = f"{error:.1e} relative where inputs are rounded as it does (allowed {allowed:.1e}), by "
    notes = [f"{name}: logits by {rounding}{whole:.1e} where they are not"]
    if not demand:
        notes = [f"{name}: logits by {whole:.1e} relative"]
    failed = not error <= allowed
    if reference.ids is not None:
        theirs = perplexity(_logits(runtime, reference.ids), reference.ids)
        notes.append(f"its perplexity of a short text {theirs:.4f} against {reference.perplexity:.4f}")
        failed = failed or not abs(theirs / reference.perplexity - 1) <= PERPLEXITY
        notes.append(_greedy(runtime, reference))
        notes.append(compare_tokens(
            "llama.cpp", model.tokenizer, lambda text: runtime.tokenize(text.encode(), add_bos=True, special=True)
        ))  # fmt: skip
    if failed and demand:
        raise ExportError(f"llama.cpp computes something else from {path.name}: {'; '.join(notes)}")
    return notes


def _open(path: Path, context: int) -> Any:
    import llama_cpp

    threads = torch.get_num_threads()
    with redirect_stderr(StringIO()):  # it remarks on contexts longer than trained, which it rounds up to itself
        try:
            return llama_cpp.Llama(
                str(path), n_ctx=context, n_batch=context, n_ubatch=context, n_threads=threads, n_threads_batch=threads,
                logits_all=True, verbose=False, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
            )  # fmt: skip
        except ValueError as error:
            raise ExportError(f"llama.cpp {llama_cpp.__version__} cannot open {path.name}: {error}") from error


def _logits(runtime: Any, ids: list[int]) -> Tensor:
    """[tokens, vocabulary]."""
    runtime.reset()
    runtime.eval(ids)
    return torch.tensor(runtime.scores[: len(ids)])


def _greedy(runtime: Any, reference: Reference) -> str:
    runtime.reset()
    runtime.eval(list(reference.prompt))
    count = len(reference.greedy)
    for equal, token in enumerate(reference.greedy):
        if int(runtime.scores[runtime.n_tokens - 1].argmax()) != token:
            margin = reference.margins[equal]
            return f"the first {equal} of {count} greedy tokens equal (then a choice between logits {margin:.2g} apart)"
        runtime.eval([token])
    return f"all {count} greedy tokens equal"
