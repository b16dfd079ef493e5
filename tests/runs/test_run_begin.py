"""``qat.begin=fine-tuned``: QAT after fine-tuning, with its steps counted, and a baseline of as many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qat_plugin.report import Report, read_report

from .conftest import Qat

BEGIN = "qat.begin=fine-tuned"
STAGES = "task.stages=[float,fine-tuned,fine-tuned-ptq,qat,converted,reloaded]"
ALL = "task.stages=[float,fine-tuned,fine-tuned-ptq,further,further-ptq,qat,converted,reloaded]"


def report(folder: str) -> Report:
    return read_report(Path(folder, "report.json"))


def row(folder: str, name: str) -> Any:
    found = report(folder).row(name)
    assert found is not None
    return found


def weights(folder: str, stage: str) -> dict[str, torch.Tensor]:
    return torch.load(f"{folder}/checkpoints/{stage}/last.ckpt", weights_only=True)["state_dict"]


def test_qat_starts_from_the_weights_of_the_fine_tuned_rung(qat: Qat, mine: tuple[str, ...]) -> None:
    still = ("+model.rate=1e-30", "trainer.max_steps=4")  # steps that move nothing: QAT ends where it began
    assert qat(*mine, "run.dir=here", STAGES, BEGIN, "trainer.max_steps=4").code == 0
    other = qat(*mine, "run.dir=still", STAGES, BEGIN, *still)
    assert other.code == 0, other.err
    for name, weight in weights("still", "qat").items():
        assert torch.equal(weight, weights("still", "fine-tuned")[name])
    assert any(not torch.equal(w, weights("here", "fine-tuned")[name]) for name, w in weights("here", "qat").items())
    moved = qat(*mine, "run.dir=plain", STAGES, "trainer.max_steps=4")
    assert moved.code == 0, moved.err
    assert any(not torch.equal(w, weights("plain", "qat")[name]) for name, w in weights("here", "qat").items())


def test_nothing_says_same_steps_where_they_are_not_the_same(qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat(*mine, "run.dir=here", STAGES, BEGIN)
    assert done.code == 0, done.err
    assert row("here", "fine-tuned").steps == (13,)
    assert row("here", "fine-tuned, then PTQ").steps == (13,)
    assert row("here", "QAT").steps == (13, 13)
    for text in (done.out, Path("here", "report.md").read_text()):
        assert "same steps" not in text
        assert "float, trained for 13 steps; QAT begins from these weights" in text
        assert "QAT: 13 + 13 steps: it began from the fine-tuned weights, and the last are its own" in text
    verdict = report("here").verdict
    assert (
        "QAT began from the fine-tuned weights and had 13 + 13 optimizer steps, fine-tuning, then PTQ 13: any gain of "
        "QAT over PTQ may be that of the longer training and not of the quantizer. Fine-tuning for 13 + 13 steps, then "
        "PTQ, was not measured: the stages further and further-ptq do."
    ) in verdict
    assert any("; QAT, after 13 + 13 steps: " in sentence for sentence in verdict)


def test_further_fine_tuning_is_the_baseline_of_as_many_steps(qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat(*mine, "run.dir=here", ALL, BEGIN)
    assert done.code == 0, done.err
    assert [entry.name for entry in report("here").rows] == [
        "float", "fine-tuned", "fine-tuned, then PTQ", "fine-tuned further", "fine-tuned further, then PTQ", "QAT",
        "converted", "reloaded",
    ]  # fmt: skip
    assert row("here", "fine-tuned further, then PTQ").steps == row("here", "QAT").steps == (13, 13)
    assert row("here", "fine-tuned further").metrics.loss < row("here", "fine-tuned").metrics.loss
    verdict = " ".join(report("here").verdict)
    assert "13 + 13 optimizer steps, as many as fine-tuning further, then PTQ." in verdict
    assert "was not measured" not in verdict
    quality = row("here", "fine-tuned further, then PTQ").quality
    worth = next(s for s in report("here").verdict if s.startswith(("QAT is", "PTQ is", "QAT has")))
    assert f"{100 * quality:.2f}%" in worth
    assert "fine-tuning further, then PTQ" in worth


@pytest.mark.parametrize("stage", ["fine-tuned", "qat"])
def test_interrupted_and_resumed_equals_uninterrupted(
    stage: str, qat: Qat, mine: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert qat(*mine, "run.dir=whole", STAGES, BEGIN).code == 0
    monkeypatch.setenv("PRESS_CTRL_C_AT", f"{stage} 6")
    assert qat(*mine, "run.dir=parts", STAGES, BEGIN).code == 130
    resumed = qat("resume=parts", "allow=[mine_of_tests]")
    assert resumed.code == 0, resumed.err
    assert report("parts").rows == report("whole").rows
    assert report("parts").verdict == report("whole").verdict
    for name, weight in weights("whole", "qat").items():
        assert torch.equal(weight, weights("parts", "qat")[name])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            ["task.stages=[float,qat]", BEGIN],
            "which task.stages leaves out: give task.stages=[float,fine-tuned,qat], or qat.begin=pretrained",
        ),
        ([BEGIN[:-5]], "qat.begin=fine- is not allowed: it is one of pretrained, fine-tuned"),
        ([ALL], "it needs qat.begin=fine-tuned"),
        (["task.stages=[fine-tuned,further-ptq]", BEGIN], "'further-ptq', which needs 'further' before it"),
    ],
)
def test_mistakes_leave_no_folder(keys: list[str], said: str, qat: Qat, mine: tuple[str, ...]) -> None:
    done = qat(*mine, "run.dir=here", *keys)
    assert done.code == 2
    assert said in done.err
    assert not Path("here").exists()
