"""Facts that a reader must find in the rendered report, wherever the spaces are."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from qat_plugin.errors import ConfigError
from qat_plugin.measure import ClassifierMetrics
from qat_plugin.report import (
    Report,
    Row,
    environment,
    print_report,
    read_report,
    to_json,
    to_markdown,
    with_verdict,
    write_report,
)
from qat_plugin.report.plan import by_scheme, folded
from qat_plugin.report.units import in_bytes, percent, times

from .conftest import PLAN, layer, proof

Make = Callable[..., Report]


def cells(markdown: str, heading: str) -> list[list[str]]:
    """The table under a heading: header and rows, unescaped."""
    section = markdown.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    parsed = [[cell.strip().replace("\\", "") for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    assert all(len(row) == len(parsed[0]) for row in parsed)
    assert all(set(cell) <= {"-", ":"} for cell in parsed[1])
    return [parsed[0], *parsed[2:]]


def test_markdown_says_the_verdict_first_and_how_to_reproduce_last(make_report: Make) -> None:
    report = with_verdict(make_report())
    text = to_markdown(report)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    assert headings == ["qat_int4_tiny", "Verdict", "Ladder", "Size by scheme", "Latency", "Plan", "Proof",
                        "SQNR of the weights", "Environment", "Reproduce"]  # fmt: skip
    assert all(f"* {sentence}" in text for sentence in report.verdict)
    assert text.rstrip().endswith("```\nqat recipe=qat_int4_tiny seed=7\n```")


def test_the_ladder_holds_every_row_with_four_decimals(make_report: Make) -> None:
    header, *rows = cells(to_markdown(make_report()), "Ladder")
    assert [row[0] for row in rows] == [
        "float", "PTQ", "fine-tuned", "fine-tuned, then PTQ", "QAT", "converted", "reloaded"
    ]  # fmt: skip
    qat = dict(zip(header, rows[4], strict=True))
    assert qat == {
        "model": "QAT", "loss": "1.3890", "perplexity": "4.0108", "delta to float": "-0.6538", "KL to float": "0.01",
        "top-1 agreement": "97.00%", "in memory": "3.815 MiB", "on disk": "3.819 MiB", "bits/weight": "32.00",
    }  # fmt: skip
    assert rows[0][3] == "+0.0000"


def test_what_was_not_measured_is_a_dash_and_notes_are_kept() -> None:
    text = to_markdown(Report("t", rows=(Row("float", note="evaluated | elsewhere"),)))
    assert cells(text, "Ladder")[1] == ["float", *["-"] * 8]
    assert "float: evaluated \\| elsewhere" in text
    assert "## Latency" not in text


def test_a_classifier_has_accuracy_in_points() -> None:
    rows = (Row("float", ClassifierMetrics(0.5, 0.9, 10)), Row("QAT", ClassifierMetrics(0.6, 0.885, 10)))
    header, first, second = cells(to_markdown(Report("t", rows=rows)), "Ladder")
    assert header[2] == "accuracy"
    assert (first[2], first[3]) == ("90.00%", "+0.00 points")
    assert (second[2], second[3]) == ("88.50%", "-1.50 points")


def test_latency_is_in_milliseconds_with_the_speed_against_bf16(make_report: Make) -> None:
    _, *rows = cells(to_markdown(make_report()), "Latency")
    assert rows == [
        ["batch 1, 1 token", "float", "4.000 ms", "6.000 ms", "30", "0.50x"],
        ["batch 1, 1 token", "bf16", "2.000 ms", "3.000 ms", "30", "1.00x"],
        ["batch 1, 1 token", "converted", "1.000 ms", "1.500 ms", "30", "2.00x"],
    ]


def test_the_plan_folds_equal_blocks_and_gives_the_reason_of_each_kept_layer(make_report: Make) -> None:
    _, *rows = cells(to_markdown(make_report()), "Plan")
    by_name = {row[0]: row for row in rows}
    assert list(by_name) == [
        "model.embed_tokens", "model.layers.*.mlp.up_proj", "model.layers.3.mlp.up_proj", "lm_head"
    ]  # fmt: skip
    assert by_name["model.layers.*.mlp.up_proj"][1:3] == ["3", "w4a8-g32"]
    assert by_name["model.layers.3.mlp.up_proj"][-1] == "172 is not divisible by 32"
    assert by_name["model.embed_tokens"][2:3] + by_name["model.embed_tokens"][-1:] == ["kept", "embeddings stay float"]
    assert by_name["lm_head"][-1] == "the output head stays float; tied to model.embed_tokens"


def test_folding_and_summing_lose_no_layer_and_no_byte() -> None:
    for lines in (folded(PLAN), by_scheme(PLAN)):
        assert sum(line.count for line in lines) == len(PLAN)
        assert sum(line.bytes_before for line in lines) == sum(entry["bytes_before"] for entry in PLAN)
        assert sum(line.bytes_after for line in lines) == sum(entry["bytes_after"] for entry in PLAN)
    assert [line.scheme for line in by_scheme(PLAN)] == ["w4a8-g32", "w8a8", "kept"]


def test_only_a_whole_name_part_is_an_index() -> None:
    names = ["conv1", "conv2", "0", "1", "blocks.0.fc2", "blocks.1.fc2"]
    assert [line.name for line in folded(layer(name, "w8a8", 1, 1) for name in names)] == [
        "conv1", "conv2", "*", "blocks.*.fc2"
    ]  # fmt: skip


def test_a_plan_of_the_policy_room_is_understood(make_report: Make) -> None:
    from torch import nn

    from qat_plugin.policy import Policy

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    plan = Policy({"0": "w4a8-g32", "2": "w8a8"}, keep=["4"]).plan(model)
    report = make_report(plan=plan.to_list())
    _, *rows = cells(to_markdown(report), "Plan")
    assert [(row[0], row[2]) for row in rows] == [("0", "w4a8-g32"), ("2", "w8a8"), ("4", "kept")]
    assert "1 of 3 layers stay in float" in " ".join(with_verdict(report).verdict)


def test_the_worst_layers_come_first_and_the_cut_is_admitted(make_report: Make) -> None:
    sqnr = {f"layer{i}": float(40 - i) for i in range(15)} | {"same": math.inf, "far": -math.inf}
    text = to_markdown(make_report(sqnr=sqnr))
    _, *rows = cells(text, "SQNR of the weights")
    assert rows[:2] == [["far", "-inf dB"], ["layer14", "26.0 dB"]]
    assert len(rows) == 10
    assert "The 10 worst layers of 17; all are in report.json." in text.replace("\\", "")
    few = to_markdown(make_report(sqnr={"same": math.inf}))
    assert cells(few, "SQNR of the weights")[1:] == [["same", "equal"]]
    assert "layers of 1" not in few


def test_the_proof_shows_the_layer_nearest_to_its_limit_first(make_report: Make) -> None:
    layers = [
        proof("easy"), proof("tight", output_error=9e-4), proof("unmeasured", output_error=None),
        proof("broken", output_error=math.nan), proof("exact", output_error=0.0, tolerance=0.0),
    ]  # fmt: skip
    _, *rows = cells(to_markdown(make_report(proof=layers)), "Proof")
    assert [row[0] for row in rows[:3]] == ["broken", "tight", "easy"]
    assert rows[1][3:6] == ["0", "9.00e-04", "1.00e-03"]


def test_names_cannot_break_out_of_a_cell() -> None:
    plan = [layer("a|b\n*c*_d_<e>", "w8a8", 1, 1)]
    assert cells(to_markdown(Report("t", plan=plan)), "Plan")[1][0] == "a|b *c*_d_<e>"


def printed(report: Report, *, terminal: bool, width: int = 160) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, force_terminal=terminal, width=width, color_system=None))
    return stream.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_console_shows_the_ladder_and_the_verdict(make_report: Make, terminal: bool) -> None:
    report = with_verdict(make_report())
    text = printed(report, terminal=terminal)
    flat = " ".join(text.split())
    for row in report.rows:
        assert row.metrics is not None
        assert re.search(rf"^{row.name} +1\.\d{{4}} +{row.quality:.4f} ", text, flags=re.MULTILINE)
    assert "converted 1.000 ms 1.500 ms 30 2.00x" in flat
    assert all(sentence in flat for sentence in report.verdict)


def test_output_that_is_no_terminal_is_plain_and_unbroken(
    make_report: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    report = make_report(verdict=("A sentence is one line in a log, " + "however long it is, " * 20 + "for grep.",))
    print_report(report)
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert all(f"* {sentence}\n" in text for sentence in report.verdict)
    assert re.search(r"^fine-tuned, then PTQ .* 5\.60 *$", text, flags=re.MULTILINE)


@pytest.mark.parametrize(("width", "pieces"), [(60, 3), (80, 2), (100, 2), (140, 1)])
def test_a_narrow_terminal_loses_no_column_and_no_digit(make_report: Make, width: int, pieces: int) -> None:
    text = printed(make_report(), terminal=True, width=width)
    flat = " ".join(text.split())
    assert max(map(len, text.splitlines())) <= width
    for title in ("perplexity", "top-1 agreement", "bits/weight", "speed against bf16", "weight difference"):
        assert title in flat
    for cell in ("4.3319", "-0.3327", "683.6 KiB", "688.5 KiB", "5.60", "97.00%", "1.500 ms", "layers.0.mlp.up_proj"):
        assert cell in flat
    assert len(re.findall(r"^fine-tuned, then PTQ ", text, flags=re.MULTILINE)) == pieces


def test_an_ascii_log_can_take_it(make_report: Make) -> None:
    raw = io.BytesIO()
    log = io.TextIOWrapper(raw, encoding="ascii")
    print_report(with_verdict(make_report()), Console(file=log, width=160))
    log.flush()
    assert b"fine-tuned, then PTQ" in raw.getvalue()
    assert to_markdown(with_verdict(make_report())).isascii()


def test_markup_in_names_is_printed_as_it_stands(make_report: Make) -> None:
    assert "experts[0]/[bold]" in printed(make_report(proof=[proof("experts[0]/[bold]")]), terminal=True)


def test_both_files_are_written_and_read_back(make_report: Make, tmp_path: Path) -> None:
    report = with_verdict(make_report())
    as_json, as_markdown = write_report(report, tmp_path / "runs" / "1")
    assert read_report(as_json) == report
    assert as_markdown.read_text(encoding="utf-8") == to_markdown(report)
    assert sorted(os.listdir(tmp_path / "runs" / "1")) == ["report.json", "report.md"]


def test_a_failed_write_leaves_the_old_report(make_report: Make, tmp_path: Path) -> None:
    old = make_report()
    path, _ = write_report(old, tmp_path)
    unprintable = make_report(title="new", environment={"device": object()})
    with pytest.raises(TypeError):
        write_report(unprintable, tmp_path)
    assert path.read_text(encoding="utf-8") == to_json(old)
    assert sorted(os.listdir(tmp_path)) == ["report.json", "report.md"]


def test_a_file_that_cannot_be_replaced_is_explained_and_leaves_no_rest(make_report: Make, tmp_path: Path) -> None:
    (tmp_path / "report.md" / "in the way").mkdir(parents=True)
    with pytest.raises(ConfigError, match="choose another output folder"):
        write_report(make_report(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["report.json", "report.md"]


def test_a_folder_that_cannot_be_made_is_explained(make_report: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write the report into .*choose another output folder"):
        write_report(make_report(), tmp_path / "file" / "run")


def test_the_environment_names_versions_and_no_place() -> None:
    import torch

    facts = environment()
    assert facts["device"] == "cpu"
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == str(torch.get_num_threads())
    assert all(isinstance(value, str) and value for value in facts.values())
    assert not any(os.sep in value for value in facts.values())


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.000 KiB"),
        (1784874, "1.702 MiB"),
        (1040384, "1016 KiB"),
        (2**20 - 1, "1024 KiB"),
        (35 * 2**30, "35.00 GiB"),
    ],
)
def test_bytes_are_readable(count: int, text: str) -> None:
    assert in_bytes(count) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0.00%"), (1.0, "100.00%"), (0.12345, "12.35%"), (0.999999, "99.999900%"), (1e-6, "0.000100%"),
     (math.nan, "nan%")],
)  # fmt: skip
def test_a_share_is_never_rounded_to_all_or_nothing(share: float, text: str) -> None:
    assert percent(share) == text


def test_ratios_are_short() -> None:
    assert [times(x) for x in (0.6134, 1.0, 12.3)] == ["0.61x", "1.00x", "12x"]
