"""Tokenizers in the file: what the keys say, and the same ids from transformers' reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from qat_plugin import convert
from qat_plugin.errors import ExportError
from qat_plugin.exporting import Exported, export_model
from qat_plugin.exporting.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from tests.exporting.gguf.families import network
from tests.exporting.gguf.tokenizers_made import LLAMA3, QWEN2, byte_level, sentencepiece_like


def exported(tokenizer: Any, path: Path, **options: Any) -> Exported:
    model = convert(network("Llama", num_hidden_layers=1, vocab_size=500), "w8a16")
    return export_model(model, "gguf", path / "model", tokenizer=tokenizer, options=options)


def keys_of(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items()}


@pytest.mark.parametrize(
    ("tokenizer", "pre"),
    [
        (byte_level(), "gpt-2"),
        (byte_level(LLAMA3, ignore_merges=True, bos=True), "llama-bpe"),
        (byte_level(QWEN2), "qwen2"),
    ],
    ids=["gpt-2", "llama-bpe", "qwen2"],
)
def test_byte_level_tokenizers_are_known_by_their_pattern(tokenizer: Any, pre: str, tmp_path: Path) -> None:
    made = exported(tokenizer, tmp_path)
    keys = keys_of(made.path)
    assert (keys["model"], keys["pre"]) == ("gpt2", pre)
    assert keys["tokens"][: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    types = keys["token_type"]
    assert (
        types[tokenizer.bos_token_id] == CONTROL and types[tokenizer.convert_tokens_to_ids("<think>")] == USER_DEFINED
    )
    assert types[5] == NORMAL and types[499] == UNUSED and len(types) == 500
    assert keys["add_bos_token"] == (pre == "llama-bpe") and not keys["add_eos_token"]
    assert (keys["bos_token_id"], keys["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert len(keys["merges"]) > 50
    assert "transformers's tokenizer gives the same ids" in str(made)


def test_an_unknown_pattern_is_said_to_be_one_and_can_be_named(tmp_path: Path) -> None:
    made = exported(byte_level(r"\w+|\s+|[^\w\s]+"), tmp_path, outputs=False)
    assert keys_of(made.path)["pre"] == "default" and "splitting of text is none that is known here" in str(made)
    named = exported(byte_level(r"\w+|\s+|[^\w\s]+"), tmp_path, outputs=False, pre_tokenizer="olmo")
    assert keys_of(named.path)["pre"] == "olmo" and "none that is known" not in str(named)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_like_tokenizers_have_scores_in_the_order_of_merges(prefix: bool, tmp_path: Path) -> None:
    tokenizer = sentencepiece_like(prefix=prefix)
    made = exported(tokenizer, tmp_path, outputs=False)
    keys = keys_of(made.path)
    assert keys["model"] == "llama" and keys["add_space_prefix"] == prefix and keys["add_bos_token"]
    types, scores, tokens = keys["token_type"], keys["scores"], keys["tokens"]
    assert types[:3] == [UNKNOWN, CONTROL, CONTROL] and types[3] == BYTE and types[300] == NORMAL
    assert scores[tokens.index("▁t")] > scores[tokens.index("he")] > scores[tokens.index("▁and")]
    assert "may join" not in str(made)


def test_a_chat_template_goes_into_the_file(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    made = exported(tokenizer, tmp_path, outputs=False)
    assert keys_of(made.path)["tokenizer.chat_template"] == tokenizer.chat_template


def test_a_plain_tokenizer_of_tokenizers_is_taken_too(tmp_path: Path) -> None:
    made = exported(byte_level().backend_tokenizer, tmp_path, outputs=False)
    assert keys_of(made.path)["pre"] == "gpt-2" and "bos_token_id" not in keys_of(made.path)


def test_without_a_tokenizer_the_file_says_so(tmp_path: Path) -> None:
    made = exported(None, tmp_path, outputs=False)
    assert keys_of(made.path)["model"] == "no_vocab" and "no tokenizer was given" in str(made)


def test_other_kinds_of_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="type WordLevel has no form in GGUF"):
        exported(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), tmp_path)
    plain = Tokenizer(models.BPE({"a": 0}, []))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ExportError, match="BPE tokenizer without bytes"):
        exported(plain, tmp_path)
    with pytest.raises(ExportError, match="no tokenizer of transformers or tokenizers"):
        exported(object(), tmp_path)
    model = convert(network("Llama", num_hidden_layers=1, vocab_size=160), "w8a16")
    with pytest.raises(ExportError, match="the model only 160 rows"):
        export_model(model, "gguf", tmp_path / "model", tokenizer=byte_level())
