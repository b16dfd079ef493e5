"""The rooms: which may import which, what importing costs, and how large a file may grow."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "qat_plugin"
# A room imports only rooms above it.
ROOMS = (
    "errors", "atomic", "cache", "scheme", "native", "numerics", "learned", "grid_search", "fused", "losses", "kernels",
    "policy", "observers", "qat", "conversion", "inference", "measure", "ptq", "sensitivity", "report", "qlora",
    "data", "models", "exporting", "callbacks", "config", "runs", "__main__",
)  # fmt: skip
HEAVY = {"lightning", "hydra", "omegaconf", "transformers", "tokenizers", "peft", "bitsandbytes", "torchao", "rich"}
# third parties that a room may import at the top of a module
MAY_TOUCH = {
    "kernels": {"torchao"},
    "measure": {"rich"},
    "report": {"rich"},
    "data": {"lightning", "tokenizers", "transformers", "rich"},
    "models": {"lightning", "tokenizers", "transformers", "rich"},
    "callbacks": {"lightning"},
    "config": {"hydra", "omegaconf"},
    "runs": HEAVY,
    "__main__": {"hydra", "omegaconf", "rich"},
}


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


def imported(path: Path, *, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.iter_child_nodes(tree) if top_level_only else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by the absolute name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_file_belongs_to_a_known_room() -> None:
    assert {room_of(path) for path in files()} <= set(ROOMS)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_above_it(path: Path) -> None:
    here = ROOMS.index(room_of(path))
    for name in imported(path, top_level_only=False):
        if name.startswith("qat_plugin."):
            room = name.split(".")[1]
            if room in ROOMS:
                assert ROOMS.index(room) <= here, f"{path} imports {name}, a room below it"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_touches_only_its_third_parties(path: Path) -> None:
    touched = {name.split(".")[0] for name in imported(path, top_level_only=True)} & HEAVY
    assert touched <= MAY_TOUCH.get(room_of(path), set())


def test_importing_the_package_is_cheap_and_silent() -> None:
    script = "import sys, qat_plugin; print(sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(ast.literal_eval(done.stdout))
    assert not loaded & (HEAVY | {"torch", "numpy"})
    assert done.stderr == ""


def test_the_core_works_without_lightning_hydra_and_transformers() -> None:
    script = (
        "import sys, torch\n"
        "from qat_plugin import prepare, convert\n"
        "model = torch.nn.Sequential(torch.nn.Linear(64, 64))\n"
        "convert(prepare(model, 'w8a8'))\n"
        "print(sorted({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not set(ast.literal_eval(done.stdout)) & {"lightning", "hydra", "transformers", "peft", "bitsandbytes"}
    assert done.stderr == ""


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_holds_one_idea(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_top_level_names_resolve_to_what_they_say() -> None:
    import qat_plugin

    for name in qat_plugin.__all__:
        value = getattr(qat_plugin, name)
        assert name == "__version__" or getattr(value, "__name__", name) == name
        assert not isinstance(value, type(sys)), f"{name} is a module"
