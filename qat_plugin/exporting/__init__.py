"""Files for other runtimes, one module per format, each of which writes and verifies; and reading them back."""

from qat_plugin.exporting.card import CardFacts
from qat_plugin.exporting.export import Exported, check_format, export_model
from qat_plugin.exporting.formats import FORMATS, Format, format_named
from qat_plugin.exporting.reading import load
from qat_plugin.exporting.verification import Verification

__all__ = [
    "FORMATS",
    "CardFacts",
    "Exported",
    "Format",
    "Verification",
    "check_format",
    "export_model",
    "format_named",
    "load",
]
