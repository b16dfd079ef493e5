"""A sealed file is what was written, to the bit, or it is refused."""

from __future__ import annotations

import hashlib
import random
import warnings
from pathlib import Path

import gguf
import pytest
from gguf import GGMLQuantizationType as Kind

import qat_plugin
from qat_plugin.errors import CheckpointError
from qat_plugin.exporting.gguf.header import read_header
from qat_plugin.exporting.gguf.seal import DATA_SEAL, SEAL, check_seal, is_sealed, seal
from tests.exporting.gguf_read.files import llama, put, write


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = llama(num_hidden_layers=1, vocab_size=16)
    return write(small, tmp_path_factory.mktemp("gguf") / "m.gguf", Kind.Q4_0, sealed=True)


def test_the_checksums_are_those_of_the_bytes(sealed: Path) -> None:
    header, content = read_header(sealed), sealed.read_bytes()
    check_seal(header)
    data, head = content[header.data_start :], content[: header.data_start]
    assert header.metadata[DATA_SEAL] == hashlib.sha256(data).hexdigest()
    assert header.metadata[SEAL] == hashlib.sha256(head.replace(header.metadata[SEAL].encode(), b"0" * 64)).hexdigest()
    assert gguf.GGUFReader(str(sealed)).fields[SEAL].contents() == header.metadata[SEAL]  # others can read it


def test_sealing_again_changes_nothing(sealed: Path) -> None:
    before = sealed.read_bytes()
    read_header(sealed)
    assert is_sealed(read_header(sealed))
    copy = sealed.with_name("copy.gguf")
    copy.write_bytes(before)
    seal(copy)
    assert copy.read_bytes() == before


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as told:
        check_seal(read_header(path))
    return str(told.value)


def test_any_cut_is_refused(sealed: Path, tmp_path: Path) -> None:
    content, cut = sealed.read_bytes(), tmp_path / "cut.gguf"
    for place in [*random.Random(1).sample(range(len(content)), 50), len(content) - 1]:
        cut.write_bytes(content[:place])
        assert str(cut) in refused(cut)
    cut.write_bytes(content + b"\0")
    assert "tensors do not match their checksum" in refused(cut)


def test_any_changed_byte_of_the_header_is_refused(sealed: Path, tmp_path: Path) -> None:
    content, changed = sealed.read_bytes(), tmp_path / "changed.gguf"
    changed.write_bytes(content)
    generator = random.Random(2)
    for place in range(read_header(sealed).data_start):
        put(changed, place, (content[place] + generator.randrange(1, 256)) % 256)
        refused(changed)
        put(changed, place, content[place])


def test_a_changed_bit_of_the_tensors_is_refused(sealed: Path, tmp_path: Path) -> None:
    content, changed = bytearray(sealed.read_bytes()), tmp_path / "changed.gguf"
    start = read_header(sealed).data_start
    for place in random.Random(3).sample(range(start, len(content)), 50):
        content[place] ^= 16
        changed.write_bytes(content)
        assert "tensors do not match their checksum" in refused(changed)
        content[place] ^= 16
    put(changed, len(content) - 1, content[-1] ^ 1)
    with pytest.raises(CheckpointError, match="do not match"):
        qat_plugin.load(changed)


def test_one_checksum_without_the_other_is_damage(sealed: Path, tmp_path: Path) -> None:
    other = tmp_path / "m.gguf"
    for key in (SEAL, DATA_SEAL):
        other.write_bytes(sealed.read_bytes().replace(key.encode(), key[:-1].encode() + b"7"))
        assert "beside the other checksum" in refused(other)
    other.write_bytes(sealed.read_bytes().replace(b"sha256", b"sha257"))
    check_seal(read_header(other))  # nothing says that there ever were any


def test_a_file_without_places_for_them_cannot_be_sealed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no qat_plugin.sha256 of 64 digits"):
        seal(write(llama(), tmp_path / "m.gguf"))


def test_a_damaged_file_without_checksums_is_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    path = write(llama(num_hidden_layers=1), tmp_path / "m.gguf", Kind.Q4_0)
    content, size = bytearray(path.read_bytes()), read_header(path).data_start
    generator, changed, outcomes = random.Random(4), tmp_path / "changed.gguf", [0, 0]
    for place in generator.sample(range(4, size), 150):
        old = content[place]
        content[place] = generator.randrange(256)
        changed.write_bytes(content)
        try:
            with warnings.catch_warnings(action="ignore"):
                qat_plugin.load(changed)
            outcomes[0] += 1
        except CheckpointError:
            outcomes[1] += 1
        content[place] = old
    assert min(outcomes) > 5
