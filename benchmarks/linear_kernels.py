"""One linear layer on each scheme's kernel, against the float layers and torchao's config for the same scheme.

    python benchmarks/linear_kernels.py                                   # bf16, all shapes and rows, some minutes
    python benchmarks/linear_kernels.py --shapes 4096x4096 --rows 1 8 128 --schemes w8a8 w4a16-g32
    python benchmarks/linear_kernels.py --dtype fp32 --no-torchao --json kernels.json

A figure is a speed relative to the bf16 layer: its median time over ours, of calls that take turns. Weights are rotated
through more than the last-level cache, so that each call reads them from memory, as in a real model. ``compiled`` is
the bf16 layer under torch.compile.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import write_json
from torch import Tensor, nn

from qat_plugin import native
from qat_plugin.kernels.weight import QuantizedWeight
from qat_plugin.measure import interleaved_latency
from qat_plugin.numerics import round_to_nearest
from qat_plugin.scheme import FLOAT_DTYPES, Scheme

SHAPES = ("2048x2048", "4096x4096", "4096x11008", "11008x4096")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
SCHEMES = ("w8a8", "w8a16", "w4a8-g32", "w4a16-g32")
_MIB = 1 << 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="OUTxIN", help="out_features x in_features")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="tokens of a call")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--dtype", choices=list(FLOAT_DTYPES), default="bf16", help="of the activations")
    parser.add_argument("--no-torchao", dest="torchao", action="store_false", help="leave torchao's kernels out")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=1.5, help="at most, for one shape and number of rows")
    parser.add_argument("--rotate-mib", type=int, default=96, help="bytes of weights to rotate through")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write all figures there")
    return parser.parse_args()


def torchao_config(scheme: str, device: str) -> Any:
    """torchao's own configuration for a scheme, or ``None`` where it has none that runs."""
    from torchao.quantization import (
        Int4WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        PerGroup,
    )

    if scheme == "w8a8":
        return Int8DynamicActivationInt8WeightConfig()
    if scheme == "w8a16":
        return Int8WeightOnlyConfig()
    if scheme == "w4a8-g32":
        return Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    if scheme == "w4a16-g32" and device == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=32)
    return Int4WeightOnlyConfig(group_size=32) if scheme == "w4a16-g32" else None


def rotating(weights: list[Any], call: Callable[[Any], Tensor]) -> Callable[[], Tensor]:
    turn: Iterator[Any] = itertools.cycle(weights)
    return lambda: call(next(turn))


class Shape:
    """The contenders of one weight shape; each holds enough copies to leave the cache."""

    def __init__(self, rows: int, columns: int, options: argparse.Namespace) -> None:
        self.options, self.dtype = options, FLOAT_DTYPES[options.dtype]
        torch.manual_seed(0)
        weight = torch.randn(rows, columns, device=options.device)
        self.weights: dict[str, list[Any]] = {"bf16": self._copies(weight.bfloat16())}
        self.weights["fp32"] = self._copies(weight)
        if options.dtype == "fp16":
            self.weights["fp16"] = self._copies(weight.half())
        self.kernels: dict[str, str] = {}
        for spelling in options.schemes:
            quantized = QuantizedWeight.from_integers(round_to_nearest(weight, Scheme.parse(spelling)), self.dtype)
            self.kernels[spelling] = quantized.kernel_name
            self.weights[spelling] = self._copies(quantized)
            if options.torchao and (theirs := self._torchao(spelling, weight)) is not None:
                self.weights[f"torchao {spelling}"] = self._copies(theirs)

    def _torchao(self, spelling: str, weight: Tensor) -> Tensor | None:
        from torchao.quantization import quantize_

        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=self.dtype)
        layer.weight.data.copy_(weight)
        try:
            quantize_(layer, torchao_config(spelling, self.options.device))
            layer(torch.randn(2, weight.shape[1], device=weight.device, dtype=self.dtype))
        except Exception as reason:  # whatever torchao says; it is shown
            print(f"  torchao {spelling}: {type(reason).__name__}: {str(reason).splitlines()[0][:90]}")
            return None
        return layer.weight.detach()

    def _copies(self, weight: Tensor) -> list[Tensor]:
        size = _bytes(weight)
        return [weight, *(weight.clone() for _ in range(self.options.rotate_mib * _MIB // size))]

    def calls(self, tokens: int, compiled: Callable[..., Tensor]) -> dict[str, Callable[[], Tensor]]:
        """What is timed, by name, for one number of rows."""
        columns = self.weights["bf16"][0].shape[1]
        x = torch.randn(tokens, columns, device=self.options.device)
        mine, narrow = x.to(self.dtype), x.bfloat16()
        inputs = {"fp32": x}
        calls = {"bf16": rotating(self.weights["bf16"], lambda w: F.linear(narrow, w))}
        calls["compiled"] = rotating(self.weights["bf16"], lambda w: compiled(narrow, w))
        for name, weights in self.weights.items():
            if name != "bf16":
                given = inputs.get(name, mine)
                calls[name] = rotating(weights, lambda w, given=given: F.linear(given, w))
        return calls


def _bytes(weight: Tensor) -> int:
    names = getattr(weight, "tensor_data_names", None) or getattr(type(weight), "tensor_data_names", None)
    if not names:
        return weight.nbytes
    return sum(getattr(weight, name).nbytes for name in names)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    compiled = torch.compile(F.linear, dynamic=True)
    print(f"{native.native()}; {options.threads} threads, {options.dtype} activations, speed relative to bf16")
    cells: list[dict[str, Any]] = []
    for shape in options.shapes:
        rows, columns = map(int, shape.split("x"))
        print(f"\n{rows} x {columns}")
        contenders = Shape(rows, columns, options)
        print("  kernels: " + ", ".join(f"{scheme} {kernel}" for scheme, kernel in contenders.kernels.items()))
        for tokens in options.rows:
            with torch.inference_mode():
                took = interleaved_latency(
                    contenders.calls(tokens, compiled), rounds=options.rounds, warmup=2, budget_s=options.seconds,
                    progress=False,
                )  # fmt: skip
            base = took["bf16"].p50
            if tokens == options.rows[0]:
                print(
                    "  " + f"{'rows':>5} {'bf16 ms':>8} " + " ".join(f"{name:>17}" for name in took if name != "bf16")
                )
            ratios = {name: base / one.p50 for name, one in took.items() if name != "bf16"}
            print("  " + f"{tokens:5} {base * 1e3:8.2f} " + " ".join(f"{ratio:17.2f}" for ratio in ratios.values()))
            seconds = {name: one.p50 for name, one in took.items()}
            cells.append({"shape": [rows, columns], "rows": tokens, "seconds": seconds, "against_bf16": ratios})
    write_json(options, cells=cells)


if __name__ == "__main__":
    main()
