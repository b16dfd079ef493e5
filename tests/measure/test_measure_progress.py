from __future__ import annotations

import io
import sys

import pytest

import qat_plugin.measure.progress as progress
from qat_plugin.measure import progressing


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(choice: progress.Progress | bool, total: int | None = 4) -> None:
    with progressing(choice, "packing", total) as advance:
        for done in range(1, 5):
            advance(done)


def test_quick_work_shows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    run(True)
    assert capfd.readouterr() == ("", "")


def test_slow_work_prints_plain_lines_where_there_is_no_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    run(True)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("packing: 1/4 (25%) after ")
    assert "\x1b" not in captured.err


def test_a_stream_of_unknown_length_is_counted(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    run(True, total=None)
    assert capfd.readouterr().err.startswith("packing: 1 after")


@pytest.mark.parametrize(("quiet", "shown"), [(0.0, True), (600.0, False)])
def test_slow_work_shows_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, quiet: float, shown: bool) -> None:
    monkeypatch.setattr(progress, "QUIET_S", quiet)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    run(True)
    assert ("packing" in sys.stderr.getvalue()) is shown  # type: ignore[attr-defined]


def test_false_shows_nothing_and_a_callback_gets_every_step(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    seen: list[tuple[int, int | None]] = []
    run(False)
    run(lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert capfd.readouterr() == ("", "")
