"""A LightningDataModule for instruction tuning: prompts and answers, packed or padded."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from qat_plugin.data.answers import encode_conversation
from qat_plugin.data.conversations import Conversations
from qat_plugin.data.packing import IGNORED, Example, PackedExamples, padded
from qat_plugin.data.windows import EpochOrder
from qat_plugin.errors import ConfigError, DataError
from qat_plugin.measure import Progress, progressing

Batches = DataLoader[dict[str, Tensor]]


class _Examples(Dataset[dict[str, Tensor]]):
    """Examples one by one, each cut off at ``length``."""

    def __init__(self, examples: list[Example], length: int) -> None:
        self.examples, self.length = examples, length

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, labels = (part[: self.length] for part in self.examples[index])
        return {"input_ids": ids, "labels": labels}


class InstructionData(L.LightningDataModule):
    """Conversations for training and evaluation; the loss is on the answers.

    Batches hold ``input_ids`` and ``labels``, int64 [B, T], labels not shifted and -100 where nothing is predicted;
    with packing ``position_ids`` that begin anew with each example, without ``attention_mask``. Training visits the
    windows in an order that is a pure function of (seed, epoch).

    Example:
        >>> data = InstructionData(tokenizer, "chat.jsonl", sequence_length=1024)

    Args:
        tokenizer: a transformers tokenizer; its chat template is used if it has one, else Alpaca's plain form.
        train: path of a .jsonl file, or a .json array, of chat, Alpaca or prompt/completion records.
        valid: the same; without it the last ``valid_fraction`` of the training records is held out.
        sequence_length: T of a window; with packing a longer example goes on in another window, where it is learned
            without its beginning; else it is cut off.
        packing: several examples in a window, none of which sees another.
        answers_only: learn the answers, not the prompts.
        batch_size, eval_batch_size, eval_tokens, seed, valid_fraction, num_workers, progress: as for
            :class:`~qat_plugin.data.text.TextData`.

    Raises:
        ConfigError: at once, when a number is out of its range.
        DataError: in :meth:`setup`, for a file or a record that cannot be used; it names the line.
    """

    def __init__(
        self,
        tokenizer: Any,
        train: str | os.PathLike[str] | Conversations,
        valid: str | os.PathLike[str] | Conversations | None = None,
        *,
        sequence_length: int = 1024,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        eval_tokens: int | None = None,
        packing: bool = True,
        answers_only: bool = True,
        seed: int = 0,
        valid_fraction: float = 0.1,
        num_workers: int = 0,
        progress: Progress | bool = True,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("sequence_length", sequence_length, 2), ("batch_size", batch_size, 1), ("num_workers", num_workers, 0),
            ("eval_batch_size", eval_batch_size, 1), ("eval_tokens", eval_tokens, 2),
        ):  # fmt: skip
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
        if valid is None and not 0 < valid_fraction < 1:
            raise ConfigError(f"valid_fraction is {valid_fraction}; it must lie between 0 and 1, or give valid")
        self.tokenizer, self.train, self.valid = tokenizer, train, valid
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.eval_batch_size, self.eval_tokens = eval_batch_size or batch_size, eval_tokens
        self.packing, self.answers_only = packing, answers_only
        self.seed, self.valid_fraction, self.num_workers = seed, valid_fraction, num_workers
        self._progress = progress
        self._windows: tuple[Any, Any] | None = None
        self._fingerprint = self._summary = ""

    @property
    def fingerprint(self) -> str:
        """sha256, in hexadecimal, of the conversations trained and evaluated on."""
        self.setup()
        return self._fingerprint

    @property
    def summary(self) -> str:
        """One line: what was made of the files."""
        self.setup()
        return self._summary

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize, the first time it is called."""
        if self._windows is not None:
            return
        train = self._read(self.train)
        if self.valid is None:
            held_out = max(1, round(len(train.items) * self.valid_fraction))
            if held_out >= len(train.items):
                raise DataError(
                    f"{train.source} has {len(train.items)} record: holding out {self.valid_fraction:.0%} for "
                    "validation leaves none to train on; give a file for valid, or more records"
                )
            valid = Conversations(train.items[-held_out:], f"the end of {train.source}")
            train = Conversations(train.items[:-held_out], train.source)
        else:
            valid = self._read(self.valid)
        self._fingerprint = hashlib.sha256((train.fingerprint + valid.fingerprint).encode()).hexdigest()
        unseen, examples = self._encoded(valid), self._encoded(train)
        limited = _first_tokens(unseen, self.eval_tokens)
        self._windows = (self._dataset(examples, train.source), self._dataset(limited, valid.source))
        split = f"the last {self.valid_fraction:.0%} of the file" if self.valid is None else valid.source
        used = f", the first {len(limited)} of them used" if len(limited) < len(unseen) else ""
        template = getattr(self.tokenizer, "chat_template", None)
        form = "chat template" if template else "Alpaca form, no chat template"
        train_on, held_out_on = (_counted(each, self.answers_only) for each in (examples, unseen))
        self._summary = f"{train.source}: {train_on} to train on; held out {held_out_on} ({split}{used}); {form}"
        rank_zero_info(f"InstructionData: {self._summary}")

    @override
    def train_dataloader(self) -> Batches:
        """Shuffled full batches; the order is :class:`~qat_plugin.data.windows.EpochOrder`'s."""
        windows = self._datasets()[0]
        return DataLoader(
            windows,
            batch_size=self.batch_size,
            sampler=EpochOrder(len(windows), self.seed),
            drop_last=len(windows) >= self.batch_size,
            num_workers=self.num_workers,
            collate_fn=self._collate(),
        )

    @override
    def val_dataloader(self) -> Batches:
        """All evaluation windows, in one order."""
        windows = self._datasets()[1]
        return DataLoader(
            windows, batch_size=self.eval_batch_size, num_workers=self.num_workers, collate_fn=self._collate()
        )

    @override
    def test_dataloader(self) -> Batches:
        """The same as :meth:`val_dataloader`."""
        return self.val_dataloader()

    def _datasets(self) -> tuple[Any, Any]:
        self.setup()
        assert self._windows is not None
        return self._windows

    def _read(self, source: str | os.PathLike[str] | Conversations) -> Conversations:
        return source if isinstance(source, Conversations) else Conversations.read(Path(source))

    def _encoded(self, conversations: Conversations) -> list[Example]:
        examples = []
        with progressing(self._progress, "tokenizing", len(conversations.items)) as advance:
            for number, item in enumerate(conversations.items, start=1):
                where = f"{conversations.source} record {number}"
                examples.append(encode_conversation(item, self.tokenizer, answers_only=self.answers_only, where=where))
                advance(number)
        return examples

    def _dataset(self, examples: list[Example], source: str) -> Any:
        long = sum(len(ids) > self.sequence_length for ids, _ in examples)
        if self.packing:
            dataset: Any = PackedExamples(examples, self.sequence_length, padding=self._padding)
            if long:
                rank_zero_warn(
                    f"{source}: {long} of {len(examples)} examples are longer than sequence_length="
                    f"{self.sequence_length} and go on in another window, where the rest is learned without its "
                    "beginning, the prompt. Raise sequence_length, or cut the rest off with packing=false"
                )
            return dataset
        kept = [(ids, labels) for ids, labels in examples if bool((labels[1 : self.sequence_length] != IGNORED).any())]
        if not kept:
            raise DataError(
                f"{source}: no example has a token to learn within sequence_length={self.sequence_length}; raise it"
            )
        if long:
            rank_zero_warn(
                f"{source}: {long} of {len(examples)} examples are longer than sequence_length={self.sequence_length} "
                f"and are cut off; {len(examples) - len(kept)} of them lose their whole answer and are left out"
            )
        return _Examples(kept, self.sequence_length)

    @property
    def _padding(self) -> int:
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return int(next(token for token in ids if token is not None))

    def _collate(self) -> Any:
        if self.packing:
            return None
        padding = self._padding
        return lambda examples: padded(examples, padding)


def _counted(examples: list[Example], answers_only: bool) -> str:
    """Examples and tokens, in words."""
    tokens = sum(len(ids) for ids, _ in examples)
    learned = sum(int((labels != IGNORED).sum()) for _, labels in examples)
    plural = "s" * (len(examples) != 1)
    which = "in answers" if answers_only else "learned"
    return f"{len(examples):,} example{plural} of {tokens:,} tokens ({learned:,} {which})"


def _first_tokens(examples: list[Example], limit: int | None) -> list[Example]:
    """The first examples, up to so many tokens; at least one."""
    if limit is None:
        return examples
    total, kept = 0, []
    for ids, labels in examples:
        kept.append((ids, labels))
        total += len(ids)
        if total >= limit:
            break
    return kept
