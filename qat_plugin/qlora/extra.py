"""peft and bitsandbytes: imported when they are needed, with one line that installs them when they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from qat_plugin.errors import ConfigError
from qat_plugin.kernels.torchao_import import known_noise_dropped


def import_extra(name: str) -> Any:
    """A module of the extra ``qlora``.

    Raises:
        ConfigError: when it is not installed.
    """
    try:
        with known_noise_dropped():
            return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f'QLoRA needs {name.split(".")[0]} ({error}): pip install "qat-plugin[qlora]"') from error
