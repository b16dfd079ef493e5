"""What the file's numbers compute in float32: the other side of every comparison with a runtime."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.exporting.contents import Exportable, outputs_of
from qat_plugin.exporting.gguf.layout import Entry
from qat_plugin.exporting.gguf.runtime_rounding import rounding_inputs

TEXT = (
    "Once upon a time there was a little girl who lived near the forest. Every morning she walked to the river with "
    "her dog, and every evening she told her mother what they had seen: a fox, two birds, an old boat. One day the dog "
    "ran away into the trees and did not come back, so she took a lamp and went to look for him."
)
PROMPT = "Once upon a time"
GREEDY = 24
_LONGEST = 128


@dataclass(frozen=True)
class Reference:
    """Of one model.

    Attributes:
        outputs: logits of the sample, float32.
        rounded: the same where inputs of products are rounded as llama.cpp does.
        ids: tokens of a short text, or ``None`` without a tokenizer.
        perplexity: of that text.
        prompt: tokens of a prompt.
        greedy: the tokens after it, the likeliest each time.
        margins: how far the logit of each is above the next best.
    """

    outputs: Tensor
    rounded: Tensor
    ids: list[int] | None = None
    perplexity: float = math.nan
    prompt: tuple[int, ...] = ()
    greedy: tuple[int, ...] = ()
    margins: tuple[float, ...] = ()

    @classmethod
    def of(cls, network: nn.Module, model: Exportable, entries: Sequence[Entry]) -> Reference:
        """Run a float copy of the model."""
        outputs = outputs_of(network, model.sample)
        with rounding_inputs(network, model, entries):
            inexact = outputs_of(network, model.sample)
        if model.tokenizer is None:
            return cls(outputs, inexact)
        longest = min(_LONGEST, int(model.config.max_position_embeddings))
        ids = encode(model.tokenizer, TEXT)[:longest]
        prompt = encode(model.tokenizer, PROMPT)
        logits = outputs_of(network, {"input_ids": torch.tensor([ids])})[0]
        count = max(0, min(GREEDY, longest - len(prompt)))
        return cls(outputs, inexact, ids, perplexity(logits, ids), tuple(prompt), *_greedy(network, prompt, count))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids as the tokenizer gives them, with what it puts around a text."""
    encoded = tokenizer.encode(text)
    return [int(index) for index in getattr(encoded, "ids", encoded)]


def perplexity(logits: Tensor, ids: list[int]) -> float:
    """exp of the mean negative log-likelihood of each token after the first.

    Args:
        logits: [tokens, vocabulary].
        ids: as many.
    """
    loss = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:]))
    return math.exp(float(loss))


@torch.no_grad()
def _greedy(network: nn.Module, prompt: list[int], count: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    ids, past = torch.tensor([prompt]), None
    tokens: list[int] = []
    margins: list[float] = []
    for _ in range(count):
        out = network(input_ids=ids, past_key_values=past, use_cache=True)
        best = out.logits[0, -1].topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        ids, past = torch.tensor([tokens[-1:]]), out.past_key_values
    return tuple(tokens), tuple(margins)
