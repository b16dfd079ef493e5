"""Runs that train adapters, by the command: the ladder, merging, plans that do not fit, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat_plugin.models.causal_lm import load_causal_lm
from qat_plugin.models.embedded import embedded_lm
from qat_plugin.report import read_report
from qat_plugin.runs.language_model import embedded_recipe
from qat_plugin.runs.progress import TrainingProgress
from tests.runs.test_run_recipes import QUICK, SMALL, small_model

from .conftest import Qat

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

ADAPTER = Path("here", "adapter", "adapter_model.safetensors")


pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model's directory of our own, which a test may change."""
    source = embedded_lm(recipe=embedded_recipe(SMALL), progress=False)
    return Path(shutil.copytree(source, tmp_path / "base"))


def tiny(recipe: str, *keys: str, base: Path | None = None) -> list[str]:
    model = small_model() if base is None else [f"model.path={base}", *text()]
    return [f"recipe={recipe}", "run.dir=here", *QUICK, *model, *keys]


def text() -> list[str]:
    for name in ("train.txt", "valid.txt"):
        Path(name).write_text("def function(argument):\n    return argument + 1\n\n" * 200)
    return ["data.train=train.txt", "data.valid=valid.txt"]


def rows(folder: str = "here") -> dict[str, Any]:
    return {row.name: row.metrics for row in read_report(Path(folder, "report.json")).rows}


def refused(answer: Any, *said: str) -> None:
    assert answer.code == 2, answer.err
    for part in said:
        assert part in answer.err
    assert "Traceback" not in answer.err


def test_qlora_from_a_directory_to_a_merged_and_converted_model(qat: Qat, base: Path) -> None:
    done = qat(*tiny("qlora_tiny", "trainer.max_steps=20", base=base))
    assert done.code == 0, done.err
    found = rows()
    assert list(found) == [
        "float", "NF4 base", "QLoRA", "merged", "merged, into the original", "merged, w8a16", "merged, w4a16-g32",
        "converted", "reloaded", "converted, bf16",
    ]  # fmt: skip
    assert found["QLoRA"].loss < found["NF4 base"].loss - 0.1
    assert found["merged"].loss == pytest.approx(found["QLoRA"].loss, abs=1e-4), "exact: dequantized, then added"
    assert found["converted"].loss == pytest.approx(found["merged, w4a16-g32"].loss, abs=1e-6)
    assert found["reloaded"] == found["converted"]
    report = read_report(Path("here", "report.json"))
    assert {"w8a16", "w4a16-g32", "nf4-dq"} <= report.survival[0]["cosines"].keys()
    kept = json.loads(Path("here", "run.json").read_text())
    assert kept["base"]["fingerprint"]
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= set(kept["artifacts"])
    state = torch.load("here/checkpoints/qlora/last.ckpt", weights_only=True)["state_dict"]
    assert state
    assert all(".lora_" in name for name in state)


def test_plain_peft_loads_the_runs_adapter_and_gives_its_loss(qat: Qat, base: Path) -> None:
    from peft import PeftModel

    assert qat(*tiny("qlora_tiny", "task.stages=[base,qlora]", "lora.init=gaussian", base=base)).code == 0
    model, _ = load_causal_lm(base)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        merged = PeftModel.from_pretrained(model, "here/adapter").merge_and_unload()
        theirs = merged(input_ids=ids).logits
    assert qat("task=merge", "run.dir=here", "merge.into=original", "merge.out=ours", "merge.compare=[]").code == 0
    ours, _ = load_causal_lm(Path("ours"))
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(theirs, before, atol=1e-3)


def test_qat_and_lora_convert_to_exactly_what_was_trained(qat: Qat) -> None:
    assert qat(*tiny("qat_lora_tiny", "trainer.max_steps=6")).code == 0
    found = rows()
    assert found["QAT + LoRA"].loss < found["PTQ"].loss
    assert found["merged"] == found["QAT + LoRA"], "to the bit"
    assert found["converted"].loss == pytest.approx(found["QAT + LoRA"].loss, abs=1e-6)
    assert found["reloaded"] == found["converted"]
    assert {layer["weight_difference"] for layer in read_report(Path("here", "report.json")).proof} == {0.0}


def test_what_only_training_all_weights_can_do_is_refused(qat: Qat) -> None:
    given = ("qat=learned_scales", "qat.monitor=true", "distill.weight=1", "distill.teacher=fine-tuned")
    done = qat(*tiny("qat_lora_tiny", *given))
    assert done.code == 2
    assert "qat.monitor, distill.teacher=fine-tuned: not for adapters" in done.err


def test_adapters_learn_the_scales_of_their_base(qat: Qat) -> None:
    assert qat(*tiny("qat_lora_tiny", "qat=learned_scales", "task.stages=[float,qlora,merged,converted]")).code == 0
    assert rows()["converted"].loss == pytest.approx(rows()["merged"].loss, abs=1e-6)


def test_distillation_from_the_float_base_is_one_key(qat: Qat) -> None:
    assert qat(*tiny("qat_lora_tiny", "task.stages=[float,base,qlora]")).code == 0
    plain = load_file(ADAPTER)
    assert qat(*tiny("qat_lora_tiny", "task.stages=[float,base,qlora]", "distill.weight=1", "run.dir=taught")).code == 0
    taught = load_file(Path("taught", "adapter", "adapter_model.safetensors"))
    assert any(not torch.equal(plain[name], taught[name]) for name in plain)


def test_a_run_interrupted_and_resumed_has_the_adapters_of_one_that_was_not(
    qat: Qat, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ("task.stages=[base,qlora]", "trainer.max_steps=5", "lora.dropout=0.1")
    assert qat(*tiny("qlora_tiny", *keys, base=base), "run.dir=whole").code == 0
    with monkeypatch.context() as patched:
        _press_ctrl_c_after(2, patched)
        stopped = qat(*tiny("qlora_tiny", *keys, base=base))
    assert stopped.code == 130
    resumed = qat("resume=here")
    assert resumed.code == 0, resumed.err
    whole, parts = load_file("whole/adapter/adapter_model.safetensors"), load_file(ADAPTER)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_base_that_changed_between_stop_and_resume_is_refused(
    qat: Qat, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ("task.stages=[base,qlora]", "trainer.max_steps=5")
    with monkeypatch.context() as patched:
        _press_ctrl_c_after(2, patched)
        assert qat(*tiny("qlora_tiny", *keys, base=base)).code == 130
    _change_a_weight(base)
    refused(qat("resume=here"), "another base", "Load the base that they were trained on")


def test_merging_takes_a_runs_adapter_into_its_base(qat: Qat, base: Path) -> None:
    assert qat(*tiny("qlora_tiny", "task.stages=[base,qlora]", base=base)).code == 0
    done = qat("task=merge", "run.dir=here", "merge.scheme=w8a8")
    assert done.code == 0, done.err
    assert Path("here", "merged-nf4", "model.safetensors").is_file()
    assert Path("here", "merged-nf4-w8a8", "model.safetensors").is_file()
    for said in ("QLoRA", "merged, w4a16-g32", "Survival of the update", "nf4-exact", "converted"):
        assert said in done.out
    closing = done.out.rsplit("Verdict", 1)[1]
    for folder in ("merged-nf4", "merged-nf4-w8a8"):  # every folder that was written
        assert f": {Path('here', folder).absolute()} (" in closing
    assert "NOT VERIFIED" not in done.out + done.err
    found = rows("here/merged-nf4")
    assert found["merged"].loss == pytest.approx(found["QLoRA"].loss, abs=1e-4)
    again = qat("task=merge", "run.dir=here", "merge.into=original")
    assert again.code == 0, again.err
    assert Path("here", "merged-original").is_dir()
    refused(qat("task=merge", "run.dir=here"), "merged-nf4")


def test_merging_into_nf4_codes_is_refused_with_what_it_would_erase(qat: Qat, base: Path) -> None:
    assert qat(*tiny("qlora_tiny", "task.stages=[base,qlora]", base=base)).code == 0
    refused(qat("task=merge", "run.dir=here", "merge.scheme=nf4-dq"), "merge.scheme=nf4-dq: ", "cosine",
            "merge.accept_loss=true")  # fmt: skip
    assert not Path("here", "merged-nf4").exists()
    refused(qat("task=merge", "run.dir=here", "merge.scheme=foo"), "merge.scheme: unknown scheme 'foo'")
    refused(qat("task=merge", "run.dir=here", "merge.compare=[foo]"), "merge.compare: unknown scheme 'foo'")
    accepted = qat("task=merge", "run.dir=here", "merge.scheme=nf4-dq", "merge.accept_loss=true")
    assert accepted.code == 0, accepted.err
    assert "merged, nf4-dq" in rows("here/merged-nf4")


def test_a_foreign_adapter_is_merged_into_a_base_that_is_said_not_to_be_verified(qat: Qat, base: Path) -> None:
    assert qat(*tiny("qlora_tiny", "task.stages=[base,qlora]", base=base)).code == 0
    Path("here", "adapter", "qat_adapter.json").unlink()
    done = qat("task=merge", "run.dir=here", "merge.compare=[]", "merge.evaluate=false")
    assert done.code == 0, done.err
    assert done.err.startswith("warning: the base is NOT VERIFIED")
    assert read_report(Path("here", "merged-nf4", "report.json")).verdict[0].startswith("the base is NOT VERIFIED")


@pytest.mark.parametrize("package", ["peft", "bitsandbytes"])
def test_a_missing_package_is_said_before_anything_is_measured(
    package: str, qat: Qat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # Python's own way to make an import fail
    done = qat(*tiny("qlora_tiny"))
    refused(done, f"QLoRA needs {package}", 'pip install ".[qlora]"', 'pip install "qat-plugin[qlora]"')
    assert not Path("here").exists()


def test_an_adapter_of_another_base_is_not_merged(qat: Qat, base: Path) -> None:
    assert qat(*tiny("qlora_tiny", "task.stages=[base,qlora]", base=base)).code == 0
    _change_a_weight(base)
    refused(qat("task=merge", "run.dir=here"), "base")
    assert not Path("here", "merged-nf4").exists()


def test_a_truncated_shard_is_refused_before_training(qat: Qat, base: Path) -> None:
    file = base / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    refused(qat(*tiny("qlora_tiny", base=base)), "model.safetensors")
    assert not ADAPTER.exists()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["lora.rank=0"], ["rank=0"]),
        (["lora.targets=[q_porj]"], ["q_porj", "q_proj"]),
        (["lora.backend=bnb"], ["backend"]),
        (["lora.dropout=1.5"], ["dropout=1.5"]),
        (["lora.init=pissa"], ["PiSSA"]),
        (["policy=int4", "merge.scheme=null", "lora.dropout=0.1"], ["dropout"]),
        (["policy=int4"], ["the recipe's merge.scheme=w4a16-g32", "set merge.scheme=null"]),
        (["merge.scheme=foo"], ["merge.scheme: unknown scheme 'foo'"]),
        (["merge.compare=[foo]"], ["merge.compare: unknown scheme 'foo'"]),
        (["task=plan", "plan.card=h1000"], ["the card 'h1000' is not one of", "Did you mean 'H100'"]),
        (["task=plan", "plan.card=h100", "plan.gpu_gib=24"], ["plan.card=h100 has 80 GB and plan.gpu_gib=24"]),
        (["lora=none"], ["lora=default and task=qlora"]),
        (["merge.into=nf"], ["merge.into"]),
        (["merge.scheme=null"], ["merge.scheme"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_mistakes_are_said_before_anything_is_trained(keys: list[str], said: list[str], qat: Qat) -> None:
    done = qat(*tiny("qlora_tiny", *keys))
    refused(done, *said)
    assert "task=plan" not in keys or done.out == ""
    assert not Path("here", "checkpoints").exists()


def test_a_plan_that_will_not_fit_exits_with_three_and_says_what_to_change(qat: Qat) -> None:
    no = qat("task=plan", "recipe=qlora_70b_one_gpu", "plan.gpu_gib=48")
    assert no.code == 3
    assert "No: " in no.out
    assert "optimizer=adamw8bit" in no.out
    assert qat("task=plan", "recipe=qlora_70b_one_gpu", "plan.gpu_gib=48", "optimizer=adamw8bit").code == 0
    yes = qat("task=plan", "recipe=qlora_70b_48gb")
    assert yes.code == 0
    assert "Yes: " in yes.out
    for row in ("NF4 linear layers", "output head", "adapters", "gradients", "optimizer states", "activations: ",
                "logits", "workspace: ", "reserve", "total", "tokens/s"):  # fmt: skip
        assert row in yes.out


def test_a_plan_is_for_the_shape_that_was_asked_for(qat: Qat, base: Path) -> None:
    done = qat("task=plan", "recipe=qlora_tiny", "plan.shape=llama-3-8b")
    assert done.code == 0, done.err
    assert "planned for the shape llama-3-8b" in done.out
    assert "model.layers.{0..31}.mlp.up_proj" in done.out
    given = qat("task=plan", "recipe=qlora_7b", f"model.path={base}")
    assert f"planned for {base}, not plan.shape" in given.out


def test_a_card_of_any_size_loses_a_share_and_the_plan_says_what_it_assumes(qat: Qat) -> None:
    standard = qat("task=plan", "recipe=qlora_7b", "plan.gpu_gib=16")
    assert (
        "fit the 15.6 GiB that torch has on a card of 16 GB. The smallest standard card that holds it: 16"
        in standard.out
    )
    other = qat("task=plan", "recipe=qlora_7b", "plan.gpu_gib=20")
    assert "the 18.5 GiB that torch has on a card of 20 GB (assumed: 92.5%," in other.out
    named = qat("task=plan", "recipe=qlora_7b", "plan.card=h100")  # its own memory, not the recipe's 24 GB
    assert "of 80 GB" in named.out and "Expected on H100" in named.out


def test_a_plan_warns_of_missing_positions_and_forecasts_no_speed_of_a_tiny_model(qat: Qat, base: Path) -> None:
    long = qat("task=plan", "recipe=qlora_7b", "data.sequence_length=20000")
    assert "data.sequence_length=20000 is more than the model's 8192 positions" in long.out
    small = qat("task=plan", "recipe=qlora_7b", f"model.path={base}", "data.sequence_length=32")
    assert "No speed is forecast" in small.out and "positions" not in small.out


def test_a_run_warns_once_of_missing_positions_and_says_what_it_made_of_the_instructions(qat: Qat, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 24}))
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "once upon a time " * 30}]
    Path("chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 20)
    keys = ("task.stages=[base,qlora]", f"model.path={base}", "data.train=chat.jsonl", "model.cache=false")
    done = qat("recipe=qlora_7b", *QUICK, *keys, "run.dir=here", "trainer.accumulate=1")
    assert done.code == 0, done.err
    assert done.out.count("data.sequence_length=32 is more than the model's 24 positions") == 1
    assert "18 examples of" in done.out and "Alpaca form, no chat template" in done.out
    warned = [line for line in done.err.splitlines() if "longer than sequence_length=32" in line]
    assert len(warned) == 2 and all(line.startswith("warning: ") for line in warned)
    assert "UserWarning" not in done.err and "rank_zero_warn" not in done.err


def test_a_mistake_in_the_data_leaves_no_folder(qat: Qat, base: Path) -> None:
    Path("bad.jsonl").write_text(json.dumps({"messages": []}))
    keys = ("recipe=qlora_7b", *QUICK, "model.cache=false", "data.train=bad.jsonl")
    refused(qat(*keys, f"model.path={base}"), "the messages are an empty list")
    refused(qat(*keys, "model.path=bad.jsonl"), "bad.jsonl is a file, and not a GGUF one: give the directory")
    assert not Path("runs").exists()


def test_a_change_that_is_proposed_is_spelled_as_keys_that_work(qat: Qat) -> None:
    keys = ["task=plan", "recipe=qlora_70b_one_gpu", "plan.gpu_gib=48", "data.batch_size=2", "lora.rank=64"]
    no = qat(*keys)
    assert no.code == 3
    change = no.out.split("The cheapest change that fits: ")[1].split(" (")[0]
    assert qat(*keys, *change.split()).code == 0


def _press_ctrl_c_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = TrainingProgress.on_train_batch_end

    def press(self: TrainingProgress, trainer: Any, *args: Any, **kwargs: Any) -> None:
        shown(self, trainer, *args, **kwargs)
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainingProgress, "on_train_batch_end", press)


def _change_a_weight(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.endswith("mlp.down_proj.weight"))
    weights[name] = weights[name] * 1.5
    save_file(weights, base / "model.safetensors", {"format": "pt"})
