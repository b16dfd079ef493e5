"""Host memory that writing each export format takes above the model, beside the model's largest tensor.

    python benchmarks/export_memory.py                                     # wide random Llama, INT4 and INT8
    python benchmarks/export_memory.py --formats gguf onnx --scheme w3a16-g32-asym

Memory is anonymous memory of the process, sampled, above what it was before; reading back is not part of it. A small
model is exported first, so that imports and libraries' own buffers are not counted. Of ONNX, weights go into a file of
their own, as they do by default above 1.5 GB.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import add_model_options, random_llama, write_json

from qat_plugin import Policy, convert
from qat_plugin.errors import QatError
from qat_plugin.exporting import FORMATS, export_model
from qat_plugin.measure.host_memory import AnonymousMemory, return_freed_memory

OPTIONS: dict[str, dict[str, Any]] = {"onnx": {"external_data": True}}
SCHEMES = {"executorch": ("w4a8-g32", "w8a8")}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, hidden=2048, ffn=8192, layers=2)
    names = [name for name, entry in FORMATS.items() if not entry.of_adapters]
    parser.add_argument("--formats", nargs="+", choices=names, default=names)
    parser.add_argument("--scheme", help="of the linear layers; by default INT4 and INT8 as each format holds them")
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser.parse_args()


def written(network: Any, name: str) -> int | None:
    """Bytes above the model while a file is written; ``None`` where the system does not say."""
    with tempfile.TemporaryDirectory() as place:
        return_freed_memory()
        with AnonymousMemory() as memory:
            export_model(network, name, Path(place) / "model", options=OPTIONS.get(name), verify=False, progress=False)
    return memory.growth


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    small = argparse.Namespace(**{**vars(options), "hidden": 256, "ffn": 512, "layers": 1, "heads": 4, "kv_heads": 4})
    rows: list[dict[str, Any]] = []
    for name in options.formats:
        for scheme in [options.scheme] if options.scheme else SCHEMES.get(name, ("w4a16-g32", "w8a8")):
            policy = Policy(scheme)
            try:
                written(convert(random_llama(small, torch.float32), policy, reversible=False), name)
                network = random_llama(options, torch.float32)
                largest = max(parameter.numel() for parameter in network.parameters())
                growth = written(convert(network, policy, reversible=False), name)
            except QatError as error:
                print(f"{name:20}{scheme:14}refused: {str(error).splitlines()[0]}")
                continue
            rows.append({"format": name, "scheme": scheme, "growth": growth, "largest": largest})
            told = "not known here" if growth is None else (
                f"{growth / 1e6:8.0f} MB above the model: {growth / (4 * largest):.1f}x its largest tensor in fp32 "
                f"({4 * largest / 1e6:.0f} MB), {growth / (2 * largest):.1f}x in fp16"
            )  # fmt: skip
            print(f"{name:20}{scheme:14}{told}", flush=True)
    write_json(options, rows=rows)


if __name__ == "__main__":
    main()
