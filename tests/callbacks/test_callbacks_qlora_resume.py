"""A QLoRA run stopped anywhere, killed too, and resumed ends with the adapters of the run that was never stopped."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from qat_plugin.callbacks import QLoRAFinetuning
from tests.callbacks.qlora_subjects import Language, adapters, tokens
from tests.callbacks.subjects import checkpoint, trainer

STEPS = 9  # of 6 batches an epoch: the run ends in the midst of its second


def _finetuning(base: str) -> QLoRAFinetuning:
    return QLoRAFinetuning(rank=4, base=base, dropout=0.2 if base.startswith("nf4") else 0.0, neftune_alpha=5)


def _run(folder: Path, base: str, steps: int, seed: int, resume: str | None = None) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    module = Language()
    save = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=0)
    fit = trainer(folder, _finetuning(base), save, max_steps=steps)
    torch.manual_seed(seed)
    fit.fit(module, tokens(), tokens(8, shuffle=False), ckpt_path=resume, weights_only=True)
    return module, checkpoint(save.last_model_path)


@pytest.mark.parametrize("base", ["nf4-dq", "w4a16-g32"])
@pytest.mark.parametrize("stop", [1, 5, 6, 7])
def test_a_stop_at_any_step_changes_nothing(tmp_path: Path, base: str, stop: int) -> None:
    whole, whole_saved = _run(tmp_path / "whole", base, STEPS, seed=0)
    _, first = _run(tmp_path / "parts", base, stop, seed=0)
    assert first["global_step"] == stop
    resumed, saved = _run(tmp_path / "parts", base, STEPS, seed=99, resume=str(tmp_path / "parts" / "last.ckpt"))
    expected, found = adapters(whole), adapters(resumed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert whole.losses[stop:] == resumed.losses
    for mine, theirs in zip(saved["optimizer_states"], whole_saved["optimizer_states"], strict=True):
        for index, state in theirs["state"].items():
            assert all(torch.equal(mine["state"][index][name], value) for name, value in state.items())


SCRIPT = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.callbacks.test_callbacks_qlora_resume import STEPS, _finetuning
from tests.callbacks.qlora_subjects import Language, tokens, adapters
from tests.callbacks.subjects import trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

class Tell(Callback):
    def on_train_batch_end(self, trainer, *args):
        print(trainer.global_step, flush=True)
        time.sleep(0.05)

folder, seed = Path(sys.argv[1]), int(sys.argv[2])
last = folder / "last.ckpt"
torch.manual_seed(seed)
module = Language()
save = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=0, enable_version_counter=False)
fit = trainer(folder, _finetuning("nf4-dq"), save, Tell(), max_steps=STEPS)
torch.manual_seed(seed)
fit.fit(module, tokens(), tokens(8, shuffle=False), ckpt_path=str(last) if last.exists() else None, weights_only=True)
torch.save(adapters(module), folder / "adapters.pt")
"""


@pytest.mark.slow
def test_a_killed_process_resumes_to_equal_adapters(tmp_path: Path) -> None:
    stop = random.Random(time.time_ns()).randrange(2, STEPS)  # the kill may come before the save of its step
    print(f"killed after step {stop}")

    def start(folder: Path, seed: int) -> subprocess.Popen[str]:
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", SCRIPT, str(folder), str(seed)]
        root = Path(__file__).resolve().parents[2]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)

    whole = start(tmp_path / "whole", 0)
    _, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    killed = start(tmp_path / "killed", 0)
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.strip() == str(stop):
            killed.send_signal(signal.SIGKILL)
            break
    killed.wait(timeout=60)
    killed.stdout.close()
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "adapters.pt").exists()
    resumed = start(tmp_path / "killed", 7)
    out, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert int(out.split()[0]) in (stop, stop + 1), json.dumps(out)  # no batch twice, none left out
    expected, found = (torch.load(tmp_path / name / "adapters.pt", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
