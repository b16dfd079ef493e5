"""The identity of a frozen base, taken once."""

from __future__ import annotations

from torch import nn

from qat_plugin.qlora.fingerprint import fingerprint
from qat_plugin.qlora.prepare import prepared_of


def base_fingerprint(model: nn.Module) -> str:
    """:func:`~qat_plugin.qlora.fingerprint.fingerprint` of a prepared model's base; computed once, it is frozen.

    Raises:
        PrepareError: when the model is not prepared.
    """
    record = prepared_of(model)
    if not record.fingerprint:
        part = next(module for module in model.modules() if module.__dict__.get("_qlora") is record)
        record.fingerprint = fingerprint(part)
    return record.fingerprint
