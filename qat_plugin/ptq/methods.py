"""The methods by name: what becomes of a layer's input scale, and how its weight becomes integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from torch import Tensor

from qat_plugin.errors import ConfigError, did_you_mean
from qat_plugin.grid_search import clip_search
from qat_plugin.numerics import Quantized, round_to_nearest
from qat_plugin.ptq.gptq import GptqOptions, gptq
from qat_plugin.ptq.hqq import hqq
from qat_plugin.ptq.scaling import ScalingMethod
from qat_plugin.ptq.statistics import InputStatistics
from qat_plugin.scheme import Scheme

Rounding = Literal["rtn", "mse", "hqq", "gptq"]


@dataclass(frozen=True)
class Method:
    """One way of post-training quantization.

    Attributes:
        scaling: how inputs are scaled first, ``awq`` or ``smoothquant``; ``None`` for not.
        rounding: ``rtn`` (min-max grid, nearest), ``mse`` (searched grid, nearest), ``hqq`` (refined zero points) or
            ``gptq``.
        help: one line.
    """

    rounding: Rounding
    help: str
    scaling: ScalingMethod | None = None

    @property
    def looks(self) -> bool:
        """Whether the layers' inputs are looked at."""
        return self.rounding != "rtn" or self.scaling is not None


METHODS: Final[dict[str, Method]] = {
    "rtn": Method("rtn", "round to nearest on min-max grids; looks at no data but for static activations"),
    "mse": Method("mse", "grids by search, squared errors weighted by the inputs"),
    "hqq": Method("hqq", "zero points refined by a robust fit (below 4 bits)"),
    "gptq": Method("gptq", "errors are made up for by the weights still to come; blocks in turn"),
    "awq": Method("mse", "input scales that spare the weights of large inputs, then grids by search", "awq"),
    "awq-gptq": Method("gptq", "AWQ's input scales, then GPTQ", "awq"),
    "smoothquant": Method("rtn", "input scales that share outliers between activations and weights", "smoothquant"),
}


def method_named(name: str) -> Method:
    """The method of that name.

    Raises:
        ConfigError: listing the methods.
    """
    if name not in METHODS:
        raise ConfigError(f"method={name!r} is not one of {', '.join(METHODS)}.{did_you_mean(name, METHODS)}")
    return METHODS[name]


def rounded(
    rounding: Rounding,
    weight: Tensor,
    statistics: InputStatistics | None,
    scheme: Scheme,
    options: GptqOptions,
    wanted: Tensor | None = None,
) -> Quantized:
    """Integers of one weight, [out_features, in_features], by the method; without statistics GPTQ is a search.

    What is ``wanted`` (:func:`~qat_plugin.ptq.gptq.aim`) can be given to GPTQ where it is known.
    """
    seen = statistics is not None and statistics.rows > 0
    if rounding == "rtn":
        return round_to_nearest(weight, scheme)
    if rounding == "gptq" and statistics is not None and seen:
        return gptq(weight, statistics, scheme, options, wanted)
    importance = statistics.mean_square if statistics is not None and seen else None
    return hqq(weight, scheme, importance) if rounding == "hqq" else clip_search(weight, scheme, importance)
