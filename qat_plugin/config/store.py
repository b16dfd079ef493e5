"""The schema in Hydra's ConfigStore, under the names that ``conf/`` refers to."""

from __future__ import annotations

from typing import Any, Final

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from qat_plugin.config.options import (
    AdamW,
    Digits,
    EmbeddedModel,
    EmbeddedText,
    IdxFolder,
    ImageModel,
    InstructionFiles,
    TextFiles,
    TransformersModel,
)
from qat_plugin.config.schema import Config

SCHEMA: Final = "schema"
_OPTIONS: Final[dict[str, dict[str, type]]] = {
    "model": {"embedded": EmbeddedModel, "transformers": TransformersModel, "image": ImageModel},
    "data": {
        "embedded": EmbeddedText,
        "text": TextFiles,
        "instructions": InstructionFiles,
        "digits": Digits,
        "idx": IdxFolder,
    },
    "optimizer": {"adamw": AdamW},
}


def register_schema() -> None:
    """Store the dataclasses; the options of ``model``, ``data`` and ``optimizer`` bring their own."""
    store = ConfigStore.instance()
    store.store(name=SCHEMA, node=_schema())
    for group, options in _OPTIONS.items():
        for name, node in options.items():
            store.store(group=f"{SCHEMA}/{group}", name=name, node=node)


def _schema() -> Any:
    """The root. Hydra closes the whole config to new keys; the flags leave rules and a format's options open."""
    node = OmegaConf.structured(Config)
    OmegaConf.set_struct(node.policy.rules, False)
    OmegaConf.set_struct(node.export.options, False)
    return node
