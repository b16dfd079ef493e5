"""ONNX Runtime as a user would start it, and the models that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FEATURES, ROWS = 96, 40


def run(folder: Path, *values: Tensor, **settings: str) -> list[Tensor]:
    """Outputs of ``model.onnx`` for positional inputs, one thread, session entries as given."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    for name, value in settings.items():
        options.add_session_config_entry(name.replace("__", "."), value)
    session: Any = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    given = {entry.name: value.numpy() for entry, value in zip(session.get_inputs(), values, strict=True)}
    return [torch.from_numpy(found) for found in session.run(None, given)]


class Beside(nn.Module):
    """Layers side by side, one for each name, so that an error of one is not hidden by the others."""

    def __init__(self, linear: list[str], embedding: list[str]) -> None:
        super().__init__()
        self.linear = nn.ModuleDict({name: nn.Linear(FEATURES, FEATURES // 2) for name in linear})
        self.embedding = nn.ModuleDict({name: nn.Embedding(ROWS, FEATURES // 2) for name in embedding})

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """[batch, layers, FEATURES / 2]."""
        return torch.stack(
            [*(layer(x) for layer in self.linear.values()), *(layer(ids) for layer in self.embedding.values())], dim=1
        )
