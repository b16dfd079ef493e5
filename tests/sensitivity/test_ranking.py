"""Single damages are what a hand-made forward pass gives, the estimate ranks as they do, and nothing is left behind."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from qat_plugin.errors import CheckpointError, ConfigError, DataError, PolicyError, SchemeError
from qat_plugin.numerics import round_to_nearest
from qat_plugin.ptq import METHODS
from qat_plugin.scheme import Scheme
from qat_plugin.sensitivity import Entry, Measure, Sensitivity, auto_policy, choices_of, rank_layers, ranked
from tests.qat.images import residual

from .subjects import assert_untouched, images, llama, snapshot, text

SCHEMES = ("w8a16", "w4a16-g32-asym", "w3a16-g16-asym", "w2a16-g16-asym")


def kl(reference: Tensor, logits: Tensor) -> float:
    """Mean KL(reference || logits) over rows, in float64."""
    ours, theirs = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
    return float(F.kl_div(ours, theirs, reduction="batchmean", log_target=True))


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32-asym", "w4a16-g16", "w3a16-g16-asym", "w2a16"])
def test_the_damage_of_one_layer_is_that_of_its_dequantized_weight(classifier: nn.Module, scheme: str) -> None:
    found = rank_layers(classifier, images(), [scheme], progress=False)
    x = torch.cat([x for x, _ in images()])
    with torch.no_grad():
        first = classifier.first(x).relu()
        spelled = next(entry.scheme for entry in found.entries if entry.group == "middle")
        weight = round_to_nearest(classifier.middle.weight, Scheme.parse(spelled)).dequantize()
        middle = F.linear(first, weight, classifier.middle.bias).relu()
        logits = classifier.classifier(classifier.last_hidden(middle).relu())
        expected = kl(classifier(x), logits)
    assert found.damage("middle", spelled) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_int8_activations_are_rounded_token_by_token(classifier: nn.Module) -> None:
    found = rank_layers(classifier, images(), ["w8a8"], progress=False)
    x = torch.cat([x for x, _ in images()])
    with torch.no_grad():
        first = classifier.first(x).relu()
        step = first.abs().amax(-1, keepdim=True) / 127
        rounded = torch.round(first / step.clamp_min(1e-30)).clamp(-127, 127) * step
        weight = round_to_nearest(classifier.middle.weight, Scheme.parse("w8a8")).dequantize()
        middle = F.linear(rounded, weight, classifier.middle.bias).relu()
        expected = kl(classifier(x), classifier.classifier(classifier.last_hidden(middle).relu()))
    assert found.damage("middle", "w8a8") == pytest.approx(expected, rel=0.02)


def test_a_language_model_is_scored_where_there_is_a_next_token(language_model: nn.Module) -> None:
    batches = text(2)
    batches[0]["labels"][:, :9] = -100
    found = rank_layers(language_model, batches, ["w3a16-g16-asym"], progress=False)
    name = "model.layers.1.self_attn.o_proj"
    changed = copy.deepcopy(language_model)
    layer = changed.get_submodule(name)
    layer.weight.data = round_to_nearest(layer.weight.data, Scheme.parse("w3a16-g16-asym")).dequantize()
    rows, references = [], []
    with torch.no_grad():
        for batch in batches:
            scored = batch["labels"][:, 1:] != -100
            rows.append(changed(batch["input_ids"]).logits[:, :-1][scored])
            references.append(language_model(batch["input_ids"]).logits[:, :-1][scored])
    assert found.tokens == sum(map(len, rows)) == 6 * 7 + 6 * 15
    assert found.damage(name, "w3a16-g16-asym") == pytest.approx(kl(torch.cat(references), torch.cat(rows)), rel=1e-4)


def test_without_labels_the_tokens_are_the_labels(language_model: nn.Module) -> None:
    with_labels = rank_layers(language_model, text(1), ["w2a16"], progress=False)
    without = rank_layers(language_model, text(1, labels=False), ["w2a16"], progress=False)
    assert without.entries == with_labels.entries


@pytest.mark.parametrize("subject", ["classifier", "language_model"])
def test_the_estimate_ranks_as_the_measurement_does(subject: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(subject)
    batches = images(8) if subject == "classifier" else text(8)
    schemes = ("w4a16-g32-asym", "w4a16-g16-asym", "w3a16-g16-asym")
    exact = rank_layers(model, batches, schemes, progress=False)
    estimate = rank_layers(model, batches, schemes, method="gradient", progress=False)
    assert [(e.group, e.scheme, e.bytes) for e in exact.entries] == [
        (e.group, e.scheme, e.bytes) for e in estimate.entries
    ]
    pairs = [(a.damage, b.damage) for a, b in zip(exact.entries, estimate.entries, strict=True)]
    assert spearmanr(*zip(*pairs, strict=True)).statistic > 0.9
    assert 0.5 < sum(b for _, b in pairs) / sum(a for a, _ in pairs) < 2, "the same unit, nats a prediction"
    assert estimate.passes == len(batches)
    assert exact.passes == len(batches) * len(exact.entries)


def test_the_estimate_counts_int8_activations(classifier: nn.Module) -> None:
    exact = rank_layers(classifier, images(), ["w8a8"], progress=False)
    estimate = rank_layers(classifier, images(), ["w8a8"], method="gradient", progress=False)
    weights = rank_layers(classifier, images(), ["w8a16"], method="gradient", progress=False)
    for entry in estimate.entries:
        assert entry.damage >= weights.damage(entry.group, "w8a16")
    assert estimate.damage("middle", "w8a8") == pytest.approx(exact.damage("middle", "w8a8"), rel=1)


@pytest.mark.parametrize("method", ["kl", "gradient"])
@pytest.mark.parametrize("subject", ["classifier", "language_model"])
def test_the_same_input_gives_the_same_figures_and_leaves_no_trace(
    method: str, subject: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(subject)
    batches = images(2) if subject == "classifier" else text(2)
    next(model.parameters()).requires_grad_(False)
    model.train()
    before = snapshot(model)
    first = rank_layers(model, batches, SCHEMES, method=method, progress=False)  # type: ignore[arg-type]
    assert_untouched(model, before)
    torch.rand(7)
    assert rank_layers(model, batches, SCHEMES, method=method, progress=False) == first  # type: ignore[arg-type]
    model.eval()
    next(model.parameters()).requires_grad_(True)


def test_a_static_scheme_is_calibrated_on_the_batches(classifier: nn.Module) -> None:
    static = rank_layers(classifier, images(), ["w8a8-static"], progress=False)
    assert all(0 < entry.damage < 0.1 for entry in static.entries)
    with pytest.raises(ConfigError, match="w8a8-static"):
        rank_layers(classifier, images(), ["w8a8-static"], method="gradient", progress=False)


def test_what_is_known_is_not_measured_again(classifier: nn.Module) -> None:
    choices = choices_of(classifier, SCHEMES)
    told: list[Entry] = []
    whole = ranked(Measure(classifier, images(1)), choices, progress=False, on_entry=told.append)
    assert tuple(told) == whole.entries
    measure, later = Measure(classifier, images(1)), []
    known = [replace(told[0], damage=42.0), *told[1:5]]
    again = ranked(measure, choices, progress=False, known=known, on_entry=later.append)
    assert tuple(later) == whole.entries[5:]
    assert measure.measured == len(whole.entries) - 5
    assert again.entries[0].damage == 42.0


def test_logits_beyond_memory_are_kept_in_a_file(classifier: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = rank_layers(classifier, images(3), ["w4a16"], progress=False)
    monkeypatch.setattr("qat_plugin.sensitivity.damage._KEPT", 64 * 6 * 4)
    assert rank_layers(classifier, images(3), ["w4a16"], progress=False) == expected


@pytest.mark.parametrize("quantize", METHODS)
def test_every_method_of_calibration_measures_or_says_why_not(language_model: nn.Module, quantize: str) -> None:
    before = snapshot(language_model)
    try:
        found = rank_layers(language_model, text(2), ["w4a16-g16-asym"], quantize=quantize, progress=False)
    except ConfigError as refusal:
        told = str(refusal)
    else:
        told = ""
        assert found.quantize == quantize
        assert all(entry.damage > 0 for entry in found.entries)
    assert not told or "one at a time" in told
    assert_untouched(language_model, before)


@pytest.mark.parametrize("quantize", ["awq", "awq-gptq", "smoothquant"])
def test_methods_that_scale_the_layers_before_are_refused_before_anything_runs(
    classifier: nn.Module, quantize: str
) -> None:
    """Their scales leave a layer's own weight: what one layer costs alone is not what it costs in the model."""
    calls: list[object] = []
    classifier.register_forward_pre_hook(lambda *_: calls.append(1))
    text = rf"quantize='{quantize}' divides .*one at a time.*one of rtn, mse, hqq, gptq, .*method='{quantize}'"
    with pytest.raises(ConfigError, match=text):
        rank_layers(classifier, images(1), ["w4a16"], quantize=quantize, progress=False)
    with pytest.raises(ConfigError, match=text):
        auto_policy(classifier, images(1), budget="6bpw", candidates=["w4a16", "w8a16"], quantize=quantize)
    assert not calls


@pytest.mark.parametrize("subject", ["classifier", "language_model"])
def test_integers_found_by_calibration_stand_in_for_rounding(subject: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(subject)
    before = snapshot(model)
    plan = choices_of(model, ["w4a16-g16-asym"]).plans["w4a16-g16-asym"]
    measure = Measure(model, images(2) if subject == "classifier" else text(2))
    rounded = measure.of(plan.quantized), measure.of(plan.quantized[1:2])
    measure._calibrate(plan)  # what is done for every method but rounding to nearest
    assert all(measure.numbers(layer) is not None for layer in plan.quantized)
    held = measure.of(plan.quantized), measure.of(plan.quantized[1:2])
    assert held == rounded
    assert_untouched(model, before)


def test_saved_and_read_back(classifier: nn.Module) -> None:
    found = rank_layers(classifier, images(1), SCHEMES, progress=False)
    assert Sensitivity.from_dict(found.to_dict()) == found
    with pytest.raises(CheckpointError, match="entries"):
        Sensitivity.from_dict({"method": "kl"})


def test_the_table_has_a_row_a_group_with_the_worst_first(classifier: nn.Module) -> None:
    found = rank_layers(classifier, images(1), SCHEMES, progress=False)
    lines = found.table().splitlines()
    totals = {entry.group: 0.0 for entry in found.entries}
    for entry in found.entries:
        totals[entry.group] += entry.damage
    assert [line.split()[0] for line in lines[2:-1]] == sorted(totals, key=lambda name: -totals[name])
    assert "w8a16" in lines[0]
    worst = found.ranked()
    assert [entry.damage for entry in worst] == sorted((e.damage for e in found.entries), reverse=True)


def test_an_interruption_leaves_the_model_as_it_was(classifier: nn.Module) -> None:
    before = snapshot(classifier)
    choices = choices_of(classifier, SCHEMES)

    def stop(_: Entry) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ranked(Measure(classifier, images(1)), choices, progress=False, on_entry=stop)
    assert_untouched(classifier, before)


def test_mistakes(classifier: nn.Module) -> None:
    with pytest.raises(DataError, match="no calibration data"):
        rank_layers(classifier, [], SCHEMES)
    with pytest.raises(ConfigError, match="'hessian' is not one of kl, gradient"):
        rank_layers(classifier, images(1), SCHEMES, method="hessian")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'magic' is not one of rtn"):
        rank_layers(classifier, images(1), SCHEMES, quantize="magic")
    with pytest.raises(ConfigError, match="'rows' is not one of fused, layers"):
        rank_layers(classifier, images(1), SCHEMES, groups="rows")  # type: ignore[arg-type]
    with pytest.raises(SchemeError, match="unknown scheme 'w4a16-32'"):
        rank_layers(classifier, images(1), ["w4a16-32"])
    with pytest.raises(PolicyError, match="candidate"):
        rank_layers(classifier, images(1), ["keep"])
    with pytest.raises(PolicyError, match="frozen base"):
        rank_layers(classifier, images(1), ["nf4"])
    with pytest.raises(PolicyError, match="all are kept"):
        rank_layers(classifier, images(1), SCHEMES, keep=["type:Linear"])
    with pytest.raises(PolicyError, match="matched no module"):
        rank_layers(classifier, images(1), SCHEMES, keep=["no_such_layer"])
    with pytest.raises(DataError, match="none of them fits"):
        rank_layers(llama(), [{"pixels": torch.zeros(1)}], SCHEMES)


@pytest.mark.parametrize("quantize", ["rtn", "gptq"])
def test_batch_norms_that_were_folded_while_measuring_are_as_they_were(quantize: str) -> None:
    model, batches = residual(), [torch.randn(8, 3, 8, 8) for _ in range(2)]
    model.fc_bn.train()
    before = snapshot(model)
    found = rank_layers(model, batches, ["w8a8-static"], quantize=quantize, progress=False)
    assert all(0 <= entry.damage < 0.5 for entry in found.entries)
    assert_untouched(model, before)
