"""From a network in operators that XNNPACK knows to the bytes of a ``.pte``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat_plugin.errors import ExportError

_NOISY = ("torch.utils._pytree", "torch.export", "torch.__trace", "executorch")
_PRODUCTS = (
    "Linear", "Addmm", "MM", "QuantizedPerTensor", "DeQuantizedPerTensor", "QuantizeAffine", "DeQuantizeAffine",
    "ChooseQParamsAffine",
)  # fmt: skip
_BETWEEN = (
    "Abs", "Add", "BMM", "Clamp", "ConstantPad", "Div", "Mul", "Neg", "Pow", "ReciprocalSquareRoot", "Sigmoid",
    "Softmax", "Sub",
)  # fmt: skip


def trace(network: nn.Module, given: tuple[Tensor, ...], batch: int, length: int) -> Any:
    """The exported program of one call.

    Args:
        network: a :class:`~qat_plugin.exporting.executorch.skeleton.Call`.
        given: the sample's arguments.
        batch: most rows; exactly one with 1.
        length: most tokens of a language model, else 0.

    Raises:
        ExportError: when PyTorch cannot trace it so.
    """
    rows = torch.export.Dim("rows", min=1, max=batch) if batch > 1 else None
    dims: dict[int, Any] = {} if rows is None else {0: rows}
    if length > 1:
        dims[1] = torch.export.Dim("tokens", min=1, max=length)
    given = tuple(_shaped(x, batch, length) for x in given)
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(network, given, dynamic_shapes=(tuple(dims for _ in given),), strict=False)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        free = f"1 to {batch} rows" + (f" and 1 to {length} tokens" if length > 1 else "")
        raise ExportError(
            f"torch.export cannot trace the model for {free}: {error}. Where it cannot leave the number of rows "
            "open, fix it: options={'max_batch': 1}"
        ) from error


def _shaped(x: Tensor, batch: int, length: int) -> Tensor:
    """An example that nothing is specialised on: two rows or more where rows may vary, two tokens or more."""
    x = x[:batch] if len(x) >= min(batch, 2) else torch.cat([x, x])
    if not length:
        return x
    return x[:, :length] if x.shape[1] > 1 else torch.cat([x, x], 1)


def lower(program: Any, *, static: bool) -> Any:
    """ExecuTorch's edge program with XNNPACK's parts delegated.

    Only products and, without static layers, what lies between them are delegated: XNNPACK cannot hold some tensors of
    attention masks, and looks for the layout of a convolution's rounded input at the beginning of its part of the
    graph, so that each must begin there.

    Args:
        program: of :func:`trace`.
        static: it has layers with calibrated inputs, for which all of XNNPACK's passes are needed; otherwise one is
            enough, and several times as fast.
    """
    with quiet():
        from executorch.backends.xnnpack.partition import config
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
        from executorch.exir.backend.compile_spec_schema import CompileSpec
        from executorch.exir.backend.partitioner import DelegationSpec

        names = (*_PRODUCTS, "Convolution") if static else (*_PRODUCTS, *_BETWEEN)
        partitioner = XnnpackPartitioner(configs=[getattr(config, f"{name}Config") for name in names])
        if not static:
            backend = partitioner.delegation_spec.backend_id
            partitioner.delegation_spec = DelegationSpec(backend, [CompileSpec("dqlinear_partitioner", b"")])
        return to_edge_transform_and_lower(
            program, partitioner=[partitioner], compile_config=EdgeCompileConfig(_check_ir_validity=False)
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without what these packages say about each other's deprecations, and the root handler that one of them adds."""
    handlers = list(logging.root.handlers)
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", (FutureWarning, DeprecationWarning))
            yield
    finally:
        logging.root.handlers[:] = handlers
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
