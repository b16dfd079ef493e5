"""Images: the digits, MNIST's format, splits that repeat, files that lie."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from qat_plugin.data.idx import read_idx
from qat_plugin.data.images import ImageData
from qat_plugin.errors import ConfigError, DataError

from .mnist import idx, write_mnist


def test_the_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    data = ImageData(batch_size=100)
    images, labels = (torch.cat([a, b]) for a, b in zip(data.training, data.held_out, strict=True))
    theirs = load_digits()
    assert len(images) == 1797
    assert sorted(labels.tolist()) == sorted(theirs.target.tolist())
    assert images.float().sum().item() == pytest.approx(theirs.images.sum() * 255 / 16, rel=1e-3)
    batch, target = next(iter(data.train_dataloader()))
    assert batch.shape == (100, 1, 8, 8) and batch.dtype == torch.float32 and target.dtype == torch.int64
    assert batch.min() >= 0 and batch.max() == 1


def test_the_split_is_a_function_of_the_seed() -> None:
    first, again, other = ImageData(seed=1), ImageData(seed=1), ImageData(seed=2)
    assert len(first.held_out[0]) == round(1797 * 0.2)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    torch.manual_seed(5)
    order = [labels.tolist() for _, labels in first.train_dataloader()]
    torch.manual_seed(6)
    assert order == [labels.tolist() for _, labels in again.train_dataloader()]
    assert order != [labels.tolist() for _, labels in other.train_dataloader()]


def test_a_folder_says_what_is_held_out(tmp_path: Path) -> None:
    both = ImageData(write_mnist(tmp_path / "both"))
    assert len(both.training[0]) == len(both.held_out[0]) == 50
    assert both.held_out[1].tolist() == [i % 10 for i in range(50)]
    part = ImageData(write_mnist(tmp_path / "part", kinds=("t10k",)), valid_fraction=0.1)
    assert (len(part.training[0]), len(part.held_out[0])) == (45, 5)
    assert part.held_out[0].shape == (5, 9, 9)


def test_bytes_are_read_as_they_were_written(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "plain").write_bytes(idx(array))
    (tmp_path / "zipped").write_bytes(gzip.compress(idx(array)))
    for name in ("plain", "zipped"):
        assert torch.equal(read_idx(tmp_path / name, 3), torch.from_numpy(array))


GOOD = idx(np.zeros((2, 3, 4), dtype=np.uint8))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "begins with nothing"),
        (b"\x00\x00\x0d\x03" + GOOD[4:], "no idx file of unsigned bytes"),
        (GOOD[:7], "no idx file"),
        (GOOD[:10], "ends in its header, after 10 bytes"),
        (GOOD[:-1], "holds only 23"),
        (GOOD + b"\x00", "holds more"),
        (idx(np.zeros(4)), "has 1 dimensions; 3 are needed"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 0, 3, 4), "which cannot be"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 2**31, 2**31, 4), "which cannot be"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 2**20, 60, 60), "holds only 0"),
        (gzip.compress(GOOD)[:-9], "truncated or corrupt"),
        (gzip.compress(GOOD)[:10] + b"\xff" * 20, "truncated or corrupt"),
    ],
)
def test_files_that_are_not_what_they_say(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_idx(tmp_path / "file", 3)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        ImageData(tmp_path / "nowhere").setup()
    with pytest.raises(DataError, match="no images in MNIST's format"):
        ImageData(tmp_path).setup()
    folder = write_mnist(tmp_path / "half")
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="lacks t10k-labels"):
        ImageData(folder).setup()
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(3)))
    with pytest.raises(DataError, match="50 images, .* 3 labels"):
        ImageData(folder).setup()
    for options in ({"batch_size": 0}, {"valid_fraction": 1.0}):
        with pytest.raises(ConfigError):
            ImageData(**options)
