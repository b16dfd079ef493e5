"""The LightningModule: modes, schedule, groups, and exact perplexities."""

from __future__ import annotations

import math
from pathlib import Path

import lightning as L
import pytest
import torch

from qat_plugin import prepare
from qat_plugin.data.text import TextData
from qat_plugin.errors import ConfigError
from qat_plugin.measure import evaluate_lm
from qat_plugin.models.causal_lm import CausalLM, load_causal_lm
from qat_plugin.models.optimizers import warmup_cosine


def _trainer(tmp_path: Path, **options: object) -> L.Trainer:
    names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet = dict.fromkeys(names, False)
    return L.Trainer(accelerator="cpu", default_root_dir=tmp_path, **(quiet | options))  # type: ignore[arg-type]


@pytest.fixture
def data_of() -> object:
    text = "the quick brown fox jumps over the lazy dog; " * 300
    from qat_plugin.data.documents import Documents

    return lambda tokenizer: TextData(
        tokenizer, Documents.from_text(text), sequence_length=32, batch_size=4, progress=False
    )


def test_the_model_trains_in_train_mode_though_it_is_loaded_in_eval_mode(minute_model: Path) -> None:
    model, tokenizer = load_causal_lm(minute_model)
    assert not model.training
    assert CausalLM(model, tokenizer).model.training


def test_loss_falls_and_validation_equals_an_independent_evaluation(
    minute_model: Path, tmp_path: Path, data_of: object
) -> None:
    model, tokenizer = load_causal_lm(minute_model)
    data = data_of(tokenizer)  # type: ignore[operator]
    module = CausalLM(model, tokenizer, learning_rate=3e-3, warmup_steps=2)
    data.setup()
    before = evaluate_lm(model, data.val_dataloader(), progress=False).loss
    trainer = _trainer(tmp_path, max_steps=30)
    trainer.fit(module, datamodule=data)
    metrics = trainer.validate(module, datamodule=data, verbose=False)[0]
    independent = evaluate_lm(model, data.val_dataloader(), progress=False)
    assert independent.loss < before - 0.5
    assert metrics["val_loss"] == pytest.approx(independent.loss, rel=1e-5)
    assert metrics["val_perplexity"] == pytest.approx(independent.perplexity, rel=1e-4)


@pytest.mark.parametrize("final_share", [0.1, 0.0])
def test_the_learning_rate_warms_up_and_decays(final_share: float) -> None:
    factors = [warmup_cosine(step, 4, 20, final_share) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == pytest.approx(1.0)
    assert factors[20] == pytest.approx(final_share)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert warmup_cosine(10**6, 4, math.inf, final_share) == 1.0


def test_a_module_follows_its_schedule(minute_model: Path, tmp_path: Path, data_of: object) -> None:
    model, tokenizer = load_causal_lm(minute_model)
    module = CausalLM(model, tokenizer, learning_rate=1e-3, warmup_steps=2, final_share=0.0)
    trainer = _trainer(tmp_path, max_steps=4)
    trainer.fit(module, datamodule=data_of(tokenizer))  # type: ignore[operator]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ConfigError, match="final_share is 2"):
        CausalLM(model, tokenizer, final_share=2)


def test_norms_and_learned_scales_are_not_decayed(minute_model: Path, tmp_path: Path, data_of: object) -> None:
    model, tokenizer = load_causal_lm(minute_model)
    module = CausalLM(model, tokenizer, weight_decay=0.1)
    prepare(module, "w8a8", learn_scales=True)
    trainer = _trainer(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=data_of(tokenizer))  # type: ignore[operator]
    decayed, others = trainer.optimizers[0].param_groups
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert all("fake_quantizer" not in names[id(p)] and p.dim() > 1 for p in decayed["params"])
    assert any("fake_quantizer" in names[id(p)] for p in others["params"])
    assert others["weight_decay"] == 0.0
    assert {id(p) for p in [*decayed["params"], *others["params"]]} == set(names)


@pytest.mark.parametrize("wrong", [{"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"warmup_steps": -1}])
def test_numbers_out_of_range_are_refused(minute_model: Path, wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        CausalLM(load_causal_lm(minute_model)[0], **wrong)  # type: ignore[arg-type]


@pytest.mark.real
def test_the_real_model_has_the_perplexity_that_its_readme_states(shared_data: Path) -> None:
    model, tokenizer = load_causal_lm(shared_data / "stories260K")
    data = TextData(
        tokenizer,
        shared_data / "tinystories_valid.txt",
        shared_data / "tinystories_valid.txt",
        sequence_length=256,
        eval_tokens=20_400,
        progress=False,
    )
    data.setup()
    metrics = evaluate_lm(model, data.val_dataloader(), progress=False)
    assert metrics.perplexity == pytest.approx(6.0041, abs=5e-5)
    window = data.valid_windows[3]
    with torch.no_grad():  # transformers' own loss of one window
        expected = model(input_ids=window["input_ids"][None], labels=window["labels"][None]).loss
    assert metrics.losses[3] == pytest.approx(float(expected), rel=1e-5)
