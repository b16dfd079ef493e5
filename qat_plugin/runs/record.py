"""``run.json``: what a run was, on what, and what came of it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from qat_plugin import fused
from qat_plugin.atomic import write_text
from qat_plugin.errors import CheckpointError

SCHEMA: Final = "qat_plugin.run/1"
FILE: Final = "run.json"
_PACKAGES: Final = ("torch", "torchao", "lightning", "transformers", "peft", "bitsandbytes", "hydra-core", "numpy")


@dataclass
class StageRecord:
    """One finished rung of the ladder.

    Attributes:
        seconds: wall time, summed over the sessions that worked on it.
        metrics: what it measured, by name.
    """

    seconds: float
    metrics: dict[str, float | int | str | None] = field(default_factory=dict)


@dataclass
class Record:
    """Everything that identifies a run, as plain values.

    Attributes:
        name: the recipe's name.
        task: fit or ptq.
        config_hash: sha256 of all keys that decide results.
        config: those keys.
        seed: the seed of everything.
        command: the command that started it, without what has no influence.
        started: UTC, ISO 8601.
        status: running, interrupted, failed or finished.
        versions: of Python and the packages that compute.
        git: commit and whether there were changes, of the folder it was started in; ``None`` outside a repository.
        fake_quantization: the form of it that ran here, and why.
        data_fingerprint: sha256 of the data.
        base: where the adapters' frozen base came from, what loading it took, its fingerprint.
        stages: the finished rungs.
        seconds_spent: wall time of rungs that are not finished.
        artifacts: path inside the folder -> sha256.
    """

    name: str
    task: str
    config_hash: str
    config: dict[str, Any]
    seed: int
    command: str
    started: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    status: str = "running"
    versions: dict[str, str] = field(default_factory=lambda: versions())
    git: dict[str, Any] | None = field(default_factory=lambda: git_state())
    fake_quantization: str = field(default_factory=lambda: fake_quantization())
    data_fingerprint: str = ""
    base: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, StageRecord] = field(default_factory=dict)
    seconds_spent: dict[str, float] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write ``run.json``, whole or not at all."""
        write_text(folder / FILE, json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Read ``run.json``.

        Raises:
            CheckpointError: when it is missing, no JSON, or of another form.
        """
        path = folder / FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            schema = values.pop("schema")
            if schema != SCHEMA:
                raise CheckpointError(f"{path} has the schema {schema!r}; this version of qat_plugin reads {SCHEMA!r}")
            values.setdefault("base", {})  # runs recorded before there were adapters
            values.setdefault("fake_quantization", "plain: the only form there was")  # and before there were others
            values["stages"] = {name: StageRecord(**stage) for name, stage in values["stages"].items()}
            return cls(**{entry.name: values[entry.name] for entry in fields(cls)})
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{path} is damaged or no record of a run: {error}; start again in another folder"
            ) from error


def versions() -> dict[str, str]:
    """Versions of what computes."""
    from qat_plugin import __version__

    found = {"qat_plugin": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def fake_quantization() -> str:
    """Which form of fake quantization training runs, and why."""
    import torch

    return str(fused.implementation("cuda" if torch.cuda.is_available() else "cpu"))


def git_state() -> dict[str, Any] | None:
    """Commit of the repository that the working directory is in, and whether files differ from it."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "changed": bool(git("status", "--porcelain"))}


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
