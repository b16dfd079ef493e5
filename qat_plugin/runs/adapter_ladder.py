"""The ladder of a fine-tuning run: the frozen base, adapters on it, merged, converted, read back from disk.

::

    float ---- base (NF4, or fake-quantized) ---- qlora ---- merged ---- converted ---- reloaded
                                                    |           |            |
                                                 adapter/    merged/     converted/        in the run's folder

Every rung reads what the one before it left on disk; the merged model is made by the same shard-by-shard merge that
``task=merge`` runs. On a fake-quantized base (QAT + LoRA) the merged model stays prepared with the scales of training,
and conversion takes those.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from qat_plugin import qlora
from qat_plugin import report as reporting
from qat_plugin.atomic import replacing
from qat_plugin.callbacks import QLoRAFinetuning
from qat_plugin.config.schema import Config
from qat_plugin.measure import model_bytes
from qat_plugin.policy import Policy
from qat_plugin.qat import load_quantizer_state, prepare, quantizer_state
from qat_plugin.qlora.merge import survival_table
from qat_plugin.qlora.merge_files import updated_weights
from qat_plugin.runs.base_policy import base_policy
from qat_plugin.runs.folder import ADAPTER, MERGED
from qat_plugin.runs.planning import adapter_options
from qat_plugin.runs.rungs import Rungs
from qat_plugin.runs.subject import network_of, placed
from qat_plugin.runs.training import read_checkpoint

_QUANTIZERS: Final = "quantizers.pt"
_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class AdapterLadder(Rungs):
    """The rungs of QLoRA and of QAT + LoRA."""

    def rungs(self) -> dict[str, tuple[str, Callable[[], None]]]:
        """Stage -> row and work."""
        return {
            "float": (reporting.FLOAT, self._float),
            "base": (self._base_title, self._base),
            "qlora": (self._title, self._qlora),
            "merged": (reporting.MERGED, self._merged),
            "converted": (reporting.CONVERTED, self._converted),
            "reloaded": (reporting.RELOADED, self._reloaded),
            "exported": ("", self._exported),
            "latency": ("", self._latency),
        }

    @cached_property
    def _folded(self) -> bool:
        """Whether adapters are trained under fake quantization."""
        return any(layer.scheme is not None and layer.scheme.is_integer for layer in self.plan)

    @property
    def _title(self) -> str:
        return reporting.QAT_LORA if self._folded else reporting.QLORA

    @property
    def _base_title(self) -> str:
        if self._folded:
            return reporting.PTQ
        return reporting.NF4_BASE if any(layer.scheme is not None for layer in self.plan) else reporting.BASE

    @property
    def adapter(self) -> Path:
        """Folder of the trained adapter."""
        return self.folder.path / ADAPTER

    def _base(self) -> None:
        network = self._adapted(self.subject.build_base()).eval()  # new adapters add nothing
        note = "rounded to nearest, no training" if self._folded else "frozen, before any training"
        metrics = self.subject.evaluate(network, self._reference)
        size = None if self._folded else model_bytes(network) - _adapter_bytes(network)
        self._add(reporting.Row(self._base_title, metrics, size, note=note))
        record = qlora.prepared_of(network).base
        if record is not None:
            self.folder.record.base = {
                name: value for name, value in record.to_dict().items() if name not in ("plan", "sums")
            } | {"fingerprint": qlora.base_fingerprint(network)}

    def _qlora(self) -> None:
        module = self.subject.build_base()
        network = self._adapted(module)
        callback = fine_tuning(self.config)
        self._train(module, "qlora", [callback])
        if self._folded:
            with replacing(self._checkpoints("qlora") / _QUANTIZERS) as temporary:
                torch.save(quantizer_state(network), temporary)
        qlora.save_adapter(network, self.adapter)
        network = self._trained()
        note = "adapters in full precision on the frozen base"
        if self._folded:
            note = "adapters trained under the fake quantizer"
        metrics = self.subject.evaluate(network, self._reference)
        self._add(reporting.Row(self._title, metrics, model_bytes(network), note=note))

    def _merged(self) -> None:
        if self._folded:
            self._measure(reporting.MERGED, self._merged_network(), "still fake-quantized, with the scales of training")
            return
        into = self.config.merge.into
        self._merge_to(self.folder.path / MERGED, into)
        self._measure(reporting.MERGED, self._merged_network(), _NOTES[into], memory=True)
        other = "nf4" if into == "original" else "original"
        if self.subject.directory is not None and self._quantized_base:
            place = self.folder.path / f".{MERGED}-{other}"
            self._merge_to(place, other)
            self._measure(f"{reporting.MERGED}, {_SHORT[other]}", self._read(place), _NOTES[other])
            _remove(place)
        for scheme in self.config.merge.compare:
            network = prepare(self._merged_network(), scheme)
            self._measure(f"{reporting.MERGED}, {scheme}", network, "merged, then rounded to nearest")
        self.report = replace(self.report, survival=tuple(self._survival()))

    def _survival(self) -> list[dict[str, Any]]:
        """What of the update each choice keeps, layer by layer."""
        if self.subject.directory is None:
            return []
        base = next((layer.scheme for layer in self.plan if layer.scheme is not None), None)
        schemes = list(self.config.merge.compare)
        if base is not None and base.kind == "nf4":
            schemes.append(str(base))
        rows = survival_table(
            updated_weights(self.subject.directory, self.adapter),
            schemes,
            base="nf4-dq" if base is None else base,
            dtype=torch.bfloat16,
        )
        return [row.to_dict() for row in rows]

    def _converted(self) -> None:
        if self._folded:
            self._convert(self._merged_network())
            return
        scheme = self.config.merge.scheme
        assert scheme is not None  # checked with the recipe
        network = self._merged_network()
        plan = Policy(scheme).plan(network)
        self._convert(prepare(network, plan), plan)

    @property
    def _quantized_base(self) -> bool:
        return any(layer.scheme is not None and layer.scheme.kind == "nf4" for layer in self.plan)

    def _merge_to(self, place: Path, into: str) -> None:
        """Write the merged model into a folder, from the files of the base and of the adapter."""
        if self.subject.directory is None:
            return
        _remove(place)
        qlora.merge_directory(self.subject.directory, self.adapter, place, into=into)  # type: ignore[arg-type]

    def _merged_network(self) -> nn.Module:
        """The merged model: read from its folder, or merged in memory where there are no files of a base."""
        if self._folded or self.subject.directory is None:
            return qlora.merge(self._trained())
        return self._read(self.folder.path / MERGED)

    def _read(self, place: Path) -> nn.Module:
        assert self.subject.build_from is not None
        return network_of(self.subject.build_from(place)).eval()

    def _trained(self) -> nn.Module:
        """The base with the trained adapter, both from disk."""
        network = self._adapted(self.subject.build_base())
        if self._folded:
            load_quantizer_state(network, read_checkpoint(self._checkpoints("qlora") / _QUANTIZERS))
        qlora.load_adapter(network, self.adapter)
        return network.eval()

    def _adapted(self, module: Any) -> nn.Module:
        """The network of a module, prepared as training prepares it."""
        return adapt(self.config, module)


def adapt(config: Config, module: Any) -> nn.Module:
    """Prepare the network of a LightningModule as the recipe says; on the device of the run."""
    network, lora = network_of(module), config.lora
    options = adapter_options(config)
    qlora.prepare(
        network,
        base_policy(config),
        **{name: getattr(options, name) for name in options.__dataclass_fields__},
        backend=lora.backend,  # type: ignore[arg-type]
        adapter_dtype=_DTYPES[lora.dtype],
        compute_dtype=torch.bfloat16 if config.trainer.precision.startswith("bf16") else None,
        neftune_alpha=lora.neftune_alpha,
        gradient_checkpointing=lora.gradient_checkpointing,
        learn_scales=config.qat.learn_scales,
        initial=config.qat.initial,  # type: ignore[arg-type]
        record=getattr(module, "base_record", None),
    )
    placed(module, config)
    return network


def fine_tuning(config: Config) -> QLoRAFinetuning:
    """The callback that trains what :func:`adapt` prepared."""
    options = adapter_options(config)
    return QLoRAFinetuning(
        **{name: getattr(options, name) for name in options.__dataclass_fields__},
        base=base_policy(config),
        backend=config.lora.backend,  # type: ignore[arg-type]
        neftune_alpha=config.lora.neftune_alpha,
        gradient_checkpointing=config.lora.gradient_checkpointing,
        offload_activations=config.lora.offload_activations,
        learn_scales=config.qat.learn_scales,
        adapter_dtype=config.lora.dtype,  # type: ignore[arg-type]
    )


def _adapter_bytes(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)


def _remove(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)


_SHORT: Final = {"original": "into the original", "nf4": "exact"}
_NOTES: Final = {
    "original": "the update added to the original float weights, which are not what it was trained on",
    "nf4": "the update added to the dequantized NF4 weights that it was trained on",
}
