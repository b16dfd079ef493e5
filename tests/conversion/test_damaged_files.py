"""Converted models on disk: nothing but a whole sound file is taken, and none but a whole one is left behind."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from qat_plugin import convert, is_converted, load_converted, prepare, save_converted
from qat_plugin.conversion import files
from qat_plugin.errors import CheckpointError, ConversionError
from tests.conversion.test_converted_files import WEIGHTS, converted
from tests.qat.models import MLP, batch, gpt2, llama, output


def test_loading_does_not_unpickle(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"x": Bomb()}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        load_converted(MLP(), tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.manual_seed(5)
    folder = save_converted(converted("mlp", {"up": "w4a16-g32-asym", "down": "w8a8-static"}),
                            tmp_path_factory.mktemp("sound"))  # fmt: skip
    return (folder / WEIGHTS).read_bytes()


def refused(content: bytes, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(content)
    model, x = MLP(), batch("mlp")
    expected = model(x)
    with pytest.raises(CheckpointError, match=WEIGHTS):
        load_converted(model, folder)
    assert not is_converted(model)
    assert torch.equal(model(x), expected)


class TestDamage:
    def test_the_sound_file_loads(self, sound: bytes, tmp_path: Path) -> None:
        (tmp_path / WEIGHTS).write_bytes(sound)
        assert is_converted(load_converted(MLP(), tmp_path))

    @pytest.mark.parametrize("seed", range(25))
    def test_truncated_anywhere(self, seed: int, sound: bytes, tmp_path: Path) -> None:
        refused(sound[: random.Random(seed).randrange(len(sound))], tmp_path)

    @pytest.mark.parametrize("seed", range(60))
    def test_a_changed_byte_of_the_header(self, seed: int, sound: bytes, tmp_path: Path) -> None:
        generator = random.Random(seed)
        (length,) = struct.unpack("<Q", sound[:8])
        position = generator.randrange(8 + len(sound[8 : 8 + length].rstrip()))  # what follows is padding
        changed = bytearray(sound)
        changed[position] ^= 1 << generator.randrange(7)
        refused(bytes(changed), tmp_path)

    @pytest.mark.parametrize("seed", range(25))
    def test_a_changed_byte_of_the_tensors(self, seed: int, sound: bytes, tmp_path: Path) -> None:
        generator = random.Random(seed)
        (length,) = struct.unpack("<Q", sound[:8])
        changed = bytearray(sound)
        changed[generator.randrange(8 + length, len(sound))] ^= 1 << generator.randrange(8)
        refused(bytes(changed), tmp_path)

    @pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\0" * 100, b"\xff" * 100, b"PK\x03\x04" + b"\0" * 60])
    def test_no_safetensors_at_all(self, content: bytes, tmp_path: Path) -> None:
        refused(content, tmp_path)

    def test_appended_bytes(self, sound: bytes, tmp_path: Path) -> None:
        refused(sound + b"\0" * 16, tmp_path)

    def test_a_missing_file_or_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"there is no converted model at .*; save_converted"):
            load_converted(MLP(), tmp_path)
        with pytest.raises(CheckpointError, match="there is no converted model"):
            load_converted(MLP(), tmp_path / "nowhere")

    def test_another_safetensors_file(self, tmp_path: Path) -> None:
        safetensors.torch.save_file(MLP().state_dict(), tmp_path / WEIGHTS)
        with pytest.raises(CheckpointError, match="but not a converted model of this package"):
            load_converted(MLP(), tmp_path)

    def test_a_later_format(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(files, "FORMAT_VERSION", 2)
            save_converted(converted("mlp", "w8a8"), tmp_path)
        with pytest.raises(CheckpointError, match="format 2; this package reads 1"):
            load_converted(MLP(), tmp_path)


class TestOtherModels:
    def test_other_names(self, tmp_path: Path) -> None:
        save_converted(converted("mlp", "w8a8"), tmp_path)
        with pytest.raises(CheckpointError, match=r"another model's: it lacks .*of Sequential"):
            load_converted(nn.Sequential(nn.Linear(64, 64)), tmp_path)

    def test_other_shapes(self, tmp_path: Path) -> None:
        save_converted(converted("mlp", "w8a8"), tmp_path)
        with pytest.raises(CheckpointError, match=r"up.weight has shape \(128, 64\) there, \(256, 64\) in MLP"):
            load_converted(MLP(hidden=256), tmp_path)

    def test_more_in_the_file_than_in_the_model(self, tmp_path: Path) -> None:
        class Larger(MLP):
            def __init__(self) -> None:
                super().__init__()
                self.upp = nn.Linear(64, 64)

        save_converted(convert(Larger(), "w8a8"), tmp_path)
        with pytest.raises(CheckpointError, match=r"MLP has no upp.*Did you mean 'up"):
            load_converted(MLP(), tmp_path)

    def test_another_family_on_a_transposed_weight(self, tmp_path: Path) -> None:
        save_converted(converted("gpt2", "w8a8"), tmp_path)
        with pytest.raises(CheckpointError, match="another model's"):
            load_converted(llama(), tmp_path)
        assert torch.isfinite(output(gpt2(), batch("gpt2"))).all()

    def test_a_prepared_model_is_refused(self, tmp_path: Path) -> None:
        save_converted(converted("mlp", "w8a8"), tmp_path)
        with pytest.raises(ConversionError, match=r"MLP is prepared for training: call unprepare\(model\)"):
            load_converted(prepare(MLP(), "w8a8"), tmp_path)

    def test_only_converted_models_are_saved(self, tmp_path: Path) -> None:
        with pytest.raises(ConversionError, match="was not converted"):
            save_converted(MLP(), tmp_path)
        assert not list(tmp_path.iterdir())


class TestAtomicity:
    def test_a_directory_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        model = converted("mlp", "w8a8")
        for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
            with pytest.raises(CheckpointError, match=r"cannot save the converted model in .*file"):
                save_converted(model, folder)
        assert (tmp_path / "file").read_text() == "x"

    @pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(),
                                         safetensors.SafetensorError("I/O error")])  # fmt: skip
    def test_a_save_that_fails_keeps_the_old_file_and_leaves_nothing_behind(
        self, failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_converted(converted("mlp", "w8a8"), tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

        def fails(tensors: Any, path: str, metadata: Any) -> None:
            Path(path).write_bytes(b"half")
            raise failure

        monkeypatch.setattr(safetensors.torch, "save_file", fails)
        expected = CheckpointError if isinstance(failure, Exception) else KeyboardInterrupt
        with pytest.raises(expected):
            save_converted(converted("mlp", "w4a16-g32"), tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_a_killed_save_leaves_a_whole_file(self, tmp_path: Path) -> None:
        """Two models are saved in turn, without end, and the process is killed: one of them is there, whole."""
        script = textwrap.dedent(
            """
            import sys, torch
            from qat_plugin import convert, save_converted
            torch.set_num_threads(1)
            models = []
            for seed in (0, 1):
                torch.manual_seed(seed)
                models.append(convert(torch.nn.Sequential(torch.nn.Linear(1024, 1024)), "w4a16-g32"))
            print("ready", flush=True)
            while True:
                for model in models:
                    save_converted(model, sys.argv[1])
                    print("saved", flush=True)
            """
        )
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(random.Random(0).randrange(5, 12)):
            assert process.stdout.readline() == "saved\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        known = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            known.append(convert(nn.Sequential(nn.Linear(1024, 1024)), "w4a16-g32"))
        loaded = load_converted(nn.Sequential(nn.Linear(1024, 1024)), tmp_path)
        assert any(torch.equal(loaded[0].weight.integers().q, model[0].weight.integers().q) for model in known)

    def test_files_get_the_permissions_of_the_umask(self, tmp_path: Path) -> None:
        before = os.umask(0o022)
        try:
            save_converted(converted("mlp", "w8a8"), tmp_path)
        finally:
            os.umask(before)
        assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {"0o644"}

    def test_saving_again_replaces(self, tmp_path: Path) -> None:
        save_converted(converted("mlp", "w8a8"), tmp_path)
        model = converted("mlp", "w4a16-g32")
        save_converted(model, tmp_path)
        assert torch.equal(load_converted(MLP(), tmp_path)(batch("mlp")), model(batch("mlp")))
        assert len(list(tmp_path.iterdir())) == 2
