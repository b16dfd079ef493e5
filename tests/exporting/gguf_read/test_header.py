"""A header says what is wrong with it, and where; it never hangs, or takes memory that the file does not have."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from qat_plugin.errors import CheckpointError, DataError
from qat_plugin.exporting.gguf.header import Array, read_header
from tests.exporting.gguf_read.files import llama, put, write


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def kinds(writer: gguf.GGUFWriter) -> None:
        writer.add_array("x.integers", [1, 2, 3])
        writer.add_array("x.flags", [True, False])
        writer.add_array("x.numbers", [0.5, 1.5])
        writer.add_bool("x.flag", True)
        writer.add_string("x.text", "grüße")
        writer.add_float64("x.double", 0.1)

    small = llama(num_hidden_layers=1, vocab_size=16)
    return write(small, tmp_path_factory.mktemp("gguf") / "m.gguf", Kind.Q4_0, tokens=True, more=kinds)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def built(
    entries: list[bytes] | None = None, tensors: list[bytes] | None = None, data: bytes = bytes(256), version: int = 3
) -> bytes:
    entries, tensors = entries or [], tensors or []
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries)) + b"".join(entries + tensors)
    return head + bytes(-len(head) % 32) + data


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def test_it_reads_what_the_gguf_package_reads(file: Path) -> None:
    header, theirs = read_header(file), gguf.GGUFReader(str(file))
    assert header.version == 3 and header.data_start == theirs.data_offset
    for key, field in theirs.fields.items():
        if key.startswith("GGUF."):
            continue
        value = header.metadata[key]
        found = header.values(key) if isinstance(value, Array) else value
        assert found == field.contents(), key
    assert [*header.tensors] == [one.name for one in theirs.tensors]
    for one in theirs.tensors:
        info = header.tensors[one.name]
        assert info.shape == tuple(int(size) for size in one.shape[::-1])
        assert (info.kind, info.start) == (one.tensor_type.name, one.data_offset)
        assert np.array_equal(header.data(one.name), one.data.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("version", [2, 3])
def test_versions_two_and_three_are_read(version: int, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(built([entry(b"a", 4, struct.pack("<I", 7))], [tensor(b"t")], version=version))
    header = read_header(path)
    assert header.metadata == {"a": 7} and header.data("t").nbytes == 128


def bad() -> Iterator[tuple[str, bytes, str]]:
    whole = struct.pack("<I", 1)
    yield "magic", b"GGML" + built()[4:], "does not begin with GGUF"
    yield "short", b"GGUF" + bytes(8), "it has 12 bytes"
    yield "empty", b"", "it has 0 bytes"
    yield "version 1", built(version=1), "GGUF version 1; versions that can be read: 2 and 3"
    yield "big-endian", built(version=3 << 24), "big-endian GGUF file"
    yield (
        "many entries",
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60) + bytes(64),
        "claims 1152921504606846976 metadata",
    )
    yield "many tensors", b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 0) + bytes(64), "claims .* tensors"
    yield "long key", built([struct.pack("<Q", 1 << 63) + bytes(16)]), "key of metadata entry 0 takes 92233"
    yield "empty key", built([entry(b"", 4, whole)]), "key of metadata entry 0, '', is empty .at byte 24"
    yield "no UTF-8", built([entry(b"a\xff", 4, whole)]), "no UTF-8 .*at byte 33"
    yield "twice", built([entry(b"a", 4, whole)] * 2), "'a', is there twice"
    yield "unknown type", built([entry(b"a", 13, whole)]), "a has type 13, which there is none of .at byte 33"
    yield "truth", built([entry(b"a", 7, b"\x02")]), "truth value of 2"
    yield "long array", built([entry(b"a", 9, struct.pack("<IQ", 6, 1 << 61))]), "elements of a, more than"
    yield "array of nothing", built([entry(b"a", 9, struct.pack("<IQ", 77, 1))]), "elements of a have type 77"
    deep = b"".join(struct.pack("<IQ", 9, 1) for _ in range(9)) + struct.pack("<IQ", 0, 1) + b"\0"
    yield "deep array", built([entry(b"a", 9, deep)]), "more than 4 deep"
    yield "truths", built([entry(b"a", 9, struct.pack("<IQ", 7, 2) + b"\1\2")]), "truth values above 1"
    for value in (0, 24, 1 << 31):
        yield f"alignment {value}", built([entry(b"general.alignment", 4, struct.pack("<I", value))]), "no power of two"
    yield "alignment of text", built([entry(b"general.alignment", 8, string(b"32"))]), "no power of two"
    yield "no dimensions", built(tensors=[tensor(b"t", ())]), "t has 0 dimensions"
    yield "five dimensions", built(tensors=[tensor(b"t", (1,) * 5)]), "t has 5 dimensions"
    yield "empty tensor", built(tensors=[tensor(b"t", (0,))]), r"shape \(0,\), which F32 cannot have"
    yield "overflow", built(tensors=[tensor(b"t", (1 << 32, 1 << 32))]), "cannot have"
    yield "part of a block", built(tensors=[tensor(b"t", (33,), 2)]), r"which Q4_0 cannot have \(blocks of 32\)"
    yield "unknown tensor type", built(tensors=[tensor(b"t", kind=4)]), "t has type 4, which is none"
    yield "no name", built(tensors=[tensor(b"")]), "tensor 0 has no name"
    yield "tensor twice", built(tensors=[tensor(b"t"), tensor(b"t", offset=128)]), "two tensors t"
    yield "unaligned", built(tensors=[tensor(b"t", offset=8)]), "offset 8, no multiple of 32"
    yield "outside", built(tensors=[tensor(b"t", (65,))]), r"t \(F32, \(65,\)\) takes bytes 64 to 324, the file has 320"
    yield "far outside", built(tensors=[tensor(b"t", offset=1 << 63)]), "was cut short or is damaged"
    yield "over each other", built(tensors=[tensor(b"t"), tensor(b"u", offset=64)]), "t and u lie over each other"


@pytest.mark.parametrize(("content", "message"), [case[1:] for case in bad()], ids=[case[0] for case in bad()])
def test_what_is_wrong_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as told:
        read_header(path)
    assert str(path) in str(told.value)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file at"):
        read_header(tmp_path / "m.gguf")


def test_an_array_of_empty_strings_that_fills_a_file_neither_hangs_nor_takes_memory(tmp_path: Path) -> None:
    """Zeros, which tensor data are often, read as endless empty strings."""
    path = tmp_path / "m.gguf"
    count = 1 << 35
    with path.open("wb") as out:
        out.write(built([entry(b"a", 9, struct.pack("<IQ", 8, count))], data=b""))
        out.truncate(8 * count + 4096)  # sparse
    began = time.process_time()
    with pytest.raises(CheckpointError, match="more than 16777216 strings"):
        read_header(path)
    assert time.process_time() - began < 60


def test_a_file_cut_anywhere_is_refused(file: Path, tmp_path: Path) -> None:
    content, cut = file.read_bytes(), tmp_path / "cut.gguf"
    last = max(info.start + info.nbytes for info in read_header(file).tensors.values())
    places = [*random.Random(0).sample(range(last), 300), 0, 1, 3, 4, 23, 24, last - 1]
    for place in places:
        cut.write_bytes(content[:place])
        with pytest.raises(CheckpointError):
            read_header(cut)


def test_any_changed_byte_of_a_header_is_refused_or_read_within_the_files_own_size(file: Path, tmp_path: Path) -> None:
    content, changed = file.read_bytes(), tmp_path / "changed.gguf"
    changed.write_bytes(content)
    size = read_header(file).data_start
    generator, refused = random.Random(0), 0
    tracemalloc.start()
    try:
        for place in range(size):
            old = content[place]
            new = generator.choice([old ^ 1 << generator.randrange(8), generator.randrange(256), 0xFF])
            put(changed, place, new)
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            try:
                read_header(changed)
            except CheckpointError:
                refused += 1
            assert tracemalloc.get_traced_memory()[1] - before < len(content) + (1 << 20)
            put(changed, place, old)
    finally:
        tracemalloc.stop()
    assert refused > size / 3
