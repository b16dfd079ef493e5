"""Finding, building and loading the operators."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from qat_plugin.cache import cache_directory

SOURCES: Final = Path(__file__).parent / "src"
SWITCH: Final = "QAT_PLUGIN_NATIVE"
_LOCK = threading.Lock()
_disabled = False


@dataclass(frozen=True)
class Native:
    """What became of the native operators on this machine.

    Attributes:
        instruction_set: ``"avx512-vnni-bf16"``, ``"avx512-vnni"`` or ``"portable"``; ``None`` without operators.
        reason: why there are none, or "".
        path: the library, or ``None``.
        seconds: that building took; 0 when it was cached.
    """

    instruction_set: str | None
    reason: str = ""
    path: Path | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.instruction_set is None:
            return f"no native operators: {self.reason}"
        built = f", built in {self.seconds:.0f} s" if self.seconds else ""
        return f"native operators ({self.instruction_set}{built})"


def available() -> bool:
    """Whether ``torch.ops.qat_plugin_native`` runs here; builds it the first time it is asked."""
    return not _disabled and native().instruction_set is not None


def vectorized() -> bool:
    """Whether they run here on instructions worth having: the portable form is a reference, and slower than torch."""
    return available() and native().instruction_set != "portable"


@contextlib.contextmanager
def native_disabled() -> Iterator[None]:
    """Inside, everything runs in plain PyTorch: to compare, or to rule the native operators out."""
    global _disabled
    before, _disabled = _disabled, True
    try:
        yield
    finally:
        _disabled = before


@cache
def native() -> Native:
    """Build or load the operators, once a process.

    Environment: ``QAT_PLUGIN_NATIVE=0`` leaves them out; ``QAT_PLUGIN_CACHE`` moves the folder they are kept in;
    ``CXX`` names the compiler.
    """
    import torch

    if os.environ.get(SWITCH, "1").lower() in ("0", "false", "off", "no"):
        return Native(None, f"{SWITCH}={os.environ[SWITCH]}")
    from qat_plugin.native.build import BuildError

    with _LOCK:
        try:
            path = cache_directory() / "native" / f"qat_plugin_{_fingerprint()}.so"
            if path.parent.exists():
                _only_ours(path.parent)
            began = time.monotonic()
            built = not path.exists()
            if built:
                _build(path)
            _load(path, built=built)
        except (BuildError, OSError, RuntimeError) as error:  # RuntimeError: no home folder, no cache folder
            return Native(None, f"{error}" + (f" ({error.__cause__})" if error.__cause__ else ""))
    importlib.import_module("qat_plugin.native.meta")  # registers what torch.compile must know

    seconds = time.monotonic() - began if built else 0.0
    return Native(str(torch.ops.qat_plugin_native.instruction_set()), "", path, seconds)


def _build(path: Path) -> None:
    """Build, and remember sources that this compiler does not take: trying again costs seconds at each start."""
    from qat_plugin.native.build import BuildError, SourceError, build, compiler

    named = hashlib.sha256(compiler().encode()).hexdigest()[:8]
    failed = path.with_suffix(f".{named}.failed")
    if failed.exists():
        raise BuildError(f"{failed.read_text(encoding='utf-8').strip()} (remembered; delete {failed} to try again)")
    print("qat_plugin: building its native operators, once: some 20 s ...", file=sys.stderr, flush=True)
    try:
        build(SOURCES, path)
    except SourceError as error:
        with contextlib.suppress(OSError):
            failed.write_text(f"{error}\n", encoding="utf-8")
        raise


def _load(path: Path, *, built: bool) -> None:
    import torch

    _only_ours(path)
    try:
        torch.ops.load_library(str(path))
    except OSError:
        if built:
            path.unlink(missing_ok=True)
        raise


def _only_ours(place: Path) -> None:
    """Raise where somebody else could have put code that we would run."""
    held = place.stat()
    others = held.st_mode & 0o002 or (held.st_mode & 0o020 and held.st_gid not in (0, os.getgid()))
    if held.st_uid not in (0, os.getuid()) or others:
        raise OSError(
            f"{place} can be written by other users; nothing in it is run. Name a folder of your own by "
            "QAT_PLUGIN_CACHE"
        )


def _fingerprint() -> str:
    """Of all that decides what the library is, but for the compiler: one that is built needs none."""
    import platform

    import torch

    digest = hashlib.sha256()
    for source in sorted([*SOURCES.iterdir(), Path(__file__).parent / "build.py"]):
        digest.update(source.name.encode() + source.read_bytes())
    for part in (torch.__version__, torch.__file__, platform.machine()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]
