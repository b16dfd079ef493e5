"""Where Hydra finds recipes: ``recipe=NAME`` from the built-in folder and from a user's, as one config group.

A recipe is a file that people pass around, so what it can do is bounded here: it sets keys and chooses options, and
may not touch Hydra's own configuration, whose callbacks and launchers run code. The command line may.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from qat_plugin.config.catalogue import recipe_files
from qat_plugin.config.places import recipes_folder
from qat_plugin.errors import ConfigError

_GROUP = "recipe"
_user_folders: list[Path] = []


class RecipeSource(ConfigSource):  # type: ignore[misc]  # hydra is not followed by the type checker
    """A folder whose YAML files are options of the group ``recipe`` and whose subfolders are groups of their own."""

    @staticmethod
    def scheme() -> str:
        """The prefix of such folders in Hydra's search path."""
        return "recipes"

    def available(self) -> bool:
        """Whether the folder exists."""
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        """Whether there are options under that name."""
        if not config_path or _is_hydras(config_path):
            return False
        return config_path.rstrip("/") == _GROUP or (Path(self.path) / config_path).is_dir()

    def is_config(self, config_path: str) -> bool:
        """Whether there is such an option; nothing outside a group is one."""
        return self._file(config_path) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Names of the options (or subgroups) of a group."""
        folder = Path(self.path) / config_path
        names: set[str] = set()
        if results_filter in (None, ObjectType.CONFIG):
            files = recipe_files(Path(self.path)) if config_path.rstrip("/") == _GROUP else _yaml_files(folder)
            names |= {name for name, _ in files if config_path}
        if results_filter in (None, ObjectType.GROUP) and folder.is_dir():
            names |= {entry.name for entry in folder.iterdir() if entry.is_dir()}
        return sorted(names)

    def load_config(self, config_path: str) -> ConfigResult:
        """Read and check one option.

        Raises:
            ConfigError: when it is no YAML mapping or reaches for Hydra's own configuration.
        """
        file = self._file(config_path)
        if file is None:
            raise ConfigLoadError(f"there is no {config_path} in {self.path}")
        config = _read(file)
        header = self._get_header_dict(file.read_text(encoding="utf-8"))
        if config_path.startswith(_GROUP + "/"):
            header["package"] = "_global_"
        return ConfigResult(config=config, path=f"recipes://{self.path}", provider=self.provider, header=header)

    def _file(self, config_path: str) -> Path | None:
        group, _, name = config_path.removesuffix(".yaml").rpartition("/")
        if not group or ".." in config_path.split("/") or _is_hydras(group):
            return None
        if group == _GROUP:
            return dict(recipe_files(Path(self.path))).get(name)
        file = Path(self.path) / group / f"{name}.yaml"
        return file if file.is_file() else None


class RecipeSearchPath(SearchPathPlugin):  # type: ignore[misc]
    """Adds the user's folders before qat's own configuration, and the built-in recipes behind it."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra while it sets up."""
        for folder in reversed(_user_folders):
            search_path.prepend("user", f"recipes://{folder}")
        search_path.append("recipes", f"recipes://{recipes_folder()}")


def register_sources(user_folders: list[Path]) -> None:
    """Make both known to Hydra; calling it again replaces the user's folders."""
    _user_folders[:] = user_folders
    Plugins.instance().register(RecipeSource)
    Plugins.instance().register(RecipeSearchPath)


def _is_hydras(group: str) -> bool:
    """Hydra's own groups (launchers, logging, callbacks) are not for a recipe's folder to replace."""
    return group.split("/")[0] == "hydra"


def _yaml_files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.glob("*.yaml")):
        yield path.stem, path


def _read(file: Path) -> DictConfig:
    try:
        config = OmegaConf.load(file)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {_one_line(error)}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{file} is no recipe: it must be a mapping of keys to values, as in 'policy: ...'")
    _refuse_hydra(file, config)
    return config


def _refuse_hydra(file: Path, config: DictConfig) -> None:
    chosen = [str(entry) for entry in config.get("defaults", None) or []]
    if any(re.search(r"(^|[\s'/{@])hydra([/:.'\s@]|$)", entry) for entry in chosen) or "hydra" in config:
        raise ConfigError(
            f"{file} configures Hydra itself, which can run any code; a recipe may not. "
            "Give hydra.* on the command line"
        )
    if "allow" in config:
        raise ConfigError(
            f"{file} sets 'allow'; what may be instantiated is decided on the command line only: allow=[my_package]"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
