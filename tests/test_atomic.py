"""Folders that are replaced: the old one or the new one, whatever happens between."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qat_plugin.atomic import replacing_folder


def test_the_old_folder_is_back_when_ctrl_c_comes_between_the_two_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    move = os.replace

    def interrupted(source: Any, target: Any) -> None:
        if Path(source).name == "new":
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing_folder(tmp_path / "out") as building:
        (building / "file").write_text("new")
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
