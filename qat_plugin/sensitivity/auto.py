"""``auto_policy(model, batches, budget=...)``: an ordinary Policy that spends bytes where they are needed most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qat_plugin.errors import ConfigError, DataError, PolicyError
from qat_plugin.measure.progress import Progress, progressing
from qat_plugin.policy import LayerPlan, Plan, Policy, human_bytes
from qat_plugin.scheme import Scheme
from qat_plugin.sensitivity.budget import Budget, MaxDrop
from qat_plugin.sensitivity.damage import Damage, Measure
from qat_plugin.sensitivity.fused import Grouping
from qat_plugin.sensitivity.improvement import Assignment, Search
from qat_plugin.sensitivity.options import CANDIDATES, Choices, Group, choices_of
from qat_plugin.sensitivity.ranking import Entry, Method, Sensitivity, ranked
from qat_plugin.sensitivity.rules import policy_from
from qat_plugin.sensitivity.solver import Front, Value, front


@dataclass(frozen=True)
class AutoPolicy:
    """A policy that was chosen by measuring.

    Attributes:
        policy: an ordinary Policy: for prepare, the callback, conversion, the command.
        schemes: group -> its scheme; ``"keep"`` for none.
        target: what was asked for, such as ``budget=4.6bpw``.
        bytes: of the chosen layers' weights in the file.
        file_bytes: of the whole file, its header at its upper bound.
        bits_per_weight: over the chosen layers' weights.
        predicted: sum of the groups' single damages, in nats a prediction.
        measured: what the model does with all of it at once.
        sensitivity: the single damages.
        measurements: assignments that were measured as a whole.
    """

    policy: Policy
    schemes: dict[str, str]
    target: str
    bytes: int
    file_bytes: int
    bits_per_weight: float
    predicted: float
    measured: Damage
    sensitivity: Sensitivity
    measurements: int

    def __str__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """A few lines: what was asked for, what was found, what it costs."""
        rules = "\n".join(f"  {rule.pattern}: {rule.scheme or 'keep'}" for rule in self.policy.rules)
        loss = "" if self.measured.loss_increase is None else f", loss {self.measured.loss_increase:+.5f} nats"
        return (
            f"{self.target}: {self.bits_per_weight:.3f} bits a weight in the layers chosen for "
            f"({human_bytes(self.bytes)}), {human_bytes(self.file_bytes)} in all\n"
            f"KL to the float model {self.measured.kl:.5f} nats measured (the sum of single layers said "
            f"{self.predicted:.5f}){loss}, top-1 agreement {self.measured.agreement:.2%}, on "
            f"{self.sensitivity.tokens} predictions; {self.measurements} assignments measured\n{rules}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the sensitivity."""
        return {
            "target": self.target,
            "rules": {rule.pattern: str(rule.scheme or "keep") for rule in self.policy.rules},
            "keep": list(self.policy.keep),
            "schemes": dict(self.schemes),
            "bytes": self.bytes,
            "file_bytes": self.file_bytes,
            "bits_per_weight": self.bits_per_weight,
            "predicted_kl": self.predicted,
            "measured_kl": self.measured.kl,
            "measured_loss_increase": self.measured.loss_increase,
            "measured_agreement": self.measured.agreement,
            "measurements": self.measurements,
        }


def auto_policy(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    budget: str | Budget | None = None,
    max_drop: str | float | MaxDrop | None = None,
    candidates: Sequence[str | Scheme] = CANDIDATES,
    method: Method = "kl",
    quantize: str = "rtn",
    groups: Grouping = "fused",
    keep: Sequence[str] = (),
    embeddings: bool = False,
    measurements: int = 96,
    progress: Progress | bool = True,
    known: Iterable[Entry] = (),
    on_entry: Callable[[Entry], None] | None = None,
) -> AutoPolicy:
    """Choose a scheme for each group of layers: the least damage in a budget, or the fewest bytes for a damage.

    First each group is measured alone in each scheme (:func:`~qat_plugin.rank_layers`), then the knapsack problem is
    solved for the sum of these damages, then whole assignments are measured and improved by exchanges. The same input
    gives the same policy.

    Args:
        model: the float model; as it was afterwards.
        batches: calibration data; see :func:`qat_plugin.ptq.feeding.feed` for the form.
        budget: ``"40%"`` of the bytes of the float model's tensors, ``"4.6bpw"``: bits per weight of the layers that
            are chosen for (embeddings and heads do not count unless ``embeddings``), ``"25MB"``: size of the file.
            All count scales, zero points, padding, and tied weights once; share and size count the rest of the file.
        max_drop: in place of a budget, how much worse the model may become: ``0.02`` (mean KL in nats) or ``"1%"``
            (perplexity); measured on ``batches``.
        candidates: the schemes to choose from; ``"keep"`` leaves a layer in float.
        method: how single damages are found: ``"kl"`` (measured) or ``"gradient"`` (estimated, much cheaper).
        quantize: how weights become integers; see :func:`~qat_plugin.calibrate`.
        groups: ``"fused"`` never breaks query, key and value or gate and up apart; ``"layers"`` may.
        keep: patterns of layers that stay in float.
        embeddings: let embeddings and output heads take part.
        measurements: whole assignments to measure at most.
        progress: a bar on stderr, nothing, or a callback(done, total).
        known: figures of an earlier session that ranked the same model on the same batches.
        on_entry: told each new figure of the ranking.

    Raises:
        ConfigError: for a malformed budget, or both or neither of ``budget`` and ``max_drop``.
        PolicyError: when the budget cannot be met, naming the least that can; when no candidate is good enough.
        DataError: when there is no batch, or ``max_drop`` speaks of perplexity and there are no labels.

    Example::

        found = auto_policy(model, batches, budget="4.6bpw")
        prepare(model, found.policy)
    """
    if (budget is None) == (max_drop is None):
        raise ConfigError("give either budget= (such as '40%', '4.6bpw', '25MB') or max_drop= (such as 0.02, '1%')")
    spending = None if budget is None else Budget.parse(budget)
    drop = None if max_drop is None else MaxDrop.parse(max_drop)
    if measurements < 1:
        raise ConfigError(f"measurements={measurements} is not allowed: it must be at least 1")
    choices = choices_of(model, candidates, groups=groups, keep=keep, embeddings=embeddings)
    if spending is not None:
        check_reachable(choices, spending)
    measure = Measure(model, batches, plans=choices.plans.values(), quantize=quantize)
    if drop is not None and drop.kind == "perplexity" and not measure.labelled:
        raise DataError(f"max_drop={drop.text} speaks of perplexity, and the batches have no labels: give nats instead")
    sensitivity = ranked(measure, choices, method=method, progress=progress, known=known, on_entry=on_entry)
    single = [[sensitivity.damage(g.name, option.scheme) for option in g.options] for g in choices.groups]
    solved = front([_values(group, damages) for group, damages in zip(choices.groups, single, strict=True)])
    whole: dict[Assignment, Damage] = {}

    def joint(assignment: Assignment) -> float:
        whole[assignment] = measure.of(_layers(choices, assignment))
        return whole[assignment].kl

    with progressing(progress, "measuring whole policies", measurements) as advance:
        search = Search(choices.groups, single, joint, measurements, advance)
        if spending is not None:
            best = _spend(search, solved, spending.limit(choices.ledger))
        else:
            assert drop is not None
            best = _save(search, solved, drop, whole)
    return _found(choices, search, best, measure, sensitivity, budget=spending, drop=drop)


def _values(group: Group, damages: Sequence[float]) -> list[Value]:
    return [(option.bytes, damage) for option, damage in zip(group.options, damages, strict=True)]


def check_reachable(choices: Choices, budget: Budget) -> int:
    """The bytes that a budget leaves to the layers that are chosen for.

    Raises:
        PolicyError: when they are fewer than the cheapest candidates take, naming the least reachable.
    """
    limit = budget.limit(choices.ledger)
    if choices.least <= limit:
        return limit
    ledger, least = choices.ledger, choices.least
    rest = (
        f" (of it {human_bytes(ledger.fixed)} are what stays in float, and the header)" if budget.kind != "bpw" else ""
    )
    raise PolicyError(
        f"budget={budget.text} cannot be met: with the cheapest candidate everywhere the layers take "
        f"{8 * least / ledger.weights:.3f} bits a weight, {human_bytes(least)}, and the file "
        f"{human_bytes(least + ledger.fixed)}{rest}. The least budget is {budget.spelled(least, ledger)}; give that "
        "much, add a cheaper candidate, or keep fewer layers"
    )


def _spend(search: Search, solved: Front, limit: int) -> Assignment:
    index = solved.within(limit)
    assert index is not None
    return search.least_damage(tuple(solved.choice(index)), limit)


def _save(search: Search, solved: Front, drop: MaxDrop, damages: dict[Assignment, Damage]) -> Assignment:
    """Bisect the solver's choices, from the fewest bytes to the most, then save what else can be saved."""

    def allowed(assignment: Assignment) -> bool:
        search.damage(assignment)
        return drop.allows(damages[assignment])

    low, high = 0, len(solved) - 1
    most = tuple(solved.choice(high))
    if not allowed(most):
        raise PolicyError(
            f"max_drop={drop.text} cannot be met: the best candidates everywhere give a KL of {damages[most].kl:.5f} "
            f"nats to the float model{_loss(damages[most])}. Allow that much, or add 'keep' or a finer scheme to the "
            "candidates"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if allowed(tuple(solved.choice(middle))) else (middle + 1, high)
    return search.fewest_bytes(tuple(solved.choice(low)), allowed)


def _loss(damage: Damage) -> str:
    return "" if damage.loss_increase is None else f" and add {damage.loss_increase:.5f} nats to the loss"


def _layers(choices: Choices, assignment: Assignment) -> list[LayerPlan]:
    return [
        layer
        for group, option in zip(choices.groups, assignment, strict=True)
        for layer in group.options[option].layers
    ]


def _found(
    choices: Choices,
    search: Search,
    best: Assignment,
    measure: Measure,
    sensitivity: Sensitivity,
    *,
    budget: Budget | None,
    drop: MaxDrop | None,
) -> AutoPolicy:
    layers = _layers(choices, best)
    plan = next(iter(choices.plans.values()))
    policy = policy_from(measure.model, plan, {layer.name: layer.scheme for layer in layers})
    used, ledger = search.bytes(best), choices.ledger
    return AutoPolicy(
        policy,
        {g.name: g.options[option].scheme for g, option in zip(choices.groups, best, strict=True)},
        f"budget={budget.text}" if budget is not None else f"max_drop={drop.text}" if drop is not None else "",
        used,
        used + ledger.fixed,
        8 * used / ledger.weights,
        search.predicted(best),
        _final(measure, policy),
        sensitivity,
        search.made,
    )


def _final(measure: Measure, policy: Policy) -> Damage:
    """The policy as a run would carry it out, from its rules to its integers."""
    plan: Plan = policy.plan(measure.model)
    return measure.calibrated(plan) if plan.quantized else Damage(0.0, 0.0 if measure.labelled else None, 1.0)
