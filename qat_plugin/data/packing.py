"""Several examples in one window, none of which sees another.

::

    examples   aaaaaaa  bbb  cccc  ddddd                 window of 12
    window 0   a a a a a a a d d d d d                   position_ids 0 1 2 3 4 5 6 0 1 2 3 4
    window 1   c c c c b b b . . . . .                   position_ids 0 1 2 3 0 1 2 0 1 2 3 4

Positions begin anew with each example; transformers' models make a block-diagonal mask of that when no attention mask
is given, sliding windows included. No example's first token is predicted: it would be from the end of another one.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from qat_plugin.errors import ConfigError, DataError

IGNORED = -100
Example = tuple[Tensor, Tensor]
"""Token ids and labels, both integer [tokens]; a label of -100 is not predicted."""


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into as few bins as best-fit-decreasing finds; deterministic.

    Args:
        lengths: of the items, each from 1 to ``capacity``.
        capacity: of a bin.

    Returns:
        Indices of the items in each bin, in the order they were put there.

    Raises:
        DataError: for a length that no bin holds.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if not 1 <= length <= capacity:
            raise DataError(f"item {index} has length {length}; bins hold 1 to {capacity}")
        place = bisect.bisect_left(room, (length, -1))
        if place == len(room):
            bins.append([index])
            bisect.insort(room, (capacity - length, len(bins) - 1))
        else:
            left, chosen = room.pop(place)
            bins[chosen].append(index)
            bisect.insort(room, (left - length, chosen))
    return bins


class PackedExamples(Dataset[dict[str, Tensor]]):
    """Windows of whole examples: ``input_ids``, ``labels`` and ``position_ids``, each int64 [sequence_length].

    Args:
        examples: token ids and labels of each.
        sequence_length: of a window. A longer example goes on in another window, where it does not see its beginning.
        padding: token id that fills a window up; never predicted, and apart from the examples.

    Attributes:
        pieces: examples plus the pieces that longer ones were cut into.
        cut: examples that were longer than a window.
        filled: share of all positions that hold an example's token.

    Raises:
        ConfigError: when ``sequence_length`` is below 2.
        DataError: when there is no example.
    """

    def __init__(self, examples: Sequence[Example], sequence_length: int, *, padding: int = 0) -> None:
        if sequence_length < 2:
            raise ConfigError(f"sequence_length is {sequence_length}; a window needs at least 2 tokens to predict one")
        self.sequence_length, self.padding = sequence_length, padding
        self._pieces = [piece for example in examples for piece in _cut(example, sequence_length)]
        if not self._pieces:
            raise DataError("there is no example to pack: the data is empty")
        self.pieces = len(self._pieces)
        self.cut = sum(len(ids) > sequence_length for ids, _ in examples)
        self._windows = pack([len(ids) for ids, _ in self._pieces], sequence_length)
        tokens = sum(len(ids) for ids, _ in self._pieces)
        self.filled = tokens / (len(self._windows) * sequence_length)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One window; an example's labels begin with -100."""
        members = [self._pieces[i] for i in self._windows[index]]
        fill = self.sequence_length - sum(len(ids) for ids, _ in members)
        if fill:
            members.append((torch.full((fill,), self.padding), torch.full((fill,), IGNORED)))
        labels = [torch.cat([torch.tensor([IGNORED]), given[1:].long()]) for _, given in members]
        return {
            "input_ids": torch.cat([ids.long() for ids, _ in members]),
            "labels": torch.cat(labels),
            "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in members]),
        }


def padded(examples: Sequence[dict[str, Tensor]], padding: int = 0) -> dict[str, Tensor]:
    """A batch of examples of unequal length, filled up on the right: ``input_ids``, ``labels``, ``attention_mask``."""
    longest = max(len(example["input_ids"]) for example in examples)

    def filled(name: str, value: int) -> Tensor:
        rows = [torch.nn.functional.pad(e[name], (0, longest - len(e[name])), value=value) for e in examples]
        return torch.stack(rows)

    ones = [{"mask": torch.ones_like(example["input_ids"])} for example in examples]
    mask = torch.stack([torch.nn.functional.pad(e["mask"], (0, longest - len(e["mask"]))) for e in ones])
    return {"input_ids": filled("input_ids", padding), "labels": filled("labels", IGNORED), "attention_mask": mask}


def _cut(example: Example, length: int) -> list[Example]:
    ids, labels = example
    return [(ids[i : i + length], labels[i : i + length]) for i in range(0, len(ids), length)]
