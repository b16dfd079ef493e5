"""One model of the results, its verdict, and its renderings: console, Markdown and JSON."""

from qat_plugin.report.console import print_report
from qat_plugin.report.dictionary import SCHEMA, from_dict, to_dict
from qat_plugin.report.environment import environment
from qat_plugin.report.files import write_report
from qat_plugin.report.json import from_json, read_report, to_json
from qat_plugin.report.markdown import to_markdown
from qat_plugin.report.model import (
    ADAPTER_LADDER,
    BASE,
    BF16,
    CONVERTED,
    EXPORTED,
    FINE_TUNED,
    FINE_TUNED_PTQ,
    FLOAT,
    FURTHER,
    FURTHER_PTQ,
    LADDER,
    MERGED,
    NF4_BASE,
    PTQ,
    QAT,
    QAT_LORA,
    QLORA,
    RELOADED,
    LatencyRow,
    Report,
    Row,
    latency_rows,
)
from qat_plugin.report.noise import PairedDifference, paired_difference
from qat_plugin.report.verdict import verdict_of, with_verdict

__all__ = [
    "ADAPTER_LADDER",
    "BASE",
    "BF16",
    "CONVERTED",
    "EXPORTED",
    "FINE_TUNED",
    "FINE_TUNED_PTQ",
    "FLOAT",
    "FURTHER",
    "FURTHER_PTQ",
    "LADDER",
    "MERGED",
    "NF4_BASE",
    "PTQ",
    "QAT",
    "QAT_LORA",
    "QLORA",
    "RELOADED",
    "SCHEMA",
    "LatencyRow",
    "PairedDifference",
    "Report",
    "Row",
    "environment",
    "from_dict",
    "from_json",
    "latency_rows",
    "paired_difference",
    "print_report",
    "read_report",
    "to_dict",
    "to_json",
    "to_markdown",
    "verdict_of",
    "with_verdict",
    "write_report",
]
