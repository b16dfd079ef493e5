"""Quantized files as float models: the same numbers, on which everything that trains works."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

import qat_plugin
from qat_plugin import Policy, calibrate, convert, prepare, qlora
from qat_plugin.errors import PrepareError
from qat_plugin.exporting import export_model
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.dequantized import float_folder
from qat_plugin.models.loading import load_causal_lm
from tests.exporting.gguf_read import files as gguf_files
from tests.exporting.tiny_llama import SAMPLE, converted, dividing_its_input, llama, logits, tokenizer

KINDS = ("gguf", "torchao", "compressed-tensors", "converted")
RULES = {"attention": "w8a16-g32", "ffn": "w4a16-g32-asym"}


def numbers(model: Any) -> dict[str, torch.Tensor]:
    """What each quantized weight stands for, in float64."""
    found = {}
    for name, layer in Exportable(model, ()).layers.items():
        held = layer.integers
        zero = (
            0
            if held.zero_point is None
            else held.zero_point.double().repeat_interleave(held.q.shape[1] // held.scale.shape[1], 1)
        )
        scale = held.scale.double().repeat_interleave(held.q.shape[1] // held.scale.shape[1], 1)
        found[name] = (held.q.double() - zero) * scale
    return found


@pytest.fixture(scope="module", params=KINDS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A converted model, and the file or folder that holds it."""
    model = converted(_rules(request.param), tied=True)
    place = tmp_path_factory.mktemp("written") / "model"
    made = export_model(model, request.param, place, tokenizer=_words(request.param), verify=False, progress=False)
    return model, made.path


def _rules(kind: str) -> dict[str, str]:
    return {**RULES, "ffn": "w4a16-g32"} if kind == "compressed-tensors" else RULES


def _words(kind: str) -> Any:
    return None if kind == "gguf" else tokenizer()


def test_every_number_is_that_of_its_integer(written: tuple[Any, Path]) -> None:
    model, path = written
    read, _ = qat_plugin.load(path, dequantize=True)
    state, expected = read.state_dict(), numbers(model)
    assert len(expected) == 14
    for name, value in expected.items():
        assert torch.equal(state[name].double(), value), name
    for name, tensor in Exportable(model, ()).floats():
        assert torch.equal(state[name], tensor), name
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in read.parameters())
    assert read.lm_head.weight is read.model.embed_tokens.weight
    torch.testing.assert_close(logits(read), logits(model), rtol=1e-4, atol=1e-5)


def test_what_trains_and_calibrates_takes_it(written: tuple[Any, Path]) -> None:
    model, path = written
    schemes = {layer.name: str(layer.scheme) for layer in Exportable(model, ()).layers.values()}
    policy = Policy(schemes, keep=["embedding", "head"])
    read, _ = qat_plugin.load(path, dequantize=True)
    with pytest.raises(PrepareError, match="dequantize=True"):
        prepare(qat_plugin.load(path)[0], policy)
    prepared = prepare(read, policy)
    prepared(**SAMPLE, labels=SAMPLE["input_ids"]).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in prepared.parameters() if p.requires_grad)
    again = convert(prepared)
    symmetric = [name for name, layer in Exportable(model, ()).layers.items() if layer.scheme.symmetric]
    for name in symmetric:  # min-max scales find the integers that were there
        before, after = (Exportable(each, ()).layers[name].integers for each in (model, again))
        assert torch.equal(before.q, after.q) and torch.equal(before.scale, after.scale), name
    read, _ = qat_plugin.load(path, dequantize=True)
    assert qat_plugin.is_converted(convert(calibrate(read, policy, [SAMPLE], method="gptq")))


def test_its_float_folder_holds_the_same_and_is_kept(
    written: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAT_PLUGIN_CACHE", str(tmp_path))
    _, path = written
    folder = float_folder(path)
    read, _ = qat_plugin.load(path, dequantize=True)
    if (folder / "tokenizer.json").is_file():
        plain, _ = load_causal_lm(folder)
        for name, tensor in read.state_dict().items():
            assert torch.equal(plain.state_dict()[name], tensor), name
        assert plain.lm_head.weight is plain.model.embed_tokens.weight
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert float_folder(path) == folder and (folder / "model.safetensors").stat().st_mtime_ns == made
    changed = path if path.is_file() else path / "config.json"
    os.utime(changed, ns=(1, 1))
    assert float_folder(path) == folder and (folder / "model.safetensors").stat().st_mtime_ns != made


def test_adapters_learn_on_it(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    made = export_model(converted({"attention": "w4a16-g32"}), "torchao", tmp_path / "out", verify=False)
    network = qlora.prepare(qat_plugin.load(made.path, dequantize=True)[0], rank=2)
    network(**SAMPLE, labels=SAMPLE["input_ids"]).loss.backward()
    assert any(p.grad is not None and ".lora_" in name for name, p in network.named_parameters())


def test_an_input_scale_divides_the_numbers(tmp_path: Path) -> None:
    model = dividing_its_input("w4a16-g32")
    made = export_model(model, "converted", tmp_path / "out", verify=False)
    read, _ = qat_plugin.load(made.path, dequantize=True)
    name = "model.layers.0.self_attn.o_proj.weight"
    expected = numbers(model)[name] / torch.linspace(0.5, 2.0, 64).double()
    torch.testing.assert_close(read.state_dict()[name].double(), expected, rtol=1e-6, atol=0)


def test_what_conversion_untied_stays_untied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_PLUGIN_CACHE", str(tmp_path / "cache"))
    model = convert(llama(tied=True), Policy({"embedding": "fp16", "head": "w8a16"}, keep=["attention", "ffn"]))
    made = export_model(model, "converted", tmp_path / "out", tokenizer=tokenizer(), verify=False)
    read, _ = qat_plugin.load(made.path, dequantize=True)
    plain, _ = load_causal_lm(float_folder(made.path))
    for each in (read, plain):
        assert not torch.equal(each.lm_head.weight, each.model.embed_tokens.weight)
        torch.testing.assert_close(logits(each), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Kind.Q5_0, Kind.Q4_1, Kind.F32])
def test_files_made_elsewhere_are_the_numbers_that_gguf_itself_reads(
    kind: Kind, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    path = gguf_files.write(gguf_files.llama(tie_word_embeddings=True), tmp_path / "other.gguf", kind)
    read, _ = qat_plugin.load(path, dequantize=True)
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    up = stored["blk.1.ffn_up.weight"]
    expected = torch.from_numpy(dequantize(up.data, up.tensor_type).copy())
    assert torch.equal(read.state_dict()["model.layers.1.mlp.up_proj.weight"], expected.reshape(96, 64))
    assert read.lm_head.weight is read.model.embed_tokens.weight, "trained once, not twice"
    prepare(read, "w8a16")


def test_a_narrower_type_is_one_rounding(tmp_path: Path) -> None:
    made = export_model(converted(RULES), "converted", tmp_path / "out", verify=False)
    wide, _ = qat_plugin.load(made.path, dequantize=True)
    narrow, _ = qat_plugin.load(made.path, dequantize=True, dtype=torch.bfloat16)
    for name, tensor in wide.state_dict().items():
        assert torch.equal(narrow.state_dict()[name], tensor.to(torch.bfloat16)), name


@pytest.mark.real
def test_the_real_model_there_and_back(shared_data: Path, tmp_path: Path) -> None:
    network, words = load_causal_lm(shared_data / "stories260K")
    schemes = {"attention": "w4a16-g32", "gate_proj": "w8a16-g32", "up_proj": "w8a16-g32"}
    model = convert(network, Policy({f"*{name}" if "_" in name else name: s for name, s in schemes.items()},
                                    keep=["embedding", "head", "*down_proj"]))  # fmt: skip
    made = export_model(model, "gguf", tmp_path / "real", tokenizer=words, progress=False)
    read, _ = qat_plugin.load(made.path, dequantize=True)
    for name, value in numbers(model).items():
        assert torch.equal(read.state_dict()[name].double(), value), name
    again = export_model(qat_plugin.load(made.path)[0], "compressed-tensors", tmp_path / "ct", verify=False)
    twice, _ = qat_plugin.load(again.path)
    for name, layer in Exportable(model, ()).layers.items():
        held = Exportable(twice, ()).layers[name].integers
        assert torch.equal(held.q, layer.integers.q) and torch.equal(held.scale, layer.integers.scale), name
