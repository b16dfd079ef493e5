"""Numbers: bytes in memory and on disk, perplexity and accuracy, distance to a reference, SQNR, latency."""

from qat_plugin.measure.classification import ClassifierMetrics, evaluate_classifier
from qat_plugin.measure.distortion import sqnr, sqnr_by_layer
from qat_plugin.measure.evaluating import evaluating
from qat_plugin.measure.language import LMMetrics, evaluate_lm
from qat_plugin.measure.latency import Latency, interleaved_latency
from qat_plugin.measure.model_latency import model_latency
from qat_plugin.measure.progress import Progress, progressing
from qat_plugin.measure.size import file_bytes, model_bytes, parameter_count

__all__ = [
    "ClassifierMetrics",
    "LMMetrics",
    "Latency",
    "Progress",
    "evaluate_classifier",
    "evaluate_lm",
    "evaluating",
    "file_bytes",
    "interleaved_latency",
    "model_bytes",
    "model_latency",
    "parameter_count",
    "progressing",
    "sqnr",
    "sqnr_by_layer",
]
