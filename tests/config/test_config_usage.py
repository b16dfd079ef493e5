"""The two texts that ``qat`` prints without running anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from qat_plugin.config.catalogue import groups, recipes
from qat_plugin.config.keys import keys_with_help
from qat_plugin.config.places import conf_folder
from qat_plugin.config.usage import help_text, listing

ROOT = Path(__file__).resolve().parents[2]


def test_the_listing_has_one_line_a_recipe() -> None:
    lines = listing().splitlines()[1:]
    assert [line.split()[0] for line in lines] == [entry.name for entry in recipes()]
    assert all(len(line) < 140 for line in lines)


def test_help_names_every_key_group_option_and_recipe() -> None:
    text = help_text()
    for key, *_ in keys_with_help():
        if key not in ("task.name", "task.stages", "model", "data", "optimizer"):
            assert f"  {key}=" in text
    for options in groups().values():
        for option in options:
            assert option.name in text
    schemes = text.split("Schemes (")[1].split("\n")[1]
    assert {"nf4", "nf4-dq", "w8a8"} <= set(schemes.replace(",", "").split())
    for word in ("-m", "--config-dir", "resume=", "allow=", *(entry.name for entry in recipes())):
        assert word in text


def test_neither_imports_torch_or_hydra() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for arguments in ([], ["--help"]):
        script = (
            "import sys; from qat_plugin.__main__ import main\n"
            f"code = main({arguments!r}); print(sorted(sys.modules), file=sys.stderr); sys.exit(code)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0
        assert "recipe=NAME" in done.stdout
        for heavy in ("'torch'", "'hydra'", "'lightning'", "'transformers'", "'numpy'"):
            assert heavy not in done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "qat_plugin", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as done:
        assert done.stdout is not None and done.stderr is not None
        done.stdout.close()
        assert done.stderr.read() == b""
        assert done.wait() == 141


def test_group_files_lie_where_the_root_config_says(tmp_path: Path) -> None:
    root = (conf_folder() / "config.yaml").read_text(encoding="utf-8")
    for group in groups():
        assert group == "scheme" or f"- {group}: " in root
