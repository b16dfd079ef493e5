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
        raise ConfigError(
            f'QLoRA needs {name.split(".")[0]} ({error}): pip install ".[qlora]" in a checkout of the project, or '
            'pip install "qat-plugin[qlora]"'
        ) from error


def check_extra(backend: str) -> None:
    """Import what fine-tuning needs, before anything is done.

    Raises:
        ConfigError: when a package is not installed.
    """
    for name in ("peft", backend):
        import_extra(name)
