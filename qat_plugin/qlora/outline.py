"""What a forecast takes from a model: shapes and counts, read once; the model may be on the meta device."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from qat_plugin.errors import ConfigError, did_you_mean
from qat_plugin.policy import Candidate, Plan, candidates
from qat_plugin.qlora.activations import Block, blocks_of
from qat_plugin.qlora.adapters import target_layers
from qat_plugin.scheme import Scheme


@dataclass(frozen=True)
class Floats:
    """Parameters that are stored as floats.

    Attributes:
        part: what they are.
        count: how many numbers.
        size: bytes of one; ``None`` for the run's float type.
    """

    part: str
    count: int
    size: int | None


@dataclass(frozen=True)
class Outline:
    """The shapes of a model under a plan, with the layers that get adapters.

    Attributes:
        model: its class.
        nf4: [out, in] and scheme of each NF4 layer.
        floats: every other parameter, tied ones once.
        targets: [out, in] of each layer with an adapter.
        vocabulary, hidden: the output head's [out, in]; 0 without one.
        buffers: bytes.
        blocks: decoder blocks; or why they are not known, in words.
        uncounted: what a forecast leaves out, in words.
    """

    model: str
    nf4: tuple[tuple[tuple[int, ...], Scheme], ...]
    floats: tuple[Floats, ...]
    targets: tuple[tuple[int, int], ...]
    vocabulary: int
    hidden: int
    buffers: int
    blocks: tuple[Block, ...] | str
    uncounted: tuple[str, ...]

    @property
    def nf4_count(self) -> int:
        """Numbers in NF4."""
        return sum(math.prod(shape) for shape, _ in self.nf4)

    @property
    def parameters(self) -> int:
        """Numbers in the float model, tied ones once."""
        return self.nf4_count + sum(entry.count for entry in self.floats)

    def adapter_counts(self, rank: int) -> list[int]:
        """Numbers in each trained parameter: A [r, in] and B [out, r] of each target."""
        return [rank * width for out_features, in_features in self.targets for width in (in_features, out_features)]


def outline(model: nn.Module, plan: Plan, targets: str | Collection[str] = "all-linear") -> Outline:
    """Read a model.

    Args:
        model: float, on any device.
        plan: of its base, from :func:`qat_plugin.qlora.prepare.base_plan`.
        targets: clean names of the layers that get adapters, or ``"all-linear"``.

    Raises:
        ConfigError: for targets that are no linear layer of the model.
    """
    found = {candidate.name: candidate for candidate in candidates(model)}
    names = [c.name for c in target_layers(model, targets)] if isinstance(targets, str) else list(targets)
    _check_targets(model, names, found)
    shapes = {layer.name: (layer.shape[0], layer.shape[-1]) for layer in plan}
    nf4 = [(layer, layer.scheme) for layer in plan if layer.scheme is not None and layer.scheme.kind == "nf4"]
    fake = [layer.name for layer in plan if layer.scheme is not None and layer.scheme.is_integer]
    heads = [c.out_in for c in found.values() if "head" in c.roles and c.kind == "linear"]
    vocabulary, hidden = heads[-1] if heads else (0, 0)
    blocks = blocks_of(model, plan, set(names))
    uncounted = [f"activations: {blocks}"] if isinstance(blocks, str) else []
    if fake:
        uncounted.append(f"copies of {len(fake)} fake-quantized weights ({fake[0]}, ...)")
    if not isinstance(blocks, str) and any(not block.sdpa for block in blocks):
        uncounted.append("temporaries of eager attention (T x T) beyond what it keeps")
    if any(module.p > 0 for module in model.modules() if isinstance(module, nn.Dropout)):
        uncounted.append("the model's own dropout: its masks, and T x T attention where the kernel has none")
    return Outline(
        model=type(model).__name__, nf4=tuple((layer.shape, scheme) for layer, scheme in nf4),
        floats=_floats(model, plan, found), targets=tuple(shapes.get(name) or found[name].out_in for name in names),
        vocabulary=vocabulary, hidden=hidden, buffers=sum(buffer.nbytes for buffer in model.buffers()),
        blocks=blocks if isinstance(blocks, str) else tuple(blocks), uncounted=tuple(uncounted),
    )  # fmt: skip


def _check_targets(model: nn.Module, names: Collection[str], found: dict[str, Candidate]) -> None:
    linears = [name for name, candidate in found.items() if candidate.kind in ("linear", "conv1d")]
    unknown = next((name for name in names if name not in linears), None)
    if unknown is not None:
        raise ConfigError(
            f"targets: {type(model).__name__} has no linear layer {unknown!r}.{did_you_mean(unknown, linears)} "
            f'Give names as in the plan, or "all-linear"'
        )


def _floats(model: nn.Module, plan: Plan, found: dict[str, Candidate]) -> tuple[Floats, ...]:
    """Parameters that are not the weight of an NF4 layer, by what they are; a tied one where it is seen first."""
    schemes = {layer.name: layer.scheme for layer in plan}
    parts: dict[int, tuple[str, int | None]] = {}
    skipped: set[int] = set()
    for name, candidate in found.items():
        scheme = schemes.get(name)
        for leaf, parameter in candidate.module._parameters.items():
            if parameter is None:
                continue
            if leaf == "weight" and scheme is not None and scheme.kind == "nf4":
                skipped.add(id(parameter))
            size = scheme.float_dtype.itemsize if scheme is not None and scheme.is_float else None
            parts.setdefault(id(parameter), (_part(candidate) if leaf == "weight" else "norms and biases", size))
    counts: dict[tuple[str, int | None], int] = {}
    for parameter in model.parameters():
        if id(parameter) not in skipped:
            key = parts.get(id(parameter), ("other parameters", None))
            counts[key] = counts.get(key, 0) + parameter.numel()
    return tuple(Floats(part, count, size) for (part, size), count in counts.items())


def _part(candidate: Candidate) -> str:
    if candidate.kind in ("embedding", "norm"):
        return {"embedding": "embeddings", "norm": "norms and biases"}[candidate.kind]
    if "head" in candidate.roles:
        return "output head"
    return "float linear layers"
