"""The users' side of these tests: Lightning modules that know nothing of this package, their data, a quiet Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from qat_plugin.callbacks import QuantizationAwareTraining
from qat_plugin.kernels.weight import CastWeight, QuantizedWeight

WIDTH, CLASSES, VOCABULARY = 64, 4, 96


class Classifier(L.LightningModule):
    """An MLP whose layers are built in ``__init__``, ``setup`` or ``configure_model``."""

    def __init__(self, built_in: str = "__init__", dropout: float = 0.1, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.built_in, self.dropout, self.learning_rate = built_in, dropout, learning_rate
        self.losses: list[float] = []
        self.seen: dict[str, int] = {}
        if built_in == "__init__":
            self.build()

    def build(self) -> None:
        self.net = nn.Sequential(
            nn.Linear(WIDTH, 64), nn.Dropout(self.dropout), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(),
            nn.Linear(32, CLASSES),
        )  # fmt: skip

    def setup(self, stage: str) -> None:
        if self.built_in == "setup" and not hasattr(self, "net"):
            self.build()

    def configure_model(self) -> None:
        if self.built_in == "configure_model" and not hasattr(self, "net"):
            self.build()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]).float(), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen[f"val{dataloader_idx}"] = self.seen.get(f"val{dataloader_idx}", 0) + 1
        self.log("val_loss", self.loss(batch), add_dataloader_idx=dataloader_idx > 0)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.learning_rate)


class Gpt2(L.LightningModule):
    """A GPT-2 from its config: Conv1D layers, tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_embd=64, n_layer=1, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
            )
        )  # fmt: skip

    def loss(self, batch: list[Tensor]) -> Tensor:
        loss: Tensor = self.model(input_ids=batch[0], labels=batch[0]).loss
        return loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits: Tensor = self.model(input_ids=batch[0]).logits
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Bert(Gpt2):
    """A BERT classifier from its config; its forward takes everything by keyword."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        self.model = BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
                intermediate_size=128, max_position_embeddings=32, num_labels=CLASSES,
            )
        )  # fmt: skip

    def loss(self, batch: list[Tensor]) -> Tensor:
        loss: Tensor = self.model(input_ids=batch[0], attention_mask=torch.ones_like(batch[0]), labels=batch[1]).loss
        return loss


def vectors(rows: int = 48) -> Dataset[Any]:
    """Vectors of four classes, linearly separable up to noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, WIDTH, generator=generator)
    return TensorDataset(x, (x[:, :CLASSES] + 0.1 * torch.randn(rows, CLASSES, generator=generator)).argmax(1))


def tokens(rows: int = 16) -> Dataset[Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (rows, 12), generator=generator)
    return TensorDataset(ids, ids[:, 0] % CLASSES)


def loader(dataset: Dataset[Any] | None = None, **options: Any) -> DataLoader[Any]:
    return DataLoader(vectors() if dataset is None else dataset, **{"batch_size": 8, **options})


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """A Trainer that prints and logs nothing."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        quiet["enable_checkpointing"] = False
    defaults = {"max_steps": 6, "accelerator": "cpu", "default_root_dir": folder, "num_sanity_val_steps": 1}
    return L.Trainer(callbacks=list(callbacks), **{**quiet, **defaults, **options})


def checkpoint(path: Path | str) -> dict[str, Any]:
    """A checkpoint as anybody may read it: without running code from it."""
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def quantizers_in(saved: dict[str, Any]) -> dict[str, Any]:
    """What the callback saved in a checkpoint of scales, phase and observers."""
    states = [state for key, state in saved["callbacks"].items() if key.startswith(QuantizationAwareTraining.__name__)]
    assert len(states) == 1
    quantizers: dict[str, Any] = states[0]["quantizers"]
    return quantizers


def batch_of(data: DataLoader[Any]) -> list[Tensor]:
    batch: list[Tensor] = next(iter(data))
    return batch


def quantized(module: nn.Module) -> dict[str, QuantizedWeight]:
    """The integer weights of a module by name."""
    found = {name: weight.data for name, weight in module.named_parameters()}
    return {name: weight for name, weight in found.items() if isinstance(weight, QuantizedWeight)}


def dequantized(module: nn.Module) -> dict[str, Tensor]:
    """The float state_dict that a converted module stands for."""
    return {
        name: value.dequantize() if isinstance(value, QuantizedWeight | CastWeight) else value
        for name, value in module.state_dict().items()
    }
