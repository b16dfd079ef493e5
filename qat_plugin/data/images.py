"""A LightningDataModule of small grey images: scikit-learn's bundled digits, or a folder in MNIST's format."""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import Final

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from qat_plugin.data.idx import read_idx
from qat_plugin.data.windows import EpochOrder
from qat_plugin.errors import ConfigError, DataError

Labelled = tuple[Tensor, Tensor]
ImageBatches = DataLoader[tuple[Tensor, ...]]
_PARTS: Final = {"train": "train", "test": "t10k"}


class ImageData(L.LightningDataModule):
    """Pairs (images float32 [B, 1, height, width] in [0, 1], labels int64 [B]).

    A folder may hold MNIST's training files, its test files, or both, gzipped or not. Where both are there, the test
    files are held out; otherwise a share of the images is, which is a pure function of ``seed``, as is the order of
    training. Validation and test see the held-out images in their order.

    Example:
        >>> data = ImageData()  # 1,797 digits of 8 x 8 pixels, which come with scikit-learn
        >>> data = ImageData("mnist", batch_size=128)

    Args:
        path: folder with idx files; ``None`` for the digits.
        batch_size: B in training; the last, smaller batch is dropped unless it is the only one.
        eval_batch_size: B in validation and test.
        valid_fraction: share that is held out where the folder does not say.
        seed: of the split and of the order in training.

    Raises:
        ConfigError: at once, when a number is out of its range; in :meth:`setup`, when scikit-learn is not installed.
        DataError: in :meth:`setup`, when files are missing, damaged or do not fit each other.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        batch_size: int = 64,
        eval_batch_size: int = 32,
        valid_fraction: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or eval_batch_size < 1:
            raise ConfigError(f"batch_size ({batch_size}) and eval_batch_size ({eval_batch_size}) must be at least 1")
        if not 0 < valid_fraction < 1:
            raise ConfigError(f"valid_fraction is {valid_fraction}; it must lie between 0 and 1")
        self.path = None if path is None else Path(path)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.valid_fraction, self.seed = valid_fraction, seed
        self._split: tuple[Labelled, Labelled] | None = None

    @property
    def training(self) -> Labelled:
        """Images uint8 [N, height, width] and labels int64 [N] to learn from."""
        self.setup()
        assert self._split is not None
        return self._split[0]

    @property
    def held_out(self) -> Labelled:
        """The same to evaluate on."""
        self.setup()
        assert self._split is not None
        return self._split[1]

    @cached_property
    def fingerprint(self) -> str:
        """sha256, in hexadecimal, of the images and labels of both parts."""
        digest = hashlib.sha256()
        for tensor in (*self.training, *self.held_out):
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype};".encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read and split, the first time it is called."""
        if self._split is not None:
            return
        parts = [_digits()] if self.path is None else _folder(self.path)
        if len(parts) == 2:
            self._split = (parts[0], parts[1])
            return
        (images, labels), generator = parts[0], torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(images), generator=generator)
        count = round(len(images) * self.valid_fraction)
        if not 0 < count < len(images):
            raise DataError(
                f"holding out {self.valid_fraction:.0%} of {len(images)} images leaves nothing to train or evaluate on"
            )
        chosen, rest = order[:count].sort().values, order[count:].sort().values
        self._split = (images[rest], labels[rest]), (images[chosen], labels[chosen])

    @override
    def train_dataloader(self) -> ImageBatches:
        """Shuffled full batches; the order is :class:`~qat_plugin.data.windows.EpochOrder`'s."""
        data = _dataset(self.training)
        return DataLoader(
            data,
            batch_size=self.batch_size,
            sampler=EpochOrder(len(data), self.seed),
            drop_last=len(data) >= self.batch_size,
        )

    @override
    def val_dataloader(self) -> ImageBatches:
        """All held-out images, in their order."""
        return DataLoader(_dataset(self.held_out), batch_size=self.eval_batch_size)

    @override
    def test_dataloader(self) -> ImageBatches:
        """The same as :meth:`val_dataloader`."""
        return self.val_dataloader()


def _dataset(part: Labelled) -> TensorDataset:
    images, labels = part
    return TensorDataset(images.unsqueeze(1).float() / 255, labels)


def _digits() -> Labelled:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the digits come with scikit-learn, which is not installed ({error}): pip install 'qat-plugin[images]', "
            "or give a folder in MNIST's format (data.path=DIR)"
        ) from error
    images, labels = load_digits().images, load_digits().target
    return (torch.from_numpy(images).float() * (255 / 16)).round().to(torch.uint8), torch.from_numpy(labels).long()


def _folder(folder: Path) -> list[Labelled]:
    """The training part, the test part, or both."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: give one with {_name('train', 'images')}.gz or its like")
    parts = [part for kind in _PARTS if (part := _part(folder, kind)) is not None]
    if not parts:
        raise DataError(
            f"{folder} holds no images in MNIST's format: {_name('train', 'images')}(.gz) and "
            f"{_name('train', 'labels')}(.gz), or those of t10k"
        )
    if len({tuple(images.shape[1:]) for images, _ in parts}) > 1:
        raise DataError(f"{folder}: its training and its test images differ in size")
    return parts


def _part(folder: Path, kind: str) -> Labelled | None:
    images_at, labels_at = (_existing(folder / _name(kind, what)) for what in ("images", "labels"))
    if images_at is None and labels_at is None:
        return None
    if images_at is None or labels_at is None:
        missing = _name(kind, "images" if images_at is None else "labels")
        raise DataError(f"{folder} lacks {missing}(.gz), which belongs to {(images_at or labels_at).name}")  # type: ignore[union-attr]
    images, labels = read_idx(images_at, 3), read_idx(labels_at, 1).long()
    if len(images) != len(labels):
        raise DataError(f"{images_at} holds {len(images)} images, {labels_at} {len(labels)} labels")
    return images, labels


def _name(kind: str, what: str) -> str:
    return f"{_PARTS[kind]}-{what}-idx{3 if what == 'images' else 1}-ubyte"


def _existing(path: Path) -> Path | None:
    return next((p for p in (path.with_name(path.name + ".gz"), path) if p.is_file()), None)
