"""Language models as ``.pte``: the trained integers, run by ExecuTorch; other files are caught."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("executorch")

from qat_plugin import Policy, convert
from qat_plugin.errors import ConfigError, ExportError
from qat_plugin.exporting import executorch as format_executorch
from qat_plugin.exporting import export_model
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.executorch import Options, verify
from qat_plugin.exporting.executorch.payload import read
from qat_plugin.exporting.export import Exported

IDS = {"input_ids": torch.arange(26).reshape(2, 13) % 40}


def llama(policy: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=86, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=40, tie_word_embeddings=True, max_position_embeddings=24,
    )  # fmt: skip
    return convert(LlamaForCausalLM(config), policy)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Exported]:
    """Attention in INT8, the rest in INT4 by groups of 32 and (86 = 2 x 43) of 43, a narrow embedding."""
    policy = {"embedding": "fp16", "head": "fp16", "attention": "w8a8", "*.down_proj": "w4a8-g43", "ffn": "w4a8-g32"}
    model = llama(Policy(policy))
    return model, export_model(model, "executorch", tmp_path_factory.mktemp("pte") / "llama", sample=IDS)


def test_a_language_model_computes_what_the_converted_one_does(mixed: tuple[nn.Module, Exported]) -> None:
    model, made = mixed
    found = made.verification
    assert found is not None and found.error is not None
    assert (found.tensors, found.integers, found.scales) == (7, 0, 0)
    assert found.floats >= 4  # the norms and the embedding
    assert found.error < 1e-5
    assert made.path.name == "llama.pte" and made.card.is_file()
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(made.path).load_method("forward")
    for length in (1, 7, 24):  # other lengths than were traced
        ids = torch.randint(40, (1, length))
        with torch.no_grad():
            expected = model(input_ids=ids).logits
        torch.testing.assert_close(method.execute([ids])[0], expected, rtol=1e-3, atol=1e-4)


def test_the_file_has_the_integers_in_xnnpacks_own_types(mixed: tuple[nn.Module, Exported]) -> None:
    payload = read(mixed[1].path)
    shapes = sorted(tuple(stored.q.shape) for stored in payload.weights)
    # 2 constants by 32 + 2 columns per channel, one more group of 32 and of 64
    assert shapes == [(16, 34), (16, 34), (32, 34), (32, 34), (32, 192), (86, 64), (86, 64)]
    assert {stored.input for stored in payload.weights} == {"token"}
    assert all(bool((stored.scale > 0).all()) for stored in payload.weights)


def test_a_file_with_another_integer_or_scale_is_caught(mixed: tuple[nn.Module, Exported], tmp_path: Path) -> None:
    network, made = mixed
    model = Exportable(network.eval(), IDS)
    layer = model.layers["model.layers.0.self_attn.q_proj.weight"].integers
    data = made.path.read_bytes()
    row = layer.q[3].numpy().tobytes()
    at = data.index(row)
    other = tmp_path / "other.pte"
    other.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(ExportError, match="does not hold the model's integers"):
        verify(model, other, Options()).check(other.name)
    scales = layer.scale.reshape(-1).numpy().tobytes()
    at = data.index(scales)
    other.write_bytes(data[:at] + scales[4:8] + data[at + 4 :])
    with pytest.raises(ExportError, match="does not hold the model's integers and scales"):
        verify(model, other, Options()).check(other.name)
    signs = model.layers["model.layers.0.mlp.gate_proj.weight"].integers.scale.neg().clamp(min=0).numpy().tobytes()
    at = data.index(signs)
    other.write_bytes(data[:at] + bytes(len(signs)) + data[at + len(signs) :])
    with pytest.raises(ExportError, match=r"does not hold the model's integers and .*scales by 0\.\d*[1-9]"):
        verify(model, other, Options()).check(other.name)


def test_numbers_below_zero_are_no_limits() -> None:
    with pytest.raises(ConfigError, match=r"max_length \(-1\)"):
        Options(max_length=-1)


def test_a_truncated_file_is_an_error_of_ours(mixed: tuple[nn.Module, Exported], tmp_path: Path) -> None:
    short = tmp_path / "short.pte"
    short.write_bytes(mixed[1].path.read_bytes()[:2000])
    with pytest.raises(ExportError, match="cannot be read as ExecuTorch"):
        read(short)


def test_a_layer_that_was_not_lowered_is_an_error(mixed: tuple[nn.Module, Exported]) -> None:
    other = llama(Policy({"embedding": "fp16", "default": "w8a8"}))
    with pytest.raises(ExportError, match=r"no INT8 product for .*mlp.* \(w8a8\): it was not lowered"):
        verify(Exportable(other.eval(), IDS), mixed[1].path, Options())


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ({"embedding": "w8a16", "head": "fp32", "default": "fp32"}, r"embed_tokens \(w8a16\).*nearest that fits: fp16"),
        ({"default": "w4a16-g32"}, r"q_proj.* \(w4a16-g32\).*float activations.*nearest that fits: w4a8-g32"),
        ({"default": "w8a8-g32", "ffn": "fp32"}, r"scale per channel, not per group; nearest that fits: w8a8"),
        ({"default": "w4a8-g32-asym", "ffn": "fp32"}, r"no zero points; nearest that fits: w4a8-g32"),
        ({"default": "w4a8-g8", "ffn": "fp32"}, r"multiples of 32.*nearest that fits: w4a8-g32"),
    ],
)
def test_plans_that_do_not_fit_are_refused_first(policy: dict[str, str], told: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=told):
        export_model(llama(Policy(policy)), "executorch", tmp_path / "out", sample=IDS)
    assert list(tmp_path.iterdir()) == []


def test_usage_runs(mixed: tuple[nn.Module, Exported], monkeypatch: pytest.MonkeyPatch) -> None:
    network, made = mixed
    monkeypatch.chdir(made.path.parent)
    found: dict[str, Any] = {"torch": torch}
    exec(format_executorch.usage(Exportable(network, IDS), made.path, Options()), found)
    assert found["outputs"][0].shape == (1, 3, 40)
