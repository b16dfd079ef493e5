"""Composes a command line with Hydra and runs a job on the result: once, or once for each point of a sweep."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from qat_plugin.config.arguments import RECORD, Arguments
from qat_plugin.config.mistakes import Composition, explain
from qat_plugin.config.places import conf_folder
from qat_plugin.config.schema import Config
from qat_plugin.config.sources import register_sources
from qat_plugin.config.store import register_schema
from qat_plugin.config.typed import to_config
from qat_plugin.errors import ConfigError, QatError


@dataclass(frozen=True)
class Job:
    """One config to run.

    Attributes:
        config: checked.
        recipe: the chosen recipe, or ``None``.
        folder: the folder that a sweep made for this point of it; ``None`` outside sweeps.
        allow: extra prefixes of ``_target_``.
    """

    config: Config
    recipe: str | None
    folder: Path | None
    allow: tuple[str, ...]


def launch(arguments: Arguments, run: Callable[[Job], int]) -> int:
    """Compose and run.

    Args:
        arguments: the command line, taken apart.
        run: does the job and returns its exit code; it answers for its own errors.

    Returns:
        The largest exit code; 0 when Hydra was only asked to show something.

    Raises:
        ConfigError: for a mistake in the command line or in a recipe.
    """
    register_schema()
    register_sources(list(arguments.config_dirs))
    codes: list[int] = []
    mistakes: list[QatError] = []  # kept from Hydra, which would announce them in its own words
    running = False

    def task(composed: DictConfig) -> None:
        nonlocal running
        try:
            job = _job(composed, arguments)
        except QatError as error:
            mistakes.append(error)
            return
        running = True  # from here on an exception of OmegaConf's is a bug and keeps its traceback
        codes.append(run(job))
        running = False

    command = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(task)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach this function instead of being printed and swallowed
    program, sys.argv = sys.argv, [sys.argv[0], *arguments.hydra]
    try:
        command()
    except Composition as error:
        if running:
            raise
        raise explain(error) from error
    except OSError as error:
        if running:
            raise
        raise ConfigError(
            f"cannot write {error.filename}: {error.strerror}; run qat from a folder you may write to"
        ) from error
    finally:
        sys.argv = program
    if mistakes:
        raise mistakes[0]
    return max(codes, default=0)


def _job(composed: DictConfig, arguments: Arguments) -> Job:
    state: Any = HydraConfig.get()
    chosen = state.runtime.choices.get("recipe")
    recipe = None if chosen is None else str(chosen)
    folder = Path(state.runtime.output_dir) if state.mode == RunMode.MULTIRUN else None
    return Job(to_config(composed, name=None if recipe == RECORD else recipe), recipe, folder, arguments.allow)
