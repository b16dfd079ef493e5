"""Where the configuration files are: inside an installed package, beside it in a checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from qat_plugin.errors import ConfigError

_PACKAGE: Final = Path(__file__).resolve().parents[1]


def conf_folder() -> Path:
    """The folder with ``config.yaml`` and the config groups."""
    return _folder("conf", "config.yaml")


def recipes_folder() -> Path:
    """The folder of the built-in recipes."""
    return _folder("recipes", "*.yaml")


def _folder(name: str, content: str) -> Path:
    """The package's own copy first: what lies beside an installed package belongs to others."""
    for place in (_PACKAGE / name, _PACKAGE.parent / name):
        if any(place.glob(content)):
            return place
    raise ConfigError(
        f"this installation of qat_plugin lacks its folder {name!r} of configuration files; install it again"
    )
