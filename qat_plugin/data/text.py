"""A LightningDataModule for language modelling on text files."""

from __future__ import annotations

import hashlib
import os

import lightning as L
import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from qat_plugin.data.documents import Documents
from qat_plugin.data.packing import PackedExamples
from qat_plugin.data.tokens import Tokenizer, encode
from qat_plugin.data.windows import EpochOrder, TokenWindows
from qat_plugin.errors import ConfigError, DataError
from qat_plugin.measure import Progress, progressing

Source = str | os.PathLike[str] | Documents
"""A path to plain text or JSONL, or documents already in memory."""

Batches = DataLoader[dict[str, torch.Tensor]]


class TextData(L.LightningDataModule):
    """Windows of text for training and evaluation: batches of ``input_ids`` and ``labels``, both int64 [B, T].

    The tokens form one stream, cut into windows of T ids that do not overlap, each behind the tokenizer's BOS if it
    has one. Training visits them in an order that is a pure function of (seed, epoch); validation and test see the
    same windows, in the order of the text. Labels are not shifted.

    Example:
        >>> data = TextData(tokenizer, "train.txt", "valid.txt", sequence_length=256, eval_tokens=20_400)
        >>> data = TextData(tokenizer, Documents.from_text(text))  # the last tenth is held out for validation

    Args:
        tokenizer: a transformers tokenizer.
        train: path of a text or .jsonl file, or :class:`~qat_plugin.data.documents.Documents`.
        valid: the same; without it the last ``valid_fraction`` of the training tokens is held out from training.
        sequence_length: T, ids in a window, the BOS included.
        batch_size: B; the last, smaller batch of a training epoch is dropped unless it is the only one.
        eval_batch_size: B in validation and test; ``batch_size`` by default.
        eval_tokens: evaluate on the first so many tokens only; all by default.
        seed: of the order in training.
        key: the entry of a JSONL object that holds the text.
        valid_fraction: share of the training tokens that is held out when there is no ``valid``.
        packing: windows of whole documents that do not see each other, with ``position_ids`` that begin anew with each,
            instead of one running text; a longer document goes on in another window. Needs ``valid``.
        num_workers: processes that load batches; 0 is fastest, the tokens are in memory.
        progress: shown while tokenizing: on stderr after two seconds, not at all, or callback(done, total characters).

    Raises:
        ConfigError: at once, when a number is out of its range.
        DataError: in :meth:`setup`, when a file is missing, a directory, empty, malformed, or shorter than a window.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        train: Source,
        valid: Source | None = None,
        *,
        sequence_length: int = 256,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        eval_tokens: int | None = None,
        seed: int = 0,
        key: str = "text",
        valid_fraction: float = 0.1,
        num_workers: int = 0,
        packing: bool = False,
        progress: Progress | bool = True,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.train, self.valid, self.key = train, valid, key
        self.sequence_length = _at_least("sequence_length", sequence_length, 2)
        self.batch_size = _at_least("batch_size", batch_size, 1)
        self.eval_batch_size = _at_least("eval_batch_size", eval_batch_size or batch_size, 1)
        self.eval_tokens = None if eval_tokens is None else _at_least("eval_tokens", eval_tokens, 2)
        self.num_workers = _at_least("num_workers", num_workers, 0)
        if valid is None and not 0 < valid_fraction < 1:
            raise ConfigError(f"valid_fraction is {valid_fraction}; it must lie between 0 and 1, or give valid")
        if packing and valid is None:
            raise ConfigError("packing keeps documents whole, and the held-out end of a text is none: give valid too")
        self.valid_fraction, self.packing = valid_fraction, packing
        self.seed = seed
        self._progress = progress
        self._train_windows: TokenWindows | PackedExamples | None = None
        self._valid_windows: TokenWindows | PackedExamples | None = None
        self._fingerprint = ""

    @property
    def fingerprint(self) -> str:
        """sha256, in hexadecimal, of the texts trained and evaluated on."""
        self.setup()
        return self._fingerprint

    @property
    def train_windows(self) -> TokenWindows | PackedExamples:
        """The training windows, indexable, in the order of the text."""
        self.setup()
        assert self._train_windows is not None
        return self._train_windows

    @property
    def valid_windows(self) -> TokenWindows | PackedExamples:
        """The evaluation windows, indexable, in the order of the text."""
        self.setup()
        assert self._valid_windows is not None
        return self._valid_windows

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize, the first time it is called."""
        if self._valid_windows is not None:
            return
        documents = self._documents(self.train)
        if self.packing:
            assert self.valid is not None
            held_out = self._documents(self.valid)
            self._fingerprint = hashlib.sha256((documents.fingerprint + held_out.fingerprint).encode()).hexdigest()
            self._train_windows = self._packed(documents, None)
            self._valid_windows = self._packed(held_out, self.eval_tokens)
            return
        tokens = encode(documents, self.tokenizer, progress=self._progress)
        if self.valid is None:
            held_out = documents
            tokens, valid_tokens = self._split(tokens, documents.source)
        else:
            held_out = self._documents(self.valid)
            valid_tokens = encode(held_out, self.tokenizer, progress=self._progress)
        self._fingerprint = hashlib.sha256((documents.fingerprint + held_out.fingerprint).encode()).hexdigest()
        self._train_windows = self._windows(tokens, documents.source)
        self._valid_windows = self._windows(valid_tokens[: self.eval_tokens], self._valid_source(held_out))

    @override
    def train_dataloader(self) -> Batches:
        """Shuffled full batches; the order is :class:`~qat_plugin.data.windows.EpochOrder`'s."""
        windows = self.train_windows
        return DataLoader(
            windows,
            batch_size=self.batch_size,
            sampler=EpochOrder(len(windows), self.seed),
            drop_last=len(windows) >= self.batch_size,
            num_workers=self.num_workers,
        )

    @override
    def val_dataloader(self) -> Batches:
        """All evaluation windows, in the order of the text."""
        return DataLoader(self.valid_windows, batch_size=self.eval_batch_size, num_workers=self.num_workers)

    @override
    def test_dataloader(self) -> Batches:
        """The same as :meth:`val_dataloader`."""
        return self.val_dataloader()

    def _documents(self, source: Source) -> Documents:
        return source if isinstance(source, Documents) else Documents.read(source, key=self.key)

    def _split(self, tokens: torch.Tensor, source: str) -> tuple[torch.Tensor, torch.Tensor]:
        held_out = round(len(tokens) * self.valid_fraction)
        if min(held_out, len(tokens) - held_out) < self.sequence_length:
            raise DataError(
                f"{source} has {len(tokens)} tokens: holding out {self.valid_fraction:.0%} for validation leaves "
                f"{len(tokens) - held_out} and {held_out}, and both need a window of {self.sequence_length}; give a "
                "file for valid, more text or a smaller sequence_length"
            )
        return tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :]

    def _packed(self, documents: Documents, limit: int | None) -> PackedExamples:
        """Whole documents, each behind the BOS if there is one and closed by the end-of-text token."""
        pad = self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else 0
        examples, total = [], 0
        with progressing(self._progress, "tokenizing", len(documents.texts)) as advance:
            for number, text in enumerate(documents.texts, start=1):
                ids = list(self.tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0])
                before, after = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
                ids = [*([] if before is None else [before]), *ids, *([] if after is None else [after])]
                examples.append((torch.tensor(ids), torch.tensor(ids)))
                advance(number)
                total += len(ids)
                if limit is not None and total >= limit:
                    break
        return PackedExamples(examples, self.sequence_length, padding=pad)

    def _windows(self, tokens: torch.Tensor, source: str) -> TokenWindows:
        return TokenWindows(tokens, self.sequence_length, bos=self.tokenizer.bos_token_id, source=source)

    def _valid_source(self, held_out: Documents) -> str:
        return held_out.source + (f" (limited by eval_tokens={self.eval_tokens})" if self.eval_tokens else "")


def _at_least(name: str, value: int, lowest: int) -> int:
    if value < lowest:
        raise ConfigError(f"{name} is {value}; it must be at least {lowest}")
    return value
