"""``_target_`` names classes of allowed packages, and nothing else that Python can reach."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qat_plugin.config.arguments import parse
from qat_plugin.config.targets import instantiate, resolve
from qat_plugin.errors import ConfigError

ANY = (object,)


@pytest.mark.parametrize(
    "path",
    [
        "builtins.open",
        "builtins.eval",
        "os.system",
        "subprocess.Popen",
        "importlib.import_module",
        "pickle.loads",
        "torch.os.system",
        "torch.os._wrap_close",
        "torch.hub.load",
        "torch.load",
        "torch.serialization.load",
        "torch.serialization.pickle.Unpickler",
        "torch.utils.cpp_extension.load",
        "torch.utils.cpp_extension.subprocess.Popen",
        "torch.hub.zipfile.ZipFile",
        "torch.nn",
        "lightning.fabric.utilities.cloud_io.Path",
        "qat_plugin.config.targets.importlib.import_module",
        "transformers.AutoModel.from_pretrained",
    ],
)
def test_what_runs_code_is_refused_under_any_of_its_names(path: str) -> None:
    with pytest.raises(ConfigError, match="is not allowed"):
        resolve(path, ANY)


def test_an_allowed_class_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="must derive from Optimizer"):
        resolve("torch.nn.Linear", (torch.optim.Optimizer,))
    with pytest.raises(ConfigError, match="must derive from Module"):
        resolve("torch.package.PackageImporter", (nn.Module,))


@pytest.mark.parametrize("path", ["torch.nn.Linear", "torch.nn.modules.linear.Linear"])
def test_classes_resolve_by_any_public_name(path: str) -> None:
    assert resolve(path, (nn.Module,)) is nn.Linear


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("torch.nn.Linaer", "torch.nn has no 'Linaer'. Did you mean 'Linear'"),
        ("torch.optmi.SGD", "torch has no 'optmi'"),
        ("Linear", "dotted name"),
        ("torch..nn", "dotted name"),
        ("torch.nn.Linear()", "dotted name"),
        (3, "dotted name"),
        (None, "dotted name"),
    ],
)
def test_misspelt_targets(path: object, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(path, ANY, where="model._target_")
    assert said in str(caught.value)
    assert "model._target_" in str(caught.value)


@pytest.fixture
def my_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_package_of_tests.py").write_text(
        "import os, subprocess\nfrom torch import nn\n"
        "class Net(nn.Linear):\n    def __init__(self, width, inner=None):\n"
        "        super().__init__(width, width)\n        self.inner = inner\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_package_of_tests"
    sys.modules.pop("my_package_of_tests", None)


def test_a_users_package_needs_the_command_lines_leave(my_package: str) -> None:
    path = f"{my_package}.Net"
    with pytest.raises(ConfigError, match=rf"allow=\[{my_package}\]"):
        resolve(path, (nn.Module,))
    assert my_package not in sys.modules, "refused, and yet imported"
    assert resolve(path, (nn.Module,), allow=[my_package]).__name__ == "Net"


def test_allowing_a_package_does_not_allow_what_it_imports(my_package: str) -> None:
    for path in (f"{my_package}.os.system", f"{my_package}.subprocess.Popen"):
        with pytest.raises(ConfigError, match="is not allowed"):
            resolve(path, ANY, allow=[my_package])


def test_a_prefix_is_a_whole_package_name(my_package: str) -> None:
    with pytest.raises(ConfigError, match="is not allowed"):
        resolve(f"{my_package}.Net", ANY, allow=["my_package_of"])


def test_leave_comes_from_the_command_line_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_ALLOW", "one, two.three")
    arguments = parse(["+allow=[four,'five']", "allow=six", "verbose=true"])
    assert arguments.allow == ("one", "two.three", "four", "five", "six")
    assert arguments.hydra == ("verbose=true",)


def test_arguments_are_passed_by_keyword_and_nested_targets_are_built(my_package: str) -> None:
    spec = {"_target_": f"{my_package}.Net", "width": 3, "inner": {"_target_": "torch.nn.ReLU"}}
    net = instantiate(spec, (nn.Module,), nested=(nn.Module,), allow=[my_package], where="model")
    assert net.weight.shape == (3, 3)
    assert isinstance(net.inner, nn.ReLU)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"wdth": 3}, r"does not take these arguments.*it takes width, inner"),
        ({}, "does not take these arguments"),
        ({"width": 3, "_partial_": True}, "model._partial_ is not supported"),
        ({"width": 3, "inner": {"_target_": "os.system"}}, "model.inner._target_=os.system"),
        ({"width": 3, "inner": [{"_target_": "builtins.open"}]}, r"model.inner.0._target_=builtins.open"),
    ],
)
def test_wrong_arguments(extra: dict[str, object], said: str, my_package: str) -> None:
    spec = {"_target_": f"{my_package}.Net", **extra}
    with pytest.raises(ConfigError, match=said):
        instantiate(spec, (nn.Module,), nested=(nn.Module,), allow=[my_package], where="model")


def test_an_optimizer_takes_parameters_first() -> None:
    weights = [nn.Parameter(torch.zeros(2))]
    spec = {"_target_": "torch.optim.SGD", "lr": 0.5}
    made = instantiate(spec, (torch.optim.Optimizer,), nested=(), where="optimizer", first=(weights,))
    assert made.param_groups[0]["lr"] == 0.5
    assert made.param_groups[0]["params"][0] is weights[0]
