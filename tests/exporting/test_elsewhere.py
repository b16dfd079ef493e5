"""Asking an interpreter that does not import this package."""

from __future__ import annotations

from pathlib import Path

import pytest

from qat_plugin.errors import ExportError
from qat_plugin.exporting.elsewhere import Elsewhere


def test_a_directory_that_does_not_load_is_told_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ExportError, match=r"(?s)cannot load.*nonsense"), Elsewhere(tmp_path):
        pass
