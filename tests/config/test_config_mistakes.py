"""A mistake in a command line is one message that says what was given, what is allowed and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from qat_plugin.errors import ConfigError

from .conftest import Compose

TINY = "recipe=qat_int4_tiny"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["recipe=qat_int4_tin"], "there is no recipe 'qat_int4_tin'. Did you mean 'qat_int4_tiny'"),
        (["policy=int9"], "there is no policy 'int9'. Did you mean"),
        (["task=fitt"], "there is no task 'fitt'. Did you mean 'fit'"),
        (["model=transformer"], "Did you mean 'transformers'"),
        (["polcy=int8"], "unknown key 'polcy'. Did you mean 'policy'"),
        (["recepi=x"], "Did you mean 'recipe'"),
        (["trainer.max_step=3"], "Did you mean 'max_steps'"),
        (["max_steps=3"], "Did you mean 'trainer.max_steps'"),
        (["+trainer.max_step=3"], "unknown key 'trainer.max_step'"),
        (["++nonsense=3"], "unknown key 'nonsense'"),
        (["model.pat=x"], "unknown key 'model.pat'"),
        (["trainer.max_steps=abc"], "trainer.max_steps: Value 'abc'"),
        (["trainer.max_steps=0"], "trainer.max_steps=0 is not allowed: it must be at least 1"),
        (["trainer.precision=bf16"], "one of 32-true, bf16-mixed, bf16-true"),
        (["trainer.accelerator=tpu"], "one of cpu, cuda, auto"),
        (["trainer.devices=2"], "trainer.devices=2 is not supported"),
        (["trainer.logger=wandb"], "one of csv, tensorboard, false"),
        (["trainer.gradient_clip_val=0"], "must be above 0"),
        (["optimizer.learning_rate=nan"], "must be above 0"),
        (["data.sequence_length=1"], "at least 2"),
        (["policy.indivisible=maybe"], "one of divisor, keep, error"),
        (["policy.rules.ffn=3"], "policy.rules.ffn=3 is not allowed"),
        (["policy.keep=lm_head"], "policy.keep"),
        (["ptq.method=gpqt"], "ptq.method=gpqt is not allowed"),
        (["ptq.observer=mes"], "ptq.observer=mes is not allowed: it is one of minmax, moving-average, percentile, mse"),
        (
            ["qat.observer=percentile:200"],
            "qat.observer=percentile:200 is not allowed: percentile takes a number above",
        ),
        (["qat.initial=mse"], "need qat.learn_scales=true"),
        (["qat.learn_scales=true", "qat.initial=best"], "qat.initial=best is not allowed"),
        (["qat.learn_scales=true", "qat.scale_learning_rate=0"], "qat.scale_learning_rate=0"),
        (["qat.monitor=0"], "qat.monitor=0 is not allowed"),
        (["distill.hidden=1"], "give distill.weight above 0"),
        (["distill.teacher=own"], "distill.teacher=own is not allowed"),
        (["task.stages=[qat,convert]"], "Did you mean 'converted'"),
        (["task.stages=[converted]"], "needs 'qat' or 'ptq'"),
        (["task.stages=[fine-tuned-ptq]"], "needs 'fine-tuned'"),
        (["task.stages=[qat,qat]"], "more than once"),
        (["recipe=qat_int4_llama"], "model.path is needed: local directory"),
        (["model=custom"], "model._target_ is needed: the dotted name of your class"),
        (["trainer.max_steps=1,2"], "--multirun"),
        (["name=[1"], "cannot read 'name=[1'"),
        (["~policy.rules.ffn"], "'policy.rules.ffn' does not exist"),
        (["fit"], "did you mean task=fit?"),
        (["qat_int4_tiny"], "did you mean recipe=qat_int4_tiny?"),
        (["qat_int4_tny"], "did you mean 'qat_int4_tiny'"),
        (["--recipe=x"], "Settings are written without dashes (recipe=VALUE)"),
        (["--config-path", "/x"], "--config-path is not supported"),
        (["--config-dir", "no/such/folder"], "there is no folder 'no/such/folder'"),
        (["allow=[os;path]"], "is no package name"),
    ],
)
def test_the_message(argv: list[str], said: str, compose: Compose) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(*argv)
    assert said in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "HYDRA_FULL_ERROR" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_misspelt_folder_gets_the_closest_name(compose: Compose, tmp_path: Path) -> None:
    (tmp_path / "my_recipes").mkdir()
    with pytest.raises(ConfigError, match=r"Did you mean 'my_recipes'\?"):
        compose("--config-dir", "my_recipe", TINY)


@pytest.mark.parametrize("argument", ["resume=here", "run=here"])
def test_a_folder_that_holds_no_run(argument: str, compose: Compose, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(ConfigError, match="holds no run"):
        compose("task=evaluate", argument)


def test_a_folder_without_a_name(compose: Compose) -> None:
    with pytest.raises(ConfigError, match="resume= names no folder: give resume=DIR"):
        compose("resume=")


def test_resume_takes_no_other_recipe(compose: Compose, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("verbose: true\n")
    with pytest.raises(ConfigError, match="holds the recipe of its run"):
        compose(f"resume={tmp_path}", TINY)
    with pytest.raises(ConfigError, match="exclude each other"):
        compose(f"resume={tmp_path}", "run.dir=x")
