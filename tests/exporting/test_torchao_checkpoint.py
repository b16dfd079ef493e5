"""torchao's transformers directories: our integers, loaded by transformers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qat_plugin import Policy, convert
from qat_plugin.errors import ConfigError, ExportError
from qat_plugin.exporting import export_model, torchao_checkpoint
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.elsewhere import check_kind
from qat_plugin.exporting.torchao_tensors import tensor_of
from qat_plugin.exporting.verification import Comparison
from qat_plugin.numerics import quantize_activation
from tests.exporting.tiny_llama import SAMPLE, converted, dividing_its_input, logits, tokenizer

MIXED = {
    "embedding": "w8a16", "head": "w8a16", "*.q_proj": "w8a8", "*.k_proj": "w4a8-g32", "*.v_proj": "w4a16-g64",
    "*.o_proj": "w3a16-g32-asym", "*.gate_proj": "w8a16-g32", "*.up_proj": "w8a16-asym", "*.down_proj": "w2a16-g32",
}  # fmt: skip


def plain(path: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, **options)


def test_a_mixed_tied_model_is_proven_by_another_interpreter(tmp_path: Path) -> None:
    model = converted(MIXED, tied=True)
    made = export_model(
        model, "torchao", tmp_path / "out", tokenizer=tokenizer(), options={"shard_size": "30KB"}, progress=False
    )
    found = made.verification
    assert found is not None and "without this package" in found.reader
    assert (found.tensors, found.integers, found.scales, found.floats, found.rounded) == (15, 0, 0, 13, 0)
    assert found.error is not None and found.error < 1e-4
    assert 0 < found.tolerance < 1e-2 and any("absmax / 127.5" in note for note in found.notes)
    assert len(list(made.path.glob("model-*.safetensors"))) > 2
    assert (made.path / "tokenizer.json").is_file() and (made.path / "generation_config.json").is_file()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g64-asym", "w8a16", "w8a16-g32"])
def test_weight_only_models_give_the_same_logits_in_plain_transformers(
    scheme: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = converted({"attention": scheme, "ffn": scheme, "embedding": "fp16"}, ("lm_head",), dtype=dtype)
    export_model(model, "torchao", tmp_path / "out", verify=False)
    read = plain(tmp_path / "out")
    assert read.dtype == dtype
    error = (logits(read) - logits(model)).norm() / logits(model).norm()
    assert error <= (1e-6 if dtype == torch.float32 else 2e-2)


def test_what_torchao_dequantizes_is_the_number_the_integers_stand_for(tmp_path: Path) -> None:
    model = converted(MIXED, tied=True)
    export_model(model, "torchao", tmp_path / "out", verify=False)
    read = plain(tmp_path / "out")
    for name, layer in Exportable(model, ()).layers.items():
        assert torch.equal(read.get_parameter(name).dequantize(), layer.integers.dequantize()), name
    assert read.lm_head.weight is read.model.embed_tokens.weight


def test_int8_products_are_ours_but_for_the_grid_of_activations(tmp_path: Path) -> None:
    model = converted({"attention": "w8a8", "ffn": "w8a8"}, ("lm_head", "embedding"))
    export_model(model, "torchao", tmp_path / "out", verify=False)
    read = plain(tmp_path / "out").model.layers[0].mlp.up_proj
    x = torch.randn(8, 64)
    x[:, 0] = 4.0  # its greatest magnitude
    q = torch.round(x / (4.0 / 127.5)).clamp(-128, 127)  # torchao's grid
    weight = Exportable(model, ()).layers["model.layers.0.mlp.up_proj.weight"].integers
    wanted = (q.double() @ weight.q.double().t()) * (4.0 / 127.5) * weight.scale.double().t()
    torch.testing.assert_close(read(x).double(), wanted, rtol=1e-5, atol=1e-5)
    ours, scale = quantize_activation(x)
    assert not torch.equal(ours, q) and torch.all(scale == torch.tensor(4.0) / 127)


def test_the_configuration_names_each_layer(tmp_path: Path) -> None:
    model = converted({"attention": "w8a8", "ffn": "w4a16-g32"}, ("lm_head", "embedding"))
    export_model(model, "torchao", tmp_path / "out", verify=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "torchao" and config["modules_to_not_convert"] == ["lm_head"]
    named = config["quant_type"]["default"]["_data"]["fqn_to_config"]
    assert len(named) == 14
    assert named["model.layers.1.mlp.up_proj"]["_type"] == "IntxWeightOnlyConfig"
    assert named["model.layers.1.self_attn.q_proj"]["_type"] == "Int8DynamicActivationInt8WeightConfig"
    assert getattr(model.config, "quantization_config", None) is None


def test_a_model_that_conversion_untied_is_loaded_untied(tmp_path: Path) -> None:
    model = converted({"embedding": "fp16", "lm_head": "w8a16", "ffn": "w8a16"}, tied=True)
    export_model(model, "torchao", tmp_path / "out", verify=False)
    read = plain(tmp_path / "out")
    assert type(read.lm_head.weight.data).__name__ == "Int8Tensor"
    assert type(read.model.embed_tokens.weight.data) is torch.Tensor


def test_what_torchao_cannot_hold_is_refused_and_nothing_written(tmp_path: Path) -> None:
    static = converted({"attention": "w8a8-static", "ffn": "w8a8"}, ("lm_head", "embedding"))
    with pytest.raises(ExportError, match=r"q_proj.*\(w8a8-static\).*nearest that fits: w8a8"):
        export_model(static, "torchao", tmp_path / "out")
    with pytest.raises(ExportError, match=r"\(w4a16-tensor\).*nearest that fits: w4a16\n"):
        export_model(converted({"ffn": "w4a16-tensor"}), "torchao", tmp_path / "out")
    with pytest.raises(ExportError, match=r"o_proj.*divides its inputs"):
        export_model(dividing_its_input("w8a8"), "torchao", tmp_path / "out")
    with pytest.raises(ExportError, match="needs quantized layers"):
        export_model(converted({"default": "bf16"}), "torchao", tmp_path / "out")
    with pytest.raises(ConfigError, match="is no transformers language model"):
        export_model(
            convert(torch.nn.Sequential(torch.nn.Linear(64, 64)), "w8a16"), "torchao", tmp_path / "out",
            sample=(torch.ones(1, 64),),
        )  # fmt: skip
    with pytest.raises(ConfigError, match="shard_size='many' is not a size"):
        export_model(static, "torchao", tmp_path / "out", options={"shard_size": "many"})
    assert list(tmp_path.iterdir()) == []


def test_gpt2s_transposed_weights_are_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=32)
    model = convert(GPT2LMHeadModel(config).eval(), Policy({"attention": "w8a16"}, keep=["embedding", "head"]))
    with pytest.raises(ExportError, match="Conv1D"):
        export_model(model, "torchao", tmp_path / "out")


def test_another_integer_zero_point_or_class_in_the_file_is_seen() -> None:
    layer = next(iter(Exportable(converted({"ffn": "w4a16-g32-asym"}, ("lm_head", "embedding")), ()).layers.values()))
    tensor = tensor_of(layer.integers, torch.float32)
    parts = {part: getattr(tensor, part).clone() for part in ("qdata", "scale", "zero_point")}
    seen = Comparison()
    torchao_checkpoint._compare(seen, "x", layer, parts)
    assert (seen.verification("").integers, seen.verification("").scales) == (0, 0)
    parts["zero_point"][2, 1] += 3 if parts["zero_point"][2, 1] < 0 else -3
    torchao_checkpoint._compare(seen, "x", layer, parts)
    assert seen.verification("").integers == 3
    with pytest.raises(ExportError, match="transformers has it as Int8Tensor, written was IntxUnpackedToInt8Tensor"):
        check_kind("x", layer, torchao_checkpoint._kind(layer), "Int8Tensor")


@pytest.mark.parametrize(("written", "trained"), [("w8a16", "w8a8"), ("w4a8-g32", "w4a16-g32")])
def test_a_file_that_rounds_inputs_otherwise_than_the_model_is_caught(
    written: str, trained: str, tmp_path: Path
) -> None:
    def model(scheme: str) -> Any:
        return converted({"attention": scheme, "ffn": scheme}, ("lm_head", "embedding")).eval()

    export_model(model(written), "torchao", tmp_path / "out", verify=False)
    with pytest.raises(ExportError, match=f"q_proj.*Tensor.*written was {'Int8' if trained == 'w8a8' else 'Intx'}"):
        torchao_checkpoint.verify(Exportable(model(trained), SAMPLE), tmp_path / "out", torchao_checkpoint.Options())
