"""A run's folder: made for one recipe, continued by the same one, refused to any other.

::

    runs/qat_int4_tiny/2026-01-31_12-00-00/
        recipe.yaml      the resolved recipe; qat resume=FOLDER reads it
        run.json         hash, seed, versions, data, wall times, metrics, sha256 of each artifact
        log              what was said, Lightning's own messages included
        checkpoints/     <stage>/last.ckpt, float weights, resumable; <stage>/quantizers.pt
        adapter/         adapter_model.safetensors and adapter_config.json, as peft reads them
        merged/          the base with the adapter folded in, a transformers directory
        converted/       model.safetensors and plan.json
        exported/        of export=FORMAT: the file or folder, and its model card
        report.json  report.md
        policy.yaml      of policy=auto: the policy it found, as the section policy of a recipe
        sensitivity.md  sensitivity.json  sensitivity.png  sensitivity.jsonl (figure by figure)
        curves/          of trainer.logger=csv or tensorboard
"""

from __future__ import annotations

import shlex
import shutil
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from qat_plugin.atomic import write_text
from qat_plugin.config.schema import Config
from qat_plugin.config.typed import config_hash, differences, recipe_text, significant
from qat_plugin.errors import ConfigError
from qat_plugin.runs.record import FILE, Record, sha256_of

RECIPE: Final = "recipe.yaml"
CONVERTED: Final = "converted"
ADAPTER: Final = "adapter"
MERGED: Final = "merged"
_ARTIFACTS: Final = (
    "recipe.yaml", "policy.yaml", "sensitivity.*", "report.json", "report.md",
    "adapter/*", "merged/*", "converted/*", "exported/**/*", "checkpoints/*/*",
)  # fmt: skip
_DIFFERENCES_SHOWN: Final = 5


@dataclass(frozen=True)
class RunFolder:
    """An open folder and its record.

    Attributes:
        path: absolute.
        record: in memory; :meth:`save` writes it.
        continued: whether an earlier session began it.
        allow: packages whose classes the recipe needs leave for, again when it is resumed.
    """

    path: Path
    record: Record
    continued: bool
    allow: tuple[str, ...] = ()

    @property
    def checkpoints(self) -> Path:
        """Folder of the float checkpoints, one folder a training stage."""
        return self.path / "checkpoints"

    @property
    def converted(self) -> Path:
        """Folder of the converted model."""
        return self.path / CONVERTED

    @property
    def shown(self) -> str:
        """The path as a person would write it: relative where it lies below the working directory."""
        here = Path.cwd()
        return str(self.path.relative_to(here)) if self.path.is_relative_to(here) else str(self.path)

    @property
    def resume_command(self) -> str:
        """The command that goes on with this run, from any working directory."""
        leave = [f"allow=[{','.join(self.allow)}]"] if self.allow else []
        return shlex.join(["qat", f"resume={self.path}", *leave])

    def save(self) -> None:
        """Write the record."""
        self.record.write(self.path)

    def discard(self) -> None:
        """Remove a folder that this session made and in which nothing was made."""
        if self.continued or self.record.stages or self.checkpoints.exists():
            return
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):  # others' runs are there
            self.path.parent.rmdir()
            self.path.parent.parent.rmdir()

    def finish(self) -> None:
        """Record the artifacts' sha256 and that the run is done."""
        files = sorted({file for pattern in _ARTIFACTS for file in self.path.glob(pattern) if file.is_file()})
        self.record.artifacts = {str(file.relative_to(self.path)): sha256_of(file) for file in files}
        self.record.status = "finished"
        self.save()


def open_folder(config: Config, command: str, *, default: Path | None = None, allow: tuple[str, ...] = ()) -> RunFolder:
    """Make the run's folder, or go on with the one that ``run.dir`` names.

    Args:
        config: the recipe; its ``run.dir`` decides, else ``default``, else ``runs/<name>/<date_time>``.
        command: what to record as the command.
        default: where to put the run when the recipe does not say.
        allow: what the command line allowed, to be repeated when the run is resumed.

    Raises:
        ConfigError: when it cannot be written to, is not a run's, or holds a run of another recipe.
    """
    path = Path(config.run.dir).expanduser().absolute() if config.run.dir else (default or _fresh(config.name or "run"))
    try:
        if (path / FILE).is_file() and not _is_fruitless(path, config):
            return _continue(path, config, allow)
        if path.is_dir() and any(path.iterdir()) and not (path / FILE).is_file():
            raise ConfigError(f"folder {path} exists and holds other files than a run's; give another run.dir")
        folder = RunFolder(path, _new_record(config, command), continued=False, allow=allow)
        write_text(path / RECIPE, recipe_text(config))
        folder.save()
    except OSError as error:
        raise ConfigError(
            f"cannot write into the run's folder {path}: {error.strerror}; give another one with run.dir=FOLDER"
        ) from error
    return folder


def _fresh(name: str) -> Path:
    """A folder that no other run has, also when two start within a second."""
    stem = Path("runs", name, datetime.now().strftime("%Y-%m-%d_%H-%M-%S")).absolute()
    candidates = (stem, *(stem.with_name(f"{stem.name}_{count}") for count in range(2, 1000)))
    return next(path for path in candidates if not path.exists())


def _is_fruitless(path: Path, config: Config) -> bool:
    """Whether another recipe's run broke off here before it made anything, by a mistake that is now corrected."""
    record = Record.read(path)
    made = record.stages or (path / "checkpoints").exists()
    return not made and record.config_hash != config_hash(config)


def _continue(path: Path, config: Config, allow: tuple[str, ...]) -> RunFolder:
    record = Record.read(path)
    if record.config_hash != config_hash(config):
        found = differences(record.config, significant(config))
        more = f" and {len(found) - _DIFFERENCES_SHOWN} more" if len(found) > _DIFFERENCES_SHOWN else ""
        raise ConfigError(
            f"folder {path} holds a run of another recipe: {'; '.join(found[:_DIFFERENCES_SHOWN])}{more}. "
            f"Give another run.dir, or go on with that run as it was: qat resume={path}"
        )
    record.status = "running"
    folder = RunFolder(path, record, continued=True, allow=allow)
    folder.save()
    return folder


def _new_record(config: Config, command: str) -> Record:
    return Record(
        name=config.name or "run",
        task=config.task.name,
        config_hash=config_hash(config),
        config=significant(config),
        seed=config.trainer.seed,
        command=command,
    )
