"""Packing: every token once, whole examples, and a model that cannot tell it from examples one by one."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_plugin.data.packing import IGNORED, Example, PackedExamples, pack, padded
from qat_plugin.errors import ConfigError, DataError
from tests.qlora.tiny_models import FAMILIES, WORDS

LENGTHS = st.lists(st.integers(1, 16), min_size=1, max_size=40)


def example(length: int, seed: int = 0) -> Example:
    generator = torch.Generator().manual_seed(1000 * length + seed)
    ids = torch.randint(1, WORDS, (length,), generator=generator)
    labels = torch.where(torch.rand(length, generator=generator) < 0.5, ids, IGNORED)
    return ids, labels


@given(lengths=LENGTHS)
def test_every_item_lies_in_one_bin_and_no_bin_overflows(lengths: list[int]) -> None:
    bins = pack(lengths, 16)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in members) <= 16 for members in bins)
    assert pack(lengths, 16) == bins


@given(lengths=LENGTHS)
def test_bins_are_few(lengths: list[int]) -> None:
    """Best-fit-decreasing needs at most 11/9 of the optimum plus 6/9 (Dosa, 2007, for first-fit; as good here)."""
    least = -(-sum(lengths) // 16)
    bins = pack(lengths, 16)
    assert len(bins) <= max(1, 1.7 * least + 1)
    loads = sorted(sum(lengths[index] for index in members) for members in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > 16, "two bins would have fitted into one"


@pytest.mark.parametrize("length", [0, 17])
def test_an_item_that_no_bin_holds_is_refused(length: int) -> None:
    with pytest.raises(DataError, match=f"item 1 has length {length}; bins hold 1 to 16"):
        pack([3, length], 16)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20), window=st.integers(2, 16))
@settings(deadline=None)
def test_windows_hold_every_token_once_and_no_first_token_is_predicted(lengths: list[int], window: int) -> None:
    examples = [example(length, seed) for seed, length in enumerate(lengths)]
    packed = PackedExamples(examples, window, padding=0)
    rows = [packed[index] for index in range(len(packed))]
    ids = torch.cat([row["input_ids"] for row in rows])
    assert all(tuple(row[name].shape) == (window,) for row in rows for name in row)
    given_ids = torch.cat([ids for ids, _ in examples])  # 0 is the padding, no example's token
    assert torch.equal(ids[ids != 0].sort().values, given_ids.sort().values)
    assert packed.filled == pytest.approx(sum(lengths) / ids.numel())
    assert packed.cut == sum(length > window for length in lengths)
    assert packed.pieces == sum(-(-length // window) for length in lengths)
    for row in rows:
        starts = row["position_ids"] == 0
        assert bool(starts[0])
        assert (row["labels"][starts] == IGNORED).all(), "a first token would be predicted from another example's last"
        assert (row["labels"][row["input_ids"] == 0] == IGNORED).all()
        steps = row["position_ids"][1:] - row["position_ids"][:-1]
        assert ((steps == 1) | starts[1:]).all()
        learned = row["labels"] != IGNORED
        assert torch.equal(row["labels"][learned], row["input_ids"][learned])


def test_the_labels_given_are_kept() -> None:
    ids, labels = torch.tensor([5, 6, 7, 8]), torch.tensor([5, IGNORED, 7, 8])
    row = PackedExamples([(ids, labels)], 6, padding=9)[0]
    assert row["input_ids"].tolist() == [5, 6, 7, 8, 9, 9]
    assert row["labels"].tolist() == [IGNORED, IGNORED, 7, 8, IGNORED, IGNORED]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 0, 1]


def test_nothing_to_pack_and_a_window_of_one_are_refused() -> None:
    with pytest.raises(DataError, match="the data is empty"):
        PackedExamples([], 8)
    with pytest.raises(ConfigError, match="sequence_length is 1"):
        PackedExamples([example(3)], 1)


def test_padding_fills_up_on_the_right() -> None:
    rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([1, 2, 3], [4])]
    batch = padded(rows, padding=7)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("attention", ["default", "eager"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gpt2"])
def test_a_packed_example_gives_the_logits_it_gives_alone(name: str, attention: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    if attention != "default":
        model.set_attn_implementation(attention)
    lengths = [7, 5, 9, 3]
    packed = PackedExamples([example(length) for length in lengths], 16, padding=0)
    assert len(packed) == 2, "two examples in each window"
    with torch.no_grad():
        for index in range(len(packed)):
            row = packed[index]
            together = model(
                input_ids=row["input_ids"][None], position_ids=row["position_ids"][None], use_cache=False
            ).logits[0]
            starts = [*torch.nonzero(row["position_ids"] == 0).flatten().tolist(), 16]
            for start, end in itertools.pairwise(starts):
                alone = model(input_ids=row["input_ids"][None, start:end], use_cache=False).logits[0]
                torch.testing.assert_close(together[start:end], alone, rtol=1e-4, atol=1e-5)
