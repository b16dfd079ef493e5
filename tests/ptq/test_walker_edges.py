"""Models that are not a plain row of blocks, and what must not be damaged on the way."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_plugin import Policy, prepare
from qat_plugin.errors import CheckpointError, DataError
from qat_plugin.ptq import GptqOptions, InputStatistics, calibrate, calibration_of, gptq
from qat_plugin.ptq.chains import find_chains
from qat_plugin.qat import Phase, get_phase, quantizers, set_phase
from qat_plugin.scheme import Scheme
from tests.ptq.test_walker import Killed, layer_weight, texts, vectors
from tests.qat import models

QUIET: dict[str, Any] = {"progress": False}


def integers(model: nn.Module) -> dict[str, Tensor]:
    return {name: q.integers(layer_weight(model, name)).q for name, q in quantizers(model).items()}


def output_error(model: nn.Module, exact: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        x = torch.cat(batches)
        expected = exact(x)
        return float((model(x) - expected).norm() / expected.norm())


class Block(nn.Module):
    """A residual block; in place or not."""

    def __init__(self, in_place: bool = False, act: Any = F.gelu) -> None:
        super().__init__()
        self.a, self.b, self.in_place, self.act = nn.Linear(64, 64), nn.Linear(64, 64), in_place, act

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.act(self.a(x)))
        if self.in_place:
            x += y
            return x
        return x + y


class Stack(nn.Module):
    def __init__(self, in_place: bool = False, count: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(in_place) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for block in self.blocks:
            x = block(x)
        return x


def stack(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Stack(**options).eval()


@pytest.mark.parametrize("scheme", ["w3a16-g32-asym", "w4a8-g32", "w8a8-static"])
def test_scales_kept_at_the_layers_do_not_mislead_gptq(scheme: str) -> None:
    found = {}
    outliers = torch.ones(64)
    outliers[::9] = 12.0
    batches = [x * outliers for x in vectors(6)]
    for method in ("rtn", "gptq", "awq-gptq"):
        model = stack()
        calibrate(model, scheme, batches, method=method, **QUIET)
        found[method] = output_error(model, stack(), batches)
        if method == "awq-gptq":
            assert any("input scale kept" in layer.note for layer in calibration_of(model).layers)
    assert found["awq-gptq"] < 1.25 * found["gptq"]
    assert found["awq-gptq"] < found["rtn"] * 1.02


def test_blocks_that_add_in_place_are_calibrated_as_others() -> None:
    there, here = stack(in_place=False), stack(in_place=True)
    for model in (there, here):
        calibrate(model, "w4a16-g32-asym", vectors(), method="gptq", **QUIET)
    assert all(torch.equal(q, integers(here)[name]) for name, q in integers(there).items())


class Wrapped(nn.Module):
    """What LightningModules do: a forward of their own around a transformers model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Any:
        return self.model(input_ids)


@pytest.mark.parametrize("form", ["tensor", "wrapped"])
def test_keys_and_values_of_an_earlier_pass_are_not_seen(form: str) -> None:
    torch.manual_seed(0)
    model = models.llama()
    other = copy.deepcopy(model)
    calibrate(model, "w4a16-g32-asym", texts(), method="gptq", **QUIET)
    ids = [batch["input_ids"] for batch in texts()]
    subject = Wrapped(other) if form == "wrapped" else other
    calibrate(subject, "w4a16-g32-asym", ids, method="gptq", **QUIET)
    prefix = "model." if form == "wrapped" else ""
    theirs = integers(subject)
    assert all(torch.equal(q, theirs[prefix + name]) for name, q in integers(model).items())
    assert other.config.use_cache


class TwoInputs(nn.Module):
    """One layer that is called on two tensors, another on the first of them only."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.kv(x) + self.kv(20 * x)


def test_a_layer_with_more_calls_than_its_neighbour_sees_all_of_them() -> None:
    torch.manual_seed(0)
    model = TwoInputs().eval()
    exact = copy.deepcopy(model)
    calibrate(model, "w8a8-static", vectors(), method="mse", **QUIET)
    assert output_error(model, exact, vectors()) < 0.05


class Twice(nn.Module):
    """An encoder that is run on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Stack(count=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.encoder(x) + self.encoder(10 * x)
        return out


def test_a_chain_that_is_run_twice_is_no_chain() -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    exact = copy.deepcopy(model)
    calibrate(model, "w8a8-static", vectors(), method="mse", **QUIET)
    assert output_error(model, exact, vectors()) < 0.05


class Experts(nn.Module):
    """The sign of the first number chooses who computes."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.experts[int(x[0, 0] > 0)](x)
        return out


@pytest.mark.parametrize("scheme", ["w4a16-g32-asym", "w8a8-static"])
def test_an_expert_that_a_later_batch_chooses_is_calibrated_on_it(scheme: str) -> None:
    torch.manual_seed(0)
    batches = [x.abs() * sign for x, sign in zip(vectors(), (1, 1, -1), strict=True)]
    model = calibrate(Experts().eval(), scheme, batches, method="gptq", **QUIET)
    rows = {layer.name: layer.rows for layer in calibration_of(model).layers}
    assert rows == {"experts.0": 20, "experts.1": 40}


def test_a_float_layer_that_shares_a_weight_is_not_changed() -> None:
    torch.manual_seed(0)
    model = models.llama(tied=True)
    before = layer_weight(model, "model.embed_tokens").detach().clone()
    policy = Policy({"head": "w4a16-g32-asym", "default": "w4a16-g32-asym"}, keep=["embedding"])
    calibrate(model, policy, texts(), method="gptq", **QUIET)
    assert torch.equal(layer_weight(model, "model.embed_tokens"), before)
    head = next(layer for layer in calibration_of(model).layers if layer.name == "lm_head")
    assert "stays in float" in head.note


class Fused(nn.Module):
    """Blocks that hand on a residual beside the hidden states."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(64, 64)

        def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
            residual = x if residual is None else x + residual
            return torch.tanh(self.a(residual)), residual

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Fused.Part() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor | None = None
        for block in self.blocks:
            x, residual = block(x, residual)
        return x


def test_blocks_that_hand_on_two_tensors_are_run_from_the_model() -> None:
    torch.manual_seed(0)
    model = calibrate(Fused().eval(), "w2a16-g32-asym", vectors(), method="gptq", gptq=GptqOptions(correct=0), **QUIET)
    assert len(calibration_of(model).layers) == 3
    torch.manual_seed(0)
    by_hand, x = Fused().eval(), torch.cat(vectors())
    hidden, residual = x, None
    for index, block in enumerate(by_hand.blocks):
        statistics = InputStatistics(64)
        statistics.add(hidden if residual is None else hidden + residual)
        name = f"blocks.{index}.a"
        found = gptq(block.a.weight, statistics, Scheme.parse("w2a16-g32-asym"), GptqOptions(correct=0))  # type: ignore[union-attr, arg-type]
        same = integers(model)[name] == found.q
        assert same.float().mean() > 0.99  # sums in another order
        block.a.weight.data = layer_weight(model, name).detach()  # type: ignore[union-attr]
        with torch.no_grad():
            hidden, residual = block(hidden, residual)


def test_a_model_that_is_a_chain_holds_no_other_chains() -> None:
    torch.manual_seed(0)

    def part() -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), nn.Sequential(nn.Linear(64, 64), nn.ReLU()))

    model = nn.Sequential(part(), part()).eval()
    assert [chain.name for chain in find_chains(prepare(copy.deepcopy(model), "w4a16-g32"))] == [""]
    calibrate(model, "w4a16-g32-asym", vectors(), method="awq", **QUIET)
    assert len(calibration_of(model).layers) == 4


def test_padded_batches_of_an_encoder() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    calibrate(model, Policy("w4a16-g32-asym"), [torch.randn(3, 8, 64)], method="gptq", **QUIET)
    assert {layer.rows for layer in calibration_of(model).layers} == {24}


@pytest.mark.parametrize("case", ["bf16 beside", "parted"])
def test_resumed_layers_are_those_of_the_first_run(tmp_path: Path, case: str) -> None:
    policies = {
        "bf16 beside": Policy({"*.v_proj": "bf16", "default": "w4a16-g32-asym"}),
        "parted": Policy({"embedding": "w8a16", "head": "w4a16-g32-asym", "default": "w4a16-g32-asym"}),
    }
    method = "awq" if case == "bf16 beside" else "gptq"

    def run(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        return calibrate(models.llama(), policies[case], texts(), method=method, **options)

    def stop(done: int, total: int | None) -> None:
        if done == 2:
            raise Killed

    whole = run(**QUIET)
    with pytest.raises(Killed), pytest.warns(UserWarning, match="partly quantized"):
        run(resume=tmp_path, progress=stop)
    resumed = run(resume=tmp_path, **QUIET)
    theirs = dict(resumed.named_parameters())
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(theirs[name], parameter, rtol=0, atol=0)
    assert all(torch.equal(q, integers(resumed)[name]) for name, q in integers(whole).items())


def test_another_state_of_a_prepared_model_is_not_resumed(tmp_path: Path) -> None:
    from qat_plugin import calibrating

    def watched(factor: float) -> nn.Module:
        torch.manual_seed(0)
        model = prepare(models.mlp().eval(), "w8a8-static")
        with calibrating(model):
            model(factor * vectors()[0])
        return model

    calibrate(watched(1.0), None, vectors(), method="mse", resume=tmp_path, **QUIET)
    with pytest.raises(CheckpointError, match="another state"):
        calibrate(watched(50.0), None, vectors(), method="mse", resume=tmp_path, **QUIET)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(CheckpointError, match="not what this calibration wrote"):
        calibrate(watched(50.0), None, vectors(), method="mse", resume=tmp_path, **QUIET)


class Late(nn.Module):
    """Its second layer sees NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x) / 0 * 0)
        return out


def test_a_failure_says_whether_weights_were_changed() -> None:
    with pytest.raises(DataError, match="b: "), pytest.warns(UserWarning, match="partly quantized"):
        calibrate(Late().eval(), "w4a16-g32", vectors(), method="gptq", **QUIET)
    model, bad = models.mlp().eval(), vectors()
    bad[0][0, 0] = float("inf")
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings(record=True) as heard, pytest.raises(DataError, match="up: "):
        calibrate(model, "w4a16-g32", bad, method="gptq", **QUIET)
    assert not [warning for warning in heard if "partly" in str(warning.message)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_prepared_model_is_in_its_phase_after_a_failure() -> None:
    model, bad = prepare(models.mlp().eval(), "w4a16-g32"), vectors()
    set_phase(model, Phase.FROZEN)
    scales = {name: q.frozen_scale.clone() for name, q in quantizers(model).items()}
    bad[1][0, 0] = float("nan")
    with pytest.raises(DataError):
        calibrate(model, None, bad, method="gptq", **QUIET)
    assert get_phase(model) is Phase.FROZEN
    assert all(torch.equal(q.frozen_scale, scales[name]) for name, q in quantizers(model).items())
