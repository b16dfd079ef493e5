"""Policies: ordered rules on names, types and roles, resolved against a model into a :class:`Plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from qat_plugin.errors import PolicyError, did_you_mean
from qat_plugin.kernels import ConvShape, LayerSpec, choose, kernel_named
from qat_plugin.policy.plan import LayerPlan, Plan
from qat_plugin.policy.roles import Candidate, candidates
from qat_plugin.policy.rules import Rule, check_pattern, check_used
from qat_plugin.scheme import Scheme

Indivisible = Literal["divisor", "keep", "error"]
_EVERYWHERE = "default"
_USAGE = {"embedding": "embedding", "conv": "conv"}


@dataclass(frozen=True)
class Policy:
    """Which layer gets which scheme.

    Rules are tried in order; the first that matches decides. ``keep`` patterns come before all rules. What no rule
    matches takes ``default``; embeddings and the output head take it never: they stay as they are unless a rule names
    them. The two sides of a tied weight follow the side that a rule names.

    Args:
        rules: one scheme for all linear layers (``"w4a8-g32"``; ``"w8a8-static"`` is for convolutions too), or pattern
            -> scheme (see :mod:`qat_plugin.policy.rules`); the key ``"default"`` sets ``default``, the value ``None``
            or ``"keep"`` keeps.
        default: scheme of linear layers that no rule matches; ``None`` keeps them.
        keep: patterns of layers that stay as they are.
        indivisible: what to do with a layer whose ``in_features`` the group size does not divide: take the largest
            divisor not above it (``"divisor"``), keep the layer in float (``"keep"``) or raise (``"error"``).

    Raises:
        PolicyError: for a malformed pattern or option; SchemeError for a malformed scheme.

    Example::

        policy = Policy({"embedding": "fp16", "attention": "w8a8", "ffn": "w4a16-g32"}, keep=["lm_head"])
        print(policy.plan(model))
    """

    rules: tuple[Rule, ...]
    default: Scheme | None
    keep: tuple[str, ...]
    indivisible: Indivisible

    def __init__(
        self,
        rules: str | Scheme | Mapping[str, str | Scheme | None],
        *,
        default: str | Scheme | None = None,
        keep: Sequence[str] = (),
        indivisible: Indivisible = "divisor",
    ) -> None:
        if isinstance(rules, (str, Scheme)):
            if default is not None:
                raise PolicyError(f"give either one scheme for all layers ({rules}) or rules with a default, not both")
            rules = {_EVERYWHERE: rules}
        if not isinstance(rules, Mapping):
            raise PolicyError(f"a policy is a scheme or a mapping of pattern to scheme, not {type(rules).__name__}")
        if indivisible not in get_args(Indivisible):
            raise PolicyError(f"indivisible={indivisible!r} is not one of {', '.join(get_args(Indivisible))}")
        if isinstance(keep, str):
            keep = (keep,)
        ordered = {check_pattern(pattern): _scheme_or_keep(scheme) for pattern, scheme in rules.items()}
        default_scheme = ordered.pop(_EVERYWHERE, None) if default is None else Scheme.parse(default)
        object.__setattr__(self, "rules", tuple(Rule(pattern, scheme) for pattern, scheme in ordered.items()))
        object.__setattr__(self, "default", default_scheme)
        object.__setattr__(self, "keep", tuple(check_pattern(pattern) for pattern in keep))
        object.__setattr__(self, "indivisible", indivisible)

    @classmethod
    def coerce(cls, policy: Policy | str | Scheme | Mapping[str, str | Scheme | None]) -> Policy:
        """A Policy from whatever can stand for one."""
        return policy if isinstance(policy, Policy) else cls(policy)

    def __str__(self) -> str:
        parts = [f"keep {pattern}" for pattern in self.keep]
        parts += [str(rule) for rule in self.rules]
        parts += [f"default -> {self.default or 'keep'}", f"indivisible: {self.indivisible}"]
        return "; ".join(parts)

    def plan(
        self, model: nn.Module, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Plan:
        """Resolve the policy against a model. Touches no weight; the model may be on the meta device.

        Args:
            model: any module.
            device: where the converted model will run; by default where each weight is.
            dtype: the float type it will run in; by default each weight's own.

        Raises:
            PolicyError: when a rule matches nothing or nothing new, when the model has no layer to speak of, when a
                group size does not divide and ``indivisible="error"``, when a rule asks for the impossible.
        """
        name, found = type(model).__name__, candidates(model)
        if not any(c.kind in ("linear", "conv1d", "conv", "embedding") for c in found):
            raise PolicyError(
                f"{name} has no Linear, Conv1d, Conv2d, Conv1D or Embedding layer: there is nothing to quantize"
            )
        every = [*(Rule(pattern, None) for pattern in self.keep), *self.rules]
        decided = _decide(found, every)
        check_used(every, found, decided, name)
        listed = [c for c in found if c.kind != "norm" or c.name in decided]
        target = None if device is None else torch.device(device)
        for rule in self.rules:
            _check_convolutions(rule, [c for c in found if decided.get(c.name) is rule])
        layers = [self._layer(c, decided.get(c.name), len(self.keep), every, target, dtype) for c in listed]
        return Plan(tuple(_tie(layers, listed, decided, target, dtype)), name)

    def _layer(
        self,
        candidate: Candidate,
        rule: Rule | None,
        kept_rules: int,
        every: list[Rule],
        device: torch.device | None,
        dtype: torch.dtype | None,
    ) -> LayerPlan:
        layer = _as_it_is(candidate)
        if rule is not None and any(rule is other for other in every[:kept_rules]):
            return replace(layer, rule=f"keep {rule.pattern}", reason="the policy keeps it")
        if rule is None and (set(candidate.roles) & {"embedding", "head"} or self.default is None):
            why = "no rule names it" + (" (the default leaves embeddings and heads alone)" if self.default else "")
            return replace(layer, rule="-", reason=candidate.blocked or why)
        scheme, label = (self.default, "default") if rule is None else (rule.scheme, rule.pattern)
        layer = replace(layer, rule=label)
        if scheme is None:
            return replace(layer, reason="the policy keeps it")
        if candidate.blocked:
            return replace(layer, reason=candidate.blocked)
        return self._resolve(layer, candidate, scheme, device, dtype)

    def _resolve(
        self,
        layer: LayerPlan,
        candidate: Candidate,
        scheme: Scheme,
        device: torch.device | None,
        dtype: torch.dtype | None,
    ) -> LayerPlan:
        if scheme.is_float:
            return _cast(layer, candidate, scheme)
        if candidate.kind == "norm":
            raise PolicyError(
                f"rule {layer.rule!r} gives {scheme} to {layer.name} ({layer.type}): normalisation layers are not "
                "quantized to integers; keep them or give them fp32, bf16 or fp16"
            )
        if candidate.kind == "conv" and not runs_convolutions(scheme):
            return replace(layer, reason=_no_convolution(scheme))
        scheme, reason = _without_activation(candidate, scheme)
        in_features = candidate.out_in[1]
        if scheme.group_size is not None and scheme.kind == "integer" and in_features % scheme.group_size:
            text = f"g{scheme.group_size} does not divide in_features {in_features}"
            if self.indivisible == "error":
                raise PolicyError(
                    f"{layer.name}: {text} (rule {layer.rule!r}, {scheme}); choose a divisor, or set indivisible to "
                    "'divisor' or 'keep'"
                )
            if self.indivisible == "keep":
                return replace(layer, reason=f"{text}: kept")
            scheme = scheme.with_group_size(largest_divisor(in_features, scheme.group_size))
            reason = f"{text}: g{scheme.group_size}" + (f"; {reason}" if reason else "")
        return _with_kernel(replace(layer, scheme=scheme, reason=reason), candidate, device, dtype)


def runs_convolutions(scheme: Scheme) -> bool:
    """Whether a scheme is one for convolutions too: a float type, or INT8 by calibrated INT8."""
    static8 = scheme.is_integer and scheme.weight_bits == 8 and scheme.static
    return scheme.is_float or (static8 and scheme.symmetric and scheme.group_size is None)


def _no_convolution(scheme: Scheme) -> str:
    return f"{scheme} has no integer kernel for convolutions: w8a8-static has"


def _check_convolutions(rule: Rule, decides: list[Candidate]) -> None:
    """Raise when a rule speaks of convolutions alone and gives them what they cannot take."""
    convolutions = [c for c in decides if c.kind == "conv" and not c.blocked]
    if rule.scheme is None or runs_convolutions(rule.scheme) or not convolutions:
        return
    if all(c.kind in ("conv", "norm", "unsupported") for c in decides):
        raise PolicyError(
            f"rule {rule.pattern!r} gives {rule.scheme} to {convolutions[0].name} "
            f"({type(convolutions[0].module).__name__}): convolutions run as w8a8-static, or as fp32, bf16 or fp16; "
            "give them one of these, or keep them"
        )


def _decide(found: list[Candidate], rules: list[Rule]) -> dict[str, Rule]:
    """Layer -> the first rule that matches it; a rule for integers passes over norms, unless it names nothing else."""
    decided = {c.name: rule for c in found if (rule := next((r for r in rules if r.matches(c)), None)) is not None}
    norms = {c.name for c in found if c.kind == "norm"}
    useful = {id(rule) for name, rule in decided.items() if name not in norms}
    return {
        name: rule
        for name, rule in decided.items()
        if name not in norms or rule.scheme is None or rule.scheme.is_float or id(rule) not in useful
    }


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that is not above ``limit``."""
    return next(d for d in range(min(limit, number), 0, -1) if number % d == 0)


def _scheme_or_keep(scheme: str | Scheme | None) -> Scheme | None:
    return None if scheme is None or scheme == "keep" else Scheme.parse(scheme)


def _as_it_is(candidate: Candidate) -> LayerPlan:
    weight = getattr(candidate.module, "weight", None)
    shape: tuple[int, ...] = ()
    if isinstance(weight, nn.parameter.UninitializedParameter) or not isinstance(weight, torch.Tensor):
        own = candidate.module.parameters(recurse=False)
        made = [p for p in own if not isinstance(p, nn.parameter.UninitializedParameter)]
        size = sum(p.numel() * p.element_size() for p in made)
    else:
        size = weight.numel() * weight.element_size()
        shape = tuple(weight.shape) if candidate.kind in ("unsupported", "norm") else candidate.out_in
    return LayerPlan(
        candidate.name, type(candidate.module).__name__, candidate.roles, shape, None, "-",
        bytes_before=size, bytes_after=size, usage=_USAGE.get(candidate.kind, "linear"),
    )  # fmt: skip


def _cast(layer: LayerPlan, candidate: Candidate, scheme: Scheme) -> LayerPlan:
    now: torch.dtype = candidate.module.weight.dtype  # type: ignore[assignment]
    if now == scheme.float_dtype or now.itemsize < scheme.float_dtype.itemsize:
        return replace(layer, reason=f"its weight is {str(now).removeprefix('torch.')}: {scheme} would add nothing")
    after = layer.bytes_before * scheme.float_dtype.itemsize // now.itemsize
    return replace(layer, scheme=scheme, kernel="cast", bytes_after=after)


def _without_activation(candidate: Candidate, scheme: Scheme) -> tuple[Scheme, str]:
    if candidate.kind != "embedding" or not scheme.quantizes_activations:
        return scheme, ""
    return scheme.weight_format, f"an embedding has no activation to quantize: {scheme.weight_format}"


def _with_kernel(
    layer: LayerPlan, candidate: Candidate, device: torch.device | None, dtype: torch.dtype | None
) -> LayerPlan:
    assert layer.scheme is not None
    weight: torch.Tensor = candidate.module.weight  # type: ignore[assignment]
    rows, columns = candidate.out_in
    conv = ConvShape(tuple(weight.shape), candidate.module.groups) if candidate.kind == "conv" else None  # type: ignore[arg-type]
    spec = LayerSpec(layer.scheme, rows, columns, device or weight.device, dtype or weight.dtype, layer.usage, conv)  # type: ignore[arg-type]
    choice = choose(spec)
    if choice.refusal is not None:
        return replace(layer, kernel="none", note=f"cannot be converted on {spec.device.type}: {choice.refusal}")
    return replace(layer, kernel=choice.kernel, note=choice.note, bytes_after=kernel_named(choice.kernel).nbytes(spec))


def _tie(
    layers: list[LayerPlan],
    found: list[Candidate],
    decided: dict[str, Rule],
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> list[LayerPlan]:
    """Let layers that share one Parameter share one representation, or say what parting them costs."""
    groups: dict[int, list[int]] = {}
    for i, candidate in enumerate(found):
        weight = candidate.module._parameters.get("weight")
        if weight is not None:
            groups.setdefault(id(weight), []).append(i)
    for members in (g for g in groups.values() if len(g) > 1):
        _tie_group(layers, found, members, decided, device, dtype)
    return layers


def _tie_group(
    layers: list[LayerPlan],
    found: list[Candidate],
    members: list[int],
    decided: dict[str, Rule],
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> None:
    first = members[0]
    leader = next((i for i in members if layers[i].name in decided and layers[i].scheme is not None), None)
    if leader is None:
        leader = next((i for i in members if layers[i].scheme is not None), first)
    for i in members:  # a side that no rule names follows the side that one does
        if layers[i].name not in decided and layers[leader].scheme is not None:
            text = f"follows {layers[leader].name}, whose weight it shares"
            layers[i] = replace(
                layers[i],
                scheme=layers[leader].scheme,
                rule=layers[leader].rule,
                reason=text,
                kernel=layers[leader].kernel,
            )
    usages = {layers[i].usage for i in members}
    formats = {scheme and scheme.weight_format for scheme in (layers[i].scheme for i in members)}
    if len(formats) == 1:
        usage = "both" if len(usages) > 1 else usages.pop()
        for i in members:
            layer = replace(layers[i], usage=usage)
            if layer.scheme is not None and layer.scheme.is_integer:
                layer = _with_kernel(layer, found[i], device, dtype)
            if i != first:
                layer = replace(layer, tied_to=layers[first].name, bytes_before=0, bytes_after=0)
            layers[i] = layer
        return
    for i in members[1:]:  # conversion parts them: each keeps its own representation
        layers[i] = replace(layers[i], tied_to=layers[first].name, bytes_before=0, untied_bytes=layers[i].bytes_after)


def unknown_layers(plan: Plan, model: nn.Module) -> str:
    """A message naming layers of the plan that ``model`` lacks, or an empty string."""
    names = {candidate.name for candidate in candidates(model)}
    missing = [layer.name for layer in plan.quantized if layer.name not in names]
    if not missing:
        return ""
    return (
        f"the plan was made for another model ({plan.model}): {type(model).__name__} has no layer "
        f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}.{did_you_mean(missing[0], names)}"
    )


PolicyLike = Policy | str | Scheme | Mapping[str, Any]


def plan_for(model: nn.Module, policy: PolicyLike) -> Plan:
    """``Policy.coerce(policy).plan(model)``."""
    return Policy.coerce(policy).plan(model)
