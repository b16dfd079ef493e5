"""From C++ sources to a library that torch loads."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Final

_FLAGS: Final = ("-O3", "-fPIC", "-std=c++20", "-fopenmp", "-fno-math-errno", "-ffp-contract=off")
_AVX512: Final = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
_BF16: Final = "-mavx512bf16"
# the units that include PyTorch's headers; the slowest first
_OPERATORS: Final = ("fake_quantize_ops", "ops", "attention_ops")


class BuildError(Exception):
    """Why the operators could not be built."""


class SourceError(BuildError):
    """The compiler does not take the sources."""


@cache
def compiler() -> str:
    """The C++ compiler and its version, as one line.

    Raises:
        BuildError: when there is none.
    """
    command = _command()
    try:
        shown = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C++ compiler {' '.join(command)} does not run: {error}") from error
    return f"{' '.join(command)}: {shown.stdout.strip().splitlines()[0]}"


def _command() -> list[str]:
    if named := shlex.split(os.environ.get("CXX", "")):
        return named
    for name in ("g++", "c++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler was found (g++, c++ or the CXX variable); install one to have them built")


def build(sources: Path, target: Path) -> None:
    """Compile all sources and link them into ``target``, atomically.

    Raises:
        BuildError: with the compiler's first error.
    """
    if platform.system() != "Linux":
        raise BuildError(f"they are built on Linux only, this is {platform.system()}")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    units: list[tuple[str, str, tuple[str, ...]]] = [
        (name, f"{name}.cpp", ("-DQAT_X86",) if x86 else ()) for name in _OPERATORS
    ]
    units += [
        (name, f"{name}.cpp", ()) for name in ("portable", "attention", "fake_quantize_portable", "quantize_portable")
    ]
    if x86:
        units += [("avx512", "avx512.cpp", _AVX512), ("avx512_bf16", "avx512.cpp", (*_AVX512, _BF16))]
        units += [
            (name, f"{name}.cpp", _AVX512) for name in ("attention_avx512", "fake_quantize_avx512", "quantize_avx512")
        ]
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        work = Path(folder)

        def compile_one(unit: tuple[str, str, tuple[str, ...]]) -> str:
            name, source, flags = unit
            include = _torch_flags() if name in _OPERATORS else ()
            output = str(work / f"{name}.o")
            _run(*_command(), *_FLAGS, *flags, *include, "-c", str(sources / source), "-o", output)
            return output

        with ThreadPoolExecutor(max_workers=2) as pool:
            objects = list(pool.map(compile_one, units))
        library = work / target.name
        _run(*_command(), "-shared", "-o", str(library), *objects, *_link_flags())
        library.chmod(0o755)
        os.replace(library, target)


def _torch_flags() -> tuple[str, ...]:
    from torch.utils.cpp_extension import include_paths

    paths = [part for path in include_paths() for part in ("-isystem", path)]
    return ("-DAT_PARALLEL_OPENMP=1", *paths)


def _link_flags() -> tuple[str, ...]:
    from torch.utils.cpp_extension import library_paths

    # without -fopenmp: its functions are then found in the OpenMP runtime that torch has loaded, and there is only one
    return (*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch")


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        own = any(re.match(r"\S+:\d+(:\d+)?: (fatal )?error:", line) for line in lines)
        passing = any(word in done.stderr for word in ("Killed", "No space left", "Cannot allocate", "out of memory"))
        kind = SourceError if own and not passing else BuildError
        raise kind(f"{command[0]} failed: {first}")
