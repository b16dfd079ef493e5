"""The users' side of the QLoRA tests: modules that know nothing of this package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from qat_plugin.callbacks import QLoRAFinetuning
from tests.callbacks.subjects import trainer

VOCABULARY = 96


def llama() -> LlamaForCausalLM:
    """A random Llama, the same each time, in eval mode as from_pretrained returns it."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
            )
        ).eval()  # fmt: skip


class Language(L.LightningModule):
    """A language model; the optimizer is given every parameter, frozen ones too."""

    def __init__(self, built_in: str = "__init__", make: Callable[[], Any] = llama) -> None:
        super().__init__()
        self.built_in, self.make = built_in, make
        self.losses: list[float] = []
        if built_in == "__init__":
            self.model = make()

    def setup(self, stage: str) -> None:
        if self.built_in == "setup" and not hasattr(self, "model"):
            self.model = self.make()

    def configure_model(self) -> None:
        if self.built_in == "configure_model" and not hasattr(self, "model"):
            self.model = self.make()

    def loss(self, batch: list[Tensor]) -> Tensor:
        loss: Tensor = self.model(input_ids=batch[0], labels=batch[0], use_cache=False).loss
        return loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def tokens(rows: int = 24, *, shuffle: bool = True) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, (rows, 10), generator=generator)  # four words of many: that is quickly learned
    return DataLoader(TensorDataset(ids), batch_size=4, shuffle=shuffle)


def fitted(folder: Path, module: Any, *callbacks: Any, data: Any = None, **options: Any) -> L.Trainer:
    """Fit a module; QLoRA with small adapters unless callbacks are given."""
    if not any(isinstance(callback, QLoRAFinetuning) for callback in callbacks):
        callbacks = (QLoRAFinetuning(rank=4), *callbacks)
    fit = trainer(folder, *callbacks, **options)
    loader = tokens() if data is None else data
    fit.fit(module, loader, tokens(8, shuffle=False) if isinstance(module, Language) else None)
    return fit


def adapters(module: torch.nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
