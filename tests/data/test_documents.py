"""Reading text: what a document is, and which line is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qat_plugin.data.documents import Documents
from qat_plugin.errors import DataError


def test_stories_are_split_at_the_separator(tmp_path: Path) -> None:
    file = tmp_path / "stories.txt"
    file.write_text("One day.\n<|endoftext|>\nTwo days.\n<|endoftext|>\n")
    assert Documents.read(file).texts == ("One day.", "Two days.")


def test_a_text_without_separators_is_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "plain.txt"
    file.write_bytes(b"\n  one text \r\n of lines\n")
    assert Documents.read(file).texts == ("\n  one text \n of lines\n",)


def test_jsonl_by_key(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({"body": text}) for text in ("a b", "c\u2028d")) + "\n\n")
    assert Documents.read(file, key="body").texts == ("a b", "c\u2028d")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{oops", "line 2 is not JSON"),
        ("[1]", "line 2 is a JSON list"),
        ('{"txet": "x"}', "line 2 lacks the key 'text'.*Did you mean 'txet'"),
        ('{"text": 3}', "line 2: 'text' is int"),
    ],
)
def test_a_malformed_jsonl_line_is_named(tmp_path: Path, line: str, text: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=text):
        Documents.read(file)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("x")
    with pytest.raises(DataError, match=r"trian\.txt' does not exist.*Did you mean 'train\.txt'"):
        Documents.read(tmp_path / "trian.txt")
    with pytest.raises(DataError, match=r"is a directory.*it holds train\.txt"):
        Documents.read(tmp_path)


def test_bytes_that_are_not_utf8_are_located(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"0xe9 at offset 8 \(line 2\)"):
        Documents.read(file)


@pytest.mark.parametrize("content", ["", "  \n\n", "<|endoftext|>\n<|endoftext|>"])
def test_an_empty_file_is_said(tmp_path: Path, content: str) -> None:
    file = tmp_path / "empty.txt"
    file.write_text(content)
    with pytest.raises(DataError, match="is empty"):
        Documents.read(file)


def test_the_fingerprint_is_of_the_texts_not_the_place() -> None:
    one = Documents(("a", "bc"), "here")
    assert one.fingerprint == Documents(("a", "bc"), "there").fingerprint
    assert one.fingerprint != Documents(("ab", "c"), "here").fingerprint
