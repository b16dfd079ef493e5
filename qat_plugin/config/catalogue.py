"""What there is to choose from: recipes with one line each, and the options of the config groups.

Reads the files' headers and nothing else, so that ``qat`` alone answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qat_plugin.config.places import conf_folder, recipes_folder
from qat_plugin.errors import ConfigError, did_you_mean

HEADER = "# @package _global_"


@dataclass(frozen=True)
class Entry:
    """A recipe or an option of a config group.

    Attributes:
        name: what to write after ``recipe=`` or ``group=``.
        summary: the first sentence of its file.
        path: the file.
    """

    name: str
    summary: str
    path: Path


def recipes(folders: Sequence[Path] = ()) -> list[Entry]:
    """All recipes by name: those in ``folders`` (a user's), then the built-in ones that none of these replaces.

    Raises:
        ConfigError: when a folder does not exist.
    """
    found: dict[str, Entry] = {}
    for folder in (*map(existing_folder, folders), recipes_folder()):
        for name, path in recipe_files(folder):
            found.setdefault(name, Entry(name, summary(path), path))
    return [found[name] for name in sorted(found)]


def groups() -> dict[str, list[Entry]]:
    """The config groups and their options."""
    folders = sorted(folder for folder in conf_folder().iterdir() if folder.is_dir())
    return {
        folder.name: [Entry(path.stem, summary(path), path) for path in sorted(folder.glob("*.yaml"))]
        for folder in folders
    }


def recipe_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of each recipe in a folder: its own YAML files and those under ``recipe/``."""
    for place in (folder, folder / "recipe"):
        for path in sorted(place.glob("*.yaml")):
            yield path.stem, path


def existing_folder(folder: Path) -> Path:
    """The folder, absolute.

    Raises:
        ConfigError: when there is none; the message gives the closest name beside it.
    """
    absolute = folder.expanduser().absolute()
    if not absolute.is_dir():
        beside = [entry.name for entry in absolute.parent.iterdir()] if absolute.parent.is_dir() else []
        raise ConfigError(
            f"there is no folder {str(folder)!r} (looked for {absolute}).{did_you_mean(absolute.name, beside)}"
        )
    return absolute


def summary(path: Path) -> str:
    """The first line of a file's header comment that is no Hydra directive."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("#").strip()
        if text and not text.startswith("@"):
            return text
    return ""
