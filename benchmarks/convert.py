"""Seconds and memory that converting a model takes, for each scheme.

    python benchmarks/convert.py                                  # a random Llama of 137 M parameters in bf16
    python benchmarks/convert.py --dtype fp32 --schemes w8a8 --json convert.json

Each scheme converts a model of its own. Memory is the peak of torch's allocator while the model is built and converted,
less the float model: what converting takes on top, beside the model's largest layer. ``reversible`` keeps the float
weights until the last layer is proven; ``one way`` lets each go with its layer (``convert(..., reversible=False)``).
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch
from common import add_model_options, random_llama, write_json
from torch import nn

from qat_plugin import convert, native
from qat_plugin.measure import model_bytes
from qat_plugin.measure.memory import cpu_allocations
from qat_plugin.scheme import FLOAT_DTYPES

SCHEMES = ("w8a8", "w8a16", "w4a8-g32", "w4a16-g32")
_MIB, _GIB = 1 << 20, 1 << 30


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--dtype", choices=list(FLOAT_DTYPES), default="bf16")
    parser.add_argument("--json", type=Path, help="write all figures there")
    return parser.parse_args()


def largest_layer(model: nn.Module) -> int:
    return max(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))


def converted(scheme: str, options: argparse.Namespace, *, reversible: bool) -> dict[str, Any]:
    """What one conversion took: seconds without, bytes with torch's profiler."""
    model = random_llama(options, FLOAT_DTYPES[options.dtype])
    floats, layer = model_bytes(model), largest_layer(model)
    began = time.perf_counter()
    convert(model, scheme, reversible=reversible)
    seconds, integers = time.perf_counter() - began, model_bytes(model)
    del model
    gc.collect()
    with cpu_allocations() as memory:
        model = random_llama(options, FLOAT_DTYPES[options.dtype])
        convert(model, scheme, reversible=reversible)
    del model
    gc.collect()
    extra = memory.peak - floats
    return {
        "scheme": scheme, "reversible": reversible, "seconds": seconds, "seconds_per_gib": seconds / (floats / _GIB),
        "float_bytes": floats, "bytes": integers, "extra_bytes": extra, "layer_bytes": layer,
    }  # fmt: skip


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    native.native()
    rows = [converted(scheme, options, reversible=way) for scheme in options.schemes for way in (True, False)]
    first = rows[0]
    print(
        f"{first['float_bytes'] / _MIB:.0f} MiB of {options.dtype}, largest layer {first['layer_bytes'] / _MIB:.1f} "
        f"MiB, {options.threads} threads, {native.native()}"
    )
    print(f"{'':22}{'seconds':>9}{'s/GiB':>8}{'MiB after':>11}{'extra MiB':>11}{'x largest layer':>17}")
    for row in rows:
        name = f"{row['scheme']} {'reversible' if row['reversible'] else 'one way'}"
        print(
            f"{name:22}{row['seconds']:9.2f}{row['seconds_per_gib']:8.1f}{row['bytes'] / _MIB:11.1f}"
            f"{row['extra_bytes'] / _MIB:11.1f}{row['extra_bytes'] / row['layer_bytes']:17.2f}"
        )
    write_json(options, rows=rows)


if __name__ == "__main__":
    main()
