"""The network that is traced computes what the converted one does, before anything is lowered."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("executorch")

from qat_plugin import Policy, convert
from qat_plugin.exporting.agreement import agreement
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.executorch.options import Options
from qat_plugin.exporting.executorch.refusing import refusals
from qat_plugin.exporting.executorch.rounding import Rounding, register_operators
from qat_plugin.exporting.executorch.skeleton import PREFIX, arguments, limits, skeleton
from qat_plugin.kernels.weight import QuantizedWeight
from qat_plugin.numerics import Quantized
from qat_plugin.ptq import calibrate
from qat_plugin.scheme import Scheme

register_operators()
IDS = {"input_ids": torch.arange(24).reshape(2, 12) % 40}


def check(network: nn.Module, sample: Mapping[str, Tensor] | tuple[Tensor, ...], roundings: Any = None) -> None:
    model = Exportable(network.eval(), sample)
    before = {name: id(tensor) for name, tensor in network.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        given = arguments(model, Options())
        found = agreement(network, skeleton(model, roundings)(*given), model.outputs)
        assert found.error <= found.tolerance  # sums in another order: an activation may fall to its other side
    assert {name: id(tensor) for name, tensor in network.state_dict(keep_vars=True).items()} == before


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40, n_positions=16))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-tensor", "w4a8-g32", "w4a8", "w2a8-g32"])
def test_gpt2_whose_weights_are_transposed(scheme: str) -> None:
    network = convert(gpt2(), Policy({"embedding": "fp16", "head": "fp16", "default": scheme}))
    assert refusals(Exportable(network, IDS), Options()) == []
    check(network, IDS)


def test_an_input_scale_is_divided_by() -> None:
    scheme = Scheme.parse("w8a8")
    held = Quantized(torch.randint(-127, 128, (8, 32), dtype=torch.int8), torch.full((8, 1), 0.0078125), None, scheme)
    network = convert(nn.Sequential(nn.Linear(32, 8)), "w8a8")
    weight = QuantizedWeight.from_integers(held, torch.float32, input_scale=torch.rand(32) + 0.5)
    network[0].weight = nn.Parameter(weight, requires_grad=False)  # type: ignore[index]
    check(network, (torch.randn(3, 32),))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 9, 9)),
        (nn.Conv2d(4, 6, (2, 4), padding="same", dilation=(1, 3)), torch.randn(2, 4, 9, 9)),
        (nn.Conv2d(4, 6, 3, padding="valid", bias=False), torch.randn(2, 4, 9, 9)),
        (nn.Conv1d(4, 6, 3, padding=2), torch.randn(2, 4, 9)),
        (nn.Linear(9, 5), torch.randn(2, 4, 9)),
    ],
    ids=["strides", "same", "valid", "one dimension", "linear"],
)
@pytest.mark.parametrize("fed", [False, True])
def test_calibrated_layers_with_a_float_output(layer: nn.Module, x: Tensor, fed: bool) -> None:
    network = convert(calibrate(nn.Sequential(copy.deepcopy(layer)), {"*": "w8a8-static"}, [(x,)], progress=False))
    check(network, (x,), {f"{PREFIX}0": Rounding(fed=fed)})


def test_a_model_in_bf16_becomes_float32_with_the_same_numbers() -> None:
    network = convert(nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16)), {"0": "w8a8"}, dtype=torch.bfloat16)
    made = skeleton(Exportable(network.eval(), (torch.randn(2, 32),)), None)
    norm = made.get_parameter(f"{PREFIX}1.weight")
    assert norm.dtype is torch.float32 and torch.equal(norm, network.get_parameter("1.weight").float())


def test_layers_that_would_be_replaced_by_something_else_are_refused() -> None:
    class Doubling(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    own = convert(nn.Sequential(Doubling(8, 4)), "w8a8")
    (told,) = refusals(Exportable(own, (torch.ones(1, 8),)), Options())
    assert "Doubling has a forward of its own" in str(told)
    alone = convert(nn.Linear(8, 4), {"*": "w8a8"})
    (told,) = refusals(Exportable(alone, (torch.ones(1, 8),)), Options())
    assert "not the weight of a module of the network" in str(told)


def test_limits_come_from_the_options_the_sample_and_the_model() -> None:
    network = gpt2()
    assert limits(Exportable(network, IDS), Options()) == (1, 16)
    assert limits(Exportable(network, IDS), Options(max_length=8, max_batch=4)) == (4, 8)
    assert limits(Exportable(nn.Linear(2, 2), (torch.ones(5, 2),)), Options()) == (5, 0)
