"""From the config that Hydra composed to the dataclasses, and back to a recipe file that reproduces it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, Final

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat_plugin.config.catalogue import HEADER
from qat_plugin.config.mistakes import explain, unknown_key
from qat_plugin.config.options import Digits, EmbeddedModel, EmbeddedText
from qat_plugin.config.schema import Config
from qat_plugin.errors import ConfigError

_INCIDENTAL: Final = ("run", "verbose")
"""Sections that change nothing about the results."""

_WITHOUT_FILES: Final = ("plan", "merge")
"""Tasks that need no data; a plan of a known architecture needs no model either."""

_FILES: Final = (("model", "path"), ("data", "train"))

_OPEN_GROUPS: Final = ("model", "data", "optimizer")


def to_config(composed: DictConfig, *, name: str | None = None) -> Config:
    """Check a composed config and make it the dataclasses; rules become pattern -> spelling.

    Args:
        composed: what Hydra hands to the program, without its own ``hydra`` section.
        name: the recipe's name, for a config that does not set one.

    Raises:
        ConfigError: for a missing value, or one out of its range.
    """
    _refuse_added_keys(composed)
    if composed.task.name in _WITHOUT_FILES:
        _leave_out(composed)
    try:
        config: Any = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise explain(error) from error
    assert isinstance(config, Config)
    for group in ("model", "data"):  # model.path=DIR in a recipe of the embedded model means that directory
        section = getattr(config, group)
        if isinstance(section, (Digits, EmbeddedModel, EmbeddedText)):
            setattr(config, group, section.given())
    config.name = config.name or name
    config.policy.rules = dict(_flat_rules(config.policy.rules))
    return config


def _leave_out(composed: DictConfig) -> None:
    """What these tasks do not need may be missing."""
    for section, key in _FILES:
        if OmegaConf.is_missing(composed[section], key):
            composed[section][key] = ""


def _refuse_added_keys(node: DictConfig, prefix: str = "") -> None:
    """``+trainer.stpes=3`` adds a key that nothing reads: refuse it, as without the plus."""
    kind = OmegaConf.get_type(node)
    known = [entry.name for entry in fields(kind)] if is_dataclass(kind) else None
    for key in map(str, node):
        if known is not None and key not in known:
            raise ConfigError(unknown_key(f"{prefix}{key}", known))
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            _refuse_added_keys(child, f"{prefix}{key}.")


def _flat_rules(rules: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """``{layers: {0: w8a8}}``, as the command line's dots make it, is the pattern ``layers.0``.

    An option of the group ``scheme`` arrives as ``{scheme: w8a8}``.
    """
    for key, value in rules.items():
        pattern = f"{prefix}{key}"
        if isinstance(value, Mapping) and set(value) == {"scheme"}:
            value = value["scheme"]
        if isinstance(value, Mapping):
            yield from _flat_rules(value, pattern + ".")
        elif value is None or isinstance(value, str):
            yield pattern, value
        else:
            raise ConfigError(f"policy.rules.{pattern}={value} is not allowed: give a scheme such as w8a8, or keep")


def to_plain(config: Config) -> dict[str, Any]:
    """All of a config as plain values (dict, list, str, int, float, bool, None)."""
    return asdict(config)


def significant(config: Config) -> dict[str, Any]:
    """What decides a run's results, as plain values: everything but the folder and the verbosity."""
    return {key: value for key, value in to_plain(config).items() if key not in _INCIDENTAL}


def config_hash(config: Config) -> str:
    """sha256, in hexadecimal, of what decides a run's results."""
    text = json.dumps(significant(config), sort_keys=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``key was a and is b`` for each value that differs between two plain configs."""
    found = []
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {json.dumps(old)} and is {json.dumps(new)}")
    return found


def recipe_text(config: Config) -> str:
    """The resolved recipe: a YAML file that composes to this very config, whatever the groups' defaults become."""
    choices = {
        "task": config.task.name,
        "policy": "free",
        "lora": "default" if config.lora.enabled else "none",
        "export": config.export.format or "none",
        **{group: option_of(config, group) for group in _OPEN_GROUPS},
    }
    values = significant(config)
    values["task"] = {"stages": config.task.stages}  # its name stays open: task=evaluate run=FOLDER
    header = (
        f"{HEADER}\n# The resolved recipe of a run of {config.name or 'no recipe'}.\n"
        "# Resume it: qat resume=FOLDER   Run it again: qat --config-dir FOLDER recipe=recipe\n"
    )
    defaults = {"defaults": [{f"override /{group}": choice} for group, choice in choices.items()]}
    return header + OmegaConf.to_yaml(OmegaConf.create(defaults)) + OmegaConf.to_yaml(OmegaConf.create(values))


def option_of(config: Config, group: str) -> str:
    """Which option of ``model``, ``data`` or ``optimizer`` a config has."""
    section: Any = getattr(config, group)
    kind = section.get("kind", "custom") if isinstance(section, Mapping) else section.kind
    return str(kind)
