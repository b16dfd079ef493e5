"""The recipe's policy as domain objects, and what the adapters' base makes of it."""

from __future__ import annotations

from typing import Any

from qat_plugin.config.schema import Config, PolicyConfig
from qat_plugin.errors import ConfigError, SchemeError
from qat_plugin.policy import Policy
from qat_plugin.scheme import Scheme


def policy_of(config: PolicyConfig) -> Policy:
    """The policy of a recipe.

    Raises:
        ConfigError: when it changes nothing, or for a misspelt scheme; PolicyError for a malformed pattern.
    """
    if not config.rules and config.default is None:
        raise ConfigError("the policy changes no layer: give policy.default=SCHEME or policy.rules.ROLE=SCHEME")
    check_scheme("policy.default", config.default)
    for pattern, scheme in config.rules.items():
        check_scheme(f"policy.rules.{pattern}", scheme)
    indivisible: Any = config.indivisible
    return Policy(config.rules, default=config.default, keep=config.keep, indivisible=indivisible)


def base_policy(config: Config) -> Policy:
    """The policy of the adapters' base; without rules it is plain LoRA on a float base."""
    if not config.policy.rules and config.policy.default is None:
        return Policy({})
    return policy_of(config.policy)


def trains_adapters(config: Config) -> bool:
    """Whether a recipe's run fine-tunes adapters."""
    return config.lora.enabled


def check_scheme(key: str, scheme: str | None) -> None:
    """Raise ConfigError for a misspelt scheme."""
    try:
        if scheme not in (None, "keep"):
            Scheme.parse(str(scheme))
    except SchemeError as error:
        raise ConfigError(f"{key}: {error}") from error
