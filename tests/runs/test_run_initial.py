"""``qat.initial=gptq``: QAT of a recipe begins where GPTQ on the same data ends, once in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qat_plugin.report import read_report

from .conftest import Qat

GPTQ = ("qat=learned_scales", "qat.initial=gptq", "policy.default=w3a16-g16-asym", "ptq.calibration_batches=4")
STAGES = "task.stages=[float,ptq,fine-tuned,fine-tuned-ptq,qat,converted,reloaded]"
STILL = ("+model.rate=1e-30", "trainer.max_steps=3")  # steps that move nothing


def rows(folder: str) -> dict[str, Any]:
    return {row.name: row.metrics for row in read_report(Path(folder, "report.json")).rows}


def calibrations(folder: str) -> int:
    return Path(folder, "log").read_text().count("scales begin by gptq")


def test_steps_that_move_nothing_leave_the_model_of_ptq_by_gptq(qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat(*mine, "run.dir=here", STAGES, *GPTQ, *STILL, "ptq.method=gptq")
    assert done.code == 0, done.err
    metrics = rows("here")
    assert metrics["QAT"].losses == metrics["PTQ"].losses
    assert metrics["reloaded"] == metrics["converted"]
    assert calibrations("here") == 1
    said = "scales begin by gptq: 2 layers"
    assert said in Path("here", "log").read_text()
    other = qat(*mine, "run.dir=nearest", STAGES, "qat=learned_scales", "policy.default=w3a16-g16-asym", *STILL)
    assert other.code == 0, other.err
    assert rows("nearest")["QAT"].losses != metrics["QAT"].losses


def test_it_follows_the_keys_of_ptq(qat: Qat, mine: tuple[str, ...]) -> None:
    keys = ("ptq.calibration_batches=2", "ptq.sweeps=0", "ptq.correct=0", "ptq.damping=0.5", "ptq.act_order=false")
    done = qat(*mine, "run.dir=here", STAGES, *GPTQ, *STILL, "ptq.method=gptq", *keys)
    assert done.code == 0, done.err
    assert rows("here")["QAT"].losses == rows("here")["PTQ"].losses
    assert "on 2 batches of the train dataloader" in Path("here", "log").read_text()


def test_after_fine_tuning_it_calibrates_the_fine_tuned_weights(qat: Qat, mine: tuple[str, ...]) -> None:
    keys = ("qat.begin=fine-tuned", "ptq.method=gptq", "+model.rate=1e-4", "qat.start=5", "qat.freeze=5")
    done = qat(*mine, "run.dir=here", STAGES, *GPTQ, *keys, "trainer.max_steps=6")
    assert done.code == 0, done.err
    assert calibrations("here") == 1
    still = qat(*mine, "run.dir=still", STAGES, *GPTQ, *STILL, "qat.begin=fine-tuned", "ptq.method=gptq")
    assert still.code == 0, still.err
    assert rows("still")["QAT"].losses == rows("still")["fine-tuned, then PTQ"].losses
    note = next(row.note for row in read_report(Path("still", "report.json")).rows if row.name == "QAT")
    assert note == (
        "3 + 3 steps: it began from the fine-tuned weights, and the last are its own; its weights and scales began as "
        "GPTQ's"
    )


@pytest.mark.parametrize("start", [0, 9])
def test_interrupted_and_resumed_equals_uninterrupted_and_calibrates_once(
    start: int, qat: Qat, mine: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ("task.stages=[float,qat,converted,reloaded]", *GPTQ, f"qat.start={start}", "qat.monitor=3")
    assert qat(*mine, "run.dir=whole", *keys).code == 0
    monkeypatch.setenv("PRESS_CTRL_C_AT", "qat 6")
    assert qat(*mine, "run.dir=parts", *keys).code == 130
    assert calibrations("parts") == (1 if start == 0 else 0)
    resumed = qat("resume=parts", "allow=[mine_of_tests]")
    assert resumed.code == 0, resumed.err
    assert calibrations("parts") == calibrations("whole") == 1
    assert rows("parts") == rows("whole")
    states = [torch.load(f"{run}/checkpoints/qat/quantizers.pt", weights_only=True) for run in ("whole", "parts")]
    for name, tensors in states[0]["layers"].items():
        assert all(torch.equal(value, states[1]["layers"][name][key]) for key, value in tensors.items())
    ends = [
        torch.load(f"{run}/checkpoints/qat/last.ckpt", weights_only=True)["state_dict"] for run in ("whole", "parts")
    ]
    for name, weight in ends[0].items():
        assert torch.equal(weight, ends[1][name])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["qat.initial=gptq"], "need qat.learn_scales=true"),
        (["qat.learn_scales=true", "qat.initial=awq"], "it is one of minmax, mse, gptq"),
    ],
)
def test_mistakes_leave_no_folder(keys: list[str], said: str, qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat(*mine, "run.dir=here", *keys)
    assert done.code == 2
    assert said in done.err
    assert not Path("here").exists()
