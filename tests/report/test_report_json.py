from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_plugin.errors import CheckpointError, QatError
from qat_plugin.measure import ClassifierMetrics, Latency, LMMetrics
from qat_plugin.report import (
    SCHEMA,
    LatencyRow,
    Report,
    Row,
    from_dict,
    from_json,
    latency_rows,
    read_report,
    to_dict,
    to_json,
    with_verdict,
)

Make = Callable[..., Report]


def strict(text: str) -> Any:
    """What a parser that knows no NaN and no Infinity reads."""

    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_report_survives_both_forms(make_report: Make) -> None:
    report = with_verdict(make_report())
    assert from_dict(to_dict(report)) == report
    assert from_json(to_json(report)) == report


numbers = st.floats(allow_nan=False)


@settings(max_examples=40, deadline=None)
@given(
    loss=numbers, kl=numbers | st.none(), names=st.dictionaries(st.text(max_size=8), numbers, max_size=4), p50=numbers
)
def test_no_number_is_rounded_and_none_is_lost(
    loss: float, kl: float | None, names: dict[str, float], p50: float
) -> None:
    row = Row("QAT", LMMetrics(loss, math.inf, 3, kl, None, (loss, 0.1), (1, 2)), bytes_memory=2**60)
    report = Report("t", rows=(row,), sqnr=names, latency=(LatencyRow("a/b~c", "bf16", Latency(p50, p50, 1)),))
    text = to_json(report)
    strict(text)
    assert from_json(text) == report


def test_numbers_are_those_that_were_measured(make_report: Make) -> None:
    report = make_report()
    values = strict(to_json(report))
    assert values["schema"] == SCHEMA
    assert values["sqnr"]["model.layers.1.mlp.up_proj"] == 0.30000000000000004
    rows = {row["name"]: row for row in values["rows"]}
    assert rows["QAT"]["metrics"]["loss"] == report.row("QAT").metrics.loss  # type: ignore[union-attr]
    assert rows["QAT"]["metrics"]["kind"] == "language"
    assert rows["converted"]["bits_per_weight"] == 8 * 700_000 / 1_000_000
    assert rows["PTQ"]["delta"] == rows["PTQ"]["metrics"]["perplexity"] - rows["float"]["metrics"]["perplexity"]
    assert rows["float"]["delta"] == 0.0


def test_infinite_and_undefined_values_are_null_and_keep_their_meaning(make_report: Make) -> None:
    report = make_report(sqnr={"a/b": math.inf, "zero": -math.inf, "unknown": math.nan, "plain": 1.5}, proof=())
    values = strict(to_json(report))
    assert values["sqnr"] == {"a/b": None, "zero": None, "unknown": None, "plain": 1.5}
    assert values["non_finite"] == {"/sqnr/a~1b": "inf", "/sqnr/zero": "-inf", "/sqnr/unknown": "nan"}
    back = from_json(to_json(report)).sqnr
    assert (back["a/b"], back["zero"], back["plain"]) == (math.inf, -math.inf, 1.5)
    assert math.isnan(back["unknown"])


def test_classifier_metrics_survive() -> None:
    report = Report("images", rows=(Row("float", ClassifierMetrics(0.1, 0.9, 7, losses=(0.1,), counts=(7,))),))
    assert from_json(to_json(report)) == report


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": "qat_plugin.report/99"}, "qat_plugin.report/99.*reads 'qat_plugin.report/1'"),
        ({"schema": None}, "schema None"),
        ({"colour": 1}, "colour"),
        ({"rows": [{"name": "QAT", "speed": 1}]}, "speed"),
        ({"rows": 3}, "malformed"),
        ({"rows": [{"name": "QAT", "metrics": {"kind": "poem", "losses": [], "counts": []}}]}, "'poem'"),
        ({"rows": [{"name": "QAT"}, {"name": "QAT"}]}, "'QAT' occurs more than once"),
        ({"latency": [{"workload": "w", "model": "bf16", "p50": 1.0}]}, "p95"),
        ({"non_finite": {"/sqnr/absent/deep": "inf"}}, "absent"),
    ],
)
def test_a_report_of_another_form_is_refused(make_report: Make, change: dict[str, Any], said: str) -> None:
    values = {**json.loads(to_json(make_report())), **change}
    with pytest.raises(CheckpointError, match=said):
        from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_what_is_no_report_is_refused_with_the_files_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"report\.json: this is no report"):
        read_report(tmp_path / "report.json")


def test_a_missing_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.json"):
        read_report(tmp_path / "absent.json")


def test_rows_have_unique_names_and_are_found_by_them(make_report: Make) -> None:
    assert make_report().row("PTQ") is make_report().rows[1] or make_report().row("PTQ") == make_report().rows[1]
    assert make_report().row("GPTQ") is None
    with pytest.raises(QatError, match="'PTQ' occurs more than once"):
        Report("t", rows=(Row("PTQ"), Row("PTQ")))


def test_latency_rows_are_made_from_what_model_latency_returns() -> None:
    fast, slow = Latency(1.0, 2.0, 3), Latency(4.0, 5.0, 3)
    rows = latency_rows({"decode": {"bf16": slow, "converted": fast}, "prefill": {"bf16": slow}})
    report = Report("t", latency=rows)
    assert report.workloads() == ("decode", "prefill")
    assert report.latency_of("decode", "converted") == fast
    assert report.latency_of("prefill", "converted") is None


def test_bits_and_deltas_need_their_base(make_report: Make) -> None:
    report = make_report()
    converted = report.row("converted")
    assert converted is not None
    assert replace(report, parameters=None).bits_per_weight(converted) is None
    assert replace(report, rows=report.rows[1:]).delta(converted) is None
    assert report.delta(Row("x")) is None
