"""QLoRA on unmodified modules: what trains, what a checkpoint holds, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from qat_plugin import convert, proof_of, qlora
from qat_plugin.callbacks import QLoRAFinetuning
from qat_plugin.errors import CheckpointError, ConfigError, PrepareError
from qat_plugin.qat import is_prepared as is_fake_quantized
from tests.callbacks.qlora_subjects import Language, adapters, fitted, llama, tokens
from tests.callbacks.subjects import Bert, Classifier, Gpt2, checkpoint, loader, trainer
from tests.callbacks.subjects import tokens as numbered_tokens


@pytest.mark.parametrize("built_in", ["__init__", "setup", "configure_model"])
def test_adapters_learn_and_the_base_does_not(tmp_path: Path, built_in: str) -> None:
    module = Language(built_in)
    fitted(tmp_path, module, max_steps=12)
    assert module.losses[-1] < module.losses[0]
    reference = qlora.prepare(llama(), rank=4)
    frozen = {n: p for n, p in module.model.named_parameters() if not p.requires_grad}
    for name, parameter in reference.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter.data, frozen.pop(name).data), name
    assert not frozen


def test_every_adapter_has_a_gradient_after_an_evaluation_in_between(tmp_path: Path) -> None:
    """bitsandbytes repacks weights in an eval forward on AVX512-BF16 CPUs, after which few adapters had gradients."""
    module, seen = Language(), {}

    class Watch(QLoRAFinetuning):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            for name, parameter in pl_module.named_parameters():
                if parameter.requires_grad and parameter.grad is not None and bool(parameter.grad.any()):
                    seen.setdefault(trainer.global_step, set()).add(name)

    fit = fitted(tmp_path, module, Watch(rank=4), max_steps=4, val_check_interval=1)
    fit.validate(module, tokens(8), verbose=False)
    again = trainer(tmp_path, Watch(rank=4), max_steps=3)
    seen.clear()
    again.fit(module, tokens())
    expected = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert len(expected) == 2 * 14
    assert seen[2] == expected  # lora_A has none while lora_B is zero, which it no longer is
    float_twin = qlora.merge(module.model)
    assert all(torch.isfinite(p).all() for p in float_twin.parameters())


def test_an_ordinary_network_gpt2_and_bert_train_too(tmp_path: Path) -> None:
    for make, data in ((Classifier, loader()), (Gpt2, loader(numbered_tokens())), (Bert, loader(numbered_tokens()))):
        module = make()
        fitted(tmp_path, module, QLoRAFinetuning(rank=2, alpha=4), data=data)
        layers = qlora.lora_layers(module)
        assert layers
        assert all(float(layer.lora_B["default"].weight.abs().sum()) > 0 for layer in layers.values())
        schemes = {str(layer.scheme) for layer in qlora.prepared_of(module).plan.quantized}
        assert schemes == {"nf4-dq"}


def test_the_frozen_parameters_are_taken_out_of_the_optimizer(tmp_path: Path) -> None:
    module = Language()
    fit = fitted(tmp_path, module)
    held = {id(parameter) for group in fit.optimizers[0].param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in module.parameters() if parameter.requires_grad}


def test_an_optimizer_that_lacks_adapters_is_an_error(tmp_path: Path) -> None:
    class Partial(Language):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for n, p in self.named_parameters() if "q_proj" in n], 1e-2)

    with pytest.raises(ConfigError, match=r"24 of 28 trained parameters are in no optimizer, such as .*k_proj"):
        fitted(tmp_path, Partial())


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_hold_adapters_only(tmp_path: Path, weights_only: bool) -> None:
    module = Language()
    save = ModelCheckpoint(tmp_path / "saved", save_weights_only=weights_only, save_last=True)
    fitted(tmp_path, module, QLoRAFinetuning(rank=4), save)
    saved = checkpoint(save.last_model_path)
    assert set(saved["state_dict"]) == {name for name, p in module.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in saved["state_dict"])
    assert len(module.model.state_dict()) > len(saved["state_dict"])  # the network's own is whole


def test_the_callback_says_in_one_line_what_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fitted(tmp_path, Language())
    (line,) = [
        r.getMessage() for r in caplog.records if "training" in r.getMessage() and "parameters" in r.getMessage()
    ]
    assert "14 x nf4-dq" in line
    assert "2 kept" in line
    assert "adapters" in line
    assert "AdamW will add" in line


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32)])
def test_adapters_stay_in_full_precision(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    module = Language()
    fitted(tmp_path, module, precision=precision)
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert module.model.model.embed_tokens.weight.dtype == dtype  # and nothing is upcast
    assert {layer.get_base_layer().compute_dtype for layer in qlora.lora_layers(module).values()} == {torch.bfloat16}


def test_validation_from_a_checkpoint_in_a_fresh_module(tmp_path: Path) -> None:
    module = Language()
    save = ModelCheckpoint(tmp_path / "saved", save_last=True)
    fit = fitted(tmp_path, module, QLoRAFinetuning(rank=4), save)
    expected = fit.validate(module, tokens(8, shuffle=False), verbose=False)
    fresh = Language()
    found = trainer(tmp_path, QLoRAFinetuning(rank=4)).validate(
        fresh, tokens(8, shuffle=False), ckpt_path=save.last_model_path, verbose=False, weights_only=True
    )
    assert found == expected


def test_another_base_is_refused(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path / "saved", save_last=True)
    fitted(tmp_path, Language(), QLoRAFinetuning(rank=4), save)

    def other() -> Any:
        model = llama()
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[5, 7] += 0.5
        return model

    with pytest.raises(CheckpointError, match="trained on another base"):
        trainer(tmp_path, QLoRAFinetuning(rank=4), max_steps=9).fit(
            Language(make=other), tokens(), ckpt_path=save.last_model_path, weights_only=True
        )


def test_other_adapters_than_the_checkpoints_are_refused(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path / "saved", save_last=True)
    fitted(tmp_path, Language(), QLoRAFinetuning(rank=4), save)
    for options, message in (({"rank": 8}, "shape"), ({"rank": 4, "targets": "q_proj"}, "differ"),
                             ({"rank": 4, "alpha": 5}, "alpha was 32.0 and is 5.0")):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            trainer(tmp_path, QLoRAFinetuning(**options), max_steps=9).fit(
                Language(), tokens(), ckpt_path=save.last_model_path, weights_only=True
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"alpha": 0}, "alpha=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"targets": ()}, "targets is empty"),
        ({"init": "gausian"}, "Did you mean 'gaussian'"),
        ({"at_end": "ship"}, "at_end='ship'"),
        ({"at_end": "convert"}, "at_end='convert' needs a base with an integer scheme.*not 'nf4-dq'"),
        ({"at_end": "convert", "base": {"ffn": "nf4"}}, "at_end='convert' needs a base with an integer scheme"),
        ({"at_end": "convert", "base": None}, "at_end='convert' needs a base with an integer scheme"),
        ({"adapter_dtype": "int8"}, "adapter_dtype='int8'"),
    ],
)
def test_wrong_arguments_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QLoRAFinetuning(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "q_porj"}, r"'q_porj' matches no linear layer .* Did you mean 'q_proj'"),
        ({"targets": ["q_proj", "embed_tokens"]}, r"matches only model.embed_tokens \(Embedding\)"),
        ({"backend": "bnb"}, "backend='bnb'"),
        ({"init": "pissa"}, "does not go with a quantized base"),
        ({"base": "w4a16-g32", "dropout": 0.1}, "use dropout=0 for QAT"),
        ({"train_also": "classifier"}, "train_also: 'classifier' matches no layer"),
    ],
)
def test_what_does_not_fit_the_module_is_refused_before_training(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fitted(tmp_path, Language(), QLoRAFinetuning(**options))


def test_a_module_that_is_quantized_already_is_refused(tmp_path: Path) -> None:
    def small() -> Any:
        return convert(llama(), "w8a8")

    with pytest.raises(ConfigError, match="was converted to integers"):
        fitted(tmp_path, Language(make=small))
    twice = Language()
    fitted(tmp_path, twice)
    with pytest.raises(ConfigError, match="prepared already with other adapters: rank is 4, not 8"):
        fitted(tmp_path, twice, QLoRAFinetuning(rank=8))
    with pytest.raises(PrepareError, match="has adapters already"):
        qlora.prepare(twice.model)


def test_a_part_that_trains_in_full_is_in_the_checkpoint(tmp_path: Path) -> None:
    module = Bert()
    save = ModelCheckpoint(tmp_path / "saved", save_last=True)
    fitted(tmp_path, module, QLoRAFinetuning(rank=2, train_also="classifier"), save, data=loader(numbered_tokens()))
    saved = checkpoint(save.last_model_path)["state_dict"]
    assert {name for name in saved if ".lora_" not in name} == {"model.classifier.weight", "model.classifier.bias"}


def test_qat_and_lora_convert_to_exactly_what_was_trained(tmp_path: Path) -> None:
    module = Language()
    fit = fitted(tmp_path, module, QLoRAFinetuning(rank=4, base="w4a16-g32"), max_steps=8)
    (trained,) = fit.validate(module, tokens(8, shuffle=False), verbose=False)
    ids = next(iter(tokens(8, shuffle=False)))[0]
    module.eval()
    with torch.no_grad():
        before = module.model(ids).logits
    assert module.losses[-1] < module.losses[0]
    qlora.merge(module.model)
    assert is_fake_quantized(module.model)
    with torch.no_grad():
        assert torch.equal(module.model(ids).logits, before)
    convert(module.model)
    assert max(layer.weight_difference for layer in proof_of(module.model).layers) == 0
    (converted,) = trainer(tmp_path).validate(module, tokens(8, shuffle=False), verbose=False)
    assert converted["val_loss"] == pytest.approx(trained["val_loss"], rel=1e-5)


@pytest.mark.parametrize(("at_end", "base"), [("merge", "nf4-dq"), ("convert", "w8a8")])
def test_the_fit_can_end_with_a_merged_or_a_converted_model(tmp_path: Path, at_end: str, base: str) -> None:
    module = Language()
    callback = QLoRAFinetuning(rank=4, base=base, at_end=at_end)  # type: ignore[arg-type]
    fit = fitted(tmp_path, module, callback)
    assert not qlora.lora_layers(module)
    assert not qlora.is_prepared(module)
    fit.test(module, tokens(8), verbose=False)
    assert (at_end == "convert") == (type(module.model.model.layers[0].mlp.up_proj.weight) is not nn.Parameter)


def test_a_module_that_was_prepared_without_integers_is_not_trained_to_be_converted(tmp_path: Path) -> None:
    module = Language()
    qlora.prepare(module.model, rank=4)
    with pytest.raises(ConfigError, match="the module was prepared without one"):
        fitted(tmp_path, module, QLoRAFinetuning(rank=4, base="w8a8", at_end="convert"))
    assert not module.losses


def test_neftune_dora_and_rslora_reach_the_layers(tmp_path: Path) -> None:
    module = Language()
    fitted(tmp_path, module, QLoRAFinetuning(rank=4, alpha=8, rslora=True, dora=True, neftune_alpha=5))
    layers = qlora.lora_layers(module).values()
    assert {layer.scaling["default"] for layer in layers} == {8 / 2}
    assert all("default" in layer.lora_magnitude_vector for layer in layers)
    module.train()
    ids = next(iter(tokens(8)))[0]
    embed = module.model.model.embed_tokens
    assert not torch.equal(embed(ids), embed(ids))
    module.eval()
    assert torch.equal(embed(ids), embed(ids))


def test_adapters_learn_the_same_under_torchaos_nf4(tmp_path: Path) -> None:
    def wide() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.Linear(64, 4))

    class Wide(Classifier):
        def build(self) -> None:
            self.net = wide()

    ends = {}
    for backend in ("bitsandbytes", "torchao"):
        torch.manual_seed(0)
        module = Wide(dropout=0.0)
        base = {"net.0": "nf4-dq", "net.2": "nf4-dq"}
        callback = QLoRAFinetuning(rank=4, base=base, targets=["net.0", "net.2"], backend=backend)  # type: ignore[arg-type]
        fitted(tmp_path, module, callback, data=loader())
        ends[backend] = module.losses
        assert adapters(module)
    assert ends["torchao"] == pytest.approx(ends["bitsandbytes"], rel=0.05)
