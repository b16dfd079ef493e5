"""Seconds a block that post-training quantization takes, and host memory above the model.

    python benchmarks/gptq.py                          # three blocks of the 137 M Llama
    python benchmarks/gptq.py --layers 3 --method awq --dtype bf16

Memory is anonymous memory of the process, sampled, above what it was before calibration; the random model and random
tokens change neither figure.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from common import add_model_options, random_llama, write_json

from qat_plugin import calibrate
from qat_plugin.measure.host_memory import AnonymousMemory
from qat_plugin.ptq import METHODS
from qat_plugin.scheme import FLOAT_DTYPES


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, layers=3)
    parser.add_argument("--scheme", default="w4a16-g32-asym")
    parser.add_argument("--method", choices=[name for name in METHODS if name != "rtn"], default="gptq")
    parser.add_argument("--dtype", choices=list(FLOAT_DTYPES), default="fp32")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    model = random_llama(options, FLOAT_DTYPES[options.dtype])
    block = sum(p.nbytes for p in model.model.layers[0].parameters())  # type: ignore[union-attr]
    ids = torch.randint(options.vocabulary, (options.batches, 2, options.tokens))
    began = time.perf_counter()
    with AnonymousMemory() as memory:
        calibrate(model, options.scheme, [{"input_ids": batch} for batch in ids], method=options.method)
    seconds = (time.perf_counter() - began) / options.layers
    growth = memory.growth
    found = {"seconds_a_block": seconds, "growth": growth, "block": block}
    write_json(options, **found)
    above = "not known here" if growth is None else f"{growth / 2**20:.0f} MiB, {growth / block:.1f} blocks"
    took = f"{seconds:.1f} s a block of {block / 2**20:.0f} MiB"
    print(f"{options.method} {options.scheme}: {took}; memory above the model {above}")


if __name__ == "__main__":
    main()
