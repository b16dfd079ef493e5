"""One interface: refused, written, read back, proven, put in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qat_plugin import Policy, convert
from qat_plugin.errors import ConfigError, ExportError
from qat_plugin.exporting import export_model, native
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.refusal import Refusal, check_refusals

SAMPLE = (torch.ones(2, 64),)


def small() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    return convert(model, Policy({"0": "w4a16-g32-asym", "2": "w8a8"}))


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_a_written_model_is_read_back_and_described(tmp_path: Path) -> None:
    made = export_model(small(), "converted", tmp_path / "out", sample=SAMPLE)
    assert made.verification is not None
    assert (made.verification.tensors, made.verification.integers, made.verification.scales) == (2, 0, 0)
    assert made.verification.floats == 2
    text = made.card.read_text()
    assert "w4a16-g32-asym" in text and "load_converted" in text and "integers differ by at most 0" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_float_or_prepared_model_is_refused(tmp_path: Path) -> None:
    from qat_plugin import prepare

    model = nn.Sequential(nn.Linear(64, 32))
    with pytest.raises(ExportError, match="not converted"):
        export_model(model, "converted", tmp_path / "out", sample=SAMPLE)
    with pytest.raises(ExportError, match="prepared for training"):
        export_model(prepare(model, "w8a8"), "converted", tmp_path / "out", sample=SAMPLE)
    assert list(tmp_path.iterdir()) == []


def test_unknown_names_are_told_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'converted'"):
        export_model(small(), "convertet", tmp_path / "out", sample=SAMPLE)
    with pytest.raises(ConfigError, match="has no option 'bits'"):
        export_model(small(), "converted", tmp_path / "out", sample=SAMPLE, options={"bits": 4})
    with pytest.raises(ConfigError, match="give sample="):
        export_model(small(), "converted", tmp_path / "out")


def test_a_file_that_holds_other_integers_is_an_error_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_model(small(), "converted", tmp_path / "out", sample=SAMPLE)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    write = native.write

    def altered(model: Exportable, path: Path, *rest: Any) -> None:
        write(model, path, *rest)
        from safetensors.torch import load_file, save_file

        tensors = load_file(path / "model.safetensors")
        tensors["0.weight.q"][3, 5] ^= 1
        save_file(tensors, path / "model.safetensors")

    monkeypatch.setattr(native, "write", altered)
    with pytest.raises(ExportError, match="does not hold the model's integers"):
        export_model(small(), "converted", tmp_path / "out", sample=SAMPLE)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("how", ["other", "missing"])
def test_a_file_with_other_activation_scales_is_an_error(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qat_plugin import calibrate

    model = convert(calibrate(nn.Sequential(nn.Linear(64, 32)), "w8a8-static", [torch.randn(8, 64)], progress=False))
    write = native.write

    def altered(model: Exportable, path: Path, *rest: Any) -> None:
        write(model, path, *rest)
        from safetensors.torch import load_file, save_file

        tensors = load_file(path / "model.safetensors")
        tensors["0.weight.activation_scale"] *= 1.5
        if how == "missing":
            del tensors["0.weight.activation_scale"]
        save_file(tensors, path / "model.safetensors")

    monkeypatch.setattr(native, "write", altered)
    with pytest.raises(ExportError, match="activation_scale"):
        export_model(model, "converted", tmp_path / "out", sample=SAMPLE)
    assert list(tmp_path.iterdir()) == []


def test_refused_layers_are_named_together() -> None:
    found = [Refusal(f"layers.{i}.down", "w3a16-g32", "3 bits have no place here", "w4a16-g32") for i in range(12)]
    with pytest.raises(ExportError, match=r"layers.0.down.* and 4 more \(w3a16-g32\).*nearest that fits: w4a16-g32"):
        check_refusals(found, "Some format")
    check_refusals([], "Some format")


def test_an_exported_language_model_loads_without_the_float_one(tmp_path: Path) -> None:
    import qat_plugin
    from qat_plugin.exporting.contents import outputs_of

    model = convert(tiny_llama(), Policy({"embedding": "fp16", "attention": "w8a8", "ffn": "w4a16-g32"}))
    made = export_model(model, "converted", tmp_path / "out")
    read, tokenizer = qat_plugin.load(made.path)
    sample = {"input_ids": torch.arange(32).reshape(2, 16)}
    assert tokenizer is None
    assert torch.equal(outputs_of(read, sample), outputs_of(model, sample))
    again = export_model(read, "converted", tmp_path / "again")
    assert (made.path / "model.safetensors").read_bytes() == (again.path / "model.safetensors").read_bytes()


def test_assembling_gives_the_model_that_the_integers_were_of(tmp_path: Path) -> None:
    from qat_plugin.exporting.assemble import Stored, assemble
    from qat_plugin.exporting.contents import outputs_of
    from qat_plugin.qlora.architecture import empty_from_config

    network = tiny_llama()
    policy = Policy({"embedding": "fp16", "head": "fp16", "attention": "w8a16", "ffn": "w4a16-g32"})
    model = Exportable(convert(network, policy), ())
    stored = {name: Stored(layer.integers) for name, layer in model.layers.items()}
    again = assemble(
        empty_from_config(network.config, torch.float32), stored, dict(model.floats()), torch.float32, tmp_path / "file"
    )
    sample = {"input_ids": torch.arange(32).reshape(2, 16)}
    assert torch.equal(outputs_of(again, sample), outputs_of(model.network, sample))
    assert [str(layer.scheme) for layer in model.plan.quantized] == [
        str(layer.scheme) for layer in Exportable(again, ()).plan.quantized
    ]


def test_what_is_not_a_model_is_said_to_be_none(tmp_path: Path) -> None:
    import qat_plugin
    from qat_plugin.errors import CheckpointError, DataError

    with pytest.raises(ConfigError, match="is no float type of torch"):
        qat_plugin.load(tmp_path, dtype="bfloat16")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="there is nothing at"):
        qat_plugin.load(tmp_path / "nowhere.gguf")
    (tmp_path / "file.bin").write_bytes(b"ABCD")
    with pytest.raises(CheckpointError, match="no GGUF file"):
        qat_plugin.load(tmp_path / "file.bin")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "aqlm"}}')
    with pytest.raises(CheckpointError, match="quantized by 'aqlm'"):
        qat_plugin.load(tmp_path)


def test_a_folder_of_other_files_is_never_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds other files than an export's.*such as .*mine/converted"):
        export_model(small(), "converted", mine, sample=SAMPLE)
    (mine / "README.md").write_text("# my project")
    with pytest.raises(ConfigError, match="would be deleted"):
        export_model(small(), "converted", mine, sample=SAMPLE)
    assert sorted(p.name for p in mine.iterdir()) == ["README.md", "thesis.txt"]
    (tmp_path / "empty").mkdir()
    made = export_model(small(), "converted", tmp_path / "empty", sample=SAMPLE)
    assert export_model(small(), "converted", made.path, sample=SAMPLE).bytes == made.bytes


def test_a_place_for_the_file_or_its_card_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    from tests.exporting.tiny_llama import converted

    model = converted({"ffn": "w4a16-g32"})
    for name in ("model.gguf", "other.gguf.md"):
        (tmp_path / name).mkdir()
        with pytest.raises(ConfigError, match=f"{name}.* is a folder"):
            export_model(model, "gguf", tmp_path / name.partition(".")[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf", "other.gguf.md"]


def test_a_float_tensor_that_was_changed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = native.write

    def altered(model: Exportable, path: Path, *rest: Any) -> None:
        write(model, path, *rest)
        from safetensors.torch import load_file, save_file

        tensors = load_file(path / "model.safetensors")
        tensors["2.bias"][3] += 1e-6
        save_file(tensors, path / "model.safetensors")

    monkeypatch.setattr(native, "write", altered)
    with pytest.raises(ExportError, match=r"2\.bias: the file holds other numbers"):
        export_model(small(), "converted", tmp_path / "out", sample=SAMPLE)


def test_the_model_in_a_lightning_module_is_exported(tmp_path: Path) -> None:
    import qat_plugin
    from qat_plugin import proof_of
    from qat_plugin.exporting.contents import outputs_of
    from qat_plugin.models.causal_lm import CausalLM
    from tests.exporting.tiny_llama import SAMPLE, llama

    module = CausalLM(llama(tied=True))
    convert(module, Policy({"attention": "w8a8", "ffn": "w4a16-g32"}, keep=["embedding", "lm_head"]))
    whole = export_model(module, "converted", tmp_path / "whole")
    inner = export_model(module.model, "converted", tmp_path / "inner")
    for made in (whole, inner):
        read, _ = qat_plugin.load(made.path)
        assert torch.equal(outputs_of(read, SAMPLE), outputs_of(module.model.eval(), SAMPLE))
    assert {f"model.{layer.name}" for layer in proof_of(module.model).layers} == {
        layer.name for layer in proof_of(module).layers
    }
    assert export_model(module, "gguf", tmp_path / "model").path.is_file()
    compiled = torch.compile(module.model, backend="eager")
    assert export_model(compiled, "gguf", tmp_path / "compiled").path.is_file()  # type: ignore[arg-type]


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16])
def test_a_model_is_read_in_the_float_type_that_was_asked_for(
    trained: torch.dtype, wanted: torch.dtype, tmp_path: Path
) -> None:
    import qat_plugin
    from qat_plugin.exporting.contents import outputs_of
    from tests.exporting.tiny_llama import SAMPLE, converted

    model = converted({"embedding": "fp16", "attention": "w8a8", "ffn": "w4a16-g32"}, dtype=trained)
    made = export_model(model, "converted", tmp_path / "out")
    read, _ = qat_plugin.load(made.path, dtype=wanted)
    assert {parameter.dtype for parameter in read.parameters()} == {wanted} and read.dtype == wanted
    ours, theirs = Exportable(model, ()).layers, Exportable(read, ()).layers
    for name, layer in ours.items():
        held, found = layer.integers, theirs[name].integers
        assert torch.equal(held.q, found.q) and torch.equal(held.scale, found.scale)
    assert [entry.kernel for entry in Exportable(read, ()).plan.quantized] == [
        getattr(module.weight, "kernel_name", "cast")
        for name, module in read.named_modules()
        if name in {entry.name for entry in Exportable(read, ()).plan.quantized}
    ]
    error = (outputs_of(read, SAMPLE) - outputs_of(model, SAMPLE)).norm() / outputs_of(model, SAMPLE).norm()
    assert error == 0 if wanted == trained else error < 3e-2
