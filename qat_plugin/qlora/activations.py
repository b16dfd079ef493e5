"""What a decoder block keeps for its backward pass, and takes in it: bytes derived from the block's shape.

Per token, with e bytes a number, D hidden, F inner, Q and K widths of queries and keys, r rank; "if" means: if the
layer that reads it has an adapter, for an NF4 layer itself keeps nothing of its input::

    norm (RMS)       4 D            a float32 copy (in float32 the input itself); LayerNorm: e D
    x1 -> q, k, v    e D if         q, k, v after rotation: e (Q + 2 K)
    attention        e Q + 4 heads  its output, and one logarithm a head; no T x T matrix with sdpa's kernels
    norm             4 D
    x2 -> gate, up   e D if         gate, act(gate), up: 3 e F
    product -> down  e F if
    low-rank         e r for each adapter, and its weights once more when they are converted to the type of the input

The backward pass is at its largest in ``down``, where the dequantized weight and the gradients of both ways (base and
adapter) to its input are there, or in the product, where three gradients are; after that what was kept is let go.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from qat_plugin.policy import Candidate, Plan, candidates

_INDEX = re.compile(r"^(.*?\.)?(\d+)\.(.+)$")
# tensors that an activation written in Python keeps of its width; one kernel keeps its input only
_KEPT_BY_ACTIVATION: Final = {"gelu_new": 4, "gelu_fast": 5, "quick_gelu": 2, "relu2": 2}


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block.

    Attributes:
        out_features, in_features: of its weight.
        nf4: whether the weight is dequantized each time it is used.
        adapter: whether it has one.
    """

    out_features: int
    in_features: int
    nf4: bool
    adapter: bool

    def weight_bytes(self, size: int) -> int:
        """Of the dequantized weight; 0 for one that is stored as it is used."""
        return self.out_features * self.in_features * size if self.nf4 else 0


@dataclass(frozen=True)
class Block:
    """The shape of one decoder block.

    Attributes:
        hidden, inner, query, key: widths D, F, Q, K.
        heads: of the queries.
        gated: whether the inner width is a product, ``act(gate) * up``.
        norms: width of what each normalises, per token.
        rms: whether norms compute in float32 (RMSNorm in transformers) instead of one kernel (LayerNorm).
        activation: its name in the model's config.
        sdpa: whether attention runs without a T x T matrix.
        capped: whether eager attention caps its logits by a tanh, which keeps its result.
        attention, feed_forward: the linear layers, the one that leads out last.
    """

    hidden: int
    inner: int
    query: int
    key: int
    heads: int
    gated: bool
    norms: tuple[int, ...]
    rms: bool
    activation: str
    sdpa: bool
    capped: bool
    attention: tuple[Linear, ...]
    feed_forward: tuple[Linear, ...]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linear layers."""
        return self.attention + self.feed_forward


@dataclass(frozen=True)
class Sizes:
    """Sizes that every count below takes.

    Attributes:
        tokens: B T.
        sequence_length: T.
        size: bytes of a number in the activations' type.
        cast: whether adapters are converted to that type (they are stored in another).
        rank: of the adapters.
        dropout_mask: bytes a number of dropout's mask; 0 without dropout.
    """

    tokens: int
    sequence_length: int
    size: int
    cast: bool
    rank: int
    dropout_mask: int


def boundary(block: Block, sizes: Sizes) -> int:
    """The block's input [B, T, D], which checkpointing keeps."""
    return sizes.tokens * block.hidden * sizes.size


def kept_attention(block: Block, sizes: Sizes) -> int:
    """Bytes that the first half (norm, attention) keeps for its backward pass."""
    n, e = sizes.tokens, sizes.size
    inputs = any(layer.adapter for layer in block.attention[:-1])
    if block.sdpa:
        per_token = e * (2 * block.query + 2 * block.key) + 4 * block.heads
    else:  # keys and values repeated for every head, the softmax in float32, and converted
        per_token = e * 4 * block.query
        per_token += sizes.sequence_length * block.heads * (4 + e * (e != 4) + e * block.capped)
    per_token += e * block.hidden * inputs
    return n * per_token + _norms(block, sizes, len(block.norms) - 1) + _adapters(block.attention, sizes)


def kept_feed_forward(block: Block, sizes: Sizes) -> int:
    """Bytes that the second half (norm, feed-forward) keeps for its backward pass."""
    *inputs, output = block.feed_forward
    wide = _KEPT_BY_ACTIVATION.get(block.activation, 1) + 2 * block.gated + output.adapter
    per_token = any(layer.adapter for layer in inputs) * block.hidden + wide * block.inner
    norm = block.norms[-1:] and _norm_bytes(block, sizes, block.norms[-1])
    return sizes.tokens * sizes.size * per_token + (norm or 0) + _adapters(block.feed_forward, sizes)


def kept(block: Block, sizes: Sizes) -> int:
    """Bytes that a block keeps for its backward pass, its input where it is kept too."""
    return kept_attention(block, sizes) + kept_feed_forward(block, sizes)


def keeps_its_input(block: Block, sizes: Sizes) -> bool:
    """Whether the input itself is what the first norm keeps, so that checkpointing's copy is the same tensor."""
    return sizes.size == 4 or not block.rms


def backward_workspace(block: Block, sizes: Sizes) -> tuple[int, int]:
    """The most that the backward pass of a block takes beside what it keeps.

    Returns:
        Bytes beyond :func:`kept` (gradients, less what was let go), and bytes of the dequantized weight among it.
    """
    n, e = sizes.tokens, sizes.size
    *_, down = block.feed_forward
    *_, out = block.attention
    freed = n * e * block.inner * down.adapter
    wide = (1 + down.adapter) * n * e * block.inner - freed
    halves = [(wide + down.weight_bytes(e), down.weight_bytes(e))]
    halves.append(((3 if block.gated else 2) * n * e * block.inner - freed, 0))
    gone = kept_feed_forward(block, sizes)
    narrow = (1 + out.adapter) * n * e * block.query - gone
    halves.append((narrow + out.weight_bytes(e), out.weight_bytes(e)))
    halves.append((n * e * (2 * block.query + 2 * block.key) - gone, 0))
    incoming = n * e * block.hidden
    most, weight = max(halves)
    return most + incoming, weight


def blocks_of(model: nn.Module, plan: Plan, adapters: Collection[str]) -> list[Block] | str:
    """The decoder blocks of a transformers model, read from its config and its layers' shapes.

    Args:
        model: on any device, before or after its layers were replaced.
        plan: of the base.
        adapters: clean names of the layers with an adapter.

    Returns:
        The blocks; or why they are not known, in words.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    groups: dict[tuple[str, int], list[tuple[str, Candidate]]] = {}
    for candidate in candidates(model):
        if match := _INDEX.match(candidate.name):
            groups.setdefault((match[1] or "", int(match[2])), []).append((match[3], candidate))
    groups = {key: found for key, found in groups.items() if any("attention" in c.roles for _, c in found)}
    if config is None or not groups:
        return f"{type(model).__name__} has no config with decoder blocks"
    if len({prefix for prefix, _ in groups}) > 1:
        return f"{type(model).__name__} has blocks of more than one kind"
    if any(parameter.dim() > 2 for parameter in model.parameters()):
        return f"{type(model).__name__} has weights with more than two dimensions (a mixture of experts)"
    blocks = []
    for found in groups.values():
        block = _block(found, config, plan, adapters)
        if isinstance(block, str):
            return f"{type(model).__name__}: {block}"
        blocks.append(block)
    return blocks


def _block(found: list[tuple[str, Candidate]], config: Any, plan: Plan, adapters: Collection[str]) -> Block | str:
    schemes = {layer.name: layer for layer in plan}
    attention, feed_forward = (
        [_linear(c, schemes, adapters) for _, c in found if role in c.roles and c.kind in ("linear", "conv1d")]
        for role in ("attention", "ffn")
    )
    if len(attention) < 2 or len(feed_forward) < 2:
        return "a block without attention and feed-forward layers"
    if any(_INDEX.match(name) for name, c in found if "ffn" in c.roles):
        return "a mixture of experts"
    heads = int(_first(config, "num_attention_heads", "n_head", "num_heads") or 0)
    hidden, query, inner = attention[0].in_features, attention[-1].in_features, feed_forward[-1].in_features
    if not heads:
        return "its config does not say how many heads there are"
    groups = int(_first(config, "num_key_value_heads") or heads)
    key = query * groups // heads
    norms = [(name, c) for name, c in found if c.kind == "norm"]
    return Block(
        hidden=hidden, inner=inner, query=query, key=key, heads=heads,
        gated=sum(layer.out_features for layer in feed_forward[:-1]) >= 2 * inner,
        norms=tuple(_norm_width(name, c, hidden, query, key) for name, c in norms),
        rms=any("RMS" in type(c.module).__name__ for _, c in norms),
        activation=str(_first(config, "hidden_act", "hidden_activation", "activation_function") or ""),
        sdpa=getattr(config, "_attn_implementation", "sdpa") != "eager",
        capped=bool(_first(config, "attn_logit_softcapping")),
        attention=tuple(attention), feed_forward=tuple(feed_forward),
    )  # fmt: skip


def _linear(candidate: Candidate, schemes: Mapping[str, Any], adapters: Collection[str]) -> Linear:
    entry = schemes.get(candidate.name)
    scheme = None if entry is None else entry.scheme
    rows, columns = candidate.out_in if entry is None else entry.shape
    return Linear(rows, columns, scheme is not None and scheme.kind == "nf4", candidate.name in adapters)


def _norm_width(name: str, candidate: Candidate, hidden: int, query: int, key: int) -> int:
    """Numbers a token that a norm normalises; those of queries and keys run over every head."""
    leaf = name.rsplit(".", 1)[-1]
    if re.match(r"q(uery)?_", leaf):
        return query
    return key if re.match(r"k(ey)?_", leaf) else hidden


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _norms(block: Block, sizes: Sizes, count: int) -> int:
    return sum(_norm_bytes(block, sizes, width) for width in block.norms[:count])


def _norm_bytes(block: Block, sizes: Sizes, width: int) -> int:
    return sizes.tokens * width * (4 if block.rms else sizes.size)


def _adapters(layers: tuple[Linear, ...], sizes: Sizes) -> int:
    """Low-rank products, converted adapters, and what dropout keeps of each input."""
    return sum(_adapter(layer, sizes) for layer in layers if layer.adapter)


def _adapter(layer: Linear, sizes: Sizes) -> int:
    low = sizes.tokens * sizes.rank * sizes.size
    cast = sizes.rank * (layer.out_features + layer.in_features) * sizes.size if sizes.cast else 0
    masked = sizes.tokens * layer.in_features * (sizes.size + sizes.dropout_mask) if sizes.dropout_mask else 0
    return low + cast + masked


def distinct(blocks: list[Block]) -> Iterator[tuple[Block, int]]:
    """Each shape once, with how many blocks have it."""
    counts: dict[Block, int] = {}
    for block in blocks:
        counts[block] = counts.get(block, 0) + 1
    yield from counts.items()
