"""Hydra's and OmegaConf's exceptions as one message a person can act on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from qat_plugin.config.catalogue import groups
from qat_plugin.config.keys import help_of, keys_with_help
from qat_plugin.errors import ConfigError, did_you_mean

Composition = (HydraException, OmegaConfBaseException)
"""What composing a config may raise for a mistake of the user's."""


def explain(error: Exception) -> ConfigError:
    """The mistake behind an exception of Hydra or OmegaConf."""
    root = _root(error)
    where = _recipe_of(error)
    if isinstance(error, MissingConfigException):
        return ConfigError(_missing_option(error))
    if isinstance(error, OverrideParseException):
        return ConfigError(
            f"cannot read {error.override!r}: {_first_line(error)}; put quotes around special characters"
        )
    if isinstance(root, MissingMandatoryValue):
        return ConfigError(_missing_value(root))
    if isinstance(root, (ConfigAttributeError, ConfigKeyError)):
        return ConfigError(where + _unknown_key(root))
    if isinstance(root, (ValidationError, InterpolationResolutionError)):
        return ConfigError(f"{where}{root.full_key}: {_first_line(root)}")
    return ConfigError(where + _plain(error))


def _root(error: BaseException) -> Any:
    """The innermost OmegaConf exception, where the facts are."""
    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    return next((link for link in chain if isinstance(link, OmegaConfBaseException) and link.full_key), error)


def _recipe_of(error: Exception) -> str:
    """``recipe 'x': `` when a file is to blame and not the command line."""
    match = re.match(r"In '([^']+)'", str(error))
    if match is None or match[1] == "config":
        return ""
    group, _, name = match[1].rpartition("/")
    return f"{group} {name!r}: " if group else f"{name}: "


def _missing_option(error: MissingConfigException) -> str:
    path = str(error.missing_cfg_file)
    group, _, name = path.rpartition("/")
    if not group:
        return _plain(error)
    options = [str(option) for option in error.options or ()] or _options(error)
    listed = ", ".join(options) or "none"
    hint = {
        "recipe": "qat lists them; recipes of your own: qat --config-dir FOLDER recipe=NAME",
        "policy": "one scheme for all linear layers: policy=free policy.default=SCHEME",
    }.get(group)
    return f"there is no {group} {name!r}.{did_you_mean(name, options)} There are: {listed}" + (
        f" ({hint})" if hint else ""
    )


def _options(error: Exception) -> list[str]:
    """The options that Hydra lists in its message."""
    _, found, rest = str(error).partition("Available options in")
    return (
        [line.strip() for line in rest.split("Config search path")[0].splitlines()[1:] if line.strip()] if found else []
    )


def _missing_value(error: Any) -> str:
    help = help_of(error.object_type, str(error.key)) or "the dotted name of your class, package.module.Class"
    return f"{error.full_key} is needed: {help}; give {error.full_key}=VALUE"


def _unknown_key(error: Any) -> str:
    return unknown_key(str(error.full_key), _names(error.parent_node))


def unknown_key(key: str, siblings: Iterable[str]) -> str:
    """A message for a key that is none, with the closest of its siblings or the same name in another section."""
    section, _, leaf = key.rpartition(".")
    known = sorted(name for name in siblings if name != "hydra")
    elsewhere = [name for name, *_ in keys_with_help() if name.rpartition(".")[2] == leaf]
    if elsewhere:
        near = f" Did you mean {elsewhere[0]!r}?"
    else:
        near = did_you_mean(leaf, dict.fromkeys([*known, *groups(), "recipe"] if not section else known))
    place = f"of {section}" if section else "at the top"
    return f"unknown key {key!r}.{near} Keys {place}: {', '.join(known) or 'none'}"


def _names(node: Any) -> list[str]:
    try:
        return [str(name) for name in node]
    except (TypeError, OmegaConfBaseException):  # a value where a section was expected
        return []


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _plain(error: Exception) -> str:
    """A message without Hydra's search path, on one line."""
    text = str(error).split("Config search path")[0]
    return " ".join(text.split()) or type(error).__name__
