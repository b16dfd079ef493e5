"""The README is true: its commands are the ones CI runs, its Python runs, its recipes exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_two_commands_stand_as_promised() -> None:
    assert "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/qat recipe=qat_int4_tiny" in README
    assert 'python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/python -m pytest' in README


def test_ci_reads_its_test_command_from_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script
    assert "-m pytest" not in script.replace("pytest' README.md", "")


def test_every_recipe_is_named_and_every_named_recipe_exists() -> None:
    shipped = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    named = set(re.findall(r"recipe=([a-z0-9_]+)", README))
    assert shipped <= named
    assert named <= shipped


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_python_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if '"stories260K"' in block:  # any directory of a transformers model will do
        from qat_plugin.models.embedded import EmbeddedRecipe, embedded_lm

        monkeypatch.setenv("QAT_PLUGIN_CACHE", str(tmp_path / "cache"))
        small = EmbeddedRecipe(
            hidden=64, ffn=64, vocabulary=300, layers=1, heads=2, steps=3, batch_size=2, sequence_length=32,
            train_characters=60_000, valid_characters=9_000,
        )  # fmt: skip
        Path("stories260K").symlink_to(embedded_lm(recipe=small, progress=False))
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
