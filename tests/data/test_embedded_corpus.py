"""The embedded text: the same on every machine with the same Python, held-out files apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qat_plugin.data.embedded import embedded_corpus
from qat_plugin.errors import DataError


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    for index in range(40):
        file = root / ("package" if index % 3 else ".") / f"module{index}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# file {index}\n" + "x = 1\n" * 30)
    (root / "site-packages").mkdir()
    (root / "site-packages" / "alien.py").write_text("alien = True\n")
    (root / "latin.py").write_bytes(b"# caf\xe9 latin\n")
    return root


def test_it_does_not_depend_on_where_the_library_lies(library: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "another" / "place"
    shutil.copytree(library, elsewhere)
    sizes = {"train_characters": 3000, "valid_characters": 800}
    assert embedded_corpus(root=library, **sizes) == embedded_corpus(root=elsewhere, **sizes)


def test_held_out_files_are_not_trained_on(library: Path) -> None:
    corpus = embedded_corpus(root=library, train_characters=10**6, valid_characters=800)
    held_out, trained = set(corpus.valid_documents.texts), set(corpus.train_documents.texts)
    assert held_out
    assert trained
    assert not held_out & trained
    assert len(held_out) + len(trained) == 40
    assert "alien" not in corpus.train + corpus.valid
    assert "latin" not in corpus.train + corpus.valid


def test_a_change_of_one_file_changes_the_fingerprint(library: Path) -> None:
    before = embedded_corpus(root=library, valid_characters=800).fingerprint
    (library / "module0.py").write_text("changed = True\n")
    assert embedded_corpus(root=library, valid_characters=800).fingerprint != before


def test_a_python_without_sources_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ships without it"):
        embedded_corpus(root=tmp_path)


def test_this_python_has_enough_of_it() -> None:
    corpus = embedded_corpus(train_characters=200_000, valid_characters=50_000)
    assert len(corpus.train) >= 200_000
    assert len(corpus.valid) >= 50_000
    assert "def " in corpus.train
