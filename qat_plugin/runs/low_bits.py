"""Below 4 bits a recipe's symmetric schemes become asymmetric ones, and the run says so."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from qat_plugin.config.launch import Job
from qat_plugin.config.schema import LADDER, Config
from qat_plugin.errors import SchemeError
from qat_plugin.qat.advice import with_zero_points
from qat_plugin.scheme import Scheme

KEY: Final = "policy.keep_symmetric"
_TASKS: Final = ("fit", "ptq", "plan")  # a ranking shows what each scheme given does


def switched(job: Job) -> tuple[Job, str]:
    """The job with symmetric schemes below 4 bits replaced by asymmetric ones, before anything is planned or recorded.

    The policy's default, its rules, the candidates of an automatic policy and the scheme that merged weights are
    converted to; not what a merge is only compared with. ``policy.keep_symmetric=true`` leaves all as given.

    Returns:
        The job, and one line that names what was given, what is taken and how to keep it; empty where nothing changed.
    """
    if job.config.task.name not in _TASKS or job.config.policy.keep_symmetric:
        return job, ""
    config = copy.deepcopy(job.config)
    given = _switch(config)
    if not given:
        return job, ""
    swaps = ", ".join(f"{new} instead of {old} ({', '.join(keys)})" for (old, new), keys in given.items())
    told = (
        f"policy: symmetric grids lose much more than asymmetric ones below 4 bits, so this run takes {swaps}; to keep "
        f"what was given: {KEY}=true"
    )
    return replace(job, config=config), told


def _switch(config: Config) -> dict[tuple[str, str], list[str]]:
    """Replace in place; (given, taken) -> the keys where that was."""
    found: dict[tuple[str, str], list[str]] = {}

    def taken(key: str, spelling: str | None) -> str | None:
        new = _asymmetric(spelling)
        if spelling is None or new is None:
            return spelling
        found.setdefault((spelling, new), []).append(key)
        return new

    policy = config.policy
    policy.default = taken("policy.default", policy.default)
    policy.rules = {pattern: taken(f"policy.rules.{pattern}", scheme) for pattern, scheme in policy.rules.items()}
    if policy.auto.enabled or config.ptq.method == LADDER:
        policy.auto.candidates = _once([str(taken("policy.auto.candidates", s)) for s in policy.auto.candidates])
    if config.lora.enabled:
        config.merge.scheme = taken("merge.scheme", config.merge.scheme)
    return found


def _asymmetric(spelling: str | None) -> str | None:
    """The spelling to take instead; ``None`` to leave it, and a misspelt one to those who check it."""
    try:
        scheme = with_zero_points(Scheme.parse(spelling)) if spelling is not None else None
    except SchemeError:
        return None
    return None if scheme is None else str(scheme)


def _once(names: Sequence[str]) -> list[str]:
    """Without repetitions: a candidate may have been given in both forms."""
    return list(dict.fromkeys(names))
