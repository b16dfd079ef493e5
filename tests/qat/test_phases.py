"""Phases: what each computes, what freezing fixes, and that calibration moves nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qat_plugin import Phase, calibrating, capture_inputs, prepare, set_phase
from qat_plugin.errors import PrepareError
from qat_plugin.qat import get_phase, prepared_layers
from tests.qat.models import FAMILIES, MLP, batch, bert, gpt2, llama, output, sequential

SCHEMES = ["w8a8", "w8a8-static", "w4a16-g32", "w4a16-g32-asym", "fp16"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("phase", [Phase.FLOAT, Phase.OBSERVING])
def test_float_phases_are_bit_equal_to_the_float_model(family: str, phase: Phase) -> None:
    model, x = FAMILIES[family](), batch(family)
    expected = output(model, x).detach()
    prepare(model, "w4a8-g32", phase=phase, learn_scales=True)
    assert torch.equal(output(model, x), expected)
    set_phase(model, Phase.FAKE_QUANTIZED)
    assert not torch.equal(output(model, x), expected)
    set_phase(model, phase)
    assert torch.equal(output(model, x), expected)


@pytest.mark.parametrize("learn_scales", [False, True])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32", "w4a16-g32-asym", "w8a16-tensor"])
def test_freezing_keeps_the_numbers_and_then_the_scales_while_weights_move(scheme: str, learn_scales: bool) -> None:
    model, x = prepare(MLP(), scheme, learn_scales=learn_scales), batch("mlp")
    expected = model(x)
    set_phase(model, Phase.FROZEN)
    assert get_phase(model) is Phase.FROZEN
    assert torch.equal(model(x), expected)
    layer = model.up
    before = layer.fake_quantizer.qparams(layer.weight)
    with torch.no_grad():
        layer.weight.mul_(1.5)
    after = layer.fake_quantizer.qparams(layer.weight)
    assert torch.equal(after[0], before[0])
    assert (after[1] is None) == (before[1] is None)
    assert after[1] is None or torch.equal(after[1], before[1])
    set_phase(model, Phase.FROZEN)  # again: it does not freeze anew
    assert torch.equal(layer.fake_quantizer.qparams(layer.weight)[0], before[0])
    model(x).sum().backward()
    assert layer.weight.grad is not None


def test_leaving_frozen_releases_the_scales() -> None:
    model = prepare(MLP(), "w4a16-g32")
    set_phase(model, Phase.FROZEN)
    frozen = model.up.fake_quantizer.qparams(model.up.weight)[0]
    with torch.no_grad():
        model.up.weight.mul_(2.0)
    set_phase(model, Phase.FAKE_QUANTIZED)
    assert torch.equal(model.up.fake_quantizer.qparams(model.up.weight)[0], frozen * 2)


def test_freezing_does_not_alias_a_learned_scale() -> None:
    model = prepare(MLP(), "w4a16-g32", learn_scales=True)
    set_phase(model, Phase.FROZEN)
    frozen = model.up.fake_quantizer.qparams(model.up.weight)[0].clone()
    with torch.no_grad():
        model.up.fake_quantizer.grid.relative_scale.mul_(2.0)
    assert torch.equal(model.up.fake_quantizer.qparams(model.up.weight)[0], frozen)


def test_phases_may_be_given_by_their_names() -> None:
    model = prepare(MLP(), "w8a8")
    set_phase(model, "frozen")  # type: ignore[arg-type]
    assert get_phase(model) is Phase.FROZEN
    with pytest.raises(PrepareError, match="'melted' is not one of 'float', 'observing', 'fake-quantized', 'frozen'"):
        set_phase(model, "melted")  # type: ignore[arg-type]
    fresh = MLP()
    with pytest.raises(PrepareError, match="'melted'"):
        prepare(fresh, "w8a8", phase="melted")  # type: ignore[arg-type]
    assert type(fresh.up) is nn.Linear


class TestObservers:
    def test_they_average_over_training_batches(self) -> None:
        model = prepare(nn.Sequential(nn.Linear(64, 8)), "w8a8-static").train()
        batches = [torch.randn(4, 64) * size for size in (1.0, 5.0, 2.0)]
        for x in batches:
            model(x)
        expected = float(batches[0].abs().max())
        for x in batches[1:]:
            expected = 0.9 * expected + 0.1 * float(x.abs().max())
        assert float(model[0].fake_quantizer.observer.absmax) == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("phase", list(Phase))
    def test_they_move_only_in_training_and_never_when_frozen_or_float(self, phase: Phase) -> None:
        model = prepare(nn.Sequential(nn.Linear(64, 8)), "w8a8-static").train()
        model(torch.randn(4, 64))
        set_phase(model, phase)
        observer = model[0].fake_quantizer.observer
        before = observer.absmax.clone()
        model.eval()(torch.randn(4, 64) * 9)
        assert torch.equal(observer.absmax, before)
        model.train()(torch.randn(4, 64) * 9)
        moves = phase in (Phase.OBSERVING, Phase.FAKE_QUANTIZED)
        assert torch.equal(observer.absmax, before) != moves

    def test_a_layer_in_eval_mode_inside_a_training_model_is_not_observed(self) -> None:
        model = prepare(MLP(), "w8a8-static").train()
        model.up.eval()
        model(batch("mlp"))
        assert not model.up.fake_quantizer.observer.has_data
        assert model.down.fake_quantizer.observer.has_data

    @pytest.mark.parametrize("phase", list(Phase))
    def test_calibrating_watches_in_eval_and_leaves_all_else_as_it_was(self, phase: Phase) -> None:
        model, x = prepare(MLP(), "w8a8-static").eval(), batch("mlp")
        plain = MLP()
        plain.load_state_dict(model.state_dict())
        set_phase(model, phase)
        with torch.no_grad():  # a frozen scale must survive although it is no longer the weight's own
            model.up.weight.mul_(2.0)
            plain.up.weight.mul_(2.0)
        before = [t.clone() for t in model.up.fake_quantizer.qparams(model.up.weight) if t is not None]
        with calibrating(model), torch.no_grad():
            assert torch.equal(model(x), plain(x))
        assert get_phase(model) is phase
        after = [t for t in model.up.fake_quantizer.qparams(model.up.weight) if t is not None]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert torch.equal(model.up.fake_quantizer.observer.absmax, x.abs().max())
        model(x * 100)
        assert torch.equal(model.up.fake_quantizer.observer.absmax, x.abs().max())

    def test_calibrating_ends_well_when_the_forward_fails(self) -> None:
        model = prepare(MLP(), "w8a8-static", phase=Phase.FROZEN).eval()
        with pytest.raises(RuntimeError), calibrating(model):
            model(torch.randn(2, 3))
        assert get_phase(model) is Phase.FROZEN
        model(batch("mlp"))
        assert model.up.fake_quantizer.observer.batches == 1  # the one that failed came that far
        assert not model.down.fake_quantizer.observer.has_data

    def test_without_data_the_scale_names_the_layer_and_what_to_do(self) -> None:
        model = prepare(MLP(), "w8a8-static").eval()
        model(batch("mlp"))
        with pytest.raises(PrepareError, match=r"down \(w8a8-static\) saw no activation.*calibrating"):
            model.down.fake_quantizer.activation_scale()

    def test_an_unprepared_model_cannot_be_calibrated_or_watched(self) -> None:
        for context in (calibrating, capture_inputs):
            with pytest.raises(PrepareError, match="MLP is not prepared"), context(MLP()):
                pass


class TestCaptureInputs:
    def test_rows_are_what_each_layer_was_given(self) -> None:
        model, x = prepare(MLP(), "w8a8").eval(), torch.randn(2, 5, 64)
        with capture_inputs(model) as rows:
            model(x)
        assert list(rows) == ["up", "down"]
        assert torch.equal(rows["up"], x.reshape(-1, 64))
        assert torch.equal(rows["down"], torch.tanh(model.up(x)).reshape(-1, 128))
        assert not rows["down"].requires_grad

    def test_at_most_64_rows_spread_over_the_batch_from_the_last_pass(self) -> None:
        model = prepare(nn.Sequential(nn.Linear(2, 4)), "w8a16")
        with capture_inputs(model) as rows:
            model(torch.zeros(10, 2))
            model(torch.arange(2000.0).reshape(1000, 2))
        assert rows["0"].shape == (64, 2)
        assert rows["0"][-1, 0] > 1500
        assert {tuple(row) for row in rows["0"].tolist()} <= {(2.0 * i, 2.0 * i + 1) for i in range(1000)}

    @pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "sequential", "encoder", "own_forwards"])
    def test_every_layer_of_each_family_is_seen(self, family: str) -> None:
        model = prepare(FAMILIES[family](), {"default": "w8a8", **self.embedding(family)})
        with capture_inputs(model) as rows:
            output(model, batch(family))
        assert set(rows) == set(prepared_layers(model))
        for name, layer in prepared_layers(model).items():
            if isinstance(layer, nn.Embedding):
                assert rows[name].dtype == torch.int64
                assert rows[name].dim() == 1
            else:
                assert rows[name].shape[1] == layer.fake_quantizer.rows(layer.weight).shape[1]

    @staticmethod
    def embedding(family: str) -> dict[str, str]:
        return {"embedding": "w8a16"} if family in ("llama", "gpt2", "bert", "sequential") else {}

    def test_hooks_are_gone_afterwards_even_after_an_error(self) -> None:
        model = prepare(MLP(), "w8a8")
        with pytest.raises(RuntimeError), capture_inputs(model):
            model(torch.randn(2, 3))
        assert not model.up._forward_pre_hooks

    def test_padded_inference_of_an_encoder(self) -> None:
        model, x = prepare(FAMILIES["encoder"](), "w4a8-g32"), batch("encoder")
        padding = torch.zeros(3, 6, dtype=torch.bool)
        padding[0, 2:] = True
        with capture_inputs(model) as rows, torch.no_grad():
            model(x, src_key_padding_mask=padding)
        assert rows["layers.0.linear1"].shape == (2 + 6 + 6, 64)


def test_models_of_transformers_run_in_every_phase() -> None:
    for family in (llama, gpt2, bert, sequential):
        model = prepare(family(), "w8a8-static").train()
        for phase in Phase:
            set_phase(model, phase)
            assert output(model, batch(family.__name__)).isfinite().all()
