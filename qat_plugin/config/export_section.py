"""The keys of a recipe's section ``export``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from qat_plugin.config.fields import absolute, check_choice, help_text, option

EXPORT_FORMATS: Final = (
    "converted", "gguf", "torchao", "compressed-tensors", "onnx", "executorch", "peft", "bitsandbytes",
)  # fmt: skip
"""The last two are of what QLoRA leaves, the others of converted models."""


@dataclass
class ExportConfig:
    """A file for another runtime, made of the converted model."""

    format: str | None = option(
        None, f"{', '.join(EXPORT_FORMATS)}; null for none; written export=NAME, or format=NAME with task=export"
    )
    path: str | None = option(None, "file or folder to write; null for exported/<format> in the run's folder")
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata=help_text("the format's own, e.g. export.options.kquant=Q4_K_M; README, section Export, lists them"),
    )
    verify: bool = option(True, "read the file back and compare integers, scales and outputs")

    def __post_init__(self) -> None:
        if self.format is not None:
            check_choice("export.format", self.format, EXPORT_FORMATS)
        self.path = None if self.path is None else absolute(self.path)
