"""Every shipped recipe runs: two steps on a small model, a real tokenizer and real text."""

from __future__ import annotations

import os
import signal
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from qat_plugin.config.options import EmbeddedModel
from qat_plugin.config.places import recipes_folder
from qat_plugin.config.schema import Config
from qat_plugin.models.embedded import EmbeddedRecipe, embedded_lm
from qat_plugin.report import read_report
from qat_plugin.runs.language_model import embedded_recipe
from qat_plugin.runs.progress import TrainingProgress
from qat_plugin.runs.skeleton import skeleton_of
from tests.data.mnist import write_mnist

from .conftest import Qat

SMALL = EmbeddedModel(
    hidden=64, ffn=96, vocabulary=320, layers=2, heads=2, steps=2, batch_size=2, sequence_length=32,
    train_characters=60_000, valid_characters=8_000,
)  # fmt: skip
QUICK = (
    "trainer.max_steps=2", "trainer.threads=1", "data.batch_size=2", "data.sequence_length=32", "data.eval_tokens=330",
    "measure.latency_rounds=1", "measure.latency_tokens=[1,3]",
)  # fmt: skip
IMAGES = ("qat_int8_cnn", "ptq_int8_cnn")
QUICK_IMAGES = (
    "trainer.max_steps=2", "trainer.threads=1", "data.batch_size=16", "data.eval_batch_size=3", "model.width=4",
    "model.steps=4", "measure.latency_rounds=1",
)  # fmt: skip
FROM_A_DIRECTORY = ("qat_int4_llama", "qat_int4_lsq", "qat_int3", "qat_int2", "qat_distill")
LARGE = ("qlora_7b", "qlora_70b_one_gpu", "qlora_70b_48gb")
TRAINED = {"mixed_auto": "PTQ", "qlora_tiny": "merged, w4a16-g32", "qat_lora_tiny": "QAT + LoRA"}
RECIPES = sorted(path.stem for path in recipes_folder().glob("*.yaml"))
TRAINED |= {name: "PTQ" for name in RECIPES if name.startswith("ptq")}


pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def text(tmp_path: Path) -> tuple[Path, Path]:
    """A training file of JSONL, a held-out text; chats beside them."""
    (tmp_path / "chat.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "say it"}, '
        '{"role": "assistant", "content": "once upon a time"}]}\n' * 60
    )
    train, valid = tmp_path / "train.jsonl", tmp_path / "valid.txt"
    train.write_text('{"text": "once upon a time there was a small model"}\n' * 100)
    valid.write_text("the small model met a large one\n" * 60)
    return train, valid


def small_model() -> list[str]:
    names = [entry.name for entry in fields(SMALL) if entry.name not in ("kind", "path", "seed")]
    return [f"model.{name}={getattr(SMALL, name)}" for name in names]


def arguments(name: str, text: tuple[Path, Path]) -> list[str]:
    if name in IMAGES:
        return [*QUICK_IMAGES]
    if name in FROM_A_DIRECTORY:
        folder = embedded_lm(recipe=embedded_recipe(SMALL), progress=False)
        return [f"model.path={folder}", f"data.train={text[0]}", f"data.valid={text[1]}"]
    if name in LARGE:
        folder = embedded_lm(recipe=embedded_recipe(SMALL), progress=False)
        small = ["model.cache=false", "optimizer.bits=32", "trainer.accumulate=1", "plan.gpu_gib=24"]
        return [f"model.path={folder}", f"data.train={text[0].with_name('chat.jsonl')}", *small]
    return small_model()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_from_nothing_to_report(name: str, qat: Qat, text: tuple[Path, Path]) -> None:
    quick = () if name in IMAGES else QUICK
    done = qat(f"recipe={name}", "run.dir=here", *quick, *arguments(name, text))
    assert done.code == 0, done.err
    assert done.err.replace("training the embedded model", "") == done.err, "two seconds are not up"
    if name == "sensitivity":
        assert {path.suffix for path in Path("here").glob("sensitivity.*")} == {".md", ".json", ".jsonl", ".png"}
        return
    report = read_report(Path("here", "report.json"))
    rows = {row.name: row for row in report.rows}
    if name in LARGE:
        assert list(rows) == ["NF4 base", "QLoRA"]
        assert Path("here", "adapter", "adapter_model.safetensors").is_file()
        return
    assert rows["reloaded"].metrics == rows["converted"].metrics
    before = rows[TRAINED.get(name, "QAT")].metrics
    assert rows["converted"].metrics.loss == pytest.approx(before.loss, rel=2e-5)
    workloads = {entry.workload for entry in report.latency}
    if name in IMAGES:
        assert rows["converted"].metrics.accuracy == before.accuracy
        assert workloads == {"batch 1", "batch 3"}
        assert {layer["kernel"] for layer in report.plan if layer["type"] == "Conv2d"} == {"onednn-conv"}
        return
    assert rows["converted"].bytes_memory < rows["float"].bytes_memory
    assert workloads == {"batch 1, 1 token", "batch 1, 3 tokens"}
    assert all(not layer["name"].startswith("model.model.") for layer in report.plan), "names are the network's own"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_plans_without_training_or_reading_weights(
    name: str, qat: Qat, text: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(name, text)
    monkeypatch.setenv("QAT_PLUGIN_CACHE", str(tmp_path / "empty"))
    done = qat(f"recipe={name}", "task=plan", *given)
    assert done.code == 0, done.err
    shown = {"mixed_auto": "w4a16-g32-asym"} | dict.fromkeys(IMAGES, "blocks.4.shortcut.0")
    assert shown.get(name, "model.layers.{0..1}.mlp.down_proj") in done.out
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize("keys", [[], ["trainer.precision=bf16-mixed", "qat=learned_scales"]])
def test_a_language_model_interrupted_in_qat_and_resumed_equals_an_uninterrupted_run(
    keys: list[str], qat: Qat, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ["recipe=qat_int4_tiny", *QUICK, *small_model(), "trainer.max_steps=5", "task.stages=[float,qat]", *keys]
    assert qat(*recipe, "run.dir=whole").code == 0
    shown = TrainingProgress.on_train_batch_end

    def press(self: TrainingProgress, trainer: Any, *args: Any, **kwargs: Any) -> None:
        shown(self, trainer, *args, **kwargs)
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingProgress, "on_train_batch_end", press)
        stopped = qat(*recipe, "run.dir=parts")
    assert stopped.code == 130
    assert "stopped after step 2" in stopped.err
    resumed = qat("resume=parts")
    assert resumed.code == 0, resumed.err
    whole, parts = (read_report(Path(folder, "report.json")).rows for folder in ("whole", "parts"))
    assert parts == whole
    states = [torch.load(f"{run}/checkpoints/qat/last.ckpt", weights_only=True) for run in ("whole", "parts")]
    for name, weight in states[0]["state_dict"].items():
        assert torch.equal(weight, states[1]["state_dict"][name]), name


def test_the_skeleton_is_the_model_without_its_weights() -> None:
    skeleton = skeleton_of(Config(model=SMALL), ())
    from qat_plugin.models.causal_lm import load_causal_lm

    model, _ = load_causal_lm(embedded_lm(recipe=embedded_recipe(SMALL), progress=False))
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    assert {name: weight.shape for name, weight in skeleton.named_parameters()} == shapes
    assert {weight.device.type for weight in skeleton.parameters()} == {"meta"}


def test_the_embedded_models_keys_are_its_recipes_fields_and_defaults() -> None:
    assert embedded_recipe(EmbeddedModel()) == EmbeddedRecipe()
    assert {entry.name for entry in fields(EmbeddedModel)} == {entry.name for entry in fields(EmbeddedRecipe)} | {
        "kind", "path",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["model.path=no/such/model"], "no/such/model does not exist; nor does the folder"),
        (["data.train=train.jsnl"], "Did you mean 'train.jsonl'"),
        (["data.valid=."], "directory"),
        (["policy.rules.attn=w8a8"], "policy rule 'attn' matched no module"),
        (["policy.rules.head=w4a16-g32", "policy.indivisible=error", "policy.default=w4a16-g48"], "48"),
        (["data.sequence_length=4000"], "fewer than"),
        (["data.key=body"], "lacks the key 'body'"),
        (["data=custom", "data._target_=torch.nn.Linear"], "unknown key 'data.train'"),
        (["optimizer=own"], "optimizer=own is for model=custom"),
    ],
)
def test_mistakes_in_a_language_models_recipe(keys: list[str], said: str, qat: Qat, text: tuple[Path, Path]) -> None:
    done = qat("recipe=qat_int4_llama", *arguments("qat_int4_llama", text), "run.dir=here", *keys)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err


def test_a_folder_of_images_takes_the_place_of_the_digits(qat: Qat, tmp_path: Path) -> None:
    folder = write_mnist(tmp_path / "mnist", kinds=("t10k",))
    done = qat("recipe=ptq_int8_cnn", "run.dir=here", *QUICK_IMAGES, f"data.path={folder}")
    assert done.code == 0, done.err
    assert read_report(Path("here", "report.json")).rows[0].metrics.samples == 10
    assert qat("task=evaluate", "run=here").code == 0


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["data.path=nowhere"], "nowhere does not exist"),
        (["data.path=."], "no images in MNIST's format"),
        (["model.width=5"], "must be even"),
        (["data.valid_fraction=1"], "below 1"),
        (["data=embedded"], "model=image needs images"),
        (["optimizer=own"], "optimizer=own is for model=custom"),
        (["distill.weight=0.5"], "are for language models"),
        (["policy=int8"], "w8a8 has no integer kernel for convolutions"),
    ],
)
def test_mistakes_in_an_image_nets_recipe(keys: list[str], said: str, qat: Qat) -> None:
    done = qat("recipe=qat_int8_cnn", "run.dir=here", *QUICK_IMAGES, *keys)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err


def test_a_directory_that_is_no_model(qat: Qat, text: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty_model").mkdir()
    done = qat("recipe=qat_int4_llama", "model.path=empty_model", f"data.train={text[0]}", f"data.valid={text[1]}")
    assert done.code == 2
    assert "empty_model" in done.err
    assert not Path("runs").exists()
