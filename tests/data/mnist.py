"""Files in MNIST's format, written by hand."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, kinds: tuple[str, ...] = ("train", "t10k"), count: int = 50, size: int = 9) -> Path:
    """A folder of random images; the label of each is its number modulo 10."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for kind in kinds:
        images = generator.integers(0, 256, (count, size, size), dtype=np.uint8)
        with gzip.open(folder / f"{kind}-images-idx3-ubyte.gz", "wb") as file:
            file.write(idx(images))
        (folder / f"{kind}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 10))
    return folder
