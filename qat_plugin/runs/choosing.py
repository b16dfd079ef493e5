"""``task=sensitivity`` and ``policy=auto`` in a run's folder: figures kept one by one, a policy found once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import lightning as L
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from qat_plugin.atomic import write_text
from qat_plugin.config.schema import Config
from qat_plugin.errors import CheckpointError, ConfigError, QatError
from qat_plugin.policy import Policy, human_bytes
from qat_plugin.runs.base_policy import check_scheme
from qat_plugin.runs.folder import RunFolder
from qat_plugin.runs.journal import say
from qat_plugin.runs.subject import Batch, Subject, casting_inputs, network_of
from qat_plugin.sensitivity import (
    Budget,
    Choices,
    Entry,
    MaxDrop,
    Measure,
    Sensitivity,
    auto_policy,
    check_reachable,
    choices_of,
    ranked,
)
from qat_plugin.sensitivity.files import write_sensitivity
from qat_plugin.sensitivity.ranking import entry_from

POLICY: Final = "policy.yaml"
_FIGURES: Final = "sensitivity.jsonl"


def choices_in(config: Config, network: nn.Module) -> Choices:
    """What there is to choose in a recipe's model; it may be on the meta device.

    Raises:
        ConfigError: for options that do not go together; PolicyError when the budget cannot be met.
    """
    auto = config.policy.auto
    for scheme in auto.candidates:
        check_scheme("policy.auto.candidates", scheme)
    spending = None if config.budget is None else Budget.parse(config.budget)
    if config.max_drop is not None:
        MaxDrop.parse(config.max_drop)
    choices = choices_of(network, auto.candidates, **_options(config))
    if spending is not None:
        check_reachable(choices, spending)
    if auto.enabled and config.task.stages and spending is None and config.max_drop is None:
        raise ConfigError(
            "policy=auto needs to know what to spend: budget=40% (of the float file), budget=4.6bpw, budget=25MB, or "
            "max_drop=1% (of perplexity), max_drop=0.02 (KL in nats)"
        )
    return choices


def bounds(config: Config, choices: Choices) -> str:
    """What is known of an automatic policy before data is read: the plan and the bytes of each candidate alone."""
    ledger = choices.ledger
    lines = ["policy=auto chooses by measuring on data, which task=plan does not read; these are its candidates", ""]
    rows = [("every layer in", "bits a weight", "layers", "whole file", "of the float file")]
    for scheme, plan in choices.plans.items():
        names = {layer.name: layer for layer in plan}
        size = 0
        for group in choices.groups:
            wanted = tuple(names[name].scheme for name in group.layers)
            option = next((o for o in group.options if tuple(p.scheme for p in o.layers) == wanted), None)
            size += 0 if option is None else option.bytes
        total = size + ledger.fixed
        rows.append(
            (
                scheme,
                f"{8 * size / ledger.weights:.3f}",
                human_bytes(size),
                human_bytes(total),
                f"{total / ledger.floats:.1%}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    target = f"budget={config.budget} can be met; " if config.budget is not None else ""
    lines.append(
        f"{target}{len(choices.groups)} groups, {ledger.weights:,} weights; {human_bytes(ledger.fixed)} of "
        "the file are other. Find the policy: task=ptq or task=fit; see the figures behind it: task=sensitivity"
    )
    return "\n".join(lines)


def rank(config: Config, subject: Subject, folder: RunFolder) -> None:
    """Rank every layer in every candidate and write the files."""
    with _measurable(config, subject) as (network, batches):
        choices = choices_of(network, config.policy.auto.candidates, **_options(config))
        measure = Measure(
            network, batches, plans=choices.plans.values(), quantize=config.policy.auto.quantize or config.ptq.method
        )
        figures = _Figures(folder.path / _FIGURES)
        sensitivity = ranked(
            measure, choices, method=config.policy.auto.method, known=figures.known, on_entry=figures.add,  # type: ignore[arg-type]
        )  # fmt: skip
    say(str(sensitivity))
    _written(sensitivity, folder)


def chosen_policy(config: Config, subject: Subject, folder: RunFolder) -> Policy:
    """The policy that an earlier session of this run found, or the one found now."""
    path = folder.path / POLICY
    if path.is_file():
        say(f"policy: found in an earlier session ({folder.shown}/{POLICY})")
        return read_policy(path)
    auto, figures = config.policy.auto, _Figures(folder.path / _FIGURES)
    with _measurable(config, subject) as (network, batches):
        found = auto_policy(
            network,
            batches,
            budget=config.budget,
            max_drop=config.max_drop,
            candidates=auto.candidates,
            method=auto.method,  # type: ignore[arg-type]
            quantize=auto.quantize or config.ptq.method,
            measurements=auto.measurements,
            known=figures.known,
            on_entry=figures.add,
            **_options(config),
        )
    _written(found.sensitivity, folder, found)
    values = found.to_dict()
    section = {"rules": values["rules"], "keep": values["keep"], "indivisible": "error"}
    header = "".join(f"# {line}\n" for line in str(found).splitlines()[:2])
    write_text(path, f"# A policy found by policy=auto.\n{header}{OmegaConf.to_yaml(OmegaConf.create(section))}")
    say(f"{found}\n")
    return found.policy


def read_policy(path: Path) -> Policy:
    """A policy from a file that :func:`chosen_policy` wrote.

    Raises:
        CheckpointError: when it cannot be read.
    """
    try:
        values: Any = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")))
        return Policy(values["rules"], keep=values["keep"], indivisible=values["indivisible"])
    except (OSError, ValueError, KeyError, TypeError, OmegaConfBaseException) as error:
        if isinstance(error, QatError):
            raise
        raise CheckpointError(f"{path} is damaged: {error}; remove it, and the policy is found again") from error


def _options(config: Config) -> dict[str, Any]:
    auto = config.policy.auto
    return {"groups": auto.groups, "keep": tuple(config.policy.keep), "embeddings": auto.embeddings}


@contextmanager
def _measurable(config: Config, subject: Subject) -> Iterator[tuple[nn.Module, list[Batch]]]:
    """The float network and the batches to measure on: the same ones in every session."""
    network = network_of(subject.build()).eval()
    L.seed_everything(config.trainer.seed, workers=True, verbose=False)
    batches = subject.training_batches(config.policy.auto.calibration_batches)
    with casting_inputs(network):
        yield network, batches


def _written(sensitivity: Sensitivity, folder: RunFolder, found: Any = None) -> None:
    if missing := write_sensitivity(sensitivity, folder.path, found):
        say(missing)


class _Figures:
    """The figures of a ranking, a line each, written as they are measured: a session that is killed loses one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: list[Entry] = []
        if path.is_file():
            whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
            self.known = [entry_from(json.loads(line)) for line in whole.splitlines() if line]
            write_text(path, "".join(json.dumps(asdict(entry)) + "\n" for entry in self.known))
            say(f"sensitivity: {len(self.known)} figures are known from an earlier session")

    def add(self, entry: Entry) -> None:
        """Keep one figure."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry)) + "\n")
