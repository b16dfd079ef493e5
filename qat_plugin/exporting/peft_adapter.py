"""The adapter of a QLoRA run as peft, transformers and vLLM read it; proven by peft's own forward on the same base."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qat_plugin import qlora
from qat_plugin.errors import ExportError
from qat_plugin.exporting.contents import Exportable, outputs_of
from qat_plugin.exporting.formats import Told
from qat_plugin.exporting.refusal import Refusal
from qat_plugin.exporting.verification import Comparison, Verification, relative_difference
from qat_plugin.measure import model_bytes
from qat_plugin.qlora.adapter_file import PREFIX
from qat_plugin.qlora.updates import adapter_layers, adapter_root, update_of

_COPIED = 4 << 30
_TOLERANCE = 1e-2
_REASON = "peft computes adapters in float32, this package in the type of the activations"


@dataclass(frozen=True)
class Options:
    """There is nothing to set."""


def refusals(model: Exportable, options: Options) -> list[Refusal]:
    """Adapters that were trained under fake quantization: on a float base they are another model."""
    return [
        Refusal(layer.name, str(layer.scheme), "its adapter was trained under fake quantization; export its converted "
                "model")
        for layer in model.plan.quantized
        if layer.scheme is not None and layer.scheme.is_integer
    ]  # fmt: skip


def write(model: Exportable, path: Path, options: Options, progress: Told) -> None:
    """Fill the folder."""
    qlora.save_adapter(model.network, path)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(path)


def verify(model: Exportable, path: Path, options: Options) -> Verification:
    """peft reads the tensors, and where memory allows runs them on a copy of the base."""
    import peft
    from peft.utils import load_peft_weights

    seen, stored = Comparison(), load_peft_weights(str(path), device="cpu")
    for name, layer in adapter_layers(adapter_root(model.network)).items():
        update = update_of(layer)
        for tensor, part in ((update.a, "lora_A.weight"), (update.b, "lora_B.weight")):
            seen.plain(name, tensor.detach().cpu(), _taken(stored, f"{PREFIX}{name}.{part}"))
        if update.magnitude is not None:
            seen.plain(name, update.magnitude.detach().cpu(), _taken(stored, f"{PREFIX}{name}.lora_magnitude_vector"))
    reader, left = f"peft {peft.__version__}", (f"{len(stored)} unknown tensors",) if stored else ()
    if model_bytes(model.network) > _COPIED:
        return seen.verification(reader, reason="a copy of the base would not fit beside it", notes=left)
    bare = _without_adapters(copy.deepcopy(model.network))
    error = relative_difference(
        outputs_of(peft.PeftModel.from_pretrained(bare, str(path)), model.sample), model.outputs()
    )
    return seen.verification(reader, error=error, tolerance=_TOLERANCE, reason=_REASON, notes=left)


def usage(model: Exportable, path: Path, options: Options) -> str:
    """How it is loaded."""
    base = getattr(model.config, "_name_or_path", "") or "BASE"
    return (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{path.name}")'
    )


def _taken(stored: dict[str, Tensor], name: str) -> Tensor:
    if name not in stored:
        raise ExportError(f"the adapter's file lacks {name}")
    return stored.pop(name)


def _without_adapters(network: nn.Module) -> Any:
    """The base alone, as it was before adapters were put around its layers."""
    around = qlora.lora_layers(network)
    places = {id(module): name for name, module in network.named_modules()}
    for layer in around.values():
        network.set_submodule(places[id(layer)], layer.base_layer)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        network.__dict__.pop(name, None)
    return network
