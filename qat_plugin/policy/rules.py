"""Rules: a pattern and the scheme of the layers it matches.

A pattern is one of

* a role (``embedding``, ``attention``, ``ffn``, ``head``, ``norm``, ``first``, ``last``);
* ``re:`` and a regular expression, matched from the start of the module's name;
* ``type:`` and a class name (``type:Linear``, ``type:torch.nn.Linear``), subclasses included;
* a glob on the module's name, matched against the whole name, any suffix of it that starts at a dot, and the names of
  the modules that contain it (``lm_head``, ``layers.0``, ``*.q_proj``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qat_plugin.errors import PolicyError, did_you_mean
from qat_plugin.policy.roles import ROLES, Candidate
from qat_plugin.scheme import Scheme


@dataclass(frozen=True)
class Rule:
    """A pattern and what its layers become; ``scheme=None`` keeps them as they are."""

    pattern: str
    scheme: Scheme | None

    def __str__(self) -> str:
        return f"{self.pattern} -> {self.scheme or 'keep'}"

    def matches(self, candidate: Candidate) -> bool:
        """Whether the pattern speaks of this module."""
        if self.pattern in ROLES:
            return self.pattern in candidate.roles
        if self.pattern.startswith("re:"):
            return re.match(self.pattern[3:], candidate.name) is not None
        if self.pattern.startswith("type:"):
            return self.pattern[5:] in _class_names(candidate)
        return any(fnmatchcase(candidate.name, form.format(self.pattern)) for form in ("{}", "*.{}", "{}.*", "*.{}.*"))


def _class_names(candidate: Candidate) -> Iterator[str]:
    for base in type(candidate.module).__mro__:
        yield base.__name__
        yield f"{base.__module__}.{base.__qualname__}"
        yield f"{base.__module__.split('.modules.')[0]}.{base.__qualname__}"  # torch.nn.Linear


def check_pattern(pattern: object) -> str:
    """Validate a pattern's form.

    Raises:
        PolicyError: when it is empty, not a string, or an invalid regular expression.
    """
    if not isinstance(pattern, str) or not pattern.strip():
        raise PolicyError(
            f"a rule's pattern is a role ({', '.join(ROLES)}), a glob, 're:...' or 'type:...', not {pattern!r}"
        )
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise PolicyError(f"rule {pattern!r} is not a valid regular expression: {error}") from error
    return pattern


def check_used(rules: Sequence[Rule], found: Sequence[Candidate], decided: dict[str, Rule], model: str) -> None:
    """Raise when a rule decides nothing: it matches no module, or earlier rules took all that it matches.

    Raises:
        PolicyError: naming the rule, what there is to match and the closest names.
    """
    for rule in rules:
        matched = [candidate.name for candidate in found if rule.matches(candidate)]
        if not matched:
            raise PolicyError(_unmatched(rule, found, model))
        if not any(decided.get(name) is rule for name in matched):
            earlier = sorted({decided[name].pattern for name in matched if name in decided})
            raise PolicyError(
                f"policy rule {rule.pattern!r} decides no layer of {model}: of the {len(matched)} it matches "
                f"(such as {matched[0]}), each was decided by an earlier rule ({', '.join(earlier)}). The "
                "first rule that "
                "matches wins: move it up or drop it"
            )


def _unmatched(rule: Rule, found: Sequence[Candidate], model: str) -> str:
    names = [candidate.name for candidate in found]
    roles = [role for role in ROLES if any(role in candidate.roles for candidate in found)]
    leaves = {name.rsplit(".", 1)[-1] for name in names}
    types = sorted({type(candidate.module).__name__ for candidate in found})
    shown = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
    return (
        f"policy rule {rule.pattern!r} matched no module of {model}."
        f"{did_you_mean(rule.pattern, [*roles, *sorted(leaves), *names])} Its layers are {shown}; "
        f"its roles {', '.join(roles) or 'none'}; its types {', '.join(types)}. Drop the rule or match one of these"
    )
