"""Post-training quantization as a callback, on modules that know nothing of this package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from qat_plugin import PostTrainingQuantization, QuantizationAwareTraining, calibrate, convert, proof_of
from qat_plugin.callbacks import ExactResume
from qat_plugin.conversion import is_converted
from qat_plugin.errors import ConfigError, DataError
from qat_plugin.kernels.weight import QuantizedWeight
from qat_plugin.qat import Phase, get_phase, is_prepared
from tests.callbacks.subjects import Bert, Classifier, Gpt2, batch_of, checkpoint, loader, tokens, trainer, vectors

STATIC = "w8a8-static"


def module(built_in: str = "__init__") -> Classifier:
    torch.manual_seed(0)
    return Classifier(built_in, dropout=0.0)


def said(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> str:
    lines = [
        line for line in (caplog.text + capsys.readouterr().err).splitlines() if "PostTrainingQuantization" in line
    ]
    return "\n".join(lines)


def first_scale(subject: Classifier) -> float:
    weight = subject.net[0].weight
    assert isinstance(weight, QuantizedWeight)
    assert weight.activation_scale is not None
    return float(weight.activation_scale)


class Mapped(Classifier):
    """Batches are mappings, by the names of its forward."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)

    def loss(self, batch: Any) -> Tensor:
        return super().loss([batch["x"], batch["labels"]])


class Mappings(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, *names: str) -> None:
        self.names = names

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(zip(self.names, vectors()[index], strict=True))


class Normed(Classifier):
    """With a BatchNorm that has seen batches."""

    def build(self) -> None:
        self.net = nn.Sequential(
            nn.Unflatten(1, (4, 16)), nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(112, 4)
        )
        with torch.no_grad():
            for batch in loader():
                self.net(2 * batch[0] + 1)


class TestFoldedNorms:
    def numbers(self, subject: Classifier) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in subject.state_dict().items()}

    def test_a_fit_after_a_validation_trains_the_network_as_it_was_before_the_fold(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        subject, callback = Normed(), PostTrainingQuantization(STATIC, convert=False)
        before = self.numbers(subject)
        trainer(tmp_path, callback).validate(subject, loader(), verbose=False)
        assert not torch.equal(subject.net[1].weight, before["net.1.weight"])  # folded
        run = trainer(tmp_path, callback, max_steps=0)
        callback.setup(run, subject, "fit")
        assert not is_prepared(subject)
        for name, value in self.numbers(subject).items():
            assert torch.equal(value, before[name]), name

    def test_a_failure_takes_the_folds_back(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        subject = Normed()
        before = self.numbers(subject)
        bad = [[torch.full((8, 64), torch.nan), torch.zeros(8, dtype=torch.long)]]
        with pytest.raises(DataError):
            trainer(tmp_path, PostTrainingQuantization(STATIC, dataloader=bad)).validate(subject, loader())
        assert not is_prepared(subject)
        for name, value in self.numbers(subject).items():
            assert torch.equal(value, before[name]), name


class TestAfterAFit:
    @pytest.mark.parametrize("built_in", ["__init__", "setup", "configure_model"])
    def test_the_trained_module_ends_on_integer_kernels_that_were_proven_on_real_inputs(
        self, tmp_path: Path, built_in: str
    ) -> None:
        subject = module(built_in)
        run = trainer(tmp_path, PostTrainingQuantization(STATIC))
        run.fit(subject, loader(), loader())
        assert is_converted(subject)
        assert {layer.inputs for layer in proof_of(subject).layers} == {"real"}
        assert run.test(subject, loader(), verbose=False)[0]["test_loss"] > 0

    def test_it_is_the_plain_fit_followed_by_calibrate_on_the_first_batches(self, tmp_path: Path) -> None:
        plain, subject = module(), module()
        trainer(tmp_path).fit(plain, loader())
        convert(calibrate(plain, STATIC, list(loader())[:3], observer="minmax", progress=False))
        trainer(tmp_path, PostTrainingQuantization(STATIC, batches=3, observer="minmax")).fit(subject, loader())
        x = batch_of(loader())[0]
        assert subject.losses == plain.losses
        assert torch.equal(subject(x), plain(x))

    @pytest.mark.parametrize("resume", [False, True])
    def test_random_generators_and_the_loaders_own_are_left_alone(self, tmp_path: Path, resume: bool) -> None:
        def after(*callbacks: L.Callback) -> list[Any]:
            module_, own = module(), torch.Generator().manual_seed(5)
            shuffled = loader(shuffle=True, generator=own)
            trainer(tmp_path, *([ExactResume()] if resume else []), *callbacks).fit(module_, shuffled)
            return [module_.losses, torch.get_rng_state().tolist(), own.get_state().tolist()]

        assert after(PostTrainingQuantization(STATIC)) == after()

    def test_checkpoints_are_float_and_resume_without_it(self, tmp_path: Path) -> None:
        files = ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="{step}", save_top_k=-1, save_last=True)
        subject = module()
        run = trainer(tmp_path, PostTrainingQuantization(STATIC), files)
        run.fit(subject, loader())
        run.save_checkpoint(tmp_path / "after.ckpt")
        for name in ("last.ckpt", "step=3.ckpt", "after.ckpt"):
            state = checkpoint(tmp_path / name)["state_dict"]
            assert {type(value) for value in state.values()} == {Tensor}
            module().load_state_dict(state)
        trainer(tmp_path).fit(module(), loader(), ckpt_path=tmp_path / "step=3.ckpt")

    def test_the_best_checkpoint_is_tested_as_integers_on_the_calibrated_scales(self, tmp_path: Path) -> None:
        files = ModelCheckpoint(tmp_path, monitor="val_loss", filename="best")
        subject = module()
        run = trainer(tmp_path, PostTrainingQuantization(STATIC), files, val_check_interval=2)
        run.fit(subject, loader(), loader())
        scale = first_scale(subject)
        assert run.test(subject, loader(), ckpt_path="best", verbose=False)[0]["test_loss"] > 0
        assert first_scale(subject) == scale

    def test_without_conversion_it_stays_fake_quantized_and_can_be_trained_again(self, tmp_path: Path) -> None:
        subject, plain = module(), module()
        for one, callbacks in ((subject, [PostTrainingQuantization(STATIC, convert=False)]), (plain, [])):
            run = trainer(tmp_path, *callbacks)
            run.fit(one, loader())
            assert is_prepared(one) == bool(callbacks)
            run.validate(one, loader(), verbose=False)
            run.fit_loop.epoch_loop.max_steps = 9
            run.fit(one, loader())
        assert get_phase(subject) is Phase.FROZEN
        assert subject.losses == plain.losses
        assert len(subject.losses) == 9
        assert all(torch.equal(a, b) for a, b in zip(subject.parameters(), plain.parameters(), strict=True))

    def test_a_second_fit_of_the_converted_module_is_refused(self, tmp_path: Path) -> None:
        subject = module()
        run = trainer(tmp_path, PostTrainingQuantization("w8a8"))
        run.fit(subject, loader())
        with pytest.raises(ConfigError, match="Classifier is converted to integers and cannot be trained on"):
            run.fit(subject, loader())

    def test_bf16_kernels(self, tmp_path: Path) -> None:
        subject = module()
        trainer(tmp_path, PostTrainingQuantization(STATIC, dtype="bf16")).fit(subject, loader())
        assert subject(batch_of(loader())[0].bfloat16()).dtype == torch.bfloat16

    @pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
    def test_precision_plugins_convert_the_batches(self, tmp_path: Path, precision: Any) -> None:
        subject = module()
        run = trainer(tmp_path, PostTrainingQuantization(STATIC), precision=precision)
        run.fit(subject, loader())
        assert run.test(subject, loader(), verbose=False)[0]["test_loss"] > 0


class TestBeforeAnEvaluation:
    @pytest.mark.parametrize("verb", ["validate", "test"])
    def test_the_loop_measures_the_quantized_module(
        self, tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        expected = convert(calibrate(module(), STATIC, list(loader())[:2], observer="minmax", progress=False))
        subject = module()
        run = trainer(tmp_path, PostTrainingQuantization(STATIC, batches=2, observer="minmax"))
        with caplog.at_level("INFO"):
            measured = getattr(run, verb)(subject, loader(), verbose=False)
        assert is_converted(subject)
        assert measured == getattr(trainer(tmp_path), verb)(expected, loader(), verbose=False)
        stage = "val" if verb == "validate" else verb
        line = f"rtn, minmax on 2 batches of the {stage} dataloader itself, there being no train dataloader"
        assert line in said(capsys, caplog)

    def test_predictions_are_the_quantized_modules(self, tmp_path: Path) -> None:
        subject = module()
        rows = trainer(tmp_path, PostTrainingQuantization(STATIC)).predict(subject, loader())
        assert rows is not None
        assert torch.equal(rows[0], subject(batch_of(loader())[0]))

    def test_running_again_changes_nothing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        subject = module()
        run = trainer(tmp_path, PostTrainingQuantization(STATIC))
        with caplog.at_level("INFO"):
            first = run.validate(subject, loader(), verbose=False)
            weight = subject.net[0].weight
            assert run.validate(subject, loader(), verbose=False) == first
            run.test(subject, loader(), verbose=False)
        assert subject.net[0].weight is weight
        assert len(set(said(capsys, caplog).splitlines())) == 1

    def test_the_datamodules_train_dataloader_comes_first(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        class Data(L.LightningDataModule):
            def setup(self, stage: str) -> None:
                if stage == "fit":
                    self.train = TensorDataset(vectors()[:][0] * 3, vectors()[:][1])

            def train_dataloader(self) -> DataLoader[Any]:
                return loader(self.train, shuffle=True)

            def test_dataloader(self) -> DataLoader[Any]:
                return loader()

        subject = module()
        with caplog.at_level("INFO"):
            trainer(tmp_path, PostTrainingQuantization(STATIC, observer="minmax")).test(subject, Data(), verbose=False)
        assert first_scale(subject) == pytest.approx(float(vectors()[:][0].abs().max()) * 3 / 127)
        assert "on 6 batches of the train dataloader" in said(capsys, caplog)

    def test_a_given_dataloader_wins_and_may_be_a_list(self, tmp_path: Path) -> None:
        subject = module()
        given = [(torch.full((2, 64), 12.7), torch.zeros(2))]
        callback = PostTrainingQuantization(STATIC, dataloader=given, observer="minmax")
        trainer(tmp_path, callback).test(subject, loader(), verbose=False)
        assert first_scale(subject) == pytest.approx(0.1)

    def test_a_checkpoints_weights_are_what_is_quantized(self, tmp_path: Path) -> None:
        files = ModelCheckpoint(tmp_path, filename="trained")
        trained = module()
        trainer(tmp_path, files).fit(trained, loader())
        subject = module()
        run = trainer(tmp_path, PostTrainingQuantization("w8a8"))
        run.test(subject, loader(), ckpt_path=tmp_path / "trained.ckpt", verbose=False)
        x = batch_of(loader())[0]
        assert torch.equal(subject(x), convert(trained, "w8a8")(x))

    def test_the_loops_own_workers_go_on(self, tmp_path: Path) -> None:
        subject = module()
        data = loader(num_workers=1, persistent_workers=True)
        trainer(tmp_path, PostTrainingQuantization(STATIC, batches=2)).validate(subject, data, verbose=False)
        assert subject.seen["val0"] == 6


class TestBatches:
    def test_mappings_go_by_the_names_of_forward(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        subject = Mapped(dropout=0.0)
        data = loader(Mappings("x", "labels"))
        trainer(tmp_path, PostTrainingQuantization(STATIC, observer="minmax")).fit(subject, data)
        assert first_scale(subject) == pytest.approx(float(vectors()[:][0].abs().max()) / 127)

    def test_names_that_do_not_fit_are_listed_and_the_module_stays_float(self, tmp_path: Path) -> None:
        class Misnamed(Mapped):
            def loss(self, batch: Any) -> Tensor:
                return super().loss({"x": batch["pixels"], "labels": batch["labels"]})

        subject = Misnamed(dropout=0.0)
        with pytest.raises(DataError, match="'pixels', 'labels', and Misnamed.forward takes x: none of them fits"):
            trainer(tmp_path, PostTrainingQuantization(STATIC)).fit(subject, loader(Mappings("pixels", "labels")))
        assert not is_prepared(subject)
        assert type(subject.net[0]) is nn.Linear

    @pytest.mark.parametrize("family", [Gpt2, Bert])
    def test_a_module_without_forward_is_calibrated_through_its_one_model(self, tmp_path: Path, family: Any) -> None:
        subject = family()
        run = trainer(tmp_path, PostTrainingQuantization(STATIC, observer="mse"), max_steps=2)
        run.fit(subject, loader(tokens()))
        assert all(layer.name.startswith("model.") for layer in proof_of(subject).layers)
        assert run.test(subject, loader(tokens()), verbose=False)[0]["test_loss"] > 0

    def test_two_models_and_no_forward_are_refused(self, tmp_path: Path) -> None:
        class Pair(Gpt2):
            def __init__(self) -> None:
                super().__init__()
                self.teacher = nn.Linear(4, 4)

        with pytest.raises(ConfigError, match=r"Pair has no forward\(\) to calibrate through, and 2 models"):
            trainer(tmp_path, PostTrainingQuantization(STATIC)).test(Pair(), loader(tokens()), verbose=False)

    def test_the_modules_transfer_hooks_see_every_batch(self, tmp_path: Path) -> None:
        class Scaled(Classifier):
            def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
                return super().transfer_batch_to_device([batch[0] * 2, batch[1]], device, dataloader_idx)

            def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                return [batch[0] * 5, batch[1]]

        subject = Scaled(dropout=0.0)
        trainer(tmp_path, PostTrainingQuantization(STATIC, observer="minmax")).fit(subject, loader())
        assert first_scale(subject) == pytest.approx(10 * float(vectors()[:][0].abs().max()) / 127)

    def test_a_bad_batch_is_named_with_its_layer(self, tmp_path: Path) -> None:
        bad = [(torch.ones(2, 64), torch.zeros(2)), (torch.full((2, 64), torch.inf), torch.zeros(2))]
        subject = module()
        with pytest.raises(DataError, match=r"calibration batch 1: net\.0 \(w8a8-static\)"):
            trainer(tmp_path, PostTrainingQuantization(STATIC, dataloader=bad)).test(subject, loader(), verbose=False)
        assert not is_prepared(subject)

    def test_no_batch_is_an_error_that_says_where(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no calibration data: the given dataloader has no batch"):
            trainer(tmp_path, PostTrainingQuantization(STATIC, dataloader=[])).test(module(), loader(), verbose=False)

    def test_an_iterator_is_not_consumed(self, tmp_path: Path) -> None:
        given = iter(loader())
        run = trainer(tmp_path, PostTrainingQuantization(STATIC, dataloader=given))
        with pytest.raises(DataError, match="the given dataloader is an iterator"):
            run.test(module(), loader(), verbose=False)
        assert len(list(given)) == 6

    def test_a_stream_is_read_from_its_start(self, tmp_path: Path) -> None:
        class Stream(IterableDataset[Any]):
            def __iter__(self) -> Iterator[Any]:
                return iter(zip(*vectors()[:], strict=True))

        subject = module()
        trainer(tmp_path, PostTrainingQuantization(STATIC, batches=1, observer="minmax")).fit(subject, loader(Stream()))
        assert first_scale(subject) == pytest.approx(float(vectors()[:8][0].abs().max()) / 127)

    def test_several_training_loaders_ask_which(self, tmp_path: Path) -> None:
        class Two(Classifier):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return super().training_step(batch["a"], batch_idx)

        with pytest.raises(ConfigError, match="there are 2 training dataloaders.*dataloader="):
            trainer(tmp_path, PostTrainingQuantization(STATIC)).fit(Two(), {"a": loader(), "b": loader()})


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"method": "rnt"}, "method='rnt' is not one of rtn"),
            ({"batches": 0}, "batches=0 is not allowed"),
            ({"batches": 2.5}, "batches=2.5 is not allowed"),
            ({"observer": "mes"}, "observer=mes is not allowed.*Did you mean 'mse'"),
            ({"dtype": "int8"}, "dtype='int8' is not one of fp32, bf16, fp16"),
            ({"progres": False}, "no argument 'progres'.*Did you mean 'progress'"),
        ],
    )
    def test_arguments_are_checked_by_the_constructor(self, options: dict[str, Any], text: str) -> None:
        with pytest.raises(ConfigError, match=text):
            PostTrainingQuantization(STATIC, **options)

    def test_beside_quantization_aware_training(self, tmp_path: Path) -> None:
        run = trainer(tmp_path, PostTrainingQuantization(), QuantizationAwareTraining("w8a8"))
        with pytest.raises(ConfigError, match="give the trainer one of them"):
            run.fit(module(), loader())

    def test_options_of_calibrate_are_passed_on(self, tmp_path: Path) -> None:
        done: list[tuple[int, int | None]] = []
        callback = PostTrainingQuantization(STATIC, progress=lambda at, total: done.append((at, total)))
        trainer(tmp_path, callback).test(module(), loader(), verbose=False)
        assert done[-1] == (6, 6)

    def test_schemes_that_need_no_data_take_none(self, tmp_path: Path) -> None:
        subject = module()
        trainer(tmp_path, PostTrainingQuantization("w4a8-g32", dataloader=[])).test(subject, loader(), verbose=False)
        assert is_converted(subject)
