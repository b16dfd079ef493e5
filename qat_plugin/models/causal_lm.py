"""A LightningModule around a transformers causal language model."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import override

from qat_plugin.models.loading import load_causal_lm
from qat_plugin.models.objective import Distillation, Objective
from qat_plugin.models.optimizers import adamw, allow_states_in_checkpoints, check_schedule, warmup_cosine

__all__ = ["CausalLM", "load_causal_lm"]


class CausalLM(L.LightningModule):
    """Next-token training of a causal language model: AdamW, linear warm-up, cosine decay.

    Batches hold ``input_ids`` and ``labels``, int64 [B, T] (labels are shifted here; -100 is not predicted), and may
    hold ``attention_mask`` or, for packed examples, ``position_ids``. Logs ``train_loss``, ``val_loss`` and
    ``val_perplexity`` (and ``test_``), in nats per token, weighted by tokens.

    Args:
        model: a transformers model whose forward takes ``input_ids`` and ``labels`` and returns ``.loss``.
        tokenizer: travels with the model; not used in training.
        learning_rate: peak learning rate.
        weight_decay: decoupled, of matrices only.
        warmup_steps: optimizer steps of linear warm-up.
        final_share: learning rate at the end of the cosine, as a share of the peak.
        betas: AdamW's.
        optimizer_bits: of AdamW's two moments, 32 or 8.
        chunked_loss: never hold the logits of all tokens at once.
        distillation: learn from ``teacher`` beside the data.
        teacher: a float model of the same vocabulary, kept outside of this module's parameters and checkpoints;
            ``None`` with ``distillation`` takes the frozen base under the adapters.
        base_record: where a quantized base came from (:func:`qat_plugin.qlora.load_base` returns it).

    Raises:
        ConfigError: for a number out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        warmup_steps: int = 10,
        final_share: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        optimizer_bits: int = 32,
        chunked_loss: bool = True,
        distillation: Distillation | None = None,
        teacher: nn.Module | None = None,
        base_record: Any = None,
    ) -> None:
        super().__init__()
        check_schedule(learning_rate, weight_decay, warmup_steps, final_share)
        # transformers returns models in eval mode and Lightning never calls .train()
        self.model = model.train()
        self.tokenizer = tokenizer
        self.learning_rate, self.weight_decay, self.warmup_steps = learning_rate, weight_decay, warmup_steps
        self.final_share = final_share
        self.betas, self.optimizer_bits, self.base_record = betas, optimizer_bits, base_record
        if optimizer_bits == 8:
            allow_states_in_checkpoints()
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        # not a submodule: its weights are in no checkpoint, and no optimizer
        self.__dict__["_objective"] = Objective(model, chunked=chunked_loss, distillation=distillation, teacher=teacher)

    @override
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """The model's own output."""
        return self.model(input_ids=input_ids, **kwargs)

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.objective(batch)
        self.log("train_loss", loss.detach(), on_step=True, on_epoch=False, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_perplexity("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_perplexity("test")

    @override
    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.dim() > 1 and parameter.dtype.is_floating_point]
        scales = _scale_ids(self)
        decayed = [parameter for parameter in matrices if id(parameter) not in scales]
        others = [parameter for parameter in trained if all(parameter is not other for other in decayed)]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = adamw(groups, lr=self.learning_rate, betas=self.betas, bits=self.optimizer_bits)
        shape = (self.warmup_steps, self.trainer.estimated_stepping_batches, self.final_share)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, *shape))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def objective(self) -> Objective:
        """The training loss."""
        objective: Objective = self.__dict__["_objective"]
        return objective

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        loss = self.objective.cross_entropy(batch)
        self.log(f"{stage}_loss", loss.float(), on_step=False, on_epoch=True, batch_size=tokens)

    def _log_perplexity(self, stage: str) -> None:
        loss = self.trainer.callback_metrics.get(f"{stage}_loss")
        if loss is not None:
            self.log(f"{stage}_perplexity", torch.exp(loss.float()), prog_bar=True)


def _scale_ids(module: nn.Module) -> set[int]:
    """Learned quantization scales are not decayed."""
    return {id(parameter) for name, parameter in module.named_parameters() if "fake_quantizer" in name.split(".")}
