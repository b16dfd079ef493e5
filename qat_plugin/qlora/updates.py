"""What one adapter adds to one weight: ``W + s B A``, and for DoRA its rows set to learned lengths.

    LoRA    W' = W + s B A                              arXiv:2106.09685, section 4.1
    rsLoRA  the same with s = alpha / sqrt(r)           arXiv:2312.03732
    DoRA    W' = m (W + s B A) / ||W + s B A||_row      arXiv:2402.09353, equation 5 (rows of [out, in])

Merging in memory, merging directories and measuring what survives all use this one arithmetic, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from qat_plugin.errors import CheckpointError, ConfigError
from qat_plugin.qlora.layers import ADAPTER

_WRAPPERS: Final = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclass(frozen=True)
class Update:
    """One layer's adapter.

    Attributes:
        a: [rank, in_features].
        b: [out_features, rank].
        scaling: ``alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA.
        magnitude: DoRA's row lengths [out_features], or ``None``.
    """

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[out_features, in_features] of the weight it belongs to."""
        return self.b.shape[0], self.a.shape[1]

    def delta(self, rows: slice = slice(None)) -> Tensor:
        """``s B A`` for some rows of the weight, float32 [rows, in_features]; DoRA's lengths are not in it."""
        return (self.b[rows].float() @ self.a.float()).mul_(self.scaling)

    def merged(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """The weight with the adapter in it.

        Args:
            weight: [rows, in_features], any float type.
            rows: which rows of the whole weight these are.

        Returns:
            float32 [rows, in_features]. Rows do not depend on each other, so that pieces give the same as the whole.
        """
        total = self.delta(rows).to(weight.device).add_(weight.float())
        if self.magnitude is None:
            return total
        length = torch.linalg.vector_norm(total, dim=1)
        return total.mul_((self.magnitude[rows].to(total.device).float() / length).unsqueeze(1))

    def check_finite(self, name: str) -> None:
        """Raise when training left NaN or infinity in the adapter.

        Raises:
            CheckpointError: naming the layer.
        """
        parts = (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise CheckpointError(
                f"the adapter of {name} holds NaN or infinite values: training diverged; take an earlier checkpoint"
            )


def update_of(layer: Any) -> Update:
    """The adapter of a peft LoRA layer, detached; its tensors are not copied."""
    magnitudes = layer.lora_magnitude_vector
    return Update(
        a=layer.lora_A[ADAPTER].weight.detach(),
        b=layer.lora_B[ADAPTER].weight.detach(),
        scaling=float(layer.scaling[ADAPTER]),
        magnitude=magnitudes[ADAPTER].weight.detach() if ADAPTER in magnitudes else None,
    )


def adapter_root(model: nn.Module) -> nn.Module:
    """The network that names in adapter files are relative to.

    It is the module that was prepared (``model`` itself, or the one inside a LightningModule or a wrapper), the model
    inside a ``PeftModel``, or else ``model``.

    Raises:
        ConfigError: when several networks in ``model`` were prepared, each with adapters of its own.
    """
    roots = [module for module in model.modules() if "_qlora" in module.__dict__]
    if len(roots) > 1:
        names = ", ".join(name or "itself" for name, module in model.named_modules() if "_qlora" in module.__dict__)
        raise ConfigError(
            f"{len(roots)} networks of {type(model).__name__} have adapters ({names}); name one: "
            "its adapter is one folder"
        )
    if roots:
        return roots[0]
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):  # PeftModel
        inner: nn.Module = model.get_base_model()  # type: ignore[operator]
        return inner
    return model


def adapter_layers(root: nn.Module) -> dict[str, Any]:
    """Name -> peft LoRA layer, by the name that the layer has in the model without adapters, in module order.

    Raises:
        ConfigError: without adapters, with several adapters on a layer, merged ones, or ones on other than linears.
    """
    layers: dict[str, Any] = {}
    for path, module in root.named_modules():
        if not isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            continue
        name = unwrapped_name(root, path)
        _check_layer(name, module)
        layers[name] = module
    if not layers:
        raise ConfigError(f"{type(root).__name__} has no adapters: call qlora.prepare(model) first")
    return layers


def unwrapped_name(root: nn.Module, path: str) -> str:
    """A module's path without the segments of ``torch.compile``, FSDP, checkpointing and DDP.

    Unlike :func:`qat_plugin.policy.clean_name` it keeps a segment ``module`` that is the user's own attribute: files
    have the names that other programs will look for.
    """
    kept: list[str] = []
    module = root
    for segment in path.split(".") if path else []:
        parallel = isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel))
        if segment not in _WRAPPERS and not (parallel and segment == "module"):
            kept.append(segment)
        module = module._modules[segment]  # type: ignore[assignment]
    return ".".join(kept)


def _check_layer(name: str, layer: Any) -> None:
    if layer.merged:
        raise ConfigError(f"the adapter of {name} is merged into its base by peft: call unmerge_adapter() first")
    if len(getattr(layer, "lora_embedding_A", {})):
        raise ConfigError(
            f"{name} is an embedding with an adapter; adapters of linear layers alone are supported: "
            "leave embeddings out of the targets"
        )
    if (present := sorted(layer.lora_A)) != [ADAPTER]:
        raise ConfigError(
            f"{name} has the adapters {', '.join(present)}; one, called {ADAPTER!r}, is supported: "
            "delete or merge the others first"
        )
    if layer.lora_A[ADAPTER].weight.dim() != 2:
        raise ConfigError(f"{name} is a convolution with an adapter; adapters of linear layers alone are supported")
    if getattr(layer, "lora_bias", {}).get(ADAPTER):
        raise ConfigError(f"the adapter of {name} has a bias (lora_bias=True), which no merge here knows; leave it off")
