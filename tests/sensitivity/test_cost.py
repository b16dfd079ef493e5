"""The bytes that a budget is spent on are those of the files that are written."""

from __future__ import annotations

import copy
import struct
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import nn

from qat_plugin import convert, save_converted
from qat_plugin.errors import ConfigError
from qat_plugin.policy import Policy
from qat_plugin.sensitivity import Budget, Damage, MaxDrop, choices_of
from qat_plugin.sensitivity.cost import Ledger, layer_bytes
from qat_plugin.sensitivity.rules import exactly

from .subjects import Classifier, llama

SCHEMES = (
    "w8a16", "w8a8", "w4a16-g43", "w4a16-g32-asym", "w3a16-g16-asym", "w3a16", "w2a16-g16-asym", "w2a16-tensor", "bf16",
)  # fmt: skip


def written(model: nn.Module, policy: Policy, folder: Path) -> tuple[int, int]:
    """Bytes of the tensors and of the header of a converted model's file."""
    save_converted(convert(copy.deepcopy(model), policy), folder)
    content = (folder / "model.safetensors").read_bytes()
    header: int = struct.unpack("<Q", content[:8])[0]
    return len(content) - 8 - header, 8 + header


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["classifier", "tied llama", "llama with embeddings"])
def test_the_bytes_of_a_scheme_are_those_of_the_file(scheme: str, family: str, tmp_path: Path) -> None:
    model = Classifier() if family == "classifier" else llama(tied=True, layers=1)
    embeddings = family == "llama with embeddings" and scheme not in ("w2a16-tensor", "w8a8")
    choices = choices_of(model, [scheme], embeddings=embeddings)
    chosen = [layer for group in choices.groups for layer in group.options[0].layers]
    policy = Policy({exactly(layer.name): layer.scheme for layer in chosen})
    tensors, header = written(model, policy, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        kept = {name for name in file.keys() if not name.endswith((".q", ".scale", ".zero_point"))}  # noqa: SIM118
        cast = {name for name in kept if name.removesuffix(".weight") in {n for g in choices.groups for n in g.layers}}
        rest = sum(file.get_tensor(name).nbytes for name in kept - cast)
    assert choices.least == tensors - rest
    bound = choices.ledger.fixed - rest
    assert header <= bound <= 1.5 * header + 4096, "an upper bound, and not far off"


def test_padding_of_odd_rows_counts() -> None:
    model = nn.Sequential(nn.Linear(13, 5))
    [group] = choices_of(model, ["w4a16", "w3a16", "w2a16", "w8a16"]).groups
    assert {option.scheme: option.bytes for option in group.options} == {
        "w2a16": 5 * (4 + 2), "w3a16": 5 * (6 + 2), "w4a16": 5 * (7 + 2), "w8a16": 5 * (13 + 2),
    }  # fmt: skip


def test_a_static_scale_and_zero_points_count() -> None:
    plan = Policy({"0": "w8a8-static", "1": "w4a16-g8-asym"}).plan(nn.Sequential(nn.Linear(16, 4), nn.Linear(16, 4)))
    assert [layer_bytes(layer) for layer in plan] == [16 * 4 + 4 * 2 + 4, 8 * 4 + 4 * 2 * (2 + 1)]


LEDGER = Ledger(fixed=1000, floats=10_000, weights=2000)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("40%", 3000),
        ("4.6bpw", 1150),
        ("4.6 BPW", 1150),
        ("25KB", 24_000),
        ("2KiB", 1048),
        ("3000B", 2000),
        ("1.5MB", 1_499_000),
        ("1e-3MiB", 48),
        ("5%", -500),
    ],
)
def test_budgets_and_what_they_leave(text: str, limit: int) -> None:
    assert Budget.parse(text).limit(LEDGER) == limit


@pytest.mark.parametrize("text", ["40", "0.4", "", "-3%", "0bpw", "4.6 bits", "many", "nan%", "1e999MB", "40%%"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(ConfigError, match="budget=40%.*budget=4.6bpw.*budget=25MB"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["40%", "4.6bpw", "25KB", "2KiB", "3000B"])
def test_the_least_budget_is_spelled_so_that_it_suffices(text: str) -> None:
    budget = Budget.parse(text)
    spelled = Budget.parse(budget.spelled(1234, LEDGER))
    assert spelled.kind == budget.kind
    assert 1234 <= spelled.limit(LEDGER) <= 1234 + 30


def test_drops() -> None:
    assert MaxDrop.parse("1%") == MaxDrop("perplexity", 0.01, "1%")
    assert MaxDrop.parse(0.02).amount == 0.02
    assert MaxDrop.parse("0.02").allows(Damage(0.019, None, 1.0))
    assert not MaxDrop.parse("0.02").allows(Damage(0.021, -1.0, 1.0))
    assert MaxDrop.parse("1%").allows(Damage(9.0, 0.00995, 1.0))
    assert not MaxDrop.parse("1%").allows(Damage(0.0, 0.00996, 1.0))
    for text in ("much", "-1%", 0, "3MB", ""):
        with pytest.raises(ConfigError, match="max_drop=1%"):
            MaxDrop.parse(text)


def test_a_buffer_counts_as_it_is_saved() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
    state = sum(t.nbytes for t in model.state_dict().values())
    assert choices_of(model, ["w8a16"]).ledger.floats == state
