"""Bytes on disk of each export format beside fp16 and fp32 weights, and what reading each file back has shown.

    python benchmarks/export_sizes.py                                   # the embedded Llama, every format that is here
    python benchmarks/export_sizes.py MODEL --formats gguf torchao --policies w4a16-g32 mixed --json sizes.json

The peer is the same model's weights alone, each stored once, in 16 and in 32 bits. Bytes are those of the files that
hold weights, not of tokenizers and cards; of GGUF, ONNX and ExecuTorch they hold the rest of the model too, and of peft
the adapter alone. Integers, scales and outputs are the largest differences that an independent reader found; seconds
are those of writing and verifying. A combination that a format refuses is one line: its first reason.
"""

from __future__ import annotations

import argparse
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import torch
from common import write_json

from qat_plugin import Policy, convert, qlora
from qat_plugin.errors import QatError
from qat_plugin.exporting import FORMATS, export_model
from qat_plugin.measure import parameter_count
from qat_plugin.models.embedded import embedded_lm
from qat_plugin.models.loading import load_causal_lm

MIXED = Policy({"embedding": "fp16", "attention": "w8a8", "ffn": "w4a16-g32"})
ADAPTERS = "nf4-dq"
DIRECTORIES = ("w4a16-g32", "w8a8", "mixed")
PAIRS = {
    "converted": DIRECTORIES,
    "gguf": DIRECTORIES,
    "torchao": DIRECTORIES,
    "compressed-tensors": DIRECTORIES,
    "onnx": ("w4a16-g32", "w4a8-g32", "w8a8"),
    "executorch": ("w4a8-g32", "w8a8"),
    "peft": (ADAPTERS,),
    "bitsandbytes": (ADAPTERS,),
}
WEIGHTS = (".safetensors", ".gguf", ".onnx", ".data", ".pte")
_MB = 1e6


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a transformers directory (default: the embedded Llama)")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), help="default: all that are installed")
    parser.add_argument(
        "--policies", nargs="+", help=f"schemes, mixed or {ADAPTERS}, for every format in place of its own list"
    )
    parser.add_argument("--rank", type=int, default=16, help="of peft's adapters")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write all figures there")
    return parser.parse_args()


def pairs(options: argparse.Namespace) -> list[tuple[str, str]]:
    """(policy, format), policy by policy, so that each model is converted once."""
    names = options.formats or list(FORMATS)
    for name in names:
        if FORMATS[name].missing:
            print(f"{name}: not installed here ({', '.join(FORMATS[name].missing)})")
    found = [
        (policy, name) for name in names if not FORMATS[name].missing for policy in options.policies or PAIRS[name]
    ]
    order = list(dict.fromkeys(policy for policy, _ in found))
    return sorted(found, key=lambda pair: order.index(pair[0]))


def made(folder: Path, policy: str, options: argparse.Namespace) -> tuple[Any, Any]:
    """The model of a policy and its tokenizer: converted, or with new adapters on an NF4 base."""
    if policy == ADAPTERS:
        base, tokenizer, _ = qlora.load_base(folder, ADAPTERS, progress=False)
        return qlora.prepare(base, rank=options.rank), tokenizer
    network, tokenizer = load_causal_lm(folder)
    return convert(network, MIXED if policy == "mixed" else policy), tokenizer


def weight_bytes(path: Path) -> int:
    """Of the file, or of those files in a folder that hold weights."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.suffix in WEIGHTS]
    return sum(file.stat().st_size for file in files)


def written(network: Any, tokenizer: Any, policy: str, format: str) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = {"policy": policy, "format": format}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        try:
            done = export_model(network, format, Path(place) / "model", tokenizer=tokenizer, progress=False)
        except QatError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            layers, bracket, reason = lines[min(1, len(lines) - 1)].partition(" (")  # the first line is of the format
            return row | {"refused": f"{layers.partition(',')[0]}{bracket}{reason}"}
        seconds, size, seen = time.perf_counter() - began, weight_bytes(done.path), done.verification
    assert seen is not None
    return row | {
        "bytes": size, "seconds": seconds, "tensors": seen.tensors, "integers": seen.integers, "scales": seen.scales,
        "outputs": seen.error, "reason": seen.reason, "reader": seen.reader,
    }  # fmt: skip


def line_of(row: dict[str, Any], weights: int) -> str:
    start = f"{row['policy']:14}{row['format']:20}"
    if "refused" in row:
        return f"{start}refused: {textwrap.shorten(row['refused'], 180)}"
    outputs = "-" if row["outputs"] is None else f"{row['outputs']:.1e}"
    return (
        f"{start}{row['bytes'] / _MB:9.2f}{row['bytes'] / (2 * weights):9.3f}{row['bytes'] / (4 * weights):9.3f}"
        f"{row['integers']:10g}{row['scales']:8g}{outputs:>10}{row['seconds']:9.1f}"
    )


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    folder = options.model or embedded_lm()
    weights = parameter_count(load_causal_lm(folder)[0])
    print(f"{folder.name}: {weights:,} weights, {2 * weights / _MB:.2f} MB in fp16, {4 * weights / _MB:.2f} MB in fp32")
    print(f"{'policy':14}{'format':20}{'MB':>9}{'x fp16':>9}{'x fp32':>9}{'integers':>10}{'scales':>8}{'outputs':>10}"
          f"{'seconds':>9}")  # fmt: skip
    rows: list[dict[str, Any]] = []
    policy, network, tokenizer = "", None, None
    for wanted, format in pairs(options):
        if wanted != policy:
            network = tokenizer = None  # one model at a time
            policy, (network, tokenizer) = wanted, made(folder, wanted, options)
        rows.append(written(network, tokenizer, policy, format))
        print(line_of(rows[-1], weights), flush=True)
    write_json(options, weights=weights, rows=rows)


if __name__ == "__main__":
    main()
