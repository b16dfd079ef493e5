"""How much memory a QLoRA run will take, from shapes alone: nothing is loaded, the model may be on the meta device.

::

    always there       base, float layers, adapters, their gradients, optimizer states, on CUDA a reserve
    + the largest of   the loss               what blocks keep + logits (or a chunk of them) and their gradients
                       backward of a block    what blocks keep + gradients + a dequantized weight
                       the optimizer's step   its temporaries

What blocks keep is their inputs and one block's insides under gradient checkpointing, all insides without it
(:mod:`qat_plugin.qlora.activations`). Counted are tensors; on the host, what libraries take for themselves is not.
``benchmarks/qlora_memory.py`` compares with measured peaks.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import torch
from torch import nn

from qat_plugin.errors import ConfigError, did_you_mean
from qat_plugin.policy import Plan
from qat_plugin.qlora import activations
from qat_plugin.qlora.activations import Block, Sizes
from qat_plugin.qlora.nf4 import Backend, nf4_bytes
from qat_plugin.qlora.outline import Outline, outline

if TYPE_CHECKING:
    from qat_plugin.qlora.economies import Change

Optimizer = Literal["adamw", "adamw8bit"]

GIB: Final = 1 << 30
CARD_GIB: Final = {16: 15.6, 24: 23.5, 40: 39.4, 48: 44.4, 80: 79.1, 141: 139.7}
"""Sizes that cards are sold as -> GiB that torch finds on them (of the 48 GB cards the smallest, an L40S with ECC)."""

_DEVICES: Final = ("cpu", "cuda", "gpu")
_CONTEXT: Final = GIB  # CUDA's context, loaded kernels, cuBLAS' workspace
_FRAGMENTS: Final = 0.05  # of what comes and goes
_MOST_RESERVE: Final = 3 * GIB // 2
_IN_FLIGHT: Final = 2  # offloaded tensors still, or again, on the card
_LOGITS: Final = "logits"
_CHUNK_LOGITS: Final = 1 << 24  # qat_plugin.losses' default
_CHUNK_LEAST_ROWS: Final = 64
_STATE_BLOCK, _STATE_LEAST, _STATE_TABLE = 256, 4096, 4 * 256  # of 8-bit moments


@dataclass(frozen=True)
class Settings:
    """What a forecast depends on beside the model; :func:`forecast` says what each means."""

    rank: int = 16
    batch_size: int = 1
    sequence_length: int = 2048
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.float32
    optimizer: Optimizer = "adamw"
    gradient_checkpointing: bool = True
    chunked_loss: bool | int = True
    offload: bool = False
    backend: Backend = "bitsandbytes"
    device: str = "cuda"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rank", "batch_size", "sequence_length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} is not allowed: it is a whole number, at least 1")
        if self.optimizer not in get_args(Optimizer):
            near = did_you_mean(str(self.optimizer), get_args(Optimizer))
            raise ConfigError(f"optimizer={self.optimizer!r} is not one of {', '.join(get_args(Optimizer))}.{near}")
        if not isinstance(self.chunked_loss, int) or self.chunked_loss < 0:
            raise ConfigError(f"chunked_loss={self.chunked_loss!r} is not allowed: False, True, or rows of a chunk")
        for name in ("dtype", "adapter_dtype"):
            kind = getattr(self, name)
            if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
                raise ConfigError(f"{name}={kind!r} is no float type: torch.bfloat16 and torch.float32 are usual")
        if self.device.partition(":")[0] not in _DEVICES:
            raise ConfigError(f"device={self.device!r} is not one of {', '.join(_DEVICES)}")

    @property
    def tokens(self) -> int:
        """Of one micro step."""
        return self.batch_size * self.sequence_length

    @property
    def on_cuda(self) -> bool:
        """Whether the run is on a card."""
        return self.device.partition(":")[0] in ("cuda", "gpu")

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {k: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Part:
    """Bytes of one kind, with a remark."""

    name: str
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Forecast:
    """Bytes a run will take.

    Attributes:
        settings, outline: what it was made from.
        always: what is there all the time.
        moments: name -> what is there beside it at that moment; the largest decides.
        host: bytes that offloading puts into host memory.
    """

    settings: Settings
    outline: Outline
    always: tuple[Part, ...]
    moments: dict[str, tuple[Part, ...]]
    host: int

    @property
    def moment(self) -> str:
        """The moment at which most is there."""
        return max(self.moments, key=lambda name: _sum(self.moments[name]))

    @property
    def parts(self) -> tuple[Part, ...]:
        """Everything that is there at that moment."""
        found = (*self.always, *self.moments[self.moment])
        if not self.settings.on_cuda:
            return found
        reserve = min(_CONTEXT + int(_FRAGMENTS * _sum(self.moments[self.moment])), _MOST_RESERVE)
        return (*found, Part("reserve", reserve, "CUDA context, libraries, fragmentation"))

    @property
    def total(self) -> int:
        """Bytes in all; where :attr:`complete` is false, at least."""
        return _sum(self.parts)

    @property
    def complete(self) -> bool:
        """Whether everything is counted."""
        return not self.outline.uncounted

    def fits(self, gib: float) -> bool:
        """Whether the run fits into so many GiB (2^30 bytes) of memory that torch can have."""
        return self.total <= gib * GIB

    def smallest_card(self) -> int | None:
        """The smallest of :data:`CARD_GIB` (16, 24, 40, 48, 80, 141 GB as sold) that it fits; ``None`` for none."""
        return next((card for card, gib in CARD_GIB.items() if self.fits(gib)), None)

    def cheapest_change(self, gib: float) -> Change | None:
        """What to change so that it fits; see :func:`qat_plugin.qlora.economies.cheapest_change`."""
        from qat_plugin.qlora.economies import cheapest_change

        return cheapest_change(self, gib)

    def table(self) -> str:
        """The parts in GiB, one a line; then the total, the moments, and what is not counted."""
        rows = [(part.name, f"{part.bytes / GIB:.3f}", part.note) for part in self.parts if part.bytes]
        if self.moment != "loss":
            logits = next(part for part in self.moments["loss"] if part.name == _LOGITS)
            place = next((i for i, row in enumerate(rows) if row[0].startswith("workspace")), len(rows))
            rows.insert(place, (_LOGITS, "-", f"{logits.bytes / GIB:.3f} in the loss, freed by then"))
        least = "" if self.complete else "at least"
        rows.append(("total", f"{self.total / GIB:.3f}", least))
        wide, figures = (max(len(row[i]) for row in rows) for i in (0, 1))
        lines = [f"{name:<{wide}}  {gib:>{figures}}  {note}".rstrip() for name, gib, note in rows]
        lines.insert(-1, "-" * (wide + 2 + figures))
        lines.insert(0, f"{'GiB':>{wide + 2 + figures}}")
        base = _sum(self.always)
        peaks = ", ".join(f"{name} {(base + _sum(parts)) / GIB:.2f}" for name, parts in self.moments.items())
        lines.append(f"largest in the {self.moment} ({peaks}, without the reserve)")
        if self.host:
            lines.append(f"host memory for offloaded activations: {self.host / GIB:.2f}")
        lines += [f"not counted: {what}" for what in self.outline.uncounted]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "settings": self.settings.to_dict(), "total": self.total, "moment": self.moment, "host": self.host,
            "parts": {part.name: part.bytes for part in self.parts}, "not_counted": list(self.outline.uncounted),
            "moments": {name: _sum(self.always) + _sum(parts) for name, parts in self.moments.items()},
        }  # fmt: skip

    def __str__(self) -> str:
        return self.table()


def forecast(
    model: nn.Module,
    plan: Plan,
    *,
    rank: int = 16,
    targets: str | Collection[str] = "all-linear",
    batch_size: int = 1,
    sequence_length: int = 2048,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype = torch.float32,
    optimizer: Optimizer = "adamw",
    gradient_checkpointing: bool = True,
    chunked_loss: bool | int = True,
    offload: bool = False,
    backend: Backend = "bitsandbytes",
    device: torch.device | str = "cuda",
    dropout: float = 0.0,
) -> Forecast:
    """Forecast the memory of a training run.

    Args:
        model: the float model, before it is prepared; on the meta device it costs nothing.
        plan: of its base, from :func:`qat_plugin.qlora.prepare.base_plan`.
        rank: of the adapters.
        targets: clean names of the layers that get adapters, or ``"all-linear"``.
        batch_size, sequence_length: B and T of a micro step, without padding.
        dtype: of activations, and of parameters that no scheme changes.
        adapter_dtype: of adapters, their gradients and 32-bit moments.
        optimizer: ``"adamw"`` (two moments in the adapters' type) or ``"adamw8bit"`` (in 8 bits, blocks of 256).
        gradient_checkpointing: recompute blocks in the backward pass.
        chunked_loss: rows of logits at a time; ``True`` for the default of
            :func:`qat_plugin.losses.chunked_cross_entropy`, ``False`` for all at once.
        offload: what is kept for the backward pass waits in host memory (on CUDA).
        backend: who holds NF4 weights.
        device: where the run is; on CUDA a reserve for the context and fragmentation is added.
        dropout: of the adapters.

    Raises:
        ConfigError: for a setting that is not allowed, or targets that the model does not have.
    """
    settings = Settings(
        rank, batch_size, sequence_length, dtype, adapter_dtype, optimizer, gradient_checkpointing, chunked_loss,
        offload, backend, str(device), dropout,
    )  # fmt: skip
    return forecast_of(outline(model, plan, targets), settings)


def forecast_of(facts: Outline, settings: Settings) -> Forecast:
    """The forecast for a model that was read before."""
    always = (*_base(facts, settings), *_training(facts, settings))
    blocks = [] if isinstance(facts.blocks, str) else list(facts.blocks)
    kept, insides, host = _kept(blocks, settings)
    moments = {"loss": (*kept["loss"], *_loss(facts, settings))}
    if blocks:
        moments["backward of a block"] = (*kept["backward"], *_backward(blocks, settings, insides))
    moments["optimizer's step"] = (_step(facts, settings),)
    return Forecast(settings, facts, always, moments, host)


def chunk_rows(vocabulary: int, chunked_loss: bool | int) -> int | None:
    """Rows of logits that are there at one time; ``None`` for all."""
    if chunked_loss is True:
        return max(_CHUNK_LEAST_ROWS, _CHUNK_LOGITS // max(1, vocabulary))
    return int(chunked_loss) or None


def _base(facts: Outline, settings: Settings) -> list[Part]:
    parts = []
    if facts.nf4:
        total = sum(nf4_bytes(shape, scheme, settings.backend) for shape, scheme in facts.nf4)
        note = f"{len(facts.nf4)} layers, {total / facts.nf4_count:.4f} bytes a weight"
        parts.append(Part("NF4 linear layers", total, note))
    sums: dict[str, int] = {}
    for entry in facts.floats:
        sums[entry.part] = sums.get(entry.part, 0) + entry.count * (entry.size or settings.dtype.itemsize)
    parts += [Part(name, count) for name, count in sums.items()]
    return [*parts, Part("buffers", facts.buffers)]


def _training(facts: Outline, settings: Settings) -> list[Part]:
    counts = facts.adapter_counts(settings.rank)
    adapters = sum(counts) * settings.adapter_dtype.itemsize
    eight = settings.optimizer == "adamw8bit"
    states = sum(_moments(count, settings.adapter_dtype.itemsize, eight) for count in counts)
    return [
        Part("adapters", adapters, f"rank {settings.rank}, {sum(counts) / 1e6:.1f} M parameters"),
        Part("gradients", adapters),
        Part("optimizer states", states, "two moments, 8 bits" if eight else "two moments"),
    ]


def _moments(count: int, size: int, eight: bool) -> int:
    """Bytes of AdamW's two moments of one parameter; small ones keep 32 bits."""
    if not eight:
        return 2 * count * size
    if count < _STATE_LEAST or count % _STATE_BLOCK:
        return 2 * count * 4
    return 2 * (count + 4 * (count // _STATE_BLOCK) + _STATE_TABLE)


def _sizes(settings: Settings) -> Sizes:
    mask = 0 if not settings.dropout else 1 if settings.on_cuda else settings.dtype.itemsize
    return Sizes(
        settings.tokens, settings.sequence_length, settings.dtype.itemsize,
        settings.adapter_dtype != settings.dtype, settings.rank, mask,
    )  # fmt: skip


def _kept(blocks: list[Block], settings: Settings) -> tuple[dict[str, list[Part]], dict[Block, int], int]:
    """What blocks keep during the loss and during a block's backward, each block's own insides, and bytes on the host.

    Under checkpointing a block's insides are there during its backward only.
    """
    sizes = _sizes(settings)
    insides = {block: activations.kept(block, sizes) for block in set(blocks)}
    offloading = settings.offload and settings.on_cuda
    if not blocks:
        return {"loss": [], "backward": []}, insides, 0
    if settings.gradient_checkpointing:
        inputs = [activations.boundary(block, sizes) for block in blocks]
        name = "activations: block inputs"
        for block in insides:
            if activations.keeps_its_input(block, sizes):
                insides[block] -= activations.boundary(block, sizes)
    else:
        inputs, name = [insides[block] for block in blocks], "activations: kept by blocks"
    there, note = sum(inputs), f"{len(inputs)} blocks"
    if offloading and len(inputs) > _IN_FLIGHT:
        there, note = _IN_FLIGHT * max(inputs), f"{_IN_FLIGHT} of {len(inputs)} on the card"
    part = Part(name, there, note)
    return {"loss": [part], "backward": [part]}, insides, sum(inputs) if offloading else 0


def _backward(blocks: list[Block], settings: Settings, insides: dict[Block, int]) -> list[Part]:
    sizes = _sizes(settings)
    found = []
    for block in set(blocks):
        workspace, weight = activations.backward_workspace(block, sizes)
        own = insides[block] if settings.gradient_checkpointing else 0
        found.append((own + workspace, own, workspace - weight, weight))
    _, own, gradients, weight = max(found)
    upstream = settings.tokens * blocks[0].hidden * settings.dtype.itemsize if settings.chunked_loss else 0
    parts = [Part("activations: block recomputed", own)] if own else []
    return [
        *parts,
        Part("workspace: gradients of activations", gradients + upstream),
        Part("workspace: dequantized weight", weight, str(settings.dtype).removeprefix("torch.") if weight else ""),
    ]


def _loss(facts: Outline, settings: Settings) -> list[Part]:
    """The softmax and two gradients of its size in float32, the last norm's input, the gradient to hidden states."""
    rows = chunk_rows(facts.vocabulary, settings.chunked_loss)
    count = min(settings.tokens, rows or settings.tokens)
    note = f"{count} of {settings.tokens} rows" if count < settings.tokens else ""
    logits = Part(_LOGITS, 12 * count * facts.vocabulary, note)
    hidden = settings.tokens * facts.hidden
    chunked = 2 * hidden * settings.dtype.itemsize if rows else 0
    return [logits, Part("activations: last hidden states", 4 * hidden + chunked)]


def _step(facts: Outline, settings: Settings) -> Part:
    """torch's AdamW takes a square root of the second moment: of all parameters at once on CUDA, of one elsewhere."""
    counts = facts.adapter_counts(settings.rank)
    at_once = sum(counts) if settings.on_cuda and settings.optimizer == "adamw" else max(counts, default=0)
    return Part("workspace: optimizer's temporaries", at_once * settings.adapter_dtype.itemsize)


def _sum(parts: Collection[Part]) -> int:
    return sum(part.bytes for part in parts)
