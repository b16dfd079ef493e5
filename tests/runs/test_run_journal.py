"""The console hears what matters; the log hears everything."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from qat_plugin.runs.journal import journal, say


@pytest.mark.parametrize("verbose", [False, True])
def test_who_hears_what(verbose: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    with journal(log, verbose=verbose):
        say("the result")
        rank_zero_info("GPU available: no")
        rank_zero_warn("`max_epochs` was not set. Setting it to 1000 epochs")
        warnings.warn("the sky falls", stacklevel=1)
        logging.getLogger("transformers").warning("a tensor is missing")
    out, err = capsys.readouterr()
    assert out == "the result\n"
    assert ("GPU available" in err) is verbose
    assert ("was not set" in err) is verbose
    assert "the sky falls" in err
    assert "a tensor is missing" in err
    written = log.read_text()
    for text in ("the result", "GPU available", "was not set", "the sky falls", "a tensor is missing"):
        assert text in written


def test_everything_is_put_back(tmp_path: Path) -> None:
    names = ("", "lightning", "lightning.pytorch", "transformers", "qat_plugin.runs.said")
    before = [
        (list(logging.getLogger(n).handlers), logging.getLogger(n).propagate, logging.getLogger(n).level) for n in names
    ]
    show = warnings.showwarning
    with journal(tmp_path / "log"):
        assert L is not None
    after = [
        (list(logging.getLogger(n).handlers), logging.getLogger(n).propagate, logging.getLogger(n).level) for n in names
    ]
    assert after == before
    assert warnings.showwarning is show
