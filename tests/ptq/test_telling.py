"""What calibration tells: each layer's number, errors and the time left; a short line for each block."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from qat_plugin.ptq import calibrate, calibration_of, telling
from qat_plugin.ptq.results import LayerResult
from qat_plugin.ptq.telling import _Lines
from tests.ptq.test_walker import texts
from tests.qat import models


def test_each_layer_tells_its_number_and_the_errors_that_are_remembered(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(telling, "QUIET_S", 0.0)
    torch.manual_seed(0)
    model = calibrate(models.llama(), "w4a16-g32-asym", texts(), method="gptq", resume=tmp_path)
    told = capsys.readouterr().err.splitlines()
    done = calibration_of(model).layers
    lines = [line for line in told if line.startswith("gptq: layer ")]
    assert len(lines) == len(done)
    for index, (line, layer) in enumerate(zip(lines, done, strict=True)):
        assert line.startswith(f"gptq: layer {index + 1}/{len(done)} {layer.name}: ")
        if layer.error is not None:
            assert f"error {layer.error_before:.2e} (nearest) -> {layer.error:.2e}; " in line
        assert re.search(r"about \d+ s left$", line)
    blocks = [line for line in told if line not in lines]
    assert re.fullmatch(r"gptq: model\.layers\.0 \(1/\d+\): \d+\.\d s", blocks[0])

    torch.manual_seed(0)
    calibrate(models.llama(), "w4a16-g32-asym", texts(), method="gptq", resume=tmp_path)
    told = capsys.readouterr().err.splitlines()
    assert not [line for line in told if "layer " in line]
    assert all(line.endswith("read from an earlier session") for line in told)


def test_time_left_counts_this_session_s_layers(capsys: pytest.CaptureFixture[str]) -> None:
    now = iter([0.0, 6.0, 6.0, 12.0, 12.0])
    lines = _Lines("gptq", clock=lambda: next(now))
    lines.layer(LayerResult("a", "w8a16", "gptq", 10, 0.5, 0.25), done=8, count=11)  # seven were read from files
    lines.layer(LayerResult("b", "w8a16", "mse"), done=9, count=11)
    assert capsys.readouterr().err.splitlines() == [
        "gptq: layer 8/11 a: error 5.00e-01 (nearest) -> 2.50e-01; about 18 s left",
        "gptq: layer 9/11 b: no inputs looked at; about 12 s left",
    ]


def test_nothing_is_told_where_nobody_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling, "QUIET_S", 0.0)
    calls: list[tuple[int, int | None]] = []
    for progress in (False, lambda done, total: calls.append((done, total))):
        calibrate(models.llama(), "w4a16-g32", texts(), method="gptq", progress=progress)
    assert capsys.readouterr().err == ""
    assert [done for done, _ in calls] == list(range(1, len(calls) + 1))
