"""What this machine can do for quantized models, and what nobody has tested."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from qat_plugin.cache import cache_directory
from qat_plugin.fused import implementation
from qat_plugin.kernels import LayerSpec, choose
from qat_plugin.kernels.torchao_import import dropped, import_torchao
from qat_plugin.runs.record import versions
from qat_plugin.scheme import EXAMPLES, Scheme

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
_COMPILERS = ("g++", "clang++", "nvcc")
_SIZE = 1024


def examination() -> str:
    """The whole report, as text."""
    sections = {
        "Versions": list(versions().items()),
        "Processor": list(_processor()),
        "GPU": list(_gpu()),
        "Compilers": [(name, shutil.which(name) or "not found") for name in _COMPILERS],
        "Folders": list(_folders()),
        "Fake quantization": [(device, str(implementation(device))) for device in _devices()],
        f"Kernels for a {_SIZE} x {_SIZE} layer": list(_kernels()),
        "Dropped import messages": list(_noise()),
        "Not tested here": list(_untested()),
    }
    return "\n\n".join("\n".join([title, *_lines(rows)]) for title, rows in sections.items())


def _lines(rows: list[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name.ljust(width)}  {value}".rstrip() for name, value in rows] or ["  none"]


def _processor() -> Iterator[tuple[str, str]]:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    lines = dict(line.partition(":")[::2] for line in text.split("\n\n")[0].splitlines())
    found = {name.strip(): value.strip() for name, value in lines.items()}
    flags = set(found.get("flags", "").split())
    yield "model", found.get("model name", "unknown")
    yield "torch sees", torch.backends.cpu.get_cpu_capability()
    for flag in _FLAGS if flags else ():
        yield flag, "yes" if flag in flags else "no"
    yield "cores", str(os.cpu_count())
    yield "torch threads", str(torch.get_num_threads())
    yield "oneDNN", "yes" if torch.backends.mkldnn.is_available() else "no"


def _gpu() -> Iterator[tuple[str, str]]:
    if not torch.cuda.is_available():
        yield "cuda", "no device" + ("" if torch.version.cuda else ", and a build of torch without CUDA")
        return
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        yield f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"


def _folders() -> Iterator[tuple[str, str]]:
    yield "working directory", _writable(Path.cwd())
    yield "cache", _writable(cache_directory())
    yield "temporary", _writable(Path(tempfile.gettempdir()))


def _writable(folder: Path) -> str:
    """The folder, whether a file can be made in it (or in the first parent that exists) and how much room there is."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            state = "writable"
    except OSError as error:
        state = f"NOT writable ({error.strerror})"
    free = shutil.disk_usage(place).free / 2**30
    return f"{folder}: {state}, {free:.1f} GiB free" + ("" if place == folder else ", not made yet")


def _kernels() -> Iterator[tuple[str, str]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in EXAMPLES:
        scheme = Scheme.parse(name)
        if scheme.is_integer:
            choices = {
                str(dtype).removeprefix("torch."): choose(LayerSpec(scheme, _SIZE, _SIZE, device, dtype))
                for dtype in (torch.float32, torch.bfloat16)
            }
            texts = {dtype: c.refusal or c.kernel + (f" ({c.note})" if c.note else "") for dtype, c in choices.items()}
            same = len(set(texts.values())) == 1
            yield name, next(iter(texts.values())) if same else "; ".join(f"{d}: {t}" for d, t in texts.items())


def _devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _noise() -> Iterator[tuple[str, str]]:
    import_torchao()
    yield from ((str(number), " ".join(text.split())) for number, text in enumerate(dropped, start=1))


def _untested() -> Iterator[tuple[str, str]]:
    if not torch.cuda.is_available():
        yield "CUDA", "no device here: the CUDA kernels of the table were not run"
    if not torch.backends.mps.is_available():
        yield "MPS", "no device here"
    yield "several devices", "the command trains, measures and converts in one process"
