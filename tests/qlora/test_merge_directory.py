"""Merging directories shard by shard: against peft's merge of the loaded model, and the model that was trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
import transformers as tf
from peft import PeftModel

from qat_plugin.errors import CheckpointError, ConfigError
from qat_plugin.qlora.adapter_file import read_adapter
from qat_plugin.qlora.files import save_adapter
from qat_plugin.qlora.fingerprint import directory_fingerprint
from qat_plugin.qlora.merge import merge, merge_directory, survival_table
from qat_plugin.qlora.merge_targets import updated_weights
from qat_plugin.qlora.record import BaseRecord
from qat_plugin.qlora.streaming import load_base
from qat_plugin.qlora.updates import adapter_layers
from tests.qlora.adapters import llama, prepared, with_peft
from tests.qlora.tiny_models import FAMILIES, family, logits, mixtral, saved

INDEX = "model.safetensors.index.json"


def load(folder: Path, dtype: Any = torch.float32) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def trained(base: Path, adapter: Path, scheme: Any = "nf4-dq", *, dtype: Any = torch.float32, **options: Any) -> Any:
    """A model trained on a directory, and its adapter saved."""
    record = BaseRecord(path=str(base), sums=directory_fingerprint(base), dtype=str(dtype).removeprefix("torch."))
    model = prepared(load(base, dtype), scheme, record=record, **options)
    save_adapter(model, adapter)
    return model


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_original_weights_get_the_update_that_peft_gives_them(name: str, dora: bool, tmp_path: Path) -> None:
    base, adapter, out = family(name, tmp_path / "base"), tmp_path / "adapter", tmp_path / "out"
    trained(base, adapter, None, dora=dora)
    record = merge_directory(base, adapter, out, progress=False)
    theirs = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    merged, before = tensors(out), tensors(base)
    assert merged.keys() == before.keys()
    changed = 0
    for key, tensor in theirs.state_dict().items():
        if key in merged:
            torch.testing.assert_close(merged[key], tensor, rtol=1e-6, atol=1e-7)
            changed += not torch.equal(merged[key], before[key])
    assert changed == record.merged == len(read_adapter(adapter).updates)
    torch.testing.assert_close(logits(load(out)), logits(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq"])
@pytest.mark.parametrize("options", [{}, {"dora": True}, {"targets": ["ffn"]}], ids=["lora", "dora", "ffn"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_into_nf4_is_the_model_that_was_trained(name: str, options: Any, scheme: str, tmp_path: Path) -> None:
    base, adapter, out = family(name, tmp_path / "base"), tmp_path / "adapter", tmp_path / "out"
    model = trained(base, adapter, scheme, **options)
    expected = logits(model)
    record = merge_directory(base, adapter, out, into="nf4", progress=False)
    loaded = load(out)
    for key, tensor in merge(model).state_dict().items():
        other = loaded.state_dict()[key]
        other = (
            other.t() if name == "gpt2" and key.split(".")[-2].startswith("c_") and tensor.dim() == 2 else other
        )  # Conv1D, then Linear
        torch.testing.assert_close(other, tensor, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    assert record.requantized == sum(layer["scheme"] == scheme for layer in read_adapter(adapter).plan)
    assert record.verified and record.merged == len(read_adapter(adapter).updates)


def test_sixteen_bits_are_rounded_once_and_float32_loses_nothing(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    saved(llama().bfloat16(), base)
    expected = merge(trained(base, adapter, dtype=torch.bfloat16), dtype=torch.float32).state_dict()
    merge_directory(base, adapter, tmp_path / "bf16", into="nf4", progress=False)
    record = merge_directory(base, adapter, tmp_path / "fp32", into="nf4", dtype=torch.float32, progress=False)
    narrow, wide = tensors(tmp_path / "bf16"), tensors(tmp_path / "fp32")
    for key in adapter_layers(trained(base, adapter, dtype=torch.bfloat16)):
        torch.testing.assert_close(wide[f"{key}.weight"], expected[f"{key}.weight"], rtol=1e-6, atol=1e-8)
        assert torch.equal(narrow[f"{key}.weight"], wide[f"{key}.weight"].bfloat16())
    assert json.loads((tmp_path / "fp32" / "config.json").read_text())["dtype"] == record.dtype == "float32"
    assert load(tmp_path / "fp32", "auto").dtype == torch.float32
    assert load(tmp_path / "bf16", "auto").dtype == torch.bfloat16


def test_the_directory_has_the_same_shards_and_what_belongs_to_the_model(tmp_path: Path) -> None:
    base, adapter, out = family("llama", tmp_path / "base"), tmp_path / "adapter", tmp_path / "out"
    (base / "code.py").write_text("raise SystemExit")
    (base / "old.bin").write_bytes(b"pickle")
    trained(base, adapter)
    record = merge_directory(base, adapter, out, progress=False)
    names = {file.name for file in base.iterdir()} - {"code.py", "old.bin"}
    assert {file.name for file in out.iterdir()} == names
    assert record.shards == len(list(out.glob("*.safetensors"))) > 2
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (base, out))
    assert after == before
    assert record.tensors == len(before["weight_map"])
    assert tf.AutoTokenizer.from_pretrained(out).get_vocab() == tf.AutoTokenizer.from_pretrained(base).get_vocab()
    assert json.loads((out / "config.json").read_text()) == json.loads((base / "config.json").read_text())


def test_an_adapter_of_plain_peft_merges(tmp_path: Path) -> None:
    base, out = family("mistral", tmp_path / "base", shard="5GB"), tmp_path / "out"
    model = with_peft(load(base), use_rslora=True)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="the base is NOT VERIFIED: the files in .*adapter do not say"):
        record = merge_directory(base, tmp_path / "adapter", out, progress=False)
    assert record.shards == 1 and not record.verified and not (out / INDEX).exists()
    torch.testing.assert_close(logits(load(out)), logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_files_without_the_prefix_of_the_model(name: str, tmp_path: Path) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    torch.manual_seed(0)
    model = FAMILIES[name]() if name == "gpt2" else llama(tie_word_embeddings=True)
    saved(model.base_model, base, shard="5GB")
    trained_model = trained(base, adapter, None)
    assert not any(key.startswith(("model.", "transformer.")) for key in tensors(base))
    merge_directory(base, adapter, out, progress=False)
    torch.testing.assert_close(logits(load(out)), logits(trained_model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prefix", ["network", "a.b"])
def test_an_adapter_trained_inside_another_module(prefix: str, tmp_path: Path) -> None:
    base, adapter = family("llama", tmp_path / "base"), tmp_path / "adapter"
    expected = logits(trained(base, adapter, None))
    file = adapter / "adapter_model.safetensors"
    start = "base_model.model."
    save_file({start + f"{prefix}." + key.removeprefix(start): value for key, value in load_file(file).items()}, file)
    (adapter / "qat_adapter.json").unlink()
    merge_directory(base, adapter, tmp_path / "out", progress=False)
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-6)


MEMORY = """
import sys
import torch, bitsandbytes, peft
from qat_plugin.measure.host_memory import AnonymousMemory
from qat_plugin.qlora.merge import merge_directory
torch.set_num_threads(1)
root = sys.argv[1]
for into in ("original", "nf4"):
    options = {"into": into, "scheme": "nf4-dq", "progress": False}
    merge_directory(root + "/tiny", root + "/tiny-adapter", f"{root}/warm-{into}", **options)
    with AnonymousMemory() as memory:
        record = merge_directory(root + "/base", root + "/adapter", f"{root}/out-{into}", **options)
    print(memory.growth, record.peak_host_bytes, record.largest_shard_bytes, record.shards, record.bytes_written)
"""


def test_anonymous_memory_stays_below_twice_the_largest_shard(tmp_path: Path) -> None:
    tiny = family("llama", tmp_path / "tiny")
    trained(tiny, tmp_path / "tiny-adapter")
    with torch.device("meta"):
        model = llama(hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, vocab_size=4096)
    model = model.bfloat16().to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01).view(-1)[::7] = -0.02
    base = saved(model, tmp_path / "base", shard="48MB")
    trained(base, tmp_path / "adapter", None, dora=True, dtype=torch.bfloat16)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True, env=environment
    )
    for line in done.stdout.splitlines():
        growth, recorded, largest, shards, written = map(int, line.split())
        print(f"{growth / largest:.2f} and {recorded / largest:.2f} of the largest shard")
        assert shards >= 3 and written > 2.2 * largest
        assert max(growth, recorded) <= 2 * largest  # the model in bfloat16 is more than that


# ---- survival, read from the directories


def test_survival_is_measured_from_the_files(tmp_path: Path) -> None:
    base, adapter = family("gpt2", tmp_path / "base"), tmp_path / "adapter"
    model = trained(base, adapter, None)
    found = {name: (weight, update) for name, weight, update in updated_weights(base, read_adapter(adapter))}
    assert found.keys() == adapter_layers(model).keys()
    for name, layer in adapter_layers(model).items():
        weight, update = found[name]
        assert torch.equal(weight, layer.get_base_layer().weight.t())
        torch.testing.assert_close(update.delta(), layer.get_delta_weight("default").t())
    few = survival_table(updated_weights(base, adapter, layers=3), ["w8a16"])
    assert len(few) == 3 and few[0].name == "transformer.h.0.attn.c_attn"
    assert all(0.9 < row.cosines["original"] <= 1.0000001 for row in few)


# ---- what does not fit


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base, adapter = family("llama", tmp_path / "base"), tmp_path / "adapter"
    trained(base, adapter)
    return base, adapter


def refused(base: Path, adapter: Path, message: str, kind: type[Exception] = CheckpointError, **options: Any) -> None:
    """It is refused, and nothing is left where the result would be or beside it."""
    before = {file.name for file in base.parent.iterdir()}
    with pytest.raises(kind, match=message):
        merge_directory(base, adapter, base.parent / "out", progress=False, **options)
    assert {file.name for file in base.parent.iterdir()} == before


def test_a_base_that_changed_is_found_while_it_is_read(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    file = sorted(base.glob("*.safetensors"))[-1]
    changed = load_file(file)
    name = sorted(changed)[-1]
    changed[name].view(-1)[-1] += 1e-3
    save_file(changed, file, metadata={"format": "pt"})
    refused(base, adapter, rf"trained on another base: {name} in .* is not what it was then")


@pytest.mark.parametrize("into", ["original", "nf4"])
@pytest.mark.parametrize("how", ["load_base", "from_pretrained"])
def test_another_base_is_refused_for_adapters_made_in_python(how: str, into: str, tmp_path: Path) -> None:
    base, adapter = family("llama", tmp_path / "base"), tmp_path / "adapter"
    model = load_base(base, progress=False)[0] if how == "load_base" else load(base, torch.bfloat16)
    save_adapter(prepared(model), adapter)
    other = load(base)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[3, 5] += 0.1
    refused(
        saved(other, tmp_path / "other"), adapter, "trained on another base: .*down_proj.*not what it was", into=into
    )
    record = merge_directory(base, adapter, tmp_path / "out", into=into, progress=False)  # type: ignore[arg-type]
    assert record.verified
    if into == "nf4":  # quantized from the type that it was loaded in, whatever the files'
        expected = merge(model, dtype=torch.float32).state_dict()
        name = "model.layers.0.mlp.up_proj.weight"
        torch.testing.assert_close(tensors(tmp_path / "out")[name], expected[name], rtol=1e-6, atol=1e-8)


def test_an_adapter_of_another_model_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    other = family("gpt2", tmp_path / "other")
    refused(other, adapter, "has 14 targets that the GPT2LMHeadModel in .* lacks: model.layers.0")
    saved(llama(intermediate_size=64), tmp_path / "narrow")
    refused(tmp_path / "narrow", adapter, r"is for a weight \[64, 128\], .* has \[64, 64\]")
    assert base.is_dir()


def test_a_truncated_shard_is_refused(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    file = sorted(base.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-64])
    refused(base, adapter, f"{file.name} is truncated or corrupt")


def test_a_missing_shard_is_refused(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    file = sorted(base.glob("*.safetensors"))[1]
    file.unlink()
    refused(base, adapter, f"lacks {file.name}")


def test_experts_that_the_model_fuses_are_copied_as_they_are(tmp_path: Path) -> None:
    base, adapter, out = saved(mixtral(), tmp_path / "base"), tmp_path / "adapter", tmp_path / "out"
    model = with_peft(load(base), target_modules=["q_proj"])
    save_adapter(model, adapter)
    assert merge_directory(base, adapter, out, progress=False).merged == 2
    torch.testing.assert_close(logits(load(out)), logits(model), rtol=1e-5, atol=1e-6)


def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    base, adapter = family("llama-tied", tmp_path / "base"), tmp_path / "adapter"
    save_adapter(with_peft(load(base), target_modules=["lm_head"]), adapter)
    refused(base, adapter, "targets lm_head, whose weight is tied")


def test_what_is_there_is_not_overwritten(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    refused(base, adapter, "is there already and not empty", ConfigError)
    (tmp_path / "out" / "mine.txt").unlink()
    merge_directory(base, adapter, tmp_path / "out", progress=False)
    refused(base, adapter, "is there already and not empty", ConfigError)


def test_nf4_is_not_pretended_for_an_adapter_that_was_trained_without(tmp_path: Path) -> None:
    base, adapter = family("llama", tmp_path / "base"), tmp_path / "adapter"
    trained(base, adapter, None)
    refused(base, adapter, "no layer was NF4 when the adapter", ConfigError, into="nf4")


def test_arguments_are_checked(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    refused(base, adapter, "into='int4' is not one of", ConfigError, into="int4")
    refused(base, adapter, "dtype=torch.int8 is not one of", ConfigError, dtype=torch.int8)
    with pytest.raises(CheckpointError, match="there is no base directory"):
        merge_directory(base / "none", adapter, base.parent / "out")


def test_an_adapter_that_started_from_a_changed_base_is_refused(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": "pissa_niter_4"}))
    refused(base, adapter, "init_lora_weights='pissa_niter_4' changes the base weights")
