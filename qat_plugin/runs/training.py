"""One training stage: a Trainer as the recipe says, resumed from its last checkpoint if there is one."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from qat_plugin.config.schema import TrainerConfig
from qat_plugin.errors import CheckpointError, ConfigError
from qat_plugin.runs.interruption import Interruptions, ResumableCheckpoint
from qat_plugin.runs.progress import TrainingProgress

LAST = "last.ckpt"


def train(
    module: L.LightningModule,
    data: L.LightningDataModule,
    config: TrainerConfig,
    *,
    stage: str,
    folder: Path,
    callbacks: Sequence[Callback],
    interruptions: Interruptions,
) -> None:
    """Train a module in place for ``max_steps`` optimizer steps; afterwards it is on the CPU, or where it was put.

    Args:
        module: with the weights to start from.
        data: its training data.
        config: how to train.
        stage: for progress and loggers.
        folder: of the stage's checkpoints; training goes on from the one in it.
        callbacks: in addition to progress and checkpoints.
        interruptions: what stops it.

    Raises:
        Interrupted: after a signal, once the checkpoint is saved.
        CheckpointError: when the checkpoint to go on from is damaged.
    """
    last = folder / LAST
    L.seed_everything(config.seed, workers=True, verbose=False)
    trainer = L.Trainer(
        accelerator=accelerator_of(config),
        devices=1,
        precision=config.precision,  # type: ignore[arg-type]
        max_steps=config.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=config.gradient_clip_val,
        deterministic=config.deterministic,
        callbacks=[
            *callbacks,
            TrainingProgress(f"training ({stage})", config.max_steps),
            ResumableCheckpoint(last, every=config.checkpoint_interval, interruptions=interruptions),
        ],
        logger=_logger(config, stage, folder.parent.parent),
        log_every_n_steps=10,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **_validation(config),
    )
    module.train()
    # norms that were folded stay in evaluation mode, as they should
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
    trainer.fit(module, datamodule=data, ckpt_path=checked(last) if last.exists() else None, weights_only=True)


def accelerator_of(config: TrainerConfig) -> str:
    """``cpu`` or ``cuda``.

    Raises:
        ConfigError: when CUDA is asked for and there is none.
    """
    if config.accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=cuda: there is no CUDA device here; use trainer.accelerator=cpu")
    if config.accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.accelerator


def checked(checkpoint: Path) -> Path:
    """The path of a checkpoint that can be read.

    Raises:
        CheckpointError: when it cannot.
    """
    read_checkpoint(checkpoint)
    return checkpoint


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, its tensors mapped and not yet read.

    Raises:
        CheckpointError: when it is missing, truncated, or holds more than tensors and plain values.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({str(error).splitlines()[0]}); delete it to train this stage from its start"
        ) from error
    return content


def _validation(config: TrainerConfig) -> dict[str, Any]:
    """Every so many optimizer steps, or not at all: the ladder measures afterwards."""
    if config.val_interval is None:
        return {"limit_val_batches": 0}
    return {"val_check_interval": config.val_interval * config.accumulate, "check_val_every_n_epoch": None}


def _logger(config: TrainerConfig, stage: str, folder: Path) -> Logger | bool:
    if config.logger == "csv":
        return CSVLogger(folder, name="curves", version=stage)
    if config.logger == "tensorboard":
        try:
            return TensorBoardLogger(folder, name="curves", version=stage)
        except ModuleNotFoundError as error:
            raise ConfigError(f"trainer.logger=tensorboard: {error}; use trainer.logger=csv") from error
    return False
