"""calibrate() of static activation scales: which observer, which batches, and what goes wrong by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_plugin import Phase, calibrate, convert, prepare
from qat_plugin.conversion.reload import reload_float
from qat_plugin.errors import CheckpointError, ConfigError, DataError, PrepareError
from qat_plugin.observers.spelling import DEFAULT_FOR_CALIBRATION
from qat_plugin.qat import (
    calibrating,
    get_phase,
    is_prepared,
    load_quantizer_state,
    observer_of,
    quantizer_state,
    set_phase,
)

STATIC = "w8a8-static"


class Net(nn.Module):
    """Two layers that run, one that does not."""

    def __init__(self, spare: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 8)
        if spare:
            self.spare, self.other = nn.Linear(32, 8), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x)))
        return y


def batches(count: int = 4) -> list[Tensor]:
    return [torch.randn(16, 32, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(count)]


def scales(model: nn.Module) -> dict[str, float]:
    return {name: float(getattr(model, name).fake_quantizer.activation_scale()) for name in ("up", "down")}


def test_minmax_calibration_is_the_greatest_input_of_each_layer() -> None:
    model = Net().eval()
    with torch.no_grad():
        x = torch.cat(batches())
        expected = {"up": float(x.abs().max()) / 127, "down": float(torch.relu(model.up(x)).max()) / 127}
    calibrate(model, STATIC, batches(), observer="minmax", progress=False)
    assert scales(model) == pytest.approx(expected, rel=1e-6)
    assert get_phase(model) is Phase.FROZEN


def test_a_float_model_takes_the_default_and_a_prepared_one_goes_on_with_its_own() -> None:
    assert str(observer_of(calibrate(Net(), STATIC, batches(), progress=False))) == DEFAULT_FOR_CALIBRATION
    model = prepare(Net(), STATIC, observer="minmax")
    calibrate(model, None, [batches()[3]], progress=False)
    before = scales(model)
    calibrate(model, None, [batches()[0]], progress=False)
    assert scales(model) == before  # the smaller batch adds nothing
    calibrate(model, None, [batches()[0]], observer="minmax", progress=False)
    assert scales(model)["up"] == pytest.approx(float(batches()[0].abs().max()) / 127)


def test_an_unknown_observer_is_refused_before_anything_changes() -> None:
    model = Net()
    with pytest.raises(ConfigError, match="observer=maxmin is not allowed.*Did you mean 'minmax'"):
        calibrate(model, STATIC, batches(), observer="maxmin")
    with pytest.raises(ConfigError, match="observer=mean"):
        prepare(model, STATIC, observer="mean")
    assert not is_prepared(model)


@pytest.mark.parametrize("observer", ["minmax", "mse", "moving-average"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_batch_is_named_with_the_layer_and_the_model_stays_float(observer: str, bad: float) -> None:
    model, given = Net(), batches()
    given[2][3, 4] = bad
    with pytest.raises(DataError, match=rf"calibration batch 2: up \({STATIC}\): its input holds NaN or infinity"):
        calibrate(model, STATIC, given, observer=observer, progress=False)
    assert not is_prepared(model)
    calibrate(model, STATIC, batches(), observer=observer, progress=False)


def test_a_batch_of_another_form_is_named_too() -> None:
    with pytest.raises(DataError, match="calibration batch 1: .*not str"):
        calibrate(Net(), STATIC, [batches()[0], "text"], progress=False)
    with pytest.raises(DataError, match="no calibration data"):
        calibrate(Net(), STATIC, [], progress=False)


def test_layers_that_no_batch_reached_are_all_named() -> None:
    with pytest.raises(PrepareError, match=rf"spare \({STATIC}\), other \({STATIC}\) saw no activation"):
        calibrate(Net(spare=True), STATIC, batches(), progress=False)
    model = prepare(Net(spare=True), STATIC).eval()
    with calibrating(model):
        model(batches()[0])
    with pytest.raises(PrepareError, match=rf"spare \({STATIC}\), other \({STATIC}\) saw no activation"):
        convert(model)
    assert is_prepared(model)


def test_training_on_nan_is_an_error_in_the_forward_pass_that_names_the_layer() -> None:
    model = prepare(Net(), STATIC).train()
    model(batches()[0])
    with pytest.raises(DataError, match="up .*NaN or infinity"):
        model(torch.full((2, 32), torch.nan))


def test_a_dead_input_has_scale_one_and_converts() -> None:
    model = calibrate(Net(), STATIC, [torch.zeros(4, 32)], progress=False)
    assert scales(model)["up"] == 1.0
    x = torch.zeros(2, 32)
    expected = model(x)
    torch.testing.assert_close(convert(model)(x), expected)


@pytest.mark.parametrize("observer", ["minmax", "moving-average:0.5", "percentile:99", "mse", "entropy"])
class TestState:
    def test_it_survives_a_file_and_goes_on_as_if_nothing_had_happened(self, observer: str, tmp_path: Path) -> None:
        model = prepare(Net(), STATIC, observer=observer).train()
        model(batches()[0])
        torch.save(quantizer_state(model), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        again = prepare(Net(), STATIC, observer=observer).train()
        again.load_state_dict(model.state_dict())
        load_quantizer_state(again, state)
        assert scales(again) == scales(model)
        for one in (model, again):
            one(batches()[3])
        assert scales(again) == scales(model)

    def test_a_converted_model_takes_the_scale_of_a_checkpoint(self, observer: str) -> None:
        model = calibrate(Net(), STATIC, batches(), observer=observer, progress=False)
        state, weights = quantizer_state(model), {k: v.clone() for k, v in model.state_dict().items()}
        expected = model.eval()(batches()[0])
        other = convert(calibrate(Net(), STATIC, [torch.ones(1, 32)], observer="minmax", progress=False))
        reload_float(other, weights, state)
        torch.testing.assert_close(other(batches()[0]), expected, rtol=1e-5, atol=1e-5)

    def test_freezing_fixes_the_scale(self, observer: str) -> None:
        model = prepare(Net(), STATIC, observer=observer).train()
        model(batches()[0])
        set_phase(model, Phase.FROZEN)
        before = scales(model)
        model(batches()[3] * 100)
        assert scales(model) == before

    def test_what_ships_is_what_was_calibrated(self, observer: str) -> None:
        model = calibrate(Net(), STATIC, batches(), observer=observer, progress=False).eval()
        x = batches()[1]
        expected, scale = model(x), scales(model)
        convert(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        held: Any = model.up.weight
        assert float(held.activation_scale) == scale["up"]


def test_a_state_of_another_observer_is_refused_and_an_old_one_is_a_moving_average() -> None:
    state = quantizer_state(prepare(Net(), STATIC, observer="percentile:99"))
    with pytest.raises(CheckpointError, match="observed by 'percentile:99'.*'mse'.*prepare it with observer='perc"):
        load_quantizer_state(prepare(Net(), STATIC, observer="mse"), state)
    model = prepare(Net(), STATIC).train()
    model(batches()[0])
    old = quantizer_state(model)
    assert old.pop("observer") == "moving-average"
    assert old["layers"]["up"].keys() == {"absmax", "batches"}
    again = prepare(Net(), STATIC)
    load_quantizer_state(again, old)
    assert scales(again) == scales(model)


def test_a_plan_without_static_schemes_asks_for_no_data() -> None:
    assert observer_of(calibrate(Net(), "w8a8", [], progress=False)) is None
