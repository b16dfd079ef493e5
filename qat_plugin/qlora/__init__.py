"""QLoRA: a frozen base in NF4, full-precision adapters, merging without loss; peft and bitsandbytes come in lazily."""

from qat_plugin.qlora.files import load_adapter, read_adapter, save_adapter
from qat_plugin.qlora.identity import base_fingerprint
from qat_plugin.qlora.layers import lora_layers, without_adapters
from qat_plugin.qlora.merge import merge, merge_directory
from qat_plugin.qlora.offload import offloading
from qat_plugin.qlora.prepare import Prepared, is_prepared, prepare, prepared_of, summary
from qat_plugin.qlora.streaming import BaseRecord, load_base

__all__ = [
    "BaseRecord", "Prepared", "base_fingerprint", "is_prepared", "load_adapter", "load_base", "lora_layers", "merge",
    "merge_directory", "offloading", "prepare", "prepared_of", "read_adapter", "save_adapter", "summary",
    "without_adapters",
]  # fmt: skip
