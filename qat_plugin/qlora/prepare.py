"""``prepare(model, ...)``: a frozen base in NF4, adapters in full precision, in place.

::

    policy -> plan:   nf4, nf4-dq   the linear layer becomes NF4 (bitsandbytes or torchao)
                      w4a16-g32 ... the layer is fake-quantized with its adapter inside (QAT + LoRA)
                      bf16, fp16    stored in that type
                      nothing       stays, frozen
    targets:          peft's adapters beside these layers, the only parameters that train
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from qat_plugin.errors import ConfigError, PrepareError
from qat_plugin.policy import Candidate, Plan, Policy, PolicyLike, Rule, candidates, clean_name, human_bytes
from qat_plugin.policy.rules import check_pattern
from qat_plugin.qat import Initial
from qat_plugin.qat import prepare as fake_quantize
from qat_plugin.qlora.adapters import ALL_LINEAR, AdapterOptions, check_init, inject, lora_config, target_layers
from qat_plugin.qlora.base import cast_layers, existing_scheme, nf4_plan, quantize_layers
from qat_plugin.qlora.fingerprint import weight_sums
from qat_plugin.qlora.layers import lora_layers
from qat_plugin.qlora.neftune import add_noise, noisy_embedding
from qat_plugin.qlora.nf4 import Backend, guard, is_nf4
from qat_plugin.qlora.record import LOADED


@dataclass(frozen=True)
class Before:
    """How a model was before it was prepared.

    Attributes:
        required: names of the parameters that required gradients.
        checkpointing: whether its blocks were recomputed already.
    """

    required: frozenset[str]
    checkpointing: bool


@dataclass
class Prepared:
    """What a prepared model remembers.

    Attributes:
        plan: the base's plan.
        options: what the adapters are.
        peft_config: peft's configuration of them.
        backend: who holds the NF4 weights.
        trained: names of the parameters that train, relative to the prepared module.
        gradient_checkpointing: whether blocks are recomputed in the backward pass.
        base: where the base came from, when it was loaded by :func:`~qat_plugin.qlora.load_base`.
        fingerprint: of the frozen base, once it was asked for.
        source: what is known of a base without such a record: its type and backend, and content sums of its weights.
        before: what :func:`~qat_plugin.qlora.merge` puts back.
    """

    plan: Plan
    options: AdapterOptions
    peft_config: Any
    backend: Backend
    trained: tuple[str, ...]
    gradient_checkpointing: bool
    base: Any = None
    fingerprint: str = field(default="", compare=False)
    source: dict[str, Any] = field(default_factory=dict, compare=False)
    before: Before | None = field(default=None, compare=False)


def prepare(
    model: nn.Module,
    base: PolicyLike | None = "nf4-dq",
    *,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    targets: str | Sequence[str] = ALL_LINEAR,
    rslora: bool = False,
    dora: bool = False,
    init: bool | str = True,
    backend: Backend = "bitsandbytes",
    adapter_dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    neftune_alpha: float | None = None,
    gradient_checkpointing: bool = True,
    train_also: Sequence[str] = (),
    learn_scales: bool = False,
    initial: Initial = "minmax",
    record: Any = None,
) -> nn.Module:
    """Make a model ready for QLoRA fine-tuning (arXiv:2305.14314), in place: quantized base, adapters, frozen rest.

    Call it before the optimizer is built. Afterwards the model is in train mode, and only adapters require gradients.

    Args:
        model: any module with linear layers.
        base: a policy for the base. ``"nf4-dq"``: every linear layer but the output head becomes NF4 with double
            quantization, embeddings and norms stay in their type. An integer scheme (``"w4a16-g32"``) fake-quantizes
            the sum of weight and adapter instead, so that merging and converting later loses nothing. ``None``: plain
            LoRA.
        rank, alpha: of the update ``alpha / rank * B A`` (``alpha / sqrt(rank)`` with ``rslora``, arXiv:2312.03732).
        dropout: on the input of the adapters, in training.
        targets: ``"all-linear"`` or patterns as in a policy's rules: names, globs, ``re:...``, roles.
        rslora, dora, init: peft's ``use_rslora``, ``use_dora`` (arXiv:2402.09353) and ``init_lora_weights``.
        backend: ``"bitsandbytes"``, or ``"torchao"`` (slower on CPU, FSDP2 hooks).
        adapter_dtype: of the adapters; they keep it when the model is cast.
        compute_dtype: type that NF4 layers multiply in; by default that of their input.
        device: where to quantize, and where quantized layers stay; by default where each weight is.
        neftune_alpha: noise on the embedding's output in training (NEFTune, arXiv:2310.05914); 5 is usual.
        gradient_checkpointing: recompute transformers' blocks in the backward pass (non-reentrant).
        train_also: patterns of modules that train in full (a new classification head); an adapter file cannot hold
            them.
        learn_scales, initial: learn the scales of a fake-quantized base (LSQ), as :func:`qat_plugin.prepare`.
        record: where the base came from; by default what :func:`~qat_plugin.qlora.load_base` left with the model.

    Returns:
        ``model``. :func:`summary` says in one line what it is now.

    Raises:
        ConfigError: for an option that is not allowed, targets that match nothing, a package that is not installed.
        PrepareError: for a model that is prepared, converted or quantized otherwise already, or a layer that cannot
            be what the plan says.
        PolicyError: when the policy does not fit the model.

    Example::

        prepare(model, rank=16, targets=["q_proj", "v_proj"])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    """
    options = AdapterOptions(
        rank, alpha, dropout, targets if isinstance(targets, str) else tuple(targets), rslora, dora, init
    )
    _check_module(model)
    if backend not in ("bitsandbytes", "torchao"):
        raise ConfigError(f"backend={backend!r} is not one of bitsandbytes, torchao")
    if not adapter_dtype.is_floating_point:
        raise ConfigError(f"adapter_dtype={adapter_dtype} is no float type: torch.float32 is usual")
    if neftune_alpha is not None:
        noisy_embedding(model, neftune_alpha)
    _check_fresh(model)
    plan = base_plan(model, base)
    chosen = target_layers(model, options.targets)
    _check_combination(plan, chosen, options)
    also = _matching(model, plan, train_also)
    record = record or next((m.__dict__[LOADED] for m in model.modules() if LOADED in m.__dict__), None)
    source = {} if record is not None else _source(model, plan, chosen, backend)
    before = Before(required_gradients(model), _checkpoints(model))
    quantize_layers(model, plan, backend=backend, compute_dtype=compute_dtype, device=device)
    guard(model)
    integer = _integer_part(plan)
    if integer.quantized:
        fake_quantize(model, integer, learn_scales=learn_scales, initial=initial)
    cast_layers(model, plan)
    config = lora_config(model, _again(model, chosen), options)
    inject(model, config, dtype=adapter_dtype)
    for module in also:
        module.requires_grad_(True)
    if learn_scales:
        for name, parameter in model.named_parameters():
            if ".fake_quantizer." in name:
                parameter.requires_grad_(True)
    if neftune_alpha is not None:
        add_noise(model, neftune_alpha)
    checkpointed = gradient_checkpointing and checkpoint_blocks(model)
    model.train()
    trained = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    prepared = Prepared(plan, options, config, backend, trained, checkpointed, record, source=source, before=before)
    model._qlora = prepared  # type: ignore[assignment]
    return model


def is_prepared(model: nn.Module) -> bool:
    """Whether :func:`prepare` was called on the model or on a part of it."""
    return any(isinstance(module.__dict__.get("_qlora"), Prepared) for module in model.modules())


def prepared_of(model: nn.Module) -> Prepared:
    """What a prepared model (or the one prepared part of it) remembers.

    Raises:
        PrepareError: when it is not prepared.
    """
    for module in model.modules():
        record = module.__dict__.get("_qlora")
        if isinstance(record, Prepared):
            return record
    raise PrepareError(f"{type(model).__name__} is not prepared: call qat_plugin.qlora.prepare(model) first")


def summary(model: nn.Module) -> str:
    """One line: trained and all parameters, bytes of base and adapters, and what AdamW will add."""
    record = prepared_of(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    adapters = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    # a quantized weight counts by the layer's shape; adapters are not in the plan
    rest = sum(p.numel() for p in _unplanned(model, record.plan))
    total = sum(_size(layer.shape) for layer in record.plan if layer.tied_to is None) + rest + _adapter_count(model)
    schemes = record.plan.summary().split(";")[0]
    # what is fake-quantized stays in float while it trains
    now = sum(e.bytes_before if e.scheme is not None and e.scheme.is_integer else e.bytes_after for e in record.plan)
    base = human_bytes(now) + (
        f" in training, {human_bytes(record.plan.bytes_after)} converted"
        if _integer_part(record.plan).quantized
        else ""
    )
    return (
        f"{schemes}, {len(record.plan.kept)} kept; training {count:,} of {total:,} parameters "
        f"({count / total:.2%}); base {base}, adapters {human_bytes(adapters)}, "
        f"AdamW will add {human_bytes(2 * 4 * count)}"
    )


def base_plan(model: nn.Module, base: PolicyLike | None) -> Plan:
    """The plan of a base: what the policy says, and the NF4 layers that are there already.

    Raises:
        PrepareError: for layers that are quantized otherwise, or embeddings that would become NF4.
        PolicyError: when the policy does not fit the model.
    """
    policy = Policy.coerce({} if base is None else base)
    layers = {candidate.name: candidate for candidate in candidates(model)}
    entries = []
    for entry in policy.plan(model):
        module = layers[entry.name].module
        if is_nf4(module):
            scheme, shape = existing_scheme(module)
            entry = replace(entry, scheme=scheme, shape=shape, rule="loaded", reason="", note="")
        if entry.scheme is not None and entry.scheme.kind == "nf4":
            entry = nf4_plan(entry, layers[entry.name])
        entries.append(entry)
    return Plan(tuple(entries), type(model).__name__)


def required_gradients(model: nn.Module) -> frozenset[str]:
    """Clean names of the parameters that require gradients, every name of a shared one."""
    named = model.named_parameters(remove_duplicate=False)
    return frozenset(clean_name(name) for name, parameter in named if parameter.requires_grad)


def restore(model: nn.Module, before: Before) -> None:
    """Put gradients and checkpointing of a merged model back as they were before it was prepared."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point():
            parameter.requires_grad_(clean_name(name) in before.required)
    if not before.checkpointing:
        for module in model.modules():
            if getattr(module, "supports_gradient_checkpointing", False) and _checkpoints(module):
                switch: Any = module  # the older name before transformers 5.20
                getattr(switch, "activation_checkpointing_disable", switch.gradient_checkpointing_disable)()
                return


def _checkpoints(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())


def _source(model: nn.Module, plan: Plan, chosen: Sequence[Candidate], backend: Backend) -> dict[str, Any]:
    """What tells later whether a directory holds this base: sums of what is quantized or gets an adapter."""
    names = {layer.name for layer in plan if layer.scheme is not None} | {c.name for c in chosen}
    dtype, sums = weight_sums({c.name: c.module for c in candidates(model) if c.name in names})
    return {"backend": backend, "dtype": dtype, "weights": sums} if sums else {}


def checkpoint_blocks(model: nn.Module) -> bool:
    """Enable non-reentrant gradient checkpointing on the transformers model inside; whether there was one."""
    options = {"use_reentrant": False}
    for module in model.modules():
        if getattr(module, "supports_gradient_checkpointing", False):
            enable: Any = getattr(module, "activation_checkpointing_enable", None)
            if enable is not None:
                enable(activation_checkpointing_kwargs=options)
            else:  # before transformers 5.20
                module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
            return True  # it sees to the models inside it
    return False


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise PrepareError(f"prepare() takes a module with its weights, not {given}: build or load the model first")


def _check_fresh(model: nn.Module) -> None:
    if is_prepared(model) or lora_layers(model):
        raise PrepareError(
            f"{type(model).__name__} has adapters already: merge(model) folds them in; a second set is not supported"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise PrepareError(
            f"{type(model).__name__} is on the meta device: load its weights first (qat_plugin.qlora.load_base streams "
            "and quantizes them)"
        )
    for candidate in candidates(model):
        if candidate.blocked.startswith("it is already quantized") and not is_nf4(candidate.module):
            raise PrepareError(
                f"{candidate.name}: {candidate.blocked}, and an adapter on it could not be merged. Load the model in "
                "float, or as NF4 (bitsandbytes Linear4bit, quant_type='nf4')"
            )


def _check_combination(plan: Plan, chosen: Sequence[Candidate], options: AdapterOptions) -> None:
    schemes = {layer.name: layer.scheme for layer in plan}
    check_init(options, quantized=any(scheme is not None and scheme.kind == "nf4" for scheme in schemes.values()))
    folded = [c.name for c in chosen if (scheme := schemes.get(c.name)) is not None and scheme.is_integer]
    if folded and options.dropout:
        raise ConfigError(
            f"dropout={options.dropout} is on the input of the adapter alone, and {folded[0]} folds its adapter into "
            "the weight that is fake-quantized: use dropout=0 for QAT + LoRA"
        )
    if folded and options.dora:
        raise ConfigError(f"dora=True does not go with a fake-quantized base ({folded[0]}): use plain LoRA there")


def _matching(model: nn.Module, plan: Plan, patterns: Sequence[str]) -> list[nn.Module]:
    """Modules that train in full.

    Raises:
        ConfigError: when a pattern matches no module, or one that becomes NF4.
    """
    frozen = {layer.name for layer in plan if layer.scheme is not None and layer.scheme.kind == "nf4"}
    found = []
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        rule = Rule(check_pattern(pattern), None)
        matched = [c for c in candidates(model) if rule.matches(c)]
        if not matched:
            raise ConfigError(f"train_also: {pattern!r} matches no layer of {type(model).__name__}")
        if lost := [c.name for c in matched if c.name in frozen]:
            raise ConfigError(
                f"train_also: {pattern!r} matches {lost[0]}, which becomes NF4 and cannot train: keep it in float by a "
                f"policy, such as Policy('nf4-dq', keep=[{pattern!r}])"
            )
        found += [c.module for c in matched]
    return found


def _integer_part(plan: Plan) -> Plan:
    """The same plan, every layer listed, in which only integer schemes change anything."""
    layers = (
        layer
        if layer.scheme is None or layer.scheme.is_integer
        else replace(layer, scheme=None, kernel="float", reason=f"{layer.scheme} in the base", tied_to=None)
        for layer in plan
    )
    return Plan(tuple(layers), plan.model)


def _again(model: nn.Module, chosen: Sequence[Candidate]) -> list[Candidate]:
    """The chosen layers as they are after quantization, which replaced some."""
    names = {c.name for c in chosen}
    return [c for c in candidates(model) if c.name in names]


def _unplanned(model: nn.Module, plan: Plan) -> list[nn.Parameter]:
    """Parameters that no layer of the plan has as its weight: norms, biases, and not adapters."""
    planned = {layer.name for layer in plan}
    weights = {id(c.module._parameters.get("weight")) for c in candidates(model) if c.name in planned}
    return [
        parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in weights and ".lora_" not in name and ".fake_quantizer." not in name
    ]


def _adapter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" in name)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size if shape else 0
