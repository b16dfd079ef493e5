"""The frozen NF4 base of a QLoRA run as a Hugging Face checkpoint: read back without quantizing the float model again.

Each NF4 weight is stored as bitsandbytes stores it (packed codes, block scales, the state that says how), everything
else in its own type; the adapters are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin import qlora
from qat_plugin.errors import ExportError
from qat_plugin.exporting.contents import Exportable, outputs_of
from qat_plugin.exporting.directory import write_companions
from qat_plugin.exporting.formats import Told
from qat_plugin.exporting.refusal import Refusal
from qat_plugin.exporting.verification import Comparison, Verification, relative_difference
from qat_plugin.kernels.torchao_import import known_noise_dropped
from qat_plugin.policy import clean_name
from qat_plugin.qlora.nf4 import is_nf4, state_tensors
from qat_plugin.qlora.source import quiet_transformers

_TOLERANCE = 1e-4
_REASON = "sums in another order"


@dataclass(frozen=True)
class Options:
    """What can be set.

    Attributes:
        shard_size: bytes of one file of weights at most, as "5GB".
    """

    shard_size: str = field(default="5GB", metadata={"help": "bytes of one file of weights at most"})


def refusals(model: Exportable, options: Options) -> list[Refusal]:
    """What no NF4 of bitsandbytes is."""
    found = []
    for layer in model.plan.quantized:
        assert layer.scheme is not None
        if layer.scheme.is_integer:
            found.append(Refusal(layer.name, str(layer.scheme), "it is fake-quantized, not NF4", "nf4-dq"))
    if qlora.prepared_of(model.network).backend != "bitsandbytes":
        found.append(Refusal("the base", "nf4", "it is held by torchao; load it with backend=bitsandbytes"))
    return found


def write(model: Exportable, path: Path, options: Options, progress: Told) -> None:
    """Fill the folder."""
    from huggingface_hub import save_torch_state_dict

    tensors = {name: tensor.detach().cpu() for name, tensor in _tensors(model.network)}
    save_torch_state_dict(tensors, path, max_shard_size=options.shard_size, safe_serialization=True)
    progress(len(tensors))
    config = model.config.__class__.from_dict(model.config.to_dict())
    config.quantization_config = _quantization(model)
    config.dtype = _compute_dtype(model)
    write_companions(model, path, config)


def verify(model: Exportable, path: Path, options: Options) -> Verification:
    """transformers and bitsandbytes read it; every byte and the outputs without adapters are compared."""
    import bitsandbytes
    import transformers

    with quiet_transformers(), known_noise_dropped():
        read = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=_compute_dtype(model), local_files_only=True, trust_remote_code=False
        ).eval()
    seen, there = Comparison(), dict(_tensors(read))
    for name, tensor in _tensors(model.network):
        if name not in there:
            raise ExportError(f"transformers finds no {name} in the file")
        seen.plain(name, tensor.detach().cpu(), there[name].detach().cpu())
    for module in read.modules():
        if is_nf4(module):
            module.train()  # else bitsandbytes repacks it on CPUs with AVX512-BF16, which not every width allows
    with qlora.without_adapters(model.network):
        wanted = model.outputs()
    error = relative_difference(outputs_of(read, model.sample), wanted)
    versions = f"transformers {transformers.__version__} and bitsandbytes {bitsandbytes.__version__}"
    nf4 = sum(is_nf4(module) for module in read.modules())
    notes = (f"{nf4} layers in NF4", "compared without the adapter")
    return seen.verification(versions, error=error, tolerance=_TOLERANCE, reason=_REASON, notes=notes)


def usage(model: Exportable, path: Path, options: Options) -> str:
    """How it is loaded."""
    return f'from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained("{path.name}")'


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base's tensors by the names of the model without adapters."""
    around = qlora.lora_layers(network).values()
    skipped = {id(p) for layer in around for p in layer.parameters()}
    skipped -= {id(p) for layer in around for p in layer.base_layer.parameters()}
    for name, module in network.named_modules():
        if is_nf4(module) and not hasattr(module, "base_layer"):
            skipped.add(id(module.weight))
            for part, tensor in state_tensors(module).items():
                yield f"{clean_name(name)}.{'weight' if part == 'weight' else f'weight.{part}'}", tensor
    for name, parameter in network.named_parameters():
        if id(parameter) not in skipped:
            yield clean_name(name), parameter


def _quantization(model: Exportable) -> Any:
    from transformers import BitsAndBytesConfig

    schemes = {layer.name: layer.scheme for layer in model.plan}
    double = any(str(scheme) == "nf4-dq" for scheme in schemes.values())
    kept = [name for name, scheme in schemes.items() if scheme is None or scheme.kind != "nf4"]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=_compute_dtype(model),
        llm_int8_skip_modules=kept or None,
    )


def _compute_dtype(model: Exportable) -> torch.dtype:
    for module in model.network.modules():
        if is_nf4(module) and getattr(module, "compute_dtype", None) is not None:
            return module.compute_dtype  # type: ignore[return-value]
    return next(p.dtype for p in model.network.parameters() if p.is_floating_point())
