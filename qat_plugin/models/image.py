"""A LightningModule around an image classifier, and a small one that is trained on the spot and cached."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from qat_plugin.cache import cache_directory
from qat_plugin.data.images import ImageData
from qat_plugin.errors import DataError
from qat_plugin.measure import Progress, progressing
from qat_plugin.models.embedded import _MARK, _is_whole, _move, _place_to_build, _sha256
from qat_plugin.models.optimizers import adamw, check_schedule, warmup_cosine
from qat_plugin.models.resnet import SmallResNet

_FORMAT = 1
_WEIGHTS = "model.safetensors"


class ImageClassifier(L.LightningModule):
    """Classification of images: AdamW, linear warm-up, cosine decay to a tenth.

    Batches are pairs (images [B, channels, height, width], labels int64 [B]). Logs ``train_loss``, ``val_loss`` and
    ``val_accuracy`` (and ``test_``).

    Args:
        model: images -> logits [B, classes]; by default a :class:`~qat_plugin.models.resnet.SmallResNet`.
        learning_rate: peak learning rate.
        weight_decay: decoupled, of matrices and kernels only.
        warmup_steps: optimizer steps of linear warm-up.
        final_share: learning rate at the end of the cosine, as a share of the peak.
        optimizer_bits: of AdamW's two moments, 32 or 8.

    Raises:
        ConfigError: for a number out of its range.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 10,
        final_share: float = 0.1,
        optimizer_bits: int = 32,
    ) -> None:
        super().__init__()
        check_schedule(learning_rate, weight_decay, warmup_steps, final_share)
        self.model = (SmallResNet() if model is None else model).train()
        self.learning_rate, self.weight_decay, self.warmup_steps = learning_rate, weight_decay, warmup_steps
        self.final_share, self.optimizer_bits = final_share, optimizer_bits

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes]."""
        logits: Tensor = self.model(images)
        return logits

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]).float(), batch[1])
        self.log("train_loss", loss.detach(), on_step=True, on_epoch=False, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    @override
    def configure_optimizers(self) -> Any:
        optimizer = _optimizer(self, self.learning_rate, self.weight_decay, self.optimizer_bits)
        shape = (self.warmup_steps, self.trainer.estimated_stepping_batches, self.final_share)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, *shape))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        logits = self(batch[0]).float()
        right = (logits.argmax(-1) == batch[1]).float().mean()
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(batch[1])}
        self.log(f"{stage}_loss", F.cross_entropy(logits, batch[1]), **options)
        self.log(f"{stage}_accuracy", right, prog_bar=True, **options)


@dataclass(frozen=True)
class ImageRecipe:
    """What shapes the net that is trained on the spot; its hash and the data's name the cache entry.

    Attributes:
        width: channels of its first block.
        classes: number of logits.
        steps: optimizer steps of its training, on the data's own batches.
        learning_rate: peak of a linear warm-up and a cosine decay.
        seed: of the weights.
    """

    width: int = 32
    classes: int = 10
    steps: int = 300
    learning_rate: float = 3e-3
    seed: int = 0

    def build(self) -> SmallResNet:
        """The net with its first weights; the global generator stays where it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return SmallResNet(self.classes, 1, self.width)


def trained_net(recipe: ImageRecipe, data: ImageData, *, progress: Progress | bool = True) -> SmallResNet:
    """The trained net; trains it first when it is not cached (a minute or two), and caches it.

    Raises:
        DataError: when the data has more classes than the recipe.
        ConfigError: when the cache directory cannot be written.
    """
    most = int(max(data.training[1].max(), data.held_out[1].max()))
    if most >= recipe.classes:
        raise DataError(
            f"the data has labels up to {most}, the net {recipe.classes} classes: give more (model.classes)"
        )
    content = {**asdict(recipe), "data": data.fingerprint, "batch": [data.batch_size, data.seed], "format": _FORMAT}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    target = cache_directory() / f"image-{key}"
    net = recipe.build()
    if not _is_whole(target):
        shutil.rmtree(target, ignore_errors=True)
        building = _place_to_build(target.parent)
        try:
            _build(building, net, recipe, data, progress)
            _move(building, target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    from safetensors.torch import load_file

    net.load_state_dict(load_file(target / _WEIGHTS))
    return net.eval()


def _build(folder: Path, net: nn.Module, recipe: ImageRecipe, data: ImageData, progress: Progress | bool) -> None:
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        _train(net, recipe, data, progress)
    save_file(net.state_dict(), folder / _WEIGHTS)
    (folder / _MARK).write_text(json.dumps({_WEIGHTS: _sha256(folder / _WEIGHTS)}), encoding="utf-8")


def _train(net: nn.Module, recipe: ImageRecipe, data: ImageData, progress: Progress | bool) -> None:
    optimizer = _optimizer(net, recipe.learning_rate, 0.05, 32)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, max(1, recipe.steps // 20), recipe.steps, 0.1)
    )
    step, epoch = 0, 0
    net.train()
    with progressing(progress, "training the image net", recipe.steps) as advance:
        while step < recipe.steps:
            loader = data.train_dataloader()
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            for images, labels in loader:
                F.cross_entropy(net(images), labels).backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                step += 1
                advance(step)
                if step == recipe.steps:
                    break
            epoch += 1
    net.eval()


def _optimizer(module: nn.Module, rate: float, decay: float, bits: int) -> torch.optim.Optimizer:
    """AdamW that decays matrices and kernels, and neither biases, norms nor learned scales."""
    trained = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
    decayed = [w for name, w in trained if w.dim() > 1 and "fake_quantizer" not in name.split(".")]
    others = [w for _, w in trained if all(w is not other for other in decayed)]
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return adamw(groups, lr=rate, bits=bits)
