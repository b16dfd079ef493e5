"""Better integers without training: each weight algorithm one function, and one walker that feeds layers in turn."""

from qat_plugin.ptq.calibrate import METHODS, calibrate
from qat_plugin.ptq.statistics import InputStatistics

__all__ = ["METHODS", "InputStatistics", "calibrate"]
