"""Where what is made once is kept: the embedded model, quantized bases, built operators."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """``QAT_PLUGIN_CACHE``, else the user's cache directory."""
    if given := os.environ.get("QAT_PLUGIN_CACHE"):
        return Path(given).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("qat_plugin"))
