"""The state of the random number generators as tensors and numbers, which a weights_only checkpoint may hold."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

States = tuple[torch.Tensor, tuple[Any, ...], tuple[Any, ...] | dict[str, Any]]


def get_states() -> States:
    """States of the generators that fetching data may draw from, as they are: fast, and not for a file."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def set_states(states: States) -> None:
    """Set what :func:`get_states` returned."""
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


def seed_all(seed: int) -> None:
    """Seed torch, NumPy's legacy generator and Python's, and no more: Lightning's global seed stays what it was."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def capture() -> dict[str, Any]:
    """States of torch (CPU, and every CUDA device there is), NumPy's legacy generator and Python's."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore(state: Mapping[str, Any]) -> None:
    """Set every generator that :func:`capture` saved; CUDA's only where the number of devices is the same."""
    torch.set_rng_state(state["torch"].cpu().to(torch.uint8))
    python, legacy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = legacy["keys"].numpy().astype(np.uint32)
    np.random.set_state((legacy["name"], keys, legacy["position"], legacy["has_gauss"], legacy["cached"]))
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([cuda.cpu().to(torch.uint8) for cuda in state["cuda"]])
