"""A token stream cut into windows, and the order in which an epoch visits them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch.utils.data import Dataset, Sampler

from qat_plugin.errors import ConfigError, DataError


class TokenWindows(Dataset[dict[str, torch.Tensor]]):
    """Non-overlapping windows of a stream of token ids, each behind one beginning-of-text token if there is one.

    With a BOS, a window of ``length`` ids holds ``length - 1`` tokens of the stream, and all of them are predicted.
    Without, its first token is context only. An incomplete window at the end is dropped.

    Args:
        tokens: [tokens] integer ids.
        length: ids in a window, the BOS included.
        bos: id that stands before each window, or ``None``.
        source: where the tokens come from, for messages.

    Raises:
        ConfigError: when ``length`` is below 2.
        DataError: when there are fewer tokens than one window takes.
    """

    def __init__(self, tokens: torch.Tensor, length: int, *, bos: int | None, source: str = "the given tokens") -> None:
        if length < 2:
            raise ConfigError(f"sequence_length is {length}; a window needs at least 2 tokens to predict one")
        self.stride = length if bos is None else length - 1
        if len(tokens) < self.stride:
            raise DataError(
                f"{source} has {len(tokens)} tokens, fewer than the {self.stride} of one window (sequence_length="
                f"{length}{'' if bos is None else ', one of them the BOS'}); give more text or a smaller "
                "sequence_length"
            )
        self.bos = bos
        self._windows = tokens[: len(tokens) // self.stride * self.stride].view(-1, self.stride)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``labels``, both int64 [length] and equal: the model shifts the labels itself."""
        ids = self._windows[index].long()
        if self.bos is not None:
            ids = torch.cat([torch.tensor([self.bos]), ids])
        return {"input_ids": ids, "labels": ids.clone()}


class EpochOrder(Sampler[int]):
    """A permutation of ``range(size)`` that is a pure function of (seed, epoch), whatever was drawn before.

    Lightning calls :meth:`set_epoch` before each epoch, in a resumed run too, so the order within a broken-off epoch
    can be taken up where it stood. The global random number generators are neither read nor moved.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        # hashed, so that (0, 1) and (1, 0) differ, which they do not in seed + epoch
        digest = hashlib.sha256(f"{self.seed} {self.epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        yield from torch.randperm(self.size, generator=generator).tolist()
