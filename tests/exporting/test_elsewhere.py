"""Asking an interpreter that does not import this package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qat_plugin.errors import ExportError
from qat_plugin.exporting.elsewhere import Elsewhere
from tests.exporting.tiny_llama import SAMPLE, llama, logits


def test_a_directory_that_does_not_load_is_told_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ExportError, match=r"(?s)does not load.*nonsense"), Elsewhere(tmp_path):
        pass


def test_it_answers_what_it_loaded_and_says_what_it_lacks(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    with Elsewhere(tmp_path) as there:
        kind, parts = there.parts("model.layers.1.self_attn.q_proj.bias")
        assert kind == "Parameter" and torch.equal(parts[""], model.model.layers[1].self_attn.q_proj.bias)
        torch.testing.assert_close(there.logits(SAMPLE), logits(model))
        with pytest.raises(ExportError, match="the model has no parameter model.norm.bias"):
            there.parts("model.norm.bias")
