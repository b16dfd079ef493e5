"""How far a runtime may be from the model: what noise of a sum's size moves the model by, and no further."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qat_plugin import convert
from qat_plugin.errors import ExportError
from qat_plugin.exporting.agreement import MOST, SUMMATION, Agreement, agreement, worst
from qat_plugin.exporting.contents import Exportable, outputs_of
from qat_plugin.exporting.counterpart import Arithmetic
from qat_plugin.exporting.float32_runtime import compared_in_float32
from qat_plugin.kernels.weight import QuantizedWeight


def mlp(scheme: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = [part for _ in range(3) for part in (nn.Linear(64, 64), nn.SiLU())]
    return convert(nn.Sequential(*layers).to(dtype), scheme).eval()


def agreed(network: nn.Module, x: Tensor, factor: float) -> Agreement:
    wanted = outputs_of(network, (x,))
    return agreement(network, wanted * factor, lambda: outputs_of(network, (x,)))


def test_float_activations_allow_the_order_of_sums_alone() -> None:
    found = agreed(mlp("w4a16-g32"), torch.randn(8, 64), 1.001)
    assert found.tolerance == SUMMATION and found.error == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32"])
def test_rounded_activations_allow_what_noise_moves_them_by(scheme: str) -> None:
    network = mlp(scheme)
    found = agreed(network, torch.randn(64, 64), 1.02)
    assert SUMMATION <= found.tolerance < 1e-2 < found.error  # a wiring error of a fiftieth is one
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_sixteen_bits_allow_their_own_rounding() -> None:
    found = agreed(mlp("w8a16", torch.bfloat16), torch.randn(8, 64, dtype=torch.bfloat16), 1.0)
    assert 2.0**-9 < found.tolerance < 0.1


def test_a_chaotic_model_does_not_allow_everything() -> None:
    network = nn.Sequential(mlp("w8a8"))
    network.register_forward_hook(lambda module, args, out: torch.sin(out * 1e9))
    assert agreed(network, torch.randn(4, 64), 1.0).tolerance == MOST


def test_another_shape_is_an_error_and_the_worst_is_the_nearest_to_its_limit() -> None:
    network, x = mlp("w8a16"), torch.randn(2, 64)
    with pytest.raises(ExportError, match=r"the file gives \(2, 32\), the model \(2, 64\)"):
        agreement(network, torch.zeros(2, 32), lambda: outputs_of(network, (x,)))
    near, far = Agreement(9e-4, 1e-3, ""), Agreement(2e-3, 1e-2, "")
    assert worst([far, near]) is near


def test_a_narrow_model_is_compared_in_float32() -> None:
    network, sample = mlp("w4a16-g32", torch.bfloat16), (torch.randn(4, 64, dtype=torch.bfloat16),)
    assert isinstance(network, nn.Sequential)
    x = sample[0].double()
    for module in network:
        held = module._parameters.get("weight")
        if isinstance(held, QuantizedWeight):
            x = x @ held.integers().dequantize(torch.float64).t() + module.bias.double()
        else:
            x = module(x)
    found, notes = compared_in_float32(Exportable(network, sample), [(x.float(), sample)])
    assert found.error < 1e-6 and found.tolerance == SUMMATION
    assert len(notes) == 1 and notes[0].startswith("the file computes in float32, which moves the model's own")


def test_products_are_computed_as_given_while_it_is_active() -> None:
    network, x = mlp("w8a8"), torch.randn(3, 64)
    before = outputs_of(network, (x,))
    with Arithmetic(lambda x, weight, bias: (torch.zeros_like(x), weight, bias)):
        biases = outputs_of(network, (x,))
    assert torch.equal(biases[0], biases[1]) and not torch.equal(before[0], before[1])
    assert torch.equal(outputs_of(network, (x,)), before)
