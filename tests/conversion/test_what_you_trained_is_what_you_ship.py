"""The promise as a property: from the last training step to the loaded file, the integers are the same."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qat_plugin import Phase, convert, load_converted, prepare, save_converted, set_phase
from qat_plugin.qat import prepared_layers
from tests.qat.arithmetic import Grid, grid

SCHEMES = [
    f"w{w}a{a}{static}{granularity}{asym}"
    for w in (8, 4, 3, 2)
    for a in (16, 8)
    for static in ("", "-static")
    for granularity in ("", "-g8", "-g32", "-tensor")
    for asym in ("", "-asym")
    if not (static and a == 16)
]


def network(widths: list[int], bias: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Embedding(11, widths[0])]
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), nn.Tanh()]
    return nn.Sequential(*layers)


def close_to(numbers: Tensor, reference: Grid) -> None:
    """Equal to the float64 grid but where float32 fell on the other side of a tie: there by one step."""
    difference = np.abs(numbers.double().numpy() - reference.weight)
    assert (difference <= reference.scale.__abs__() * 1.0000001).all()
    assert (difference > 0).mean() < 0.01


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    scheme=st.sampled_from(SCHEMES),
    widths=st.lists(st.sampled_from([8, 24, 32, 64, 172]), min_size=2, max_size=4),
    bias=st.booleans(),
    learn_scales=st.booleans(),
    freeze=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    out_dtype=st.sampled_from([None, torch.bfloat16, torch.float32]),
    rate=st.sampled_from([0.01, 1.0]),
    seed=st.integers(0, 2**20),
)
@example("w4a8-g32", [64, 64, 64], True, True, True, torch.float32, torch.bfloat16, 1.0, 0)
@example("w8a8-static", [32, 32], False, False, True, torch.bfloat16, None, 1.0, 1)
def test_integers_are_identical_all_along(
    scheme: str, widths: list[int], bias: bool, learn_scales: bool, freeze: bool, dtype: torch.dtype,
    out_dtype: torch.dtype | None, rate: float, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    model = network(widths, bias).to(dtype)
    prepare(model, {"default": scheme, "embedding": scheme}, learn_scales=learn_scales).train()
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for step in range(3):
        if freeze and step == 2:
            set_phase(model, Phase.FROZEN)
        optimizer.zero_grad()
        ids = torch.randint(11, (4, 5))
        model(ids).float().square().mean().backward()
        optimizer.step()
    trained = {n: layer.fake_quantizer.integers(layer.weight) for n, layer in prepared_layers(model).items()}
    for name, layer in prepared_layers(model).items():
        fake = layer.fake_quantizer.fake_weight(layer.weight.detach())
        assert torch.equal(fake, trained[name].dequantize(dtype))
        if not (learn_scales or freeze):
            close_to(trained[name].dequantize(), grid(layer.weight.float(), str(layer.fake_quantizer.scheme)))
    convert(model, dtype=out_dtype)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_converted(network(widths, bias), save_converted(model, Path(folder)))
    assert torch.equal(loaded(ids), model(ids))
    for shipped in (model, loaded):
        for name, expected in trained.items():
            actual = shipped.get_submodule(name).weight.integers()
            assert torch.equal(actual.q, expected.q)
            assert torch.equal(actual.scale, expected.scale)
            assert (actual.zero_point is None) == (expected.zero_point is None)
            assert actual.zero_point is None or torch.equal(actual.zero_point, expected.zero_point)
