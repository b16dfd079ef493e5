"""Each sentence both ways: said when it is true, and its opposite said when that is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from qat_plugin.measure import ClassifierMetrics
from qat_plugin.report import MERGED, NF4_BASE, QAT, QLORA, Report, Row, verdict_of, with_verdict

from .conftest import PLAN, ladder, layer, metrics, proof, timed

Make = Callable[..., Report]


def said(report: Report, start: str) -> str:
    """The one sentence that starts so."""
    [sentence] = [sentence for sentence in verdict_of(report) if sentence.startswith(start)]
    return sentence


def says(report: Report, part: str) -> bool:
    return any(part in sentence for sentence in verdict_of(report))


def test_an_empty_report_has_nothing_to_say() -> None:
    assert verdict_of(Report("nothing")) == []


def test_qat_is_better_than_fine_tuning_then_ptq(make_report: Make) -> None:
    qat = metrics(1.389, noise=0.02, seed=5)
    sentence = said(make_report(rows=ladder(QAT=qat)), "QAT is better than fine-tuning, then PTQ")
    assert "perplexity 4.0108 against 4.3319 " in sentence
    apart = torch.tensor(qat.losses, dtype=torch.float64) - torch.tensor(metrics(1.466).losses, dtype=torch.float64)
    half = 2.0227 * apart.std().item() / math.sqrt(40)
    assert f"QAT's loss is 0.077 +/- {half:.2g} nats a token lower, 95% over 40 windows" in sentence
    assert not says(make_report(), "within noise")


def test_qat_within_noise_is_not_worth_its_cost(make_report: Make) -> None:
    close = ladder(QAT=metrics(1.465, noise=0.02, seed=5))
    sentence = said(make_report(rows=close), "PTQ is within noise of QAT here: QAT is not worth its cost")
    assert "against 4.3319 of fine-tuning, then PTQ" in sentence
    assert not says(make_report(rows=close), "QAT is better")


def test_equal_losses_are_said_to_be_equal(make_report: Make) -> None:
    sentence = said(make_report(rows=ladder(QAT=1.466)), "PTQ is within noise of QAT here: QAT is not worth its cost")
    assert sentence.endswith("with equal losses on all 40 windows).")


def test_the_same_gain_is_beyond_noise_where_the_noise_is_small(make_report: Make) -> None:
    assert says(make_report(rows=ladder(QAT=metrics(1.465, noise=0.001, seed=5))), "QAT is better than")


def test_qat_worse_than_ptq_is_said(make_report: Make) -> None:
    worse = make_report(rows=ladder(QAT=1.6))
    assert "ship the PTQ model" in said(worse, "QAT is worse than fine-tuning, then PTQ: perplexity 4.9530")


def test_without_paired_losses_noise_is_admitted_to_be_unknown(make_report: Make) -> None:
    unpaired = replace(metrics(1.389), losses=(), counts=())
    assert "whether that is more than noise is not known" in said(make_report(rows=ladder(QAT=unpaired)), "QAT has")
    assert not says(make_report(), "not known")


def test_without_the_honest_baseline_the_gain_is_doubted(make_report: Make) -> None:
    unfair = make_report(rows=ladder(fine_tuned=None, fine_tuned_PTQ=None))
    assert says(unfair, "QAT is better than PTQ")
    assert says(unfair, "may be that of the training and not of the quantizer")
    assert not says(make_report(), "may be that of the training")


def test_the_recovered_share_is_against_the_fine_tuned_model(make_report: Make) -> None:
    share = (math.exp(1.466) - math.exp(1.389)) / (math.exp(1.466) - math.exp(1.36))
    assert f"{100 * share:.2f}% of the perplexity that PTQ loses" in said(make_report(), "QAT recovers")


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ({"QAT": 1.5}, "QAT recovers none of the perplexity"),
        ({"QAT": 1.3}, "QAT recovers all of the perplexity that PTQ loses and more: it ends better than fine-tuned"),
        ({"fine_tuned_PTQ": 1.36}, "PTQ loses no measurable perplexity here, so there is nothing for QAT to recover"),
        ({"fine_tuned_PTQ": 1.35}, "PTQ loses no measurable perplexity here"),
        ({"fine_tuned_PTQ": metrics(1.3605, noise=0.05, seed=3)}, "PTQ loses no measurable perplexity here"),
        ({"fine_tuned": None}, "QAT recovers all of the perplexity that PTQ loses and more: it ends better than float"),
    ],
)
def test_the_recovered_share_at_its_edges(make_report: Make, losses: dict[str, Any], sentence: str) -> None:
    report = make_report(rows=ladder(**losses))
    assert says(report, sentence)
    assert not says(report, "% of the perplexity that PTQ loses")


def test_an_infinite_perplexity_makes_no_share(make_report: Make) -> None:
    broken = replace(metrics(800.0), perplexity=math.inf)
    assert not says(make_report(rows=ladder(fine_tuned_PTQ=broken)), "recovers")


def test_what_training_alone_does_is_said(make_report: Make) -> None:
    assert "from perplexity 4.6646 to 3.8962" in said(make_report(), "Fine-tuning alone takes the float model")
    assert says(make_report(rows=ladder(fine_tuned=1.7)), "Fine-tuning alone makes the float model worse")
    unchanged = make_report(rows=ladder(fine_tuned=metrics(1.54, noise=0.1, seed=2)))
    assert not says(unchanged, "Fine-tuning alone")


@pytest.mark.parametrize(
    ("after", "sentence"),
    [
        (1.389, "The converted model has exactly the perplexity of QAT (perplexity 4.0108)"),
        (1.389 + 1e-6, "The converted model keeps QAT's perplexity to 4 decimals"),
        (
            1.389 + 1e-4,
            "The converted model does not keep QAT's perplexity: perplexity 4.0108 became 4.0112",
        ),
        (1.380, "The converted model does not keep QAT's perplexity"),
    ],
)
def test_whether_conversion_keeps_what_was_trained(make_report: Make, after: float, sentence: str) -> None:
    assert said(make_report(rows=ladder(converted=after)), "The converted model").startswith(sentence)


def test_whether_the_file_is_the_model(make_report: Make) -> None:
    assert says(make_report(), "Reloaded from disk, the model gives exactly the losses of the converted one.")
    assert says(make_report(rows=ladder(reloaded=1.389 + 1e-9)), "is not the converted one: its loss differs by +1e-09")


def test_windows_that_differ_are_found_under_an_equal_mean(make_report: Make) -> None:
    original = metrics(1.389)
    swapped = replace(original, losses=(original.losses[1], original.losses[0], *original.losses[2:]))
    assert says(make_report(rows=ladder(converted=original, reloaded=swapped)), "is not the converted one")


@pytest.mark.parametrize(
    "broken",
    [{"weight_difference": 1e-8}, {"weight_difference": math.nan}, {"output_error": 0.1}, {"output_error": math.nan}],
)
def test_a_layer_that_broke_the_promise_is_named(make_report: Make, broken: dict[str, float]) -> None:
    report = make_report(proof=[proof("good"), proof("bad", **broken)])
    assert says(report, "1 of 2 converted layers are not what training saw: bad")
    assert not says(report, "2 of 2")


def test_the_proof_is_summed_up(make_report: Make) -> None:
    assert says(make_report(), "2 of 2 converted layers hold exactly the weights that training saw")
    assert not says(make_report(), "random")
    assert says(
        make_report(proof=[proof("a"), proof("b", inputs="random")]),
        "Outputs of 1 of these layers were checked on random",
    )
    assert not says(make_report(proof=()), "converted layers")


@pytest.mark.parametrize(
    ("converted", "environment", "sentence"),
    [
        (0.001, {"device": "cpu"}, "This model is faster than bf16 on this CPU at batch 1, 1 token (2.00x)."),
        (0.00333, {"device": "cpu"}, "This model is slower than bf16 on this CPU at batch 1, 1 token (0.60x)."),
        (0.00333, {"device": "cuda:0"}, "This model is slower than bf16 on this GPU at batch 1, 1 token (0.60x)."),
        (0.00205, {}, "This model is as fast as bf16, no faster, on this device at batch 1, 1 token (0.98x)."),
    ],
)
def test_speed_against_bf16(make_report: Make, converted: float, environment: dict[str, str], sentence: str) -> None:
    latency = timed(float=0.004, bf16=0.002, converted=converted)
    assert sentence in verdict_of(make_report(latency=latency, environment=environment))


def test_a_slow_bf16_is_no_flattering_rival(make_report: Make) -> None:
    slow = make_report(latency=timed(float=0.001, bf16=0.003, converted=0.002))
    assert says(slow, "faster than bf16")
    assert says(slow, "bf16 is itself slower than the float model as trained there (0.33x)")
    assert says(slow, "the converted model runs at 0.50x")
    assert not says(make_report(), "bf16 is itself slower")


def test_without_bf16_the_rival_is_the_float_model(make_report: Make) -> None:
    assert says(
        make_report(latency=timed(float=0.004, converted=0.001)), "faster than the float model as trained on this CPU"
    )
    assert not says(make_report(latency=timed(converted=0.001)), "This model is")


def test_size_both_ways(make_report: Make) -> None:
    assert (
        said(make_report(), "The model became 5.71x smaller than as it was trained")
        == "The model became 5.71x smaller than as it was trained: 683.6 KiB in memory against 3.815 MiB; 5.60 bits a "
        "weight, where bf16 takes 16."
    )
    rows = tuple(replace(row, bytes_memory=4_000_000) for row in ladder())
    assert says(make_report(rows=rows), "The model did not become smaller: 3.815 MiB in memory against 3.815 MiB")


def test_layers_left_in_float_are_counted_with_their_bytes(make_report: Make) -> None:
    share = 200_000 / (200_000 + 3 * 112_500 + 200_500)
    assert (
        said(make_report(), "2 of 6 layers stay in float")
        == f"2 of 6 layers stay in float and hold {100 * share:.2f}% of the layers' bytes: model.embed_tokens, lm_head."
    )
    heavy = make_report(plan=[layer("embedding", "fp16", 900, 450), *PLAN[1:2], layer("head", None, 10**6, 10**6)])
    assert said(heavy, "2 of 3 layers stay").endswith("head, embedding; they, not the quantized ones, decide the size.")
    assert says(make_report(plan=PLAN[1:5]), "All 4 layers of the plan are quantized.")


def classifier(loss: float, accuracy: float) -> ClassifierMetrics:
    of_language = metrics(loss)
    return ClassifierMetrics(loss, accuracy, 400, losses=of_language.losses, counts=(10,) * len(of_language.counts))


def test_a_classifier_is_judged_by_its_accuracy(make_report: Make) -> None:
    rows = ladder(
        float=classifier(0.30, 0.90), PTQ=classifier(0.5, 0.85), fine_tuned=classifier(0.2, 0.95),
        fine_tuned_PTQ=classifier(0.4, 0.91), QAT=classifier(0.25, 0.94),
        converted=classifier(0.25, 0.94), reloaded=classifier(0.25, 0.94),
    )  # fmt: skip
    report = make_report(rows=rows)
    assert says(report, "QAT is better than fine-tuning, then PTQ: accuracy 94.00% against 91.00%")
    assert says(report, "nats an example lower, 95% over 40 batches")
    assert says(report, "QAT recovers 75.00% of the accuracy that PTQ loses")
    assert says(report, "The converted model has exactly the accuracy of QAT (accuracy 94.00%)")


def test_a_row_without_metrics_is_not_judged(make_report: Make) -> None:
    report = make_report(rows=[Row(QAT), Row("converted", metrics(1.0))], latency=(), plan=(), proof=())
    assert verdict_of(report) == []


def test_the_verdict_is_stored_in_the_report_and_does_not_depend_on_itself(make_report: Make) -> None:
    report = make_report()
    judged = with_verdict(report)
    assert list(judged.verdict) == verdict_of(report) == verdict_of(judged)
    assert replace(judged, verdict=()) == report


def adapted(merged: Any, trained: float = 2.2222) -> Report:
    """QLoRA's rows, the merged one given."""
    return Report("a merge", rows=(Row(NF4_BASE, metrics(2.2250)), Row(QLORA, metrics(trained)), Row(MERGED, merged)))


def test_what_a_merge_keeps_is_not_known_without_an_estimate_of_noise() -> None:
    few = replace(metrics(2.4506), losses=(2.4, 2.5), counts=(100, 100))
    sentence = said(adapted(few), "Whether the merged model keeps what QLoRA learned is not known")
    assert "on too few: perplexity 11.5953 against 9.2276" in sentence
    assert not says(adapted(few), "keeps what QLoRA learned, within noise")


def test_a_loss_that_noise_could_hide_is_not_said_to_be_kept() -> None:
    wide = adapted(metrics(2.4506, noise=2.0, seed=5))
    assert says(wide, "is not known, the held-out text is too short to tell within 0.")
    assert not says(wide, "The merged model keeps")
    assert says(adapted(metrics(2.2223, noise=0.01, seed=5)), "The merged model keeps what QLoRA learned, within noise")
    assert says(adapted(metrics(2.4506, noise=0.01, seed=5)), "The merged model loses some of what QLoRA learned")
