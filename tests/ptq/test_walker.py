"""The walker: blocks in turn, on what the quantized ones before give; ties, shared layers, bad input, resume."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_plugin import Policy, convert, prepare, proof_of
from qat_plugin.errors import CheckpointError, ConfigError, DataError
from qat_plugin.numerics import quantize
from qat_plugin.ptq import METHODS, GptqOptions, InputStatistics, calibrate, calibration_of, gptq
from qat_plugin.ptq.chains import find_chains
from qat_plugin.qat import Phase, get_phase, quantizers, set_phase
from qat_plugin.scheme import Scheme
from tests.qat import models

QUIET: dict[str, Any] = {"progress": False}
PLAIN = GptqOptions(correct=0.0)


def texts(count: int = 3, tokens: int = 24, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, models.VOCABULARY, (count, 2, tokens), generator=generator)
    return [{"input_ids": batch, "labels": batch} for batch in ids]


def vectors(count: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(20, 64, generator=generator) for _ in range(count)]


def bert_texts() -> list[dict[str, Tensor]]:
    return [{"input_ids": batch["input_ids"], "attention_mask": torch.ones(2, 24).long()} for batch in texts()]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]]]] = {
    "llama": (models.llama, texts),
    "gpt2": (models.gpt2, texts),
    "bert": (models.bert, bert_texts),
    "mlp": (models.mlp, vectors),
}


@pytest.fixture(params=MODELS)
def subject(request: pytest.FixtureRequest) -> tuple[nn.Module, list[Any]]:
    build, batches = MODELS[request.param]
    torch.manual_seed(0)
    return build().eval(), batches()


@pytest.mark.parametrize("method", METHODS)
def test_every_family_is_calibrated_converted_and_proven(subject: tuple[nn.Module, list[Any]], method: str) -> None:
    model, batches = subject
    calibrate(model, "w4a16-g32-asym", batches, method=method, **QUIET)
    held = {name: q.integers(layer_weight(model, name)) for name, q in quantizers(model).items()}
    assert get_phase(model) is Phase.FROZEN
    done = calibration_of(model)
    assert {layer.name for layer in done.layers} == held.keys()
    for layer in done.layers:
        if method == "gptq" and layer.error is not None:
            assert layer.error_before is not None
            assert layer.error <= layer.error_before * 1.0001
    convert(model)
    assert len(proof_of(model).layers) == len(held)
    weights = {name: module.weight for name, module in model.named_modules() if name in held}
    for name, integers in held.items():
        assert torch.equal(weights[name].integers().q, integers.q)  # type: ignore[union-attr, operator]


def layer_weight(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).weight  # type: ignore[return-value]


def test_each_group_sees_what_the_quantized_layers_before_it_give() -> None:
    """By hand: the second layer of an MLP on the outputs of the first one's integers."""
    model, batches, scheme = models.mlp().eval(), vectors(), Scheme.parse("w3a16-g32-asym")
    up, down = (copy.deepcopy(model.get_submodule(name)) for name in ("up", "down"))
    x = torch.cat(batches)

    def by_hand(weight: Tensor, inputs: Tensor) -> Any:
        statistics = InputStatistics(inputs.shape[1])
        for part in inputs.split(20):
            statistics.add(part)
        return gptq(weight, statistics, scheme, PLAIN)

    first = by_hand(up.weight, x)
    second = by_hand(down.weight, torch.tanh(nn.functional.linear(x, first.dequantize(), up.bias)))
    calibrate(model, str(scheme), batches, method="gptq", gptq=PLAIN, **QUIET)
    for name, expected in (("up", first), ("down", second)):
        weight = layer_weight(model, name)
        assert torch.equal(quantizers(model)[name].integers(weight).q, expected.q)


def test_blocks_in_turn_give_what_the_whole_model_gives() -> None:
    """A Llama walked block by block against the same one whose chain is hidden, run whole for every group."""
    torch.manual_seed(0)
    model = models.llama()
    whole = copy.deepcopy(model)
    blocks = whole.model.layers  # type: ignore[union-attr]
    whole.model.layers = _Hidden(list(blocks))  # type: ignore[union-attr, arg-type]
    assert find_chains(prepare(copy.deepcopy(model), "w4a16-g32"))
    for each in (model, whole):
        calibrate(each, "w4a16-g32-asym", texts(), method="gptq", gptq=PLAIN, **QUIET)
    assert not find_chains(whole)
    theirs = {name.replace("layers.held_", "layers."): q for name, q in quantizers(whole).items()}
    for name, quantizer in quantizers(model).items():
        other = theirs[name]
        here = quantizer.integers(layer_weight(model, name))
        there = other.integers(layer_weight(whole, other.layer.name))
        assert (here.q == there.q).float().mean() > 0.995  # sums over batches in another order


class _Hidden(nn.Module):
    """Blocks that can be sliced and iterated over, and are no ModuleList."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        for index, block in enumerate(blocks):
            self.add_module(f"held_{index}", block)

    def __iter__(self) -> Any:
        return iter(self.children())

    def __getitem__(self, index: Any) -> Any:
        return list(self.children())[index]


def test_tied_weights_get_one_set_of_integers() -> None:
    model = models.llama(tied=True)
    policy = Policy({"embedding": "w8a16", "default": "w4a16-g32-asym"})
    calibrate(model, policy, texts(), method="gptq", **QUIET)
    head = next(layer for layer in calibration_of(model).layers if layer.name == "lm_head")
    assert "the integers of model.embed_tokens" in head.note
    convert(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]


def test_a_weight_shared_by_layers_of_two_schemes_is_rounded_for_each() -> None:
    model = models.llama(tied=True)
    policy = Policy({"embedding": "w8a16", "head": "w4a16-g32-asym", "default": "w4a16-g32-asym"})
    before = layer_weight(model, "lm_head").clone()
    calibrate(model, policy, texts(), method="gptq", **QUIET)
    notes = {layer.name: layer.note for layer in calibration_of(model).layers}
    assert "another scheme" in notes["lm_head"]
    assert torch.equal(layer_weight(model, "lm_head"), before)
    convert(model)


class Shared(nn.Module):
    """One layer called twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.layer(torch.tanh(self.layer(x)))))
        return out


def test_a_layer_that_is_called_twice_sees_both_inputs() -> None:
    torch.manual_seed(0)
    model = Shared().eval()
    calibrate(model, "w4a16-g32-asym", vectors(), method="gptq", **QUIET)
    rows = {layer.name: layer.rows for layer in calibration_of(model).layers}
    assert rows == {"layer": 120, "out": 60}
    convert(model)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.used(x)
        return out


def test_a_layer_without_data_is_said_to_have_none() -> None:
    model = Unused().eval()
    calibrate(model, "w4a16-g32-asym", vectors(), method="gptq", **QUIET)
    spare = calibration_of(model).layers[-1]
    assert (spare.name, spare.method) == ("spare", "mse")
    assert "no calibration data" in spare.note


@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_nan_activations_name_layer_and_batch(method: str) -> None:
    batches = vectors()
    batches[2][5, 7] = float("nan")
    with pytest.raises(DataError, match=r"up: 1 of 1280 numbers of its input are NaN .* batch 2"):
        calibrate(models.mlp(), "w4a16-g32-asym", batches, method=method, **QUIET)


@pytest.mark.parametrize(
    ("batches", "message"),
    [([], "there is no calibration data"), ([{"pixels": torch.ones(2, 3)}], "'pixels'.*input_ids"), ([3], "not int")],
)
def test_bad_batches_are_refused(batches: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        calibrate(models.llama(), "w4a16-g32", batches, method="gptq", **QUIET)


def test_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'gptq'"):
        calibrate(models.mlp(), "w4a16-g32", vectors(), method="gpqt", **QUIET)


def test_static_activations_are_calibrated_on_the_quantized_predecessors() -> None:
    torch.manual_seed(0)
    model, batches = models.mlp().eval(), vectors()
    calibrate(model, "w8a8-static", batches, method="mse", **QUIET)
    assert all(quantizer.activation_scale() is not None for quantizer in quantizers(model).values())
    out = model(batches[0])
    convert(model)
    assert torch.allclose(model(batches[0]), out, atol=1e-5)


def test_two_runs_give_the_same_integers() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = calibrate(models.llama(), "w4a16-g32-asym", texts(), method="gptq", **QUIET)
        found.append({name: q.integers(layer_weight(model, name)).q for name, q in quantizers(model).items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("after", "method"), [(1, "gptq"), (2, "gptq"), (2, "awq-gptq")])
def test_a_killed_run_goes_on_to_identical_integers(tmp_path: Path, after: int, method: str) -> None:
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return models.llama()

    def kill(done: int, total: int | None) -> None:
        if done == after:
            raise Killed

    options: dict[str, Any] = {"method": method}
    policy = Policy({"embedding": "w8a16", "default": "w4a16-g32-asym"})
    whole = calibrate(fresh(), policy, texts(), **options, **QUIET)
    with pytest.raises(Killed):
        calibrate(fresh(), policy, texts(), resume=tmp_path, progress=kill, **options)
    calls: list[int] = []
    resumed = calibrate(
        fresh(), policy, texts(), resume=tmp_path, progress=lambda done, total: calls.append(done), **options
    )
    theirs = quantizers(resumed)
    for name, quantizer in quantizers(whole).items():
        here, there = quantizer.integers(layer_weight(whole, name)), theirs[name].integers(layer_weight(resumed, name))
        assert torch.equal(here.q, there.q)
        assert torch.equal(here.scale, there.scale)
    assert calibration_of(resumed) == calibration_of(whole)
    convert(resumed)


@pytest.mark.parametrize("other", ["model", "data", "settings"])
def test_blocks_of_something_else_are_refused(tmp_path: Path, other: str) -> None:
    torch.manual_seed(0)
    model = models.llama()
    calibrate(copy.deepcopy(model), "w4a16-g32", texts(), method="gptq", resume=tmp_path, **QUIET)
    if other == "model":
        with torch.no_grad():
            model.model.norm.weight[0] += 1  # type: ignore[union-attr]
    batches = texts(seed=1) if other == "data" else texts()
    method = "mse" if other == "settings" else "gptq"
    with pytest.raises(CheckpointError, match=f"finished blocks of another {other}"):
        calibrate(model, "w4a16-g32", batches, method=method, resume=tmp_path, **QUIET)


@pytest.mark.parametrize("damage", ["truncated", "altered", "settings"])
def test_damaged_blocks_are_refused(tmp_path: Path, damage: str) -> None:
    torch.manual_seed(0)
    model = models.llama()
    calibrate(copy.deepcopy(model), "w4a16-g32", texts(), method="gptq", resume=tmp_path, **QUIET)
    path = tmp_path / ("settings.json" if damage == "settings" else "model.layers.0.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "altered":
        content[-3] ^= 1
    else:
        del content[len(content) // 2 :]
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=str(path.name)):
        calibrate(model, "w4a16-g32", texts(), method="gptq", resume=tmp_path, **QUIET)


def test_training_can_start_from_gptq_s_scales() -> None:
    torch.manual_seed(0)
    model = prepare(models.mlp(), "w3a16-g32-asym", learn_scales=True)
    calibrate(model, None, vectors(), method="gptq", **QUIET)
    held = {name: q.integers(layer_weight(model, name)) for name, q in quantizers(model).items()}
    set_phase(model, Phase.FAKE_QUANTIZED)
    for name, quantizer in quantizers(model).items():
        now = quantizer.integers(layer_weight(model, name))
        assert torch.equal(now.q, held[name].q)
        assert torch.equal(now.scale, held[name].scale)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = vectors()[0]
    first = nn.functional.mse_loss(model(x), x)
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < float(first.detach())
    convert(model)


def test_hold_refuses_what_does_not_fit() -> None:
    from qat_plugin.errors import PrepareError
    from qat_plugin.qat import hold

    model = prepare(models.mlp(), "w4a16-g32")
    weight, scheme = torch.randn(128, 64), Scheme.parse("w8a16")
    integers = quantize(weight, torch.full((128, 1), 0.01), None, scheme)
    with pytest.raises(PrepareError, match="up is prepared as w4a16-g32"):
        hold(model.up, integers)  # type: ignore[arg-type]
    small = quantize(weight[:64], torch.full((64, 2), 0.1), None, Scheme.parse("w4a16-g32"))
    with pytest.raises(PrepareError, match=r"\[128, 64\], the integers are \[64, 64\]"):
        hold(model.up, small)  # type: ignore[arg-type]
