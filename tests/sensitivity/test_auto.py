"""Automatic policies: within their budget in the real file, ordinary, the same each time, better than uniform ones."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from qat_plugin import auto_policy, convert, load_converted, prepare, save_converted
from qat_plugin.errors import ConfigError, DataError, PolicyError
from qat_plugin.measure import file_bytes
from qat_plugin.policy import Policy
from qat_plugin.qat import calibrating
from qat_plugin.sensitivity import Measure, choices_of, rank_layers
from qat_plugin.sensitivity.damage import predictions

from .subjects import Classifier, assert_untouched, images, llama, snapshot, text
from .test_groups import Shared

SCHEMES = ("w8a16", "w4a16-g16-asym", "w4a16-g32-asym", "w3a16-g16-asym", "w2a16-g16-asym")
QUICK = {"candidates": SCHEMES, "measurements": 24, "progress": False}


@pytest.mark.parametrize("method", ["kl", "gradient"])
@pytest.mark.parametrize("budget", ["4.6bpw", "3.9bpw", "60%", "47KB"])
def test_the_file_keeps_the_budget_and_the_policy_is_an_ordinary_one(
    language_model: nn.Module, budget: str, method: str, tmp_path: Path
) -> None:
    before = snapshot(language_model)
    found = auto_policy(language_model, text(2), budget=budget, method=method, **QUICK)  # type: ignore[arg-type]
    assert_untouched(language_model, before)
    model = convert(prepare(copy.deepcopy(language_model), found.policy))
    save_converted(model, tmp_path)
    size = file_bytes(tmp_path / "model.safetensors")
    assert size <= found.file_bytes
    if budget == "47KB":
        assert size <= 47_000
    elif budget == "60%":
        assert size <= 0.6 * sum(p.nbytes for p in language_model.parameters())
    else:
        assert found.bits_per_weight <= float(budget.removesuffix("bpw"))
    again = load_converted(copy.deepcopy(language_model), tmp_path)
    ids = text(1)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_what_is_reported_is_what_the_policy_does(language_model: nn.Module) -> None:
    found = auto_policy(language_model, text(2), budget="4.2bpw", **QUICK)  # type: ignore[arg-type]
    prepared = prepare(copy.deepcopy(language_model), found.policy)
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in text(2):
            ours, _ = predictions(prepared, prepared(batch["input_ids"]), batch)
            theirs, _ = predictions(language_model, language_model(batch["input_ids"]), batch)
            p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
            total, count = total + float((p.exp() * (p - q)).sum()), count + len(p)
    assert found.measured.kl == pytest.approx(total / count, rel=1e-4)
    assert found.predicted == pytest.approx(
        sum(found.sensitivity.damage(group, scheme) for group, scheme in found.schemes.items())
    )
    assert found.measurements <= 24


def test_the_same_input_gives_the_same_policy(classifier: nn.Module) -> None:
    first = auto_policy(classifier, images(2), budget="4.5bpw", **QUICK)  # type: ignore[arg-type]
    torch.rand(11)
    second = auto_policy(classifier, images(2), budget="4.5bpw", **QUICK)  # type: ignore[arg-type]
    assert first == second
    assert str(first) == str(second)
    assert first.to_dict()["rules"] == {rule.pattern: str(rule.scheme) for rule in first.policy.rules}


def test_it_is_no_worse_than_any_uniform_policy_of_its_size(language_model: nn.Module) -> None:
    choices = choices_of(language_model, SCHEMES)
    measure = Measure(language_model, text(2))
    for scheme in SCHEMES[1:4]:
        plan = choices.plans[scheme]
        layers = {layer.name: layer for layer in plan.quantized}
        used = [next(o for o in g.options if o.layers == tuple(layers[n] for n in g.layers)) for g in choices.groups]
        bits = 8 * sum(option.bytes for option in used) / choices.ledger.weights
        found = auto_policy(language_model, text(2), budget=f"{bits + 1e-6:.6f}bpw", **QUICK)  # type: ignore[arg-type]
        assert found.measured.kl <= measure.of(plan.quantized).kl


def test_measuring_whole_policies_improves_on_single_damages(language_model: nn.Module) -> None:
    options = {**QUICK, "measurements": 1}
    solved = auto_policy(language_model, text(2), budget="3.7bpw", **options)  # type: ignore[arg-type]
    searched = auto_policy(
        language_model, text(2), budget="3.7bpw", known=solved.sensitivity.entries, **{**QUICK, "measurements": 60}
    )  # type: ignore[arg-type]
    assert solved.measurements == 1
    assert searched.measured.kl <= solved.measured.kl


@pytest.mark.parametrize("budget", ["4.1bpw", "4.6bpw", "5.3bpw", "6bpw"])
def test_fused_layers_are_never_broken_apart(language_model: nn.Module, budget: str) -> None:
    found = auto_policy(language_model, text(1), budget=budget, method="gradient", **QUICK)  # type: ignore[arg-type]
    plan = found.policy.plan(language_model)
    for block in range(2):
        for parent, names in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
            assert len({plan[f"model.layers.{block}.{parent}.{name}"].scheme for name in names}) == 1


def test_a_shared_weight_takes_one_scheme_and_is_paid_once() -> None:
    model = Shared()
    batches = [torch.randn(16, 32, generator=torch.Generator().manual_seed(0))]
    found = auto_policy(model, batches, budget="6.2bpw", candidates=["w8a16", "w3a16-g32"], progress=False)
    plan = found.policy.plan(model)
    assert plan["a"].scheme == plan["b"].scheme == plan["c"].scheme
    assert plan["b"].tied_to == plan["c"].tied_to == "a"
    assert found.bits_per_weight == 8 * found.bytes / 2048 <= 6.2
    convert(model, found.policy)


def test_a_tied_head_and_embedding_may_take_part_together(language_model: nn.Module, tmp_path: Path) -> None:
    found = auto_policy(language_model, text(1), budget="4.6bpw", embeddings=True, method="gradient", **QUICK)  # type: ignore[arg-type]
    plan = found.policy.plan(language_model)
    assert plan["lm_head"].scheme == plan["model.embed_tokens"].scheme is not None
    save_converted(convert(copy.deepcopy(language_model), found.policy), tmp_path)
    assert file_bytes(tmp_path / "model.safetensors") <= found.file_bytes


def test_the_smallest_model_within_a_drop(language_model: nn.Module) -> None:
    sizes = []
    for drop in (0.3, 0.05, 0.005):
        found = auto_policy(language_model, text(2), max_drop=drop, **QUICK)  # type: ignore[arg-type]
        assert found.measured.kl <= drop
        assert found.target == f"max_drop={drop}"
        sizes.append(found.bytes)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_a_drop_of_perplexity_is_measured_on_the_labels(language_model: nn.Module) -> None:
    found = auto_policy(language_model, text(2), max_drop="5%", **QUICK)  # type: ignore[arg-type]
    with torch.no_grad():
        losses = [
            [float(m(**batch).loss) for batch in text(2)]
            for m in (language_model, prepare(copy.deepcopy(language_model), found.policy))
        ]
    increase = (sum(losses[1]) - sum(losses[0])) / 2
    assert found.measured.loss_increase == pytest.approx(increase, abs=1e-4)
    assert increase <= 0.0488
    with pytest.raises(DataError, match="no labels"):
        auto_policy(Classifier(), [torch.zeros(4, 32)], max_drop="1%", **QUICK)  # type: ignore[arg-type]


def test_a_figure_for_each_image_class_model(classifier: nn.Module) -> None:
    found = auto_policy(classifier, images(2), budget="4.5bpw", **QUICK)  # type: ignore[arg-type]
    assert found.measured.loss_increase is not None
    assert "classifier" not in found.schemes, "a head stays"
    mapped = [{"x": x, "labels": y} for x, y in images(2)]
    assert auto_policy(classifier, mapped, budget="4.5bpw", **QUICK) == found  # type: ignore[arg-type]


def test_keeping_is_a_candidate_like_any_other(classifier: nn.Module) -> None:
    found = auto_policy(classifier, images(1), budget="31bpw", candidates=["w4a16", "keep"], progress=False)
    assert "keep" in found.schemes.values()
    plan = found.policy.plan(classifier)
    assert {layer.name for layer in plan.kept} > {name for name, scheme in found.schemes.items() if scheme == "keep"}


def test_static_activations_in_a_policy(classifier: nn.Module) -> None:
    found = auto_policy(classifier, images(1), budget="8.5bpw", candidates=["w8a8-static"], progress=False)
    model = prepare(copy.deepcopy(classifier), found.policy)
    with calibrating(model), torch.no_grad():
        model(images(1)[0][0])
    assert 0 < found.measured.kl < 0.1


@pytest.mark.parametrize(
    ("budget", "said"),
    [("2bpw", r"least budget is \d\.\d\dbpw"), ("3%", r"least budget is \d+\.\d%"), ("1KB", r"is \d+\.\d\dKiB")],
)
def test_an_impossible_budget_names_the_least_that_is_possible(
    language_model: nn.Module, budget: str, said: str
) -> None:
    with pytest.raises(PolicyError, match=said) as refused:
        auto_policy(language_model, text(1), budget=budget, **QUICK)  # type: ignore[arg-type]
    least = str(refused.value).split("least budget is ")[1].split(";")[0]
    found = auto_policy(language_model, text(1), budget=least, method="gradient", **QUICK)  # type: ignore[arg-type]
    assert set(found.schemes.values()) <= {"w2a16-g16-asym", "w2a16-g43-asym"}


def test_mistakes(classifier: nn.Module) -> None:
    for options in ({}, {"budget": "40%", "max_drop": 0.1}):
        with pytest.raises(ConfigError, match="either budget"):
            auto_policy(classifier, images(1), **options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no calibration data"):
        auto_policy(classifier, [], budget="5bpw")
    with pytest.raises(ConfigError, match="at least 1"):
        auto_policy(classifier, images(1), budget="5bpw", measurements=0)
    with pytest.raises(PolicyError, match=r"max_drop=1e-09.*add 'keep'"):
        auto_policy(classifier, images(1), max_drop=1e-9, candidates=["w2a16"], progress=False)


def test_a_ranking_and_a_policy_speak_of_the_same_groups() -> None:
    model = llama()
    ranking = rank_layers(model, text(1), SCHEMES, method="gradient", progress=False)
    found = auto_policy(model, text(1), budget="5bpw", method="gradient", **QUICK)  # type: ignore[arg-type]
    assert found.sensitivity == ranking
    assert list(found.schemes) == list(dict.fromkeys(entry.group for entry in ranking.entries))
    assert Policy.coerce(found.policy) is found.policy
