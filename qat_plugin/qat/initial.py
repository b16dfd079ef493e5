"""Where learned scales begin: the range of the weights, or the grid with the least squared error."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from qat_plugin.errors import ConfigError
from qat_plugin.grid_search import search_scales
from qat_plugin.numerics import choose_qparams
from qat_plugin.scheme import Scheme

Initial = Literal["minmax", "mse"]


def initial_scales(weight: Tensor, scheme: Scheme, method: Initial = "mse") -> tuple[Tensor, Tensor | None]:
    """Scales and zero points for a weight, [out_features, in_features].

    Args:
        weight: any float type.
        scheme: an integer scheme.
        method: ``"minmax"``, :func:`~qat_plugin.numerics.choose_qparams`; ``"mse"``,
            :func:`~qat_plugin.grid_search.search_scales`.

    Returns:
        As those: scales float32 [out_features, groups], zero points uint8 or ``None``.

    Raises:
        ConfigError: for another method.
    """
    check_initial(method)
    return choose_qparams(weight, scheme) if method == "minmax" else search_scales(weight, scheme)


def check_initial(method: str) -> None:
    """Raise unless it is a method of :func:`initial_scales`.

    Raises:
        ConfigError: listing them.
    """
    if method not in get_args(Initial):
        hint = ": it needs data, calibrate(prepared_model, None, batches, method='gptq')" if method == "gptq" else ""
        raise ConfigError(f"initial={method!r} is not one of {', '.join(get_args(Initial))}{hint}")
