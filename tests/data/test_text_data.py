"""Batches for language models: windows that tile the text, an order that is a function of seed and epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qat_plugin.data.documents import Documents
from qat_plugin.data.text import TextData
from qat_plugin.data.windows import EpochOrder, TokenWindows
from qat_plugin.errors import ConfigError, DataError


class Characters:
    """A tokenizer of characters: ids are code points."""

    def __init__(self, bos: int | None = 1) -> None:
        self.bos_token_id = bos
        self.eos_token_id = bos

    def __call__(self, text: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in piece] for piece in text]}


TEXT = "".join(chr(40 + i % 80) for i in range(1000))


@pytest.fixture
def make() -> Callable[..., TextData]:
    def build(train: str = TEXT, valid: str | None = TEXT[:200], bos: int | None = 1, **options: Any) -> TextData:
        held_out = None if valid is None else Documents.from_text(valid)
        settings = {"sequence_length": 11, "batch_size": 4, "progress": False} | options
        return TextData(Characters(bos), Documents.from_text(train), held_out, **settings)

    return build


def test_windows_tile_the_stream_behind_one_bos(make: Callable[..., TextData]) -> None:
    windows = make().train_windows
    assert len(windows) == 100
    assert all(window["input_ids"][0] == 1 and len(window["input_ids"]) == 11 for window in windows)
    stream = torch.cat([windows[i]["input_ids"][1:] for i in range(len(windows))])
    assert "".join(map(chr, stream.tolist())) == TEXT
    assert torch.equal(windows[5]["input_ids"], windows[5]["labels"])


def test_without_bos_windows_are_all_text(make: Callable[..., TextData]) -> None:
    windows = make(bos=None).train_windows
    assert len(windows) == 1000 // 11
    assert "".join(map(chr, windows[0]["input_ids"].tolist())) == TEXT[:11]


def test_documents_are_joined_by_end_of_text(make: Callable[..., TextData]) -> None:
    windows = make(train="a" * 10 + "<|endoftext|>" + "b" * 10).train_windows
    assert windows[1]["input_ids"].tolist() == [1, 1] + [ord("b")] * 9


def test_the_order_is_a_function_of_seed_and_epoch(make: Callable[..., TextData]) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochOrder(50, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(1)
    first = order(0, 1)
    torch.manual_seed(2)
    assert order(0, 1) == first
    assert sorted(first) == list(range(50))
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_batches_are_full_and_evaluation_misses_nothing(make: Callable[..., TextData]) -> None:
    data = make(train=TEXT[:470], eval_batch_size=3)
    data.setup()
    assert [batch["input_ids"].shape for batch in data.train_dataloader()] == [(4, 11)] * 11
    assert sum(len(batch["input_ids"]) for batch in data.val_dataloader()) == 20


def test_a_held_out_part_is_not_trained_on(make: Callable[..., TextData]) -> None:
    data = make(valid=None, valid_fraction=0.2)
    assert len(data.train_windows) == 80
    assert "".join(map(chr, data.valid_windows[0]["input_ids"][1:].tolist())) == TEXT[800:810]


def test_evaluation_can_be_limited_to_so_many_tokens(make: Callable[..., TextData]) -> None:
    assert len(make(eval_tokens=57).valid_windows) == 5


def test_the_fingerprint_knows_both_texts(make: Callable[..., TextData]) -> None:
    assert make().fingerprint == make(batch_size=2).fingerprint
    assert len({make().fingerprint, make(valid=TEXT[:100]).fingerprint, make(train=TEXT[:900]).fingerprint}) == 3


def test_too_little_text_names_both_numbers(make: Callable[..., TextData]) -> None:
    with pytest.raises(DataError, match="has 9 tokens, fewer than the 10 of one window"):
        make(train=TEXT[:9]).setup()
    with pytest.raises(DataError, match="both need a window of 11"):
        make(train=TEXT[:40], valid=None).setup()
    with pytest.raises(DataError, match="limited by eval_tokens=5"):
        make(eval_tokens=5).setup()


@pytest.mark.parametrize("wrong", [{"sequence_length": 1}, {"batch_size": 0}, {"eval_tokens": 1}, {"num_workers": -1}])
def test_numbers_out_of_range(make: Callable[..., TextData], wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        make(**wrong)


def test_a_window_needs_two_tokens() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        TokenWindows(torch.arange(10), 1, bos=None)
