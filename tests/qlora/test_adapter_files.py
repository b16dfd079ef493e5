"""Adapter folders are peft's: the same names, values and configuration, and nothing that plain peft or vLLM refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
from peft import PeftModel, get_peft_model_state_dict

from qat_plugin.errors import CheckpointError, ConfigError, QatError
from qat_plugin.qlora.files import load_adapter, read_adapter, save_adapter
from qat_plugin.qlora.prepare import prepare
from qat_plugin.qlora.record import BaseRecord
from qat_plugin.qlora.updates import adapter_layers, update_of
from tests.qlora.adapters import learned, llama, prepared, with_peft
from tests.qlora.tiny_models import FAMILIES, logits

KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
FILES = {"adapter_config.json", "adapter_model.safetensors", "qat_adapter.json"}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def zeroed(model: Any) -> Any:
    for layer in adapter_layers(model).values():
        update_of(layer).b.zero_()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_those_that_peft_writes(kind: str, tmp_path: Path) -> None:
    model = with_peft(llama(), **KINDS[kind])
    model.save_pretrained(tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for config in configs:
        config["target_modules"].sort()
    assert configs[0] == configs[1]
    assert {file.name for file in (tmp_path / "ours").iterdir()} == FILES


def test_an_injected_model_has_the_names_of_peft(tmp_path: Path) -> None:
    model = prepared(llama(), dora=True)
    save_adapter(model, tmp_path)
    named = {f"base_model.model.{name}": tensor for name, tensor in get_peft_model_state_dict(model).items()}
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored.keys() == named.keys()
    assert all(torch.equal(stored[name], named[name]) for name in stored)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] is None


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_plain_peft_gives_the_logits_that_training_saw(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = FAMILIES[family]().eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(prepared(model, None, **options))
    save_adapter(model, tmp_path)
    base = FAMILIES[family]().eval()
    base.load_state_dict(weights)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path)), expected, rtol=1e-5, atol=1e-6)


def test_conv1d_layers_that_became_nf4_load_onto_conv1d_layers(tmp_path: Path) -> None:
    model = prepared(FAMILIES["gpt2"]())
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(FAMILIES["gpt2"](), tmp_path)
    theirs = {
        name: layer.get_delta_weight("default").t() for name, layer in adapter_layers(loaded.get_base_model()).items()
    }
    ours = adapter_layers(model)
    assert theirs.keys() == ours.keys()
    for name, delta in theirs.items():
        torch.testing.assert_close(delta, ours[name].get_delta_weight("default"))


class Nested(nn.Module):
    """Names that end alike: peft matches them by their ends."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
        self.module = nn.ModuleDict({"proj": nn.Linear(8, 8), "other": nn.Linear(8, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module["other"](self.module["proj"](self.inner(self.proj(x))))


@pytest.mark.parametrize(
    "names", [["proj"], ["module.proj"], ["inner.0"], ["proj", "inner.1.0"], ["proj", "module.proj"]], ids="+".join
)
def test_targets_match_just_the_layers_that_have_adapters(names: list[str], tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    expression = "|".join(name.replace(".", r"\.") for name in names)
    model = learned(inject_adapter_in_model(LoraConfig(r=2, target_modules=expression), Nested()))
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(Nested(), tmp_path)
    assert set(adapter_layers(loaded.get_base_model())) == set(names)
    targets = read_adapter(tmp_path).config["target_modules"]
    assert isinstance(targets, str) == ("proj" in names and "module.proj" not in names)  # a list would match both


def test_names_in_a_lightning_module_are_those_of_the_network_that_was_prepared(tmp_path: Path) -> None:
    module = lightning.LightningModule()
    module.network = prepared(llama())
    save_adapter(module, tmp_path / "inside")
    save_adapter(module.network, tmp_path / "itself")
    assert contents(tmp_path / "inside") == contents(tmp_path / "itself")
    load_adapter(module, tmp_path / "itself")


def test_a_part_of_the_network_that_was_prepared_is_refused(tmp_path: Path) -> None:
    module = lightning.LightningModule()
    module.net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    learned(prepare(module, rank=4))
    with pytest.raises(ConfigError, match="this Sequential is a part of the network that was prepared.*pass what"):
        save_adapter(module.net, tmp_path / "adapter")
    save_adapter(module, tmp_path / "adapter")


def test_compiled_and_parallel_wrappers_are_not_in_the_names(tmp_path: Path) -> None:
    model = prepared(llama(), dora=True)
    save_adapter(model, tmp_path / "plain")
    model.model.layers[0] = torch.compile(model.model.layers[0])
    save_adapter(torch.nn.DataParallel(model), tmp_path / "wrapped")
    assert contents(tmp_path / "wrapped") == contents(tmp_path / "plain")


@pytest.mark.parametrize("base", ["nf4-dq", None, "w4a16-g32"])
def test_what_is_saved_is_loaded_to_the_bit(base: str | None, tmp_path: Path) -> None:
    model = prepared(llama(), base)
    expected = logits(model)
    save_adapter(model, tmp_path)
    assert not torch.equal(logits(zeroed(model)), expected)
    assert torch.equal(logits(load_adapter(model, tmp_path)), expected)


def test_a_new_model_takes_an_adapter_of_plain_peft(tmp_path: Path) -> None:
    theirs = with_peft(llama(), use_rslora=True)
    theirs.save_pretrained(tmp_path)
    ours = prepare(llama(), None, rank=4, alpha=8, rslora=True, targets=["q_proj", "down_proj"]).eval()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)
    assert read_adapter(tmp_path).base == {} and read_adapter(tmp_path).scheme == ""


def test_ranks_and_alphas_by_pattern_are_read_as_peft_reads_them(tmp_path: Path) -> None:
    model = with_peft(llama(), rank_pattern={r"1\.self_attn\.q_proj": 2, "down_proj": 6}, alpha_pattern={"q_proj": 3})
    save_adapter(model, tmp_path)
    for name, layer in adapter_layers(model.get_base_model()).items():
        assert read_adapter(tmp_path).updates[name].scaling == layer.scaling["default"]
    expected = logits(model)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)


def test_the_base_and_its_plan_are_written(tmp_path: Path) -> None:
    record = BaseRecord(path="org/name", revision="abc", sums={"w": "00"})
    save_adapter(prepared(llama(), record=record), tmp_path)
    file = read_adapter(tmp_path)
    assert file.base["path"] == file.config["base_model_name_or_path"] == "org/name"
    assert file.base["sums"] == {"w": "00"} and len(file.base["fingerprint"]) >= 16
    assert {layer["scheme"] for layer in file.plan} == {"nf4-dq", None}
    assert file.scheme == "nf4-dq"
    save_adapter(prepared(llama(), record=record), tmp_path, base=tmp_path)
    assert read_adapter(tmp_path).config["base_model_name_or_path"] == str(tmp_path)


def test_saving_again_replaces_the_three_files_and_leaves_others(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    save_adapter(prepared(llama()), tmp_path)
    model = learned(prepared(llama()), seed=5)
    save_adapter(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == FILES | {"README.md"}
    stored = read_adapter(tmp_path).updates
    assert all(torch.equal(stored[name].b, update_of(layer).b) for name, layer in adapter_layers(model).items())


def test_a_save_that_fails_leaves_the_old_adapter(tmp_path: Path) -> None:
    save_adapter(prepared(llama()), tmp_path)
    before = contents(tmp_path)
    blocked = tmp_path / f".qat_adapter.json.{os.getpid()}.tmp"
    blocked.mkdir()
    with pytest.raises(CheckpointError, match="cannot save the adapter"):
        save_adapter(learned(prepared(llama()), seed=5), tmp_path)
    blocked.rmdir()
    assert contents(tmp_path) == before


# ---- what does not fit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(prepared(llama()), tmp_path / "adapter")


def test_another_base_is_refused_and_nothing_is_loaded(folder: Path) -> None:
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 1
    other = prepare(other, rank=4, alpha=8)
    with pytest.raises(CheckpointError, match="trained on another base"):
        load_adapter(other, folder)
    assert all(not update_of(layer).b.any() for layer in adapter_layers(other).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["q_proj"]}, "adapters for 12 layers that have none in this model"),
        ({"rank": 2, "alpha": 4}, "with rank 4; the model has .* with rank 2"),
        ({"alpha": 16}, "is scaled by 2 and the model's by 4"),
        ({"rslora": True}, "is scaled by 2 and the model's by 4"),
        ({"dora": True}, "is LoRA and the model's is DoRA: prepare with dora=False"),
    ],
)
def test_an_adapter_of_other_options_is_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_adapter(prepare(llama(), **{"rank": 4, "alpha": 8, **options}), folder)


def test_a_model_with_more_layers_is_refused(folder: Path, tmp_path: Path) -> None:
    save_adapter(prepared(llama(), targets=["q_proj"]), tmp_path / "few")
    with pytest.raises(CheckpointError, match=r"lacks the adapters of 12 layers of this model: model\.layers\.0\."):
        load_adapter(prepare(llama(), rank=4, alpha=8), tmp_path / "few")


def test_a_truncated_file_is_refused(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        read_adapter(folder)


def test_a_changed_number_is_noticed(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="is not the file that qat_adapter.json was written with"):
        read_adapter(folder)
    (folder / "qat_adapter.json").unlink()
    assert len(read_adapter(folder).updates) == 14


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA'"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save, which is more than LoRA"),
        ({"r": "four"}, "r and lora_alpha must be numbers"),
        ({"r": 8}, "adapter_config.json says rank 8"),
        ({"use_dora": True}, "it should be .*lora_magnitude_vector"),
        ({"rank_pattern": 3}, "rank_pattern must be an object"),
    ],
)
def test_a_configuration_that_does_not_belong_is_refused(folder: Path, values: dict[str, Any], message: str) -> None:
    edit(folder / "adapter_config.json", **values)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder)


def test_broken_json_a_missing_file_and_a_missing_folder_are_named(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is not valid JSON"):
        read_adapter(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json, .* it holds adapter_model\.safetensors"):
        read_adapter(folder)
    with pytest.raises(CheckpointError, match="there is no adapter folder"):
        read_adapter(folder / "none")


def test_tensors_that_are_no_lora_on_a_linear_layer_are_refused(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 4)}, file)
    with pytest.raises(CheckpointError, match="lora_embedding_A is no part of LoRA on a linear layer"):
        read_adapter(folder)


def test_a_diverged_adapter_is_not_saved(tmp_path: Path) -> None:
    model = prepared(llama())
    update_of(model.model.layers[1].self_attn.k_proj).a[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.k_proj holds NaN"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_the_files_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no adapters"):
        save_adapter(llama(), tmp_path)
    with pytest.raises(ConfigError, match="uses modules_to_save"):
        save_adapter(with_peft(llama(), modules_to_save=["lm_head"]), tmp_path)
    with pytest.raises(ConfigError, match="is an embedding with an adapter"):
        save_adapter(with_peft(llama(), target_modules=["q_proj", "embed_tokens"]), tmp_path)
    both = with_peft(llama())
    both.add_adapter("second", both.peft_config["default"])
    with pytest.raises(QatError, match="has the adapters default, second"):
        save_adapter(both, tmp_path)
