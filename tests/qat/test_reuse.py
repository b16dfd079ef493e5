"""Weights that did not change are not quantized again, and nobody can tell from the results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qat_plugin import Phase, prepare, set_phase
from qat_plugin.native import native_disabled
from qat_plugin.qat import prepared_layers, reusing_weights
from tests.qat.models import FAMILIES, MLP, batch, gpt2, output


def gradients(model: nn.Module, forward: Callable[[], Tensor]) -> list[Tensor]:
    """Of two micro-batches."""
    model.zero_grad()
    for _ in range(2):
        forward().square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["w4a8-g32", "w8a16", "w4a16-g32-asym"])
@pytest.mark.parametrize("phase", [Phase.FAKE_QUANTIZED, Phase.FROZEN])
def test_gradients_of_micro_batches_are_the_same_bits(family: str, scheme: str, phase: Phase) -> None:
    model, inputs = prepare(FAMILIES[family](), scheme), batch(family)
    set_phase(model, phase)
    expected = gradients(model, lambda: output(model, inputs))
    with reusing_weights(model) as reuse:
        found = gradients(model, lambda: output(model, inputs))
    assert all(map(torch.equal, found, expected))
    assert reuse.quantized == reuse.reused > 0


def test_one_quantization_a_weight_until_something_changes() -> None:
    model, x = prepare(MLP(), "w4a8-g32"), torch.randn(3, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with reusing_weights(model) as reuse:

        def step_and_count() -> int:
            before, fresh = reuse.quantized, model(x)
            with torch.no_grad():
                quantizers = [layer.fake_quantizer for layer in prepared_layers(model).values()]
                for quantizer in quantizers:
                    quantizer.reuse = None
                assert torch.equal(model(x), fresh)
                for quantizer in quantizers:
                    quantizer.reuse = reuse
            return reuse.quantized - before

        assert step_and_count() == 2
        assert step_and_count() == 0
        model(x).sum().backward()
        optimizer.step()
        assert step_and_count() == 2  # the optimizer wrote to both
        with torch.no_grad():
            model.up.weight[0, 0] = 3.0
        assert step_and_count() == 1
        model.load_state_dict(MLP().state_dict())
        assert step_and_count() == 2
        set_phase(model, Phase.FROZEN)
        assert step_and_count() == 2
        model.up.fake_quantizer.frozen_scale.mul_(2.0)
        assert step_and_count() == 1
        model.down.weight = nn.Parameter(torch.randn(64, 128))
        assert step_and_count() == 1
        model.up.weight.data = torch.randn(128, 64)
        assert step_and_count() == 1
        with torch.inference_mode():
            model(x)
        assert step_and_count() == 2  # what inference mode made cannot be trained through
        reuse.drop()
        assert step_and_count() == 2
    model(x)
    assert all(layer.fake_quantizer.reuse is None for layer in prepared_layers(model).values())


def test_learned_scales_and_looked_up_rows_are_quantized_at_every_pass() -> None:
    model, x = prepare(MLP(), "w4a16-g32", learn_scales=True), torch.randn(3, 64)
    with reusing_weights(model) as reuse:
        model(x).sum().backward()
        assert reuse.quantized == 0
        assert all(
            layer.fake_quantizer.grid.relative_scale.grad is not None for layer in prepared_layers(model).values()
        )
    embedding = prepare(nn.Sequential(nn.Embedding(8, 32)), {"embedding": "w4a16-g32"})
    with reusing_weights(embedding) as reuse:
        for ids in (torch.tensor([1, 2]), torch.tensor([3, 4])):
            expected = embedding[0].fake_quantizer.fake_weight(embedding[0].weight[ids])
            assert torch.equal(embedding(ids), expected)
        assert reuse.quantized == 0


def test_a_transposed_weight_is_held_as_rows() -> None:
    model, inputs = prepare(gpt2(), "w4a8-g32"), batch("gpt2")
    expected = gradients(model, lambda: output(model, inputs))
    with reusing_weights(model), native_disabled():
        found = gradients(model, lambda: output(model, inputs))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("scheme", ["w4a8-g32", "w8a16"])
def test_a_checkpointed_pass_recomputes_the_same(scheme: str) -> None:
    model, x = prepare(MLP(), scheme), torch.randn(3, 64, requires_grad=True)
    expected = gradients(model, lambda: model(x))
    assert all(map(torch.equal, gradients(model, lambda: checkpoint(model, x, use_reentrant=False)), expected))
    with reusing_weights(model) as reuse:
        found = gradients(model, lambda: checkpoint(model, x, use_reentrant=False))
    assert all(map(torch.equal, found, expected))
    assert (reuse.quantized, reuse.reused) == (2, 6)


def test_nested_reuse_gives_the_outer_one_back() -> None:
    model, x = prepare(MLP(), "w8a16"), torch.randn(3, 64)
    with reusing_weights(model) as outer:
        model(x)
        with reusing_weights(model) as inner:
            model(x)
        model(x)
    assert (outer.quantized, outer.reused, inner.quantized, inner.reused) == (2, 2, 2, 0)
