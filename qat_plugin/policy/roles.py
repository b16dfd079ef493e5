"""What a module is and what part it plays: kinds, roles and names without wrappers.

Roles are ``embedding``, ``attention``, ``ffn``, ``head``, ``norm``, and ``first`` and ``last`` (of the layers that
multiply). They are read from module types, from ``get_output_embeddings`` where a model offers it, and from the
names that the field uses, so that they fit Llama, GPT-2, BERT, T5, ViT and plain ``nn.Sequential`` models.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn

ROLES: Final[tuple[str, ...]] = ("embedding", "attention", "ffn", "head", "norm", "first", "last")
Kind = Literal["linear", "conv1d", "conv", "embedding", "norm", "unsupported"]

_WRAPPERS: Final = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
_ADAPTERS = re.compile(r"(^|\.)(lora_\w+|ia3_\w+|modules_to_save|original_module)(\.|$)")
_HEAD_NAMES: Final = {"lm_head", "embed_out", "classifier", "score", "qa_outputs", "output_projection", "head"}
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FFN = re.compile(
    r"mlp|ffn|feed_?forward|feedforward|intermediate|expert|^(fc\d?|fc_in|fc_out|linear[12]|wi(_\d)?|"
    r"gate_proj|up_proj|down_proj|dense_h_to_4h|dense_4h_to_h)$",
    re.IGNORECASE,
)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_NO_KERNEL: Final[dict[type[nn.Module], str]] = {
    nn.MultiheadAttention: "nn.MultiheadAttention reads its projections without calling a layer",
    nn.RNNBase: "recurrent layers have no integer kernel",
    nn.RNNCellBase: "recurrent layers have no integer kernel",
    nn.Bilinear: "nn.Bilinear has no integer kernel",
    nn.EmbeddingBag: "nn.EmbeddingBag has no integer kernel",
    nn.modules.conv._ConvTransposeNd: "transposed convolutions have no integer kernel",
    nn.Conv3d: "three-dimensional convolutions have no integer kernel",
}


@dataclass(frozen=True)
class Candidate:
    """One module that a policy can speak of.

    Attributes:
        path: its name in ``model.named_modules()``.
        name: the same without wrappers (``_orig_mod.``, ``module.``, ``base_model.model.``, ...); unique.
        module: the module itself.
        kind: what it computes (``"conv"`` is nn.Conv1d or nn.Conv2d, ``"conv1d"`` transformers' Conv1D, a linear
            layer); ``"unsupported"`` ones are listed and kept.
        roles: its roles, in the order of :data:`ROLES`.
        blocked: why it cannot be quantized, or an empty string.
    """

    path: str
    name: str
    module: nn.Module
    kind: Kind
    roles: tuple[str, ...]
    blocked: str

    @property
    def out_in(self) -> tuple[int, int]:
        """[out_features, in_features] of the weight as integers are laid out."""
        shape: torch.Size = self.module.weight.shape  # type: ignore[assignment]
        if self.kind == "conv":
            return shape[0], math.prod(shape[1:])
        return (shape[1], shape[0]) if self.kind == "conv1d" else (shape[0], shape[-1])


def clean_name(path: str) -> str:
    """A module or parameter name without the segments that wrappers add.

    >>> clean_name("base_model.model.model.layers.0._orig_mod.q_proj.base_layer")
    'model.layers.0.q_proj'
    """
    path = re.sub(r"^((_orig_mod|module|_fsdp_wrapped_module)\.)*base_model\.model\.", "", path)
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D (weight [in, out]), without importing transformers."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def candidates(model: nn.Module) -> list[Candidate]:
    """Every module of ``model`` that multiplies by, looks up or normalises with a weight, in module order."""
    found = [(path, module, kind) for path, module in model.named_modules() if (kind := _kind(module)) is not None]
    cleaned = [clean_name(path) for path, _, _ in found]
    repeated = {name for name, count in Counter(cleaned).items() if count > 1}
    heads = _output_embeddings(model)
    multiply = [
        module for _, module, kind in found if kind in ("linear", "conv1d") or isinstance(module, _CONVOLUTIONS)
    ]
    ends = {"first": multiply[:1], "last": multiply[-1:]}
    modules = dict(model.named_modules())
    result = []
    for (path, module, kind), clean in zip(found, cleaned, strict=True):
        name = path if clean in repeated or not clean else clean
        roles = _roles(name, path, module, kind, heads, modules)
        roles |= {role for role, (*ms,) in ends.items() if any(m is module for m in ms)}
        ordered = tuple(role for role in ROLES if role in roles)
        result.append(Candidate(path, name, module, kind, ordered, _blocked(path, module, kind)))
    return result


def _kind(module: nn.Module) -> Kind | None:
    if is_conv1d(module):
        return "conv1d"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, tuple(_NO_KERNEL)):
        return "unsupported"
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return "conv"
    if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), Tensor):
        return "norm"
    return None


def _blocked(path: str, module: nn.Module, kind: Kind) -> str:
    if kind == "unsupported":
        return next(reason for base, reason in _NO_KERNEL.items() if isinstance(module, base))
    if kind == "norm":
        return ""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return _NO_KERNEL[nn.MultiheadAttention]
    if _ADAPTERS.search(path):
        return "an adapter's own layer stays in full precision"
    weight = getattr(module, "weight", None)
    if weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight does not exist yet: run one batch through the model first"
    if "weight" not in module._parameters:
        return "its weight is computed by a hook or a parametrization (pruning, weight or spectral norm)"
    if is_quantized(weight):
        return f"it is already quantized ({type(weight).__name__}, {str(weight.dtype).removeprefix('torch.')})"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "an embedding with max_norm rewrites its rows at each look-up"
    return ""


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight holds integers already: ours, torchao's, bitsandbytes'."""
    stored_as_integers = not (weight.is_floating_point() or weight.is_complex())
    subclass = hasattr(weight, "tensor_data_names") or hasattr(weight, "quantized_scalers")  # torchao's, its NF4
    return stored_as_integers or subclass or hasattr(weight, "quant_state")  # bitsandbytes'


def _roles(
    name: str, path: str, module: nn.Module, kind: Kind, heads: list[nn.Module], modules: dict[str, nn.Module]
) -> set[str]:
    if kind == "norm":
        return {"norm"}
    if kind == "embedding" or isinstance(module, nn.EmbeddingBag):
        return {"embedding"}
    segments = name.split(".")
    if any(module is head for head in heads) or segments[-1] in _HEAD_NAMES or name.endswith("predictions.decoder"):
        return {"head"}
    parts = path.split(".")
    ancestors = [type(modules[".".join(parts[:i])]).__name__ for i in range(1, len(parts))]
    if isinstance(module, nn.MultiheadAttention) or any(_ATTENTION.search(text) for text in segments + ancestors):
        return {"attention"}
    if any(_FFN.search(text) for text in segments + ancestors) or segments[-2:-1] == ["output"]:
        return {"ffn"}
    return set()


def _output_embeddings(model: nn.Module) -> list[nn.Module]:
    heads = []
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            head = getter()
            if isinstance(head, nn.Module):
                heads.append(head)
    return heads
