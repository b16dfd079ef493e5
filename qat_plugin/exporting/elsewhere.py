"""Asking plain transformers, in another interpreter that never imports this package, what a directory holds."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import torch
from torch import Tensor

from qat_plugin.errors import ExportError
from qat_plugin.exporting.agreement import Agreement, agreement
from qat_plugin.exporting.contents import Exportable, Layer
from qat_plugin.exporting.counterpart import Arithmetic, distance_note
from qat_plugin.exporting.verification import Comparison
from qat_plugin.kernels.weight import QuantizedWeight

_SCRIPT = Path(__file__).with_name("transformers_child.py")
_SHOWN = 2000


class Elsewhere:
    """A model that another interpreter has loaded by ``AutoModelForCausalLM.from_pretrained``.

    ::

        with Elsewhere(folder) as there:
            kind, parts = there.parts("model.layers.0.mlp.up_proj.weight")
            logits = there.logits(sample)

    Raises:
        ExportError: when it does not load, lacks tensors, or fails to answer.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Elsewhere:
        self._place = tempfile.TemporaryDirectory(prefix="qat-verify-")
        self._errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")
        source = _SCRIPT.read_text(encoding="utf-8")
        arguments = [str(self.folder.absolute()), self._place.name, str(torch.get_num_threads())]
        self._process = subprocess.Popen(
            [sys.executable, "-c", source, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, cwd=self._place.name,
        )  # fmt: skip
        answer = self._line()
        if answer != "loaded":
            self.close()
            raise ExportError(f"transformers loads {self.folder.name} with differences: {answer}")
        return self

    def parts(self, name: str) -> tuple[str, dict[str, Tensor]]:
        """What holds a parameter there (see :func:`check_kind`), and its plain tensors (``""``: a plain parameter)."""
        return self._ask(name)

    def logits(self, sample: Mapping[str, Tensor]) -> Tensor:
        """Logits, float32. Asked last: some libraries unpack everything for it."""
        from safetensors.torch import save_file

        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in sample.items()},
            Path(self._place.name) / "sample.safetensors",
        )
        return self._ask("=logits")[1][""]

    def _ask(self, name: str) -> tuple[str, dict[str, Tensor]]:
        from safetensors import safe_open

        with suppress(BrokenPipeError):  # it has ended; the next line says why
            self._stream(self._process.stdin).write(f"{name}\n")
            self._stream(self._process.stdin).flush()
        answer = Path(self._line())
        with safe_open(answer, framework="pt") as file:
            kind = (file.metadata() or {}).get("kind", "")
            parts = {key.removeprefix("."): file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        answer.unlink()
        return kind, parts

    def _line(self) -> str:
        for line in self._stream(self._process.stdout):
            if line.startswith(("loaded", self._place.name)):  # libraries may print of their own
                return line.strip()
        self._process.wait()
        self._errors.seek(0)
        told = "\n".join(line.rstrip() for line in self._errors if "Loading weights" not in line)[-_SHOWN:]
        self.close()
        raise ExportError(
            f"plain transformers, without this package, does not load {self.folder.name}, or fails on it:\n{told}"
        )

    @staticmethod
    def _stream(stream: IO[str] | None) -> IO[str]:
        assert stream is not None
        return stream

    def close(self) -> None:
        """End the other interpreter."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                with suppress(BrokenPipeError):
                    stream.close()
        self._process.wait()
        self._errors.close()
        self._place.cleanup()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.kill()
        self.close()


def compared_elsewhere(
    model: Exportable,
    path: Path,
    kind: Callable[[Layer], str],
    compare: Callable[[Comparison, str, Layer, dict[str, Tensor]], None],
    rounded: Callable[[Tensor, QuantizedWeight], Tensor],
    grid: str,
) -> tuple[Comparison, Agreement, tuple[str, ...]]:
    """Every tensor that plain transformers loads from a directory against the model's, then the outputs.

    Args:
        model: what was written.
        path: the directory.
        compare: one quantized layer: what was seen so far, the parameter's name, the layer, and the tensors that it has
            there.
        kind: what holds a layer there: a class or a format.
        rounded: input [..., features] of a layer that quantizes activations -> the library's numbers of it.
        grid: how the library rounds activations, in a few words.

    Returns:
        What was seen; how far its outputs are from the model's on the library's grid of activations; notes.

    Raises:
        ExportError: when it does not load, or holds something else.
    """
    seen = Comparison()
    sample = {"input_ids": model.sample[0]} if isinstance(model.sample, tuple) else model.sample
    with Elsewhere(path) as there:
        for name, layer in model.layers.items():
            found_kind, parts = there.parts(name)
            check_kind(name, layer, kind(layer), found_kind)
            compare(seen, name, layer, parts)
        for name, tensor in model.floats():
            seen.plain(name, tensor, there.parts(name)[1][""])
        found = there.logits(sample)

    def change(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        numbers = weight.integers().dequantize(x.dtype).to(x.device)
        return rounded(x, weight), numbers, bias

    with Arithmetic(change):
        agreed, theirs = agreement(model.network, found, model.outputs), model.outputs()
    return seen, agreed, distance_note(grid, theirs, model.outputs())


def check_kind(name: str, layer: Layer, kind: str, found: str) -> None:
    """Raise unless a layer is held as it was written, its inputs rounded as its scheme says.

    Args:
        name: of the parameter.
        layer: that was written.
        kind: the class or format it was written as.
        found: what the other interpreter has.

    Raises:
        ExportError: naming both.
    """
    inputs = "tensor" if layer.scheme.static else "token"
    wanted = f"{kind}, inputs per {inputs}" if layer.scheme.quantizes_activations else kind
    if found != wanted:
        raise ExportError(f"{name}: transformers has it as {found or 'a plain tensor'}, written was {wanted}")


def reader_with(library: str, version: str) -> str:
    """What read it, for a :class:`~qat_plugin.exporting.verification.Verification`."""
    import transformers

    return f"transformers {transformers.__version__} with {library} {version}, without this package"
