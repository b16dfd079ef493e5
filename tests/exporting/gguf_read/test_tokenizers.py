"""The tokenizer in a file splits text as the one that was written, or there is none and a line says why."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import gguf
import pytest

import qat_plugin
from tests.exporting.gguf_read.files import llama, write

TEXT = "The grid of a quantizer is a set of numbers.\n  Its step is a scale; the scales of INT4 are many, aren't they?"


def byte_level() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    return tokenizer


def described(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3 if number == 0 else 1 for number in range(len(vocabulary))])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)


def written(path: Path, more: Any, **changes: Any) -> Path:
    return write(llama(num_hidden_layers=1, **changes), path, more=more)


def test_byte_level_pairs_split_text_as_before(tmp_path: Path) -> None:
    ours = byte_level()
    with warnings.catch_warnings(action="error"):
        model, found = qat_plugin.load(
            written(tmp_path / "m.gguf", lambda w: described(w, ours), vocab_size=ours.get_vocab_size())
        )
    for text in (TEXT, " naïve  caf\u00e9\t1234567 <|end|>", ""):
        assert found(text).input_ids == ours.encode(text).ids
        assert found.decode(found(text).input_ids) == text
    assert found.eos_token == "<|end|>" and model.generation_config.eos_token_id == 0


def test_another_tokenizer_beside_the_file_is_not_taken_for_its_own(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    ours = byte_level()
    Tokenizer(models.WordLevel({"The": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    path = written(tmp_path / "m.gguf", lambda w: described(w, ours), vocab_size=ours.get_vocab_size())
    assert qat_plugin.load(path)[1](TEXT).input_ids == ours.encode(TEXT).ids


def test_a_kind_of_tokenizer_that_is_unknown_is_told(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf", lambda w: (w.add_tokenizer_model("rwkv"), w.add_token_list(["a"] * 128)))
    with pytest.warns(UserWarning, match="its tokenizer cannot be built .*'rwkv'"):
        assert qat_plugin.load(path)[1] is None


def test_a_file_without_a_vocabulary_has_no_tokenizer(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="error"):
        assert qat_plugin.load(written(tmp_path / "m.gguf", None))[1] is None


def test_tokens_without_rows_are_told(tmp_path: Path) -> None:
    ours = byte_level()
    path = written(tmp_path / "m.gguf", lambda w: described(w, ours), vocab_size=ours.get_vocab_size() - 2)
    with pytest.warns(UserWarning, match="tokens that the model has no rows for"):
        qat_plugin.load(path)


@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_an_exported_tokenizer_splits_text_as_before(prefix: bool, metaspace: bool, tmp_path: Path) -> None:
    from qat_plugin import convert
    from qat_plugin.exporting import export_model
    from qat_plugin.exporting.gguf.strings import odd_strings
    from tests.exporting.gguf.families import network
    from tests.exporting.gguf.tokenizers_made import sentencepiece_like

    ours = sentencepiece_like(prefix=prefix, metaspace=metaspace)
    model = convert(network("Llama", num_hidden_layers=1, vocab_size=512), "w4a16-g32")
    made = export_model(model, "gguf", tmp_path / "model", tokenizer=ours, options={"outputs": False})
    _, found = qat_plugin.load(made.path)
    for text in odd_strings(ours):
        assert found(text).input_ids == list(getattr(ours.encode(text), "ids", ours.encode(text))), text
    _, stock = qat_plugin.load(made.path, checksums=False)  # as llama.cpp: a space, whether there is one or not
    pieces = stock.convert_ids_to_tokens(stock(" a").input_ids[1:])
    assert "".join(pieces) == ("\u2581\u2581a" if prefix else "\u2581a")


def test_a_pattern_without_a_name_in_gguf_is_kept(tmp_path: Path) -> None:
    from qat_plugin import convert
    from qat_plugin.exporting import export_model
    from qat_plugin.exporting.gguf.strings import odd_strings
    from tests.exporting.gguf.families import network
    from tests.exporting.gguf.tokenizers_made import byte_level

    ours = byte_level(r"\p{N}|[^\s\p{N}]{1,2}|\s+")
    model = convert(network("Llama", num_hidden_layers=1, vocab_size=1024), "w4a16-g32")
    made = export_model(model, "gguf", tmp_path / "model", tokenizer=ours, options={"outputs": False})
    _, found = qat_plugin.load(made.path)
    for text in odd_strings(ours):
        assert found.encode(text) == ours.encode(text), text
