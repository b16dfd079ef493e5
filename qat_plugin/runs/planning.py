"""What can be known, and what can be known to be wrong, before a weight is read or a file is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qat_plugin.callbacks import Schedule
from qat_plugin.config.launch import Job
from qat_plugin.config.schema import Config, EmbeddedText, PolicyConfig, TextFiles, TransformersModel
from qat_plugin.config.targets import is_target
from qat_plugin.config.typed import option_of
from qat_plugin.errors import ConfigError, SchemeError, did_you_mean
from qat_plugin.policy import Plan, Policy
from qat_plugin.runs.skeleton import skeleton_of
from qat_plugin.runs.training import accelerator_of
from qat_plugin.scheme import Scheme


def planned(job: Job) -> Plan:
    """The recipe's policy resolved against its model's architecture; all of the recipe is checked on the way.

    Raises:
        ConfigError: for options that do not go together, a path that does not exist, a schedule that is none.
        PolicyError: when the policy does not fit the model.
    """
    config = job.config
    device = accelerator_of(config.trainer)
    check_choices(config)
    policy = policy_of(config.policy)
    if "qat" in config.task.stages:
        Schedule(config.qat.start, config.qat.freeze).resolve(config.trainer.max_steps)
    return policy.plan(skeleton_of(config, job.allow), device=device)


def policy_of(config: PolicyConfig) -> Policy:
    """The policy of a recipe.

    Raises:
        ConfigError: when it changes nothing, or for a misspelt scheme; PolicyError for a malformed pattern.
    """
    if not config.rules and config.default is None:
        raise ConfigError("the policy changes no layer: give policy.default=SCHEME or policy.rules.ROLE=SCHEME")
    _check_spelling("default", config.default)
    for pattern, scheme in config.rules.items():
        _check_spelling(f"rules.{pattern}", scheme)
    indivisible: Any = config.indivisible
    return Policy(config.rules, default=config.default, keep=config.keep, indivisible=indivisible)


def check_choices(config: Config) -> None:
    """Raise for options that do not go together and paths that do not exist.

    Raises:
        ConfigError: with what to choose instead, or the closest name beside a path.
    """
    if option_of(config, "model") == "custom":
        if not is_target(config.data):
            raise ConfigError("model=custom needs data=custom: your LightningDataModule, data._target_=package.Class")
        return
    if option_of(config, "optimizer") == "own":
        raise ConfigError("optimizer=own is for model=custom: a language model that qat loads has none of its own")
    if not isinstance(config.data, (EmbeddedText, TextFiles)):
        raise ConfigError("data=custom is for model=custom; with a language model use data=text or data=embedded")
    if isinstance(config.model, TransformersModel):
        _check_path("model.path", config.model.path)
    if isinstance(config.data, TextFiles):
        _check_path("data.train", config.data.train)
        _check_path("data.valid", config.data.valid)


def _check_path(key: str, given: str | None) -> None:
    if given is None or (path := Path(given)).exists():
        return
    near = did_you_mean(path.name, [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else [])
    where = "" if path.parent.is_dir() else f"; nor does the folder {path.parent}"
    raise ConfigError(f"{key}={given} does not exist{where}.{near}")


def _check_spelling(key: str, scheme: str | None) -> None:
    try:
        if scheme not in (None, "keep"):
            Scheme.parse(str(scheme))
    except SchemeError as error:
        raise ConfigError(f"policy.{key}: {error}") from error
