"""One callback on an unmodified script: it trains, converts, proves, tests and leaves float checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from qat_plugin.callbacks import MixedPrecision, QuantizationAwareTraining
from qat_plugin.conversion import is_converted, proof_of
from qat_plugin.errors import ConfigError
from qat_plugin.numerics import round_to_nearest
from qat_plugin.qat import Phase, get_phase, is_prepared
from qat_plugin.scheme import Scheme
from tests.callbacks.subjects import (
    CLASSES,
    VOCABULARY,
    WIDTH,
    Bert,
    Classifier,
    Gpt2,
    batch_of,
    checkpoint,
    dequantized,
    loader,
    quantized,
    quantizers_in,
    tokens,
    trainer,
)


@pytest.mark.parametrize("built_in", ["__init__", "setup", "configure_model"])
def test_layers_may_be_built_anywhere(tmp_path: Path, built_in: str) -> None:
    module = Classifier(built_in)
    trainer(tmp_path, QuantizationAwareTraining("w4a8-g32")).fit(module, loader(), loader())
    assert set(quantized(module)) == {"net.0.weight", "net.3.weight", "net.5.weight"}
    assert all(not parameter.requires_grad for parameter in module.parameters())


def test_training_sees_the_quantized_weights(tmp_path: Path) -> None:
    """The loss the callback trains on is that of the rounded weights: it differs from plain training's at step one."""

    def first_loss(*callbacks: L.Callback) -> float:
        torch.manual_seed(0)
        module = Classifier(dropout=0.0)
        trainer(tmp_path, *callbacks, max_steps=2).fit(module, loader())
        return module.losses[0]

    plain = first_loss()
    assert first_loss(QuantizationAwareTraining("w4a8-g32")) != plain
    assert first_loss(QuantizationAwareTraining("w4a8-g32", start=1)) == plain


@pytest.mark.parametrize(
    ("make", "data", "layers"),
    [(Classifier, None, 3), (Gpt2, tokens, 4), (Bert, tokens, 7)],
    ids=["mlp", "gpt2", "bert"],
)
def test_each_family_trains_converts_and_tests(
    tmp_path: Path, make: Callable[[], L.LightningModule], data: Callable[[], Any] | None, layers: int
) -> None:
    batches = loader(None if data is None else data())
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    module = make()
    run = trainer(tmp_path, QuantizationAwareTraining("w4a8-g32"), best)
    run.fit(module, batches, batches)

    proof = proof_of(module)
    assert len(proof.layers) >= layers
    assert {layer.inputs for layer in proof.layers} == {"real"}
    assert all(layer.weight_difference == 0 and layer.output_error <= layer.tolerance for layer in proof.layers)
    integers = {name: weight.integers().q.clone() for name, weight in quantized(module).items()}
    assert len(integers) == len(proof.layers)

    own = run.test(module, batches, verbose=False)
    again = run.test(dataloaders=batches, ckpt_path=best.best_model_path, verbose=False)
    by_name = run.test(dataloaders=batches, ckpt_path="best", verbose=False)
    assert again == by_name
    assert own[0].keys() == by_name[0].keys() == {"test_loss"}
    assert torch.isfinite(torch.tensor(own[0]["test_loss"]))
    assert set(quantized(module)) == set(integers)
    if best.best_model_path:  # six steps, one validation: the best is the last, so the very integers come back
        assert own == by_name
        now = quantized(module)
        assert all(torch.equal(now[name].integers().q, value) for name, value in integers.items())

    assert run.validate(module, batches, verbose=False)[0]["val_loss"] > 0
    predictions = run.predict(module, batches)
    assert predictions is not None and len(predictions) == len(batches)
    assert set(quantized(module)) == set(integers)


def test_the_converted_model_computes_what_was_trained(tmp_path: Path) -> None:
    """Its outputs are those of the float architecture with the dequantized weights, up to INT8 activations."""
    torch.manual_seed(0)
    module = Classifier(dropout=0.0)
    trainer(tmp_path, QuantizationAwareTraining("w4a16-g32"), max_steps=3).fit(module, loader())
    twin = Classifier(dropout=0.0)
    twin.load_state_dict(dequantized(module))
    x = batch_of(loader())[0]
    torch.testing.assert_close(module.eval()(x), twin.eval()(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)]
)
def test_precisions(tmp_path: Path, precision: Any, dtype: torch.dtype) -> None:
    module = Classifier()
    run = trainer(tmp_path, QuantizationAwareTraining("w8a8"), precision=precision)
    run.fit(module, loader(), loader())
    weights = quantized(module)
    assert len(weights) == 3 and {weight.dtype for weight in weights.values()} == {dtype}
    assert run.test(module, loader(), verbose=False)[0]["test_loss"] > 0


def test_gradient_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    phases: list[tuple[int, Phase]] = []

    class Recorder(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            phases.append((trainer.global_step, get_phase(pl_module)))

    qat = QuantizationAwareTraining("w8a8", start=1, freeze=2)
    module = Classifier()
    trainer(tmp_path, qat, Recorder(), accumulate_grad_batches=2, max_steps=3).fit(module, loader())
    float_, fake, frozen = Phase.FLOAT, Phase.FAKE_QUANTIZED, Phase.FROZEN
    assert phases == [(0, float_), (1, float_), (1, fake), (2, fake), (2, frozen), (3, frozen)]
    assert is_converted(module)


def test_a_schedule_in_fractions(tmp_path: Path) -> None:
    phases: list[Phase] = []

    class Recorder(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            phases.append(get_phase(pl_module))

    qat = QuantizationAwareTraining("w8a8-static", start=0.5, freeze=0.75)
    trainer(tmp_path, qat, Recorder(), max_steps=8).fit(Classifier(), loader())
    assert phases == [Phase.OBSERVING] * 4 + [Phase.FAKE_QUANTIZED] * 2 + [Phase.FROZEN] * 2


class TwoOptimizers(Classifier):
    """Manual optimization; each optimizer steps on every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.SGD(self.net[3].parameters(), 0.1)]


@pytest.mark.parametrize("limit", [{"max_steps": 8}, {"max_epochs": 1, "max_steps": -1, "limit_train_batches": 4}])
def test_manual_optimization_with_two_optimizers(tmp_path: Path, limit: dict[str, int]) -> None:
    phases: list[Phase] = []

    class Recorder(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            phases.append(get_phase(pl_module))

    module = TwoOptimizers()
    before = module.net[0].weight.detach().clone()
    trainer(tmp_path, QuantizationAwareTraining("w8a8", start=0.5), Recorder(), **limit).fit(module, loader())
    assert phases == [Phase.FLOAT] * 2 + [Phase.FAKE_QUANTIZED] * 2  # half of the eight optimizer steps
    assert len(quantized(module)) == 3
    assert not torch.equal(module.net[0].weight.dequantize(), before)


def test_two_validation_loaders(tmp_path: Path) -> None:
    module = Classifier()
    run = trainer(tmp_path, QuantizationAwareTraining("w4a8-g32"), num_sanity_val_steps=0)
    run.fit(module, loader(), [loader(), loader()])
    assert module.seen == {"val0": 6, "val1": 6}
    assert {"val_loss", "val_loss/dataloader_idx_1"} <= set(run.callback_metrics)
    assert is_converted(module)


def test_a_compiled_child(tmp_path: Path) -> None:
    class Compiled(Classifier):
        def build(self) -> None:
            super().build()
            self.net = torch.compile(self.net, backend="eager")  # type: ignore[assignment]

    module = Compiled(dropout=0.0)
    run = trainer(tmp_path, QuantizationAwareTraining({"net.0": "w8a8", "net.3": "w4a8-g32"}), max_steps=3)
    run.fit(module, loader(), loader())
    assert set(quantized(module)) == {"net._orig_mod.0.weight", "net._orig_mod.3.weight"}
    assert run.test(module, loader(), verbose=False)[0]["test_loss"] > 0


def test_without_a_validation_loop(tmp_path: Path) -> None:
    class NoValidation(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, CLASSES))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    module = NoValidation()
    trainer(tmp_path, QuantizationAwareTraining("w4a8-g32")).fit(module, loader())
    assert len(quantized(module)) == 2


@pytest.mark.parametrize("weights", ["last", "best"])
def test_fast_dev_run(tmp_path: Path, weights: Any) -> None:
    module = Classifier()
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    run = trainer(tmp_path, QuantizationAwareTraining("w4a8-g32", weights=weights), best, fast_dev_run=True)
    run.fit(module, loader(), loader())
    assert is_converted(module)


def test_validate_before_fit_sees_the_float_model(tmp_path: Path) -> None:
    module = Classifier()
    plain = trainer(tmp_path).validate(module, loader(), verbose=False)
    run = trainer(tmp_path, QuantizationAwareTraining("w4a8-g32"))
    assert run.validate(module, loader(), verbose=False) == plain
    assert not is_prepared(module)
    run.fit(module, loader(), loader())
    assert is_converted(module)


def test_converting_can_be_left_to_the_user(tmp_path: Path) -> None:
    module = Classifier()
    run = trainer(tmp_path, QuantizationAwareTraining("w4a8-g32", convert=False))
    run.fit(module, loader(), loader())
    assert is_prepared(module) and not is_converted(module)
    assert run.test(module, loader(), verbose=False)[0]["test_loss"] > 0
    trained = module.net[0].weight.detach().clone()
    trainer(tmp_path, QuantizationAwareTraining("w4a8-g32"), max_steps=2).fit(module, loader())  # training goes on
    assert is_converted(module)
    assert not torch.equal(module.net[0].weight.integers().q, round_to_nearest(trained, Scheme.parse("w4a8-g32")).q)


def test_the_converted_model_may_run_in_bf16(tmp_path: Path) -> None:
    module = Classifier()
    trainer(tmp_path, QuantizationAwareTraining("w4a16-g32", dtype="bf16")).fit(module, loader(), loader())
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert len(quantized(module)) == 3
    assert module.eval()(batch_of(loader())[0].bfloat16()).dtype is torch.bfloat16


def test_mixed_precision_casts_and_trains_plainly(tmp_path: Path) -> None:
    def fit(*callbacks: L.Callback) -> L.LightningModule:
        torch.manual_seed(0)
        module = Gpt2()
        run = trainer(tmp_path, *callbacks, max_steps=2)
        run.fit(module, loader(tokens()), loader(tokens()))
        return module

    plain, cast = fit(), fit(MixedPrecision({"embedding": "fp16", "ffn": "bf16"}))
    reference, stored = plain.state_dict(), dequantized(cast)
    fp16, bf16 = "model.transformer.wte.weight", "model.transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(stored[fp16], reference[fp16].half().float())
    assert torch.equal(stored[bf16], reference[bf16].bfloat16().float())
    kept = "model.transformer.h.0.attn.c_attn.weight"
    assert torch.equal(stored[kept], reference[kept])
    assert cast.model.transformer.wte.weight.data_.dtype is torch.float16
    assert is_converted(cast) and not quantized(cast)
    logits = cast.eval().model(torch.zeros(1, 4, dtype=torch.long)).logits
    assert logits.dtype is torch.float32 and logits.shape == (1, 4, VOCABULARY)


def test_mixed_precision_takes_no_integers() -> None:
    with pytest.raises(ConfigError, match="w4a8-g32 is not fp32, bf16 or fp16"):
        MixedPrecision({"ffn": "w4a8-g32"})


class Failing(Classifier):
    """Stops at its third batch."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 2:
            self(batch[0])  # the error arrives in the middle of a step
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=["ctrl-c", "error"])
@pytest.mark.parametrize("start", [0, 2])
def test_an_interrupted_fit_is_not_converted(tmp_path: Path, error: BaseException, start: int) -> None:
    module = Failing(error)
    files = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="{step}", save_top_k=-1)
    expected = (SystemExit, KeyboardInterrupt) if isinstance(error, KeyboardInterrupt) else RuntimeError
    with pytest.raises(expected):
        trainer(tmp_path, QuantizationAwareTraining("w4a8-g32", start=start), files).fit(module, loader())
    assert is_prepared(module) and not is_converted(module)
    assert all(type(parameter) is nn.Parameter for parameter in module.parameters())
    assert not [hook for layer in module.modules() for hook in _capturing(layer)]
    assert quantizers_in(checkpoint(tmp_path / "step=2.ckpt"))["layers"].keys() == {"net.0", "net.3", "net.5"}
    module.error = None  # type: ignore[assignment]
    again = Classifier()
    trainer(tmp_path, QuantizationAwareTraining("w4a8-g32", start=start)).fit(
        again, loader(), ckpt_path=tmp_path / "step=2.ckpt"
    )
    assert is_converted(again)


def _capturing(layer: nn.Module) -> list[Any]:
    return [hook for hook in layer._forward_pre_hooks.values() if "keep_rows" in getattr(hook, "__qualname__", "")]
