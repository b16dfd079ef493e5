"""Quantized files wherever the command takes a model: measured as they are, trained as float, written anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qat_plugin
from qat_plugin import Policy, convert
from qat_plugin.cache import cache_directory
from qat_plugin.errors import ConfigError
from qat_plugin.exporting import export_model
from qat_plugin.exporting.contents import Exportable
from qat_plugin.models.embedded import embedded_lm
from qat_plugin.models.loading import load_causal_lm
from qat_plugin.report import read_report
from qat_plugin.runs.language_model import embedded_recipe
from tests.runs.test_run_recipes import QUICK, SMALL

from .conftest import Qat

pytestmark = pytest.mark.usefixtures("alone")
POLICY = Policy({"attention": "w8a16-g32", "ffn": "w4a16-g32"}, keep=["embedding", "head"])


@pytest.fixture
def model(alone: None) -> tuple[Any, Any]:
    """A converted model and its tokenizer."""
    network, tokenizer = load_causal_lm(embedded_lm(recipe=embedded_recipe(SMALL), progress=False))
    return convert(network, POLICY), tokenizer


@pytest.fixture
def written(model: tuple[Any, Any]) -> dict[str, Path]:
    """It in two formats."""
    network, tokenizer = model
    return {
        name: export_model(network, name, f"small-{name}", tokenizer=tokenizer, verify=False, progress=False).path
        for name in ("gguf", "converted", "torchao", "compressed-tensors")
    }


def text() -> list[str]:
    for name in ("train.txt", "valid.txt"):
        Path(name).write_text("def function(argument):\n    return argument + 1\n\n" * 60)
    return ["data.train=train.txt", "data.valid=valid.txt"]


def perplexity(printed: str, path: Path) -> float:
    return float(next(line.split()[2] for line in printed.splitlines() if line.startswith(path.name)))


def integers(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    network, _ = qat_plugin.load(path)
    layers = Exportable(network, ()).layers
    return {name: (layer.integers.q, layer.integers.scale) for name, layer in layers.items()}


def test_a_file_is_measured_on_its_own_integers(qat: Qat, written: dict[str, Path]) -> None:
    told = []
    for path in written.values():
        done = qat("task=evaluate", "recipe=qat_int4_llama", f"model.path={path}", *QUICK, *text())
        assert done.code == 0, done.err
        assert "8 x w8a16-g32" in done.out and "6 x w4a16-g32" in done.out and "kernel " in done.out
        told.append(perplexity(done.out, path))
    assert told == [pytest.approx(told[0], rel=1e-5)] * 4
    assert not list(cache_directory().glob("dequantized/*")), "nothing was dequantized"


def test_a_file_is_written_in_another_format_without_loss(qat: Qat, written: dict[str, Path]) -> None:
    done = qat("task=export", f"model.path={written['gguf']}", "format=compressed-tensors", "export.verify=false")
    assert done.code == 0, done.err
    made = Path("small-gguf-compressed-tensors")
    assert made.is_dir() and "model card" in done.out
    back = qat_plugin.export(made, "gguf", "again", verify=False)
    assert back.path == Path("again.gguf").absolute()
    first, last = integers(written["gguf"]), integers(back.path)
    assert first.keys() == last.keys() and len(first) == 14
    for name, (q, scale) in first.items():
        assert torch.equal(q, last[name][0]) and torch.equal(scale, last[name][1]), name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["task=export", "model.path=small-gguf.gguf"], "needs to know the format"),
        (["task=export", "model.path=small-gguf.gguf", "format=peft"], "is of a run's adapter"),
        (["task=export", "model.path=small-gguf.gguf", "format=gguf"], "is there already: give export.path"),
        (["task=export", "model.path=small-gguf.gguf", "format=gguf", "export.path=small-gguf"], "is what is read"),
        (["task=export", "model.path=small-gguf.gguf", "format=onnx", "export.options.bits=4"], "no option 'bits'"),
        (["task=export", "model.path=nowhere.gguf", "format=onnx"], "there is no model directory"),
        (["task=evaluate", "recipe=qat_int4_tiny", "model.path=cut.gguf"], "cut.gguf"),
        (["task=plan", "recipe=qat_int4_tiny", "model.path=notes.txt"], "not a GGUF one"),
        (["task=plan", "recipe=qat_int4_tiny", "model.path=cut.gguf"], "cut.gguf"),
    ],
)
def test_mistakes(qat: Qat, model: tuple[Any, Any], arguments: list[str], said: str) -> None:
    made = export_model(model[0], "gguf", "small-gguf", tokenizer=model[1], verify=False)
    Path("cut.gguf").write_bytes(made.path.read_bytes()[:999])
    Path("notes.txt").write_text("no model")
    done = qat(*arguments)
    assert (done.code, said in done.err) == (2, True), done.err
    assert "Traceback" not in done.err


def test_a_plan_needs_no_weights(qat: Qat, written: dict[str, Path]) -> None:
    plans = [qat("task=plan", "recipe=qat_int4_tiny", f"model.path={path}").out for path in written.values()]
    assert "14 x w4a16-g32" in plans[0]
    assert plans == [plans[0]] * 4
    assert not list(cache_directory().glob("dequantized/*"))


@pytest.mark.parametrize("kind", ["gguf", "torchao"])
def test_training_begins_at_the_numbers_of_the_file(qat: Qat, written: dict[str, Path], kind: str) -> None:
    given = ["recipe=qat_int4_llama", f"model.path={written[kind]}", *QUICK, *text(), "run.dir=here"]
    done = qat(*given, "task.stages=[float,qat,converted,reloaded]", "policy.rules.attention=w8a16-g32")
    assert done.code == 0, done.err
    assert "the float32 numbers that its integers stand for" in done.out
    report = read_report(Path("here", "report.json"))
    begun, evaluated = report.row("float"), qat("task=evaluate", *given[:-1])
    assert begun is not None and begun.quality is not None
    assert perplexity(evaluated.out, written[kind]) == pytest.approx(begun.quality, rel=1e-5)
    again = qat("resume=here")
    assert again.code == 0, again.err


def test_adapters_learn_on_the_numbers_of_a_file(qat: Qat, written: dict[str, Path]) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    done = qat("recipe=qlora_tiny", f"model.path={written['gguf']}", *QUICK, *text(), "run.dir=here")
    assert done.code == 0, done.err
    names = [row.name for row in read_report(Path("here", "report.json")).rows]
    assert {"float", "NF4 base", "QLoRA", "merged", "converted", "reloaded"} <= set(names)
    merged = qat("task=merge", "run=here", "merge.out=merged")
    assert merged.code == 0, merged.err
    assert (Path("merged") / "model.safetensors").is_file()


def test_a_requantized_copy_of_a_sealed_file_needs_one_key(
    qat: Qat, written: dict[str, Path], model: tuple[Any, Any]
) -> None:
    data = bytearray(written["gguf"].read_bytes())
    data[-1] ^= 1
    Path("changed.gguf").write_bytes(data)
    given = ("task=evaluate", "recipe=qat_int4_llama", "model.path=changed.gguf", *QUICK, *text())
    assert "damaged" in qat(*given).err
    done = qat(*given, "model.checksums=false")
    assert done.code == 0, done.err


def test_python_refuses_what_the_command_refuses(written: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="is of a run's adapter"):
        qat_plugin.export(written["torchao"], "peft")
