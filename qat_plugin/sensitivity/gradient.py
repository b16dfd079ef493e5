"""The damage of every layer in every scheme from one backward pass a batch: a second-order estimate.

For a model that predicts p, moving its weights by d costs KL(p || p') = 1/2 d^T F d + O(d^3) with the Fisher
information F, the expected outer product of the gradient of -log p(y), y drawn from p. Rounding errors are all but
independent of each other, so that the diagonal of F stands for it: 1/2 sum F_ii (w_i - q_i)^2 (as SqueezeLLM weighs
them, arXiv:2306.07629; HAWQ-V2, arXiv:1911.03852, has the Hessian's trace in the same place). INT8 activations are
counted in the same way, with the gradient at the layer's input. Errors that GPTQ made depend on each other, so that
they cancel: the estimate is then too large, and measuring (``method="kl"``) is better. It is an estimate:
use it where the exact figures cost too much.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.errors import ConfigError
from qat_plugin.measure.evaluating import evaluating
from qat_plugin.measure.progress import Progress, progressing
from qat_plugin.numerics import fake_cast, fake_quantize_activation, round_to_nearest
from qat_plugin.policy import Candidate, LayerPlan, candidates
from qat_plugin.ptq.feeding import feed
from qat_plugin.sensitivity.damage import Measure, predictions
from qat_plugin.sensitivity.options import Group


def gradient_damage(
    measure: Measure, groups: Sequence[Group], *, progress: Progress | bool = True
) -> dict[tuple[str, str], float]:
    """Estimate the damage of each option of each group.

    Args:
        measure: the model and its batches.
        groups: whose options to estimate.
        progress: a bar on stderr, nothing, or a callback(done, total) in batches.

    Returns:
        (group, scheme) -> nats a prediction.

    Raises:
        ConfigError: for static activation scales, whose error the estimate does not know.
    """
    layers = [layer for group in groups for option in group.options for layer in option.layers]
    static = next((layer for layer in layers if layer.scheme is not None and layer.scheme.static), None)
    if static is not None:
        raise ConfigError(
            f"method='gradient' cannot estimate {static.scheme} (its activation scales are calibrated): rank it with "
            "method='kl'"
        )
    names = {name for group in groups for name in group.layers}
    found = {c.name: c for c in candidates(measure.model) if c.name in names}
    rounds_inputs = {layer.name for layer in layers if layer.scheme is not None and layer.scheme.quantizes_activations}
    fisher, inputs = _fisher(measure, found, rounds_inputs, progress)
    damage: dict[tuple[str, str], float] = {}
    for group in groups:
        for option in group.options:
            seen: set[int] = set()
            total = 0.0
            for layer in option.layers:
                candidate = found[layer.name]
                weight: Tensor = candidate.module.weight  # type: ignore[assignment]
                if layer.scheme is None:
                    continue
                if id(weight) not in seen:
                    seen.add(id(weight))
                    error = _rounding_error(measure, layer, candidate, weight.detach())
                    total += 0.5 * float((fisher[id(weight)] * error.square()).sum(dtype=torch.float64))
                if layer.scheme.quantizes_activations:
                    total += inputs[layer.name]
            damage[group.name, option.scheme] = total / measure.tokens
    return damage


def _rounding_error(measure: Measure, layer: LayerPlan, candidate: Candidate, weight: Tensor) -> Tensor:
    """Weight less what its scheme makes of it, in the module's own orientation, float32."""
    assert layer.scheme is not None
    turned = candidate.kind == "conv1d"
    rows = (weight.t() if turned else weight).float()
    if layer.scheme.is_float:
        numbers = fake_cast(rows, layer.scheme.float_dtype)
    else:
        integers = measure.numbers(layer) or round_to_nearest(rows, layer.scheme)
        numbers = integers.dequantize()
    error = rows - numbers.to(rows.device)
    return error.t() if turned else error


def _fisher(
    measure: Measure, found: dict[str, Candidate], rounds_inputs: set[str], progress: Progress | bool
) -> tuple[dict[int, Tensor], dict[str, float]]:
    """id of a weight -> sum over batches of its squared gradient; layer -> damage of rounding its input to INT8."""
    model = measure.model
    weights = {id(c.module.weight): c.module.weight for c in found.values()}
    fisher = {key: torch.zeros_like(weight, dtype=torch.float32) for key, weight in weights.items()}  # type: ignore[arg-type]
    inputs = dict.fromkeys(rounds_inputs, 0.0)
    wanted = {id(weight) for weight in weights.values()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    generator = torch.Generator().manual_seed(0)
    description = "estimating sensitivity"
    with ExitStack() as stack:
        advance = stack.enter_context(progressing(progress, description, len(measure.batches)))
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.enable_grad())
        for name in sorted(rounds_inputs):
            stack.callback(found[name].module.register_forward_pre_hook(_watch(name, inputs)).remove)
        try:
            for parameter in required:
                parameter.requires_grad_(id(parameter) in wanted)
            for index, batch in enumerate(measure.batches):
                logits, _ = predictions(model, feed(model, batch), batch)
                measure.passes += 1
                drawn = torch.multinomial(logits.detach().float().softmax(-1).cpu(), 1, generator=generator)
                loss = nn.functional.cross_entropy(logits.float(), drawn[:, 0].to(logits.device), reduction="sum")
                gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)  # type: ignore[arg-type]
                for key, gradient in zip(weights, gradients, strict=True):
                    if gradient is not None:
                        fisher[key] += gradient.float().square()
                advance(index + 1)
        finally:
            for parameter, wanted_gradient in required.items():
                parameter.requires_grad_(wanted_gradient)
    return fisher, inputs


def _watch(name: str, inputs: dict[str, float]) -> Any:
    """A hook that adds up 1/2 g^2 (x - x_q)^2 over a layer's input once the backward pass knows g."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if not isinstance(x, Tensor) or not x.requires_grad:
            return
        error = (x.detach() - fake_quantize_activation(x.detach())).float().square()

        def arrived(gradient: Tensor) -> None:
            inputs[name] += 0.5 * float((gradient.float().square() * error).sum(dtype=torch.float64))

        x.register_hook(arrived)

    return hook
