"""NEFTune's noise: within its bound, uniform, in train mode only, and no obstacle to gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_plugin.errors import ConfigError
from qat_plugin.qlora.neftune import add_noise
from tests.qlora.tiny_models import FAMILIES


def embedding(rows: int = 50, width: int = 64) -> nn.Embedding:
    return nn.Embedding(rows, width)


def noise(layer: nn.Embedding, ids: Tensor) -> Tensor:
    return layer(ids).detach() - layer.weight.detach()[ids]


@pytest.mark.parametrize(("length", "alpha"), [(16, 5.0), (40, 5.0), (16, 15.0), (1, 1.0)])
def test_noise_fills_its_bound_evenly(length: int, alpha: float) -> None:
    layer = embedding()
    nn.init.zeros_(layer.weight)
    add_noise(layer, alpha)
    found = noise(layer, torch.randint(50, (64, length)))
    bound = alpha / (length * 64) ** 0.5
    assert 0.99 * bound < found.abs().max() <= bound
    assert found.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)  # of a uniform distribution
    assert abs(found.mean().item()) < 0.05 * bound


def test_noise_is_new_in_each_pass_and_for_each_token() -> None:
    layer = embedding()
    add_noise(layer, 5)
    ids = torch.zeros(2, 8, dtype=torch.long)
    first, second = noise(layer, ids), noise(layer, ids)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0, 0], first[0, 1]) and not torch.equal(first[0], first[1])


def test_the_same_seed_gives_the_same_noise() -> None:
    layer = embedding()
    add_noise(layer, 5)
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(layer(torch.arange(8)))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_evaluation_is_exact_and_training_is_noisy_again_after_it() -> None:
    layer = embedding()
    add_noise(layer, 5)
    ids = torch.arange(8)
    assert torch.equal(layer.eval()(ids), layer.weight[ids])
    assert not torch.equal(layer.train()(ids), layer.weight[ids])


def test_the_handle_takes_the_noise_away() -> None:
    layer = embedding()
    add_noise(layer, 5).remove()
    assert torch.equal(layer(torch.arange(8)), layer.weight[:8])


def test_gradients_of_the_embedding_are_those_without_noise() -> None:
    layer = embedding()
    add_noise(layer, 5)
    upstream = torch.randn(2, 3, 64)
    ids = torch.tensor([[1, 2, 1], [4, 2, 1]])
    layer(ids).backward(upstream)
    expected = torch.zeros_like(layer.weight).index_add(0, ids.flatten(), upstream.flatten(0, 1))
    torch.testing.assert_close(layer.weight.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_type_of_the_embedding_is_kept(dtype: torch.dtype) -> None:
    layer = embedding().to(dtype)
    add_noise(layer, 5)
    assert layer(torch.arange(8)).dtype == dtype
    assert bool(noise(layer, torch.arange(8)).any())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_language_models_word_embedding_is_found(family: str) -> None:
    model: Any = FAMILIES[family]().train()
    add_noise(model, 5)
    ids = torch.arange(8).unsqueeze(0)
    words = model.get_input_embeddings()
    assert not torch.equal(words(ids), words.weight[ids])
    others = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    assert len(others) == (1 if family == "gpt2" else 0)  # GPT-2's positions stay exact
    assert all(torch.equal(other(ids), other.weight[ids]) for other in others)


@pytest.mark.parametrize("alpha", [0, -5, float("nan")])
def test_an_alpha_that_is_not_above_zero_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match=f"neftune_alpha={alpha} is not allowed"):
        add_noise(embedding(), alpha)


def test_a_model_without_an_embedding_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has no embedding"):
        add_noise(nn.Linear(4, 4), 5)
