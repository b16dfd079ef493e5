"""Exporting by recipe, by task and in Python, through this project's own format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qat_plugin
from qat_plugin.config.export_section import EXPORT_FORMATS
from qat_plugin.errors import CheckpointError, ConfigError
from qat_plugin.exporting import FORMATS
from qat_plugin.report import read_report

from .conftest import Qat

QUICK = ("task.stages=[float,ptq,converted]", "run.dir=here")


def test_a_recipe_exports_at_the_end(qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat(*mine, *QUICK, "export=converted")
    assert done.code == 0, done.err
    assert "integers differ by at most 0, scales by 0" in done.out
    report = read_report(Path("here", "report.json"))
    row = report.row("exported, converted")
    assert row is not None and row.bytes_disk is not None and "verified" in row.note
    card = Path("here", "exported", "converted", "README.md").read_text()
    assert "PTQ" in card and "Reproduce" in card
    recorded = json.loads(Path("here", "run.json").read_text())
    assert "exported/converted/model.safetensors" in recorded["artifacts"]
    again = qat("resume=here", "allow=[mine_of_tests]")
    assert again.code == 0 and "exported: done in an earlier session" in again.out


def test_a_finished_run_is_exported_later(qat: Qat, mine: tuple[str, ...], tmp_path: Path) -> None:
    assert qat(*mine, *QUICK).code == 0
    for spelled in ("format=converted", "export=converted"):
        done = qat("task=export", "run=here", spelled, "allow=[mine_of_tests]", "export.path=elsewhere")
        assert done.code == 0, done.err
        assert "verified" in done.out and Path("elsewhere", "README.md").is_file()
    stored = Path("here", "converted", "model.safetensors").read_bytes()
    assert Path("elsewhere", "model.safetensors").read_bytes() == stored


def test_a_run_is_exported_from_python(qat: Qat, mine: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert qat(*mine, *QUICK).code == 0
    monkeypatch.setenv("QAT_ALLOW", "mine_of_tests")
    made = qat_plugin.export("here", "converted")
    assert made.path == Path("here", "exported", "converted").absolute()
    assert made.verification is not None and made.verification.integers == 0
    with pytest.raises(ConfigError, match="brings its own tokenizer"):
        qat_plugin.export("here", "converted", tokenizer=object())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("task=export",), "run=DIR"),
        (("task=export", "run=here", "allow=[mine_of_tests]"), "needs to know the format"),
        (("task=export", "run=here", "format=ggff", "allow=[mine_of_tests]"), "Did you mean 'gguf'"),
        (
            ("task=export", "run=here", "format=converted", "export.options.bits=4", "allow=[mine_of_tests]"),
            "has no option 'bits'",
        ),
    ],
)
def test_mistakes(qat: Qat, mine: tuple[str, ...], arguments: tuple[str, ...], said: str) -> None:
    assert qat(*mine, *QUICK).code == 0
    done = qat(*arguments)
    assert (done.code, said in done.err) == (2, True), done.err


def test_export_needs_a_converted_model(qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat(*mine, "task.stages=[float]", "run.dir=here", "export=converted")
    assert done.code == 2 and "'exported', which needs 'converted'" in done.err
    assert qat(*mine, "task.stages=[float]", "run.dir=here").code == 0  # nothing was made there
    done = qat("task=export", "run=here", "format=converted", "allow=[mine_of_tests]")
    assert done.code == 2 and "has no converted model" in done.err


def test_the_schema_names_every_format() -> None:
    assert set(FORMATS) == set(EXPORT_FORMATS)
    assert {path.stem for path in Path(__file__).parents[2].joinpath("conf", "export").glob("*.yaml")} == {
        *FORMATS, "none",
    }  # fmt: skip


def test_a_plan_that_the_format_cannot_hold_is_refused_before_training(qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat(*mine, "run.dir=here", "export=executorch")
    assert done.code == 2 and "cannot hold this plan, and nothing was written" in done.err, done.err
    assert "layers.0, layers.3 (w4a16-g32)" in done.err and "nearest that fits: w4a8-g32" in done.err
    assert not Path("here", "checkpoints").exists()
    done = qat(*mine, "run.dir=there", "export=converted", "export.options.bits=4")
    assert done.code == 2 and "has no option 'bits'" in done.err


def test_another_format_does_not_inherit_the_runs_options(qat: Qat, mine: tuple[str, ...]) -> None:
    given = ("export=onnx", "export.options.opset=22", "export.path=first")
    assert qat(*mine, *QUICK, *given).code == 0
    done = qat("task=export", "run=here", "format=converted", "allow=[mine_of_tests]")
    assert done.code == 0, done.err
    assert Path("here", "exported", "converted", "model.safetensors").is_file() and Path("first/model.onnx").is_file()
    done = qat("task=export", "run=here", "format=onnx", "allow=[mine_of_tests]", "export.options.opset=1")
    assert done.code == 2 and "opset" in done.err


def test_a_static_plan_is_asked_about_before_training_too(qat: Qat, mine: tuple[str, ...]) -> None:
    rules = ("policy.default=w4a16-g32", "policy.rules={layers.0: w8a8-static}")
    done = qat(*mine, "run.dir=here", "export=executorch", *rules)
    assert done.code == 2 and "layers.3 (w4a16-g32)" in done.err and "layers.0" not in done.err, done.err


def test_formats_of_adapters_need_adapters(qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat(*mine, "run.dir=here", "export=peft")
    assert done.code == 2 and "this recipe trains none" in done.err and not Path("here").exists()


def test_a_file_is_no_run(qat: Qat, mine: tuple[str, ...]) -> None:
    Path("model.gguf").write_bytes(b"GGUF")
    done = qat("task=export", "run=model.gguf", "format=onnx")
    assert done.code == 2 and "model.path=model.gguf" in done.err


def test_folders_that_are_not_read_say_what_to_do(qat: Qat, mine: tuple[str, ...]) -> None:
    assert qat(*mine, *QUICK, "export=onnx").code == 0
    places = {"here": "is a run's folder", "here/converted": "load_converted", "here/exported/onnx": "ONNX"}
    for path, said in places.items():
        with pytest.raises(CheckpointError, match=said):
            qat_plugin.load(path)
