"""The command as a process: exit codes, what stands on which stream, signals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def process(folder: Path, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]), **environment}
    command = [sys.executable, "-m", "qat_plugin", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=variables)


@pytest.mark.parametrize(
    "argument",
    ["recipe=qat_int4_tny", "trainer.max_stepz=3", "task=fitt", "data=none", "--wrong", "trainer.max_steps=x"],
)
def test_a_mistake_is_one_message_on_stderr_and_code_2(argument: str, tmp_path: Path) -> None:
    done = process(tmp_path, argument)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("qat: ")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_a_recipe_is_answered_without_importing_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from qat_plugin.__main__ import main\n"
        "assert main(['recipe=qat_int4_tiny', 'trainer.max_stepz=3']) == 2\n"
        "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    )
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=variables)
    assert done.returncode == 0, done.stderr


def test_the_list_of_recipes_and_the_version(tmp_path: Path) -> None:
    done = process(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "qat_int4_tiny" in done.stdout
    assert process(tmp_path, "--version").stdout.startswith("qat_plugin ")


def test_the_composed_recipe_can_be_shown(tmp_path: Path) -> None:
    done = process(tmp_path, "recipe=qat_mixed_tiny", "--cfg", "job", "--package", "policy")
    assert done.returncode == 0, done.stderr
    assert "attention: w8a8" in done.stdout


def test_a_bug_has_its_traceback_and_code_1(mine: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "mine_of_tests.py").write_text("import lightning as L\nclass Net(L.LightningModule): bug = 1 / 0\n")
    done = process(tmp_path, *mine, "trainer.threads=1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_a_second_ctrl_c_ends_the_process_at_once(mine: tuple[str, ...], tmp_path: Path) -> None:
    module = tmp_path / "mine_of_tests.py"
    twice = "os.kill(os.getpid(), signal.SIGINT)"
    module.write_text(module.read_text().replace(twice, f"{twice}; {twice}; open('went_on', 'w')"))
    done = process(tmp_path, *mine, "run.dir=here", "task.stages=[float,qat]", PRESS_CTRL_C_AT="qat 6")
    assert done.returncode == 130
    assert "finishing this step" in done.stderr
    assert f"Go on with: qat resume={tmp_path / 'here'} 'allow=[mine_of_tests]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "went_on").exists()
    again = process(tmp_path, "resume=here", "allow=[mine_of_tests]")
    assert again.returncode == 0, again.stderr
    assert "QAT" in again.stdout
    assert again.stderr == "", "nothing but what matters is said"
