"""Tokens per second of a Llama: a prompt at once, then token by token; float, bf16 and each scheme.

    python benchmarks/decode.py                                    # 137 M random parameters, some minutes
    python benchmarks/decode.py --schemes w8a8 --prompt 512 --json decode.json
    python benchmarks/decode.py --profile w4a16-g32                # where a compiled token's time goes, nothing else

``eager`` is transformers' own loop over a growing cache; ``compiled`` is ``compile_for_inference(model)`` on a static
cache. llama.cpp takes part where llama-cpp-python is installed, on the same weights, quantized by itself. Contenders
take turns; figures are medians over rounds, of prompts and of single tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import add_model_options, random_llama, write_json
from gguf_llama import TYPES, LlamaCpp, as_list, quantized, write_f16
from torch import Tensor, nn

from qat_plugin import convert, native
from qat_plugin.inference import compile_for_inference
from qat_plugin.measure import model_bytes

_MIB = 1 << 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--schemes", nargs="+", default=["w8a8", "w8a16", "w4a8-g32", "w4a16-g32"])
    parser.add_argument("--no-fp32", dest="fp32", action="store_false")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=48, help="tokens decoded a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", metavar="SCHEME", help="print torch's profile of compiled tokens instead")
    parser.add_argument("--json", type=Path, help="write all figures there")
    return parser.parse_args()


class Torch:
    """A transformers model with a growing or a static cache."""

    def __init__(self, model: nn.Module, options: argparse.Namespace, *, static: bool) -> None:
        self.model, self.static, self.size = model, static, options.prompt + options.tokens
        self.cache: Any = None

    def prefill(self, ids: Tensor) -> float:
        """Seconds of a prompt in an empty cache."""
        from transformers import DynamicCache, StaticCache

        config = self.model.config
        self.cache = StaticCache(config, max_cache_len=self.size) if self.static else DynamicCache(config=config)
        return self._seconds(ids)

    def decode(self, tokens: int) -> float:
        """Median seconds of a token, after :meth:`prefill`."""
        ids = torch.arange(tokens, device=self.model.device)[:, None, None]  # type: ignore[call-overload]
        return statistics.median(self._seconds(token) for token in ids)

    def _seconds(self, ids: Tensor) -> float:
        began = time.perf_counter()
        logits = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        logits[0, -1].argmax().item()
        return time.perf_counter() - began


def contenders(options: argparse.Namespace, folder: Path) -> dict[str, Callable[[], tuple[float, float]]]:
    ids = torch.randint(options.vocabulary, (1, options.prompt), generator=torch.Generator().manual_seed(0))
    made: dict[str, Callable[[], tuple[float, float]]] = {}

    def add(name: str, one: Any, prompt: Any) -> None:
        made[name] = lambda: (one.prefill(prompt), one.decode(options.tokens))

    for name in [*(["fp32"] if options.fp32 else []), "bf16", *options.schemes]:
        ways = ("eager", "compiled") if options.compiled and name != "fp32" else ("eager",)
        for way in ways:
            model = random_llama(options, torch.float32 if name == "fp32" else torch.bfloat16).to(options.device)
            model = model if name in ("fp32", "bf16") else convert(model, name, reversible=False)
            print(f"  {name} {way}: {model_bytes(model) / _MIB:.0f} MiB")
            model = compile_for_inference(model) if way == "compiled" else model
            add(f"{name} {way}", Torch(model, options, static=way == "compiled"), ids.to(options.device))
    if importlib.util.find_spec("llama_cpp") and options.device == "cpu":
        file = write_f16(random_llama(options, torch.bfloat16), folder / "f16.gguf")
        for kind in TYPES:
            one = LlamaCpp(quantized(file, kind), options.threads, options.prompt + options.tokens)
            add(f"llama.cpp {kind}", one, as_list(ids))
    else:
        print("  llama.cpp: llama-cpp-python is not installed")
    return made


def profile(options: argparse.Namespace) -> None:
    """Milliseconds a token of each operator in the compiled step."""
    model = compile_for_inference(convert(random_llama(options, torch.bfloat16), options.profile))
    one = Torch(model, options, static=True)
    one.prefill(torch.arange(options.prompt)[None] % options.vocabulary)
    one.decode(8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        one.decode(16)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    for event in events[:10]:
        print(f"{event.self_cpu_time_total / 16e3:8.3f} ms  {event.count / 16:6.1f} calls  {event.key[:60]}")


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    print(f"{native.native()}; {options.threads} threads")
    if options.profile:
        with torch.inference_mode():
            profile(options)
        return
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        made = contenders(options, Path(folder))
        for run in made.values():
            run()  # compiles
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
        for _ in range(options.rounds):
            for name, run in made.items():
                rounds[name].append(run())
    rows = {}
    for name, taken in rounds.items():
        prompt, token = (statistics.median(column) for column in zip(*taken, strict=True))
        rows[name] = {"prefill": options.prompt / prompt, "decode": 1 / token}
    base = rows["bf16 eager"]
    print(f"{'tokens/s':22}{'prefill':>10}{'x bf16':>8}{'decode':>10}{'x bf16':>8}")
    for name, row in rows.items():
        prefill, decode = row["prefill"] / base["prefill"], row["decode"] / base["decode"]
        print(f"{name:22}{row['prefill']:10.0f}{prefill:8.2f}{row['decode']:10.1f}{decode:8.2f}")
    write_json(options, rows=rows)


if __name__ == "__main__":
    main()
