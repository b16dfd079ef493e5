"""What a model computes beside its configuration has no place in the file, and is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qat_plugin import Policy, convert
from qat_plugin.errors import ExportError
from qat_plugin.exporting import export_model
from tests.exporting.gguf.families import network

Changes = dict[str, Any]


def llama(policy: Any = "w4a16-g32", **changes: Any) -> Any:
    return convert(network("Llama", **{"num_hidden_layers": 1, **changes}), policy)


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8"])
def test_a_hook_is_found(scheme: str, tmp_path: Path) -> None:
    model = llama(scheme)
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out * -1)
    with pytest.raises(ExportError, match="computes something else than LlamaForCausalLM with its weights"):
        export_model(model, "gguf", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_forward_of_its_own_is_found(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    class CappedForCausalLM(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = 0.5 * out.logits.tanh()
            return out

    model = network("Llama", num_hidden_layers=1)
    model.__class__ = CappedForCausalLM
    with pytest.raises(ExportError, match="hooks, a forward of its own"):
        export_model(convert(model, "w4a16-g32"), "gguf", tmp_path / "model")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8", "w4a8-g32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_models_own_outputs_are_the_copys(tied: bool, scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    policy = Policy({"embedding": scheme, "head": scheme}, default=scheme)
    model = convert(network("Llama", tie_word_embeddings=tied).to(dtype), policy)
    found = str(export_model(model, "gguf", tmp_path / "model").verification)
    error = float(found.partition("own outputs within ")[2].split()[0])
    assert error < (1e-5 if dtype is torch.float32 else 5e-2)


def test_numbers_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = llama(Policy({"ffn": "w4a16-g32"}))
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(ExportError, match=r"not finite; model\.norm\.weight hold some"):
        export_model(model, "gguf", tmp_path / "model")


def test_a_network_that_its_configuration_does_not_describe_is_refused(tmp_path: Path) -> None:
    pruned = network("Llama")
    pruned.model.layers = pruned.model.layers[:1]
    with pytest.raises(ExportError, match=r"layers\.1\..*not there, by the configuration \[.* and .* more"):
        export_model(convert(pruned, "w4a16-g32"), "gguf", tmp_path / "model", options={"outputs": False})
    resized = network("Llama")
    resized.lm_head = torch.nn.Linear(64, 170, bias=False)
    with pytest.raises(ExportError, match=r"lm_head\.weight \(\[170, 64\], by the configuration \[160, 64\]\)"):
        export_model(convert(resized, "w4a16-g32"), "gguf", tmp_path / "model", options={"outputs": False})
    assert list(tmp_path.iterdir()) == []
