"""What a user does next with the converted module in hand."""

from __future__ import annotations

from pathlib import Path

import torch

from qat_plugin import QuantizationAwareTraining, is_converted
from tests.callbacks.subjects import Classifier, loader, trainer


def test_a_checkpoint_saved_after_the_fit_is_float_and_loads_anywhere(tmp_path: Path) -> None:
    module = Classifier()
    it = trainer(tmp_path, QuantizationAwareTraining("w4a16-g32"), max_steps=3)
    it.fit(module, loader())
    assert is_converted(module)
    it.save_checkpoint(tmp_path / "after.ckpt")
    state = torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]
    fresh = Classifier()
    fresh.load_state_dict(state, strict=True)
    x = torch.randn(5, next(fresh.parameters()).shape[1])
    torch.testing.assert_close(fresh.eval().net(x), module.eval().net(x), rtol=1e-4, atol=1e-5)
    assert all(type(tensor) is torch.Tensor for tensor in state.values())


def test_a_fit_may_start_from_it(tmp_path: Path) -> None:
    it = trainer(tmp_path, QuantizationAwareTraining("w8a8"), max_steps=3)
    it.fit(Classifier(), loader())
    it.save_checkpoint(tmp_path / "after.ckpt")
    again = Classifier()
    trainer(tmp_path, QuantizationAwareTraining("w8a8"), max_steps=5).fit(
        again, loader(), ckpt_path=tmp_path / "after.ckpt", weights_only=True
    )
    assert is_converted(again)


def test_a_converted_state_dict_loads_into_a_float_module(tmp_path: Path) -> None:
    module, fresh = Classifier(), Classifier()
    trainer(tmp_path, QuantizationAwareTraining("w8a8"), max_steps=2).fit(module, loader())
    fresh.load_state_dict(module.state_dict())
    assert not is_converted(fresh)
    weight = next(m for m in module.modules() if isinstance(m, torch.nn.Linear)).weight
    copied = next(m for m in fresh.modules() if isinstance(m, torch.nn.Linear)).weight
    assert torch.equal(copied, weight.dequantize())
