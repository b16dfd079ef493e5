"""What ``qat`` understands before Hydra does.

Three things cannot be keys of a config: ``allow=`` (a recipe must not be able to set it), ``--config-dir`` (a user's
recipes go through the same checks as the built-in ones) and ``resume=`` (it chooses the recipe). The rest is spelling:
``run=DIR`` for ``run.dir=DIR``, ``format=gguf`` for ``export.format=gguf`` and ``scheme@policy.rules.ffn=w8a8`` for
``policy.rules.ffn=w8a8``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from qat_plugin.config.catalogue import existing_folder, recipes
from qat_plugin.config.schema import TASKS
from qat_plugin.errors import ConfigError, did_you_mean

ALLOW_VARIABLE: Final = "QAT_ALLOW"
RECORD: Final = "recipe"
"""Name, without suffix, of the resolved recipe in a run's folder."""

_FLAGS: Final = (
    "--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r",
    "--multirun", "-m", "--shell-completion", "-sc", "--config-dir", "-cd", "--info", "-i",
)  # fmt: skip
_OF_A_RUN: Final = (["evaluate"], ["merge"], ["export"])
_REFUSED: Final = ("--config-path", "-cp", "--config-name", "-cn", "--experimental-rerun")


@dataclass(frozen=True)
class Arguments:
    """A command line taken apart.

    Attributes:
        hydra: what is left for Hydra.
        config_dirs: folders of the user's recipes, absolute; the folder of a run that is resumed or evaluated.
        allow: extra prefixes under which ``_target_`` may name classes.
        help: ``--help`` was asked for.
        version: ``--version`` was asked for.
    """

    hydra: tuple[str, ...] = ()
    config_dirs: tuple[Path, ...] = ()
    allow: tuple[str, ...] = ()
    help: bool = False
    version: bool = False

    @property
    def lists_recipes(self) -> bool:
        """Whether nothing but recipes is asked for."""
        return not self.hydra


@dataclass
class _Reading:
    hydra: list[str] = field(default_factory=list)
    config_dirs: list[Path] = field(default_factory=list)
    allow: list[str] = field(default_factory=list)
    run: str | None = None
    resume: str | None = None


def parse(argv: Sequence[str]) -> Arguments:
    """Take a command line apart.

    Raises:
        ConfigError: for an unknown option, a missing folder, a folder that holds no run, or a word without ``=``.
    """
    found = _Reading(allow=_prefixes(os.environ.get(ALLOW_VARIABLE, "")))
    arguments = iter(argv)
    for argument in arguments:
        flag, _, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            found.config_dirs.append(existing_folder(Path(value or next(arguments, ""))))
        elif flag in _REFUSED:
            raise ConfigError(
                f"{flag} is not supported: qat composes its own configuration. Put your recipe into a folder and run "
                "qat --config-dir FOLDER recipe=NAME; resume a run with qat resume=FOLDER"
            )
        elif argument.startswith("-"):
            found.hydra += [argument, *_value_of(flag, argument, arguments)]
        else:
            _read_setting(argument, found)
    help, version = (any(a in found.hydra for a in names) for names in (("--help", "-h"), ("--version",)))
    _take_run(found)
    return Arguments(tuple(found.hydra), tuple(found.config_dirs), tuple(found.allow), help, version)


def _value_of(flag: str, argument: str, rest: object) -> list[str]:
    if flag not in _FLAGS:
        name = flag.lstrip("-")
        raise ConfigError(
            f"unknown option {flag}. Settings are written without dashes ({name}=VALUE); options are "
            + ", ".join(option for option in _FLAGS if option.startswith("--"))
        )
    takes_value = flag in ("--cfg", "-c", "--package", "-p", "--info", "-i") and "=" not in argument
    return [value for value in [next(rest, None)] if value] if takes_value else []  # type: ignore[call-overload]


def _read_setting(argument: str, found: _Reading) -> None:
    key, equals, value = argument.partition("=")
    if not equals and not key.startswith("~"):
        raise ConfigError(_no_equals(argument, found.config_dirs))
    match key.lstrip("+"):
        case "allow":
            found.allow += _prefixes(value)
        case "resume":
            found.resume = value
        case "run" | "run.dir":
            found.run = value
        case "format":
            found.hydra.append(f"export.format={value}")
        case spelled if spelled.startswith("scheme@"):
            found.hydra.append(f"{spelled.removeprefix('scheme@')}={value}")
        case _:
            found.hydra.append(argument)


def _prefixes(text: str) -> list[str]:
    """``[a, b.c]`` or ``a,b.c`` -> names.

    Raises:
        ConfigError: when one is no dotted name.
    """
    names = [name.strip().strip("'\"") for name in text.strip().removeprefix("[").removesuffix("]").split(",")]
    names = [name for name in names if name]
    for name in names:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
            raise ConfigError(f"allow={text} is not allowed: {name!r} is no package name; write allow=[my_package]")
    return names


def _no_equals(word: str, folders: Sequence[Path]) -> str:
    names = [entry.name for entry in recipes(folders)]
    if word in names:
        hint = f"did you mean recipe={word}?"
    elif word in TASKS:
        hint = f"did you mean task={word}?"
    else:
        close = did_you_mean(word, [*names, *TASKS]).strip()
        hint = close[:1].lower() + close[1:] if close else "for example recipe=qat_int4_tiny trainer.max_steps=100"
    return f"cannot read {word!r}: settings are written key=value; {hint}"


def _take_run(found: _Reading) -> None:
    """``resume=DIR`` and ``run=DIR`` with task=evaluate, merge or export take the recipe that DIR holds."""
    tasks = [argument.partition("=")[2] for argument in found.hydra if argument.startswith("task=")]
    folder = found.resume if found.resume is not None else (found.run if tasks in _OF_A_RUN else None)
    if folder is None:
        if found.run is not None:
            found.hydra.append(f"run.dir={_quoted(found.run)}")
        return
    if found.resume is not None and found.run is not None:
        raise ConfigError(f"resume={found.resume} and run={found.run} exclude each other: give one folder")
    if not folder.strip():
        key = "run=" if found.resume is None else "resume="
        raise ConfigError(f"{key} names no folder: give {key}DIR, the folder that qat printed")
    chosen = [argument for argument in found.hydra if re.match(r"\+*recipe=", argument)]
    if chosen:
        raise ConfigError(f"{chosen[0]} is not allowed here: {folder} holds the recipe of its run")
    if Path(folder).expanduser().is_file():
        raise ConfigError(
            f"{folder} is a file, and a run is a folder; a quantized file is given as model.path={folder}"
        )
    place = existing_folder(Path(folder))
    if not (place / f"{RECORD}.yaml").is_file():
        raise ConfigError(f"{folder} holds no run: there is no {RECORD}.yaml in it; give the folder that qat printed")
    found.config_dirs.insert(0, place)
    # the recorded recipe's own keys win over an option of a group: here it is the key that is meant
    found.hydra = [re.sub(r"^export=", "export.format=", argument) for argument in found.hydra]
    found.hydra += [f"recipe={RECORD}", f"run.dir={_quoted(folder)}"]


def _quoted(path: str) -> str:
    """A path as a value in Hydra's grammar; one that is quoted already, or a sweep, is left as it is."""
    if re.fullmatch(r"[\w./-]*", path) or path[:1] in "'\"":
        return path
    escaped = path.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
