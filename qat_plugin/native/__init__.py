"""Operators in C++: built once on first use, cached, and never required.

:func:`available` says whether they run here; callers have a form in plain PyTorch for where they do not. The sources
lie in ``src``; a build takes some ten seconds and a C++20 compiler, and nothing else.
"""

from qat_plugin.native.library import Native, available, native, native_disabled, vectorized

__all__ = ["Native", "available", "native", "native_disabled", "vectorized"]
