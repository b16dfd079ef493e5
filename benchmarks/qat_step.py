"""What fake quantization adds to a training step: plain, ours and torchao's side by side.

    python benchmarks/qat_step.py                                          # 14 M parameters, a few minutes
    python benchmarks/qat_step.py --modes eager --dtypes bf16 --json step.json

Every contender trains a copy of one random Llama: forward, backward, AdamW. ``plain`` quantizes nothing; ``ours`` is
``prepare(model, scheme)``; ``torchao`` is ``QATConfig`` of ``Int8DynamicActivationIntxWeightConfig`` (INT8 activations
per token, symmetric INT4 weights in groups of 32) on the same layers, so that it takes part for ``w4a8-g32`` only.
``compiled`` is ``torch.compile`` of the whole model. Steps are interleaved, one of each contender a round; times are
medians and ratios are of medians.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import write_json
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qat_plugin.fused import implementation
from qat_plugin.measure import interleaved_latency
from qat_plugin.qat import prepare, prepared_layers

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MODES = ("eager", "compiled")
LONGEST = 256  # tokens of one sequence


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="w4a8-g32")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--ffn", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024], help="tokens of a step")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-torchao", dest="torchao", action="store_false")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def llama(options: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=options.ffn,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, max_position_embeddings=LONGEST,
        use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(options.device, dtype).train()


def torchao(model: nn.Module, layers: set[str]) -> nn.Module:
    """torchao's own fake quantization of these layers."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_
    from torchao.quantization.qat import QATConfig

    base = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    quantize_(model, QATConfig(base, step="prepare"), lambda module, name: name in layers)
    return model


def contenders(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, nn.Module]:
    plain = llama(options, dtype)
    ours = prepare(copy.deepcopy(plain), options.scheme)
    models = {"plain": plain, "ours": ours}
    if options.torchao and options.scheme == "w4a8-g32":
        models["torchao"] = torchao(copy.deepcopy(plain), set(prepared_layers(ours)))
    return models


def step_of(model: nn.Module, tokens: int, options: argparse.Namespace, *, compiled: bool) -> Callable[[], object]:
    """One step of training on the same batch each time."""
    length = min(tokens, LONGEST)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(options.vocabulary, (tokens // length, length), generator=generator).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    run: Callable[..., Any] = torch.compile(model) if compiled else model

    def step() -> Tensor:
        logits = run(input_ids=ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def measured(options: argparse.Namespace, dtype: str, tokens: int, mode: str) -> dict[str, Any]:
    """Median seconds of each contender in one setting, and the ratios to plain."""
    torch.compiler.reset()
    models = contenders(options, DTYPES[dtype])
    steps = {name: step_of(model, tokens, options, compiled=mode == "compiled") for name, model in models.items()}
    found = interleaved_latency(steps, rounds=options.rounds, warmup=options.warmup, progress=False)
    seconds = {name: latency.p50 for name, latency in found.items()}
    ratios = {name: taken / seconds["plain"] for name, taken in seconds.items() if name != "plain"}
    return {"mode": mode, "dtype": dtype, "tokens": tokens, "seconds": seconds, "ratios": ratios}


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    ours = implementation(options.device)
    parameters = sum(parameter.numel() for parameter in llama(options, torch.float32).parameters())
    print(f"{parameters:,} parameters, {options.scheme}, {options.threads} threads, {options.rounds} rounds; {ours}")
    print(f"{'mode':10}{'type':6}{'tokens':>7}{'plain ms':>10}{'ours':>8}{'torchao':>9}")
    rows = []
    for mode, dtype, tokens in itertools.product(options.modes, options.dtypes, options.tokens):
        row = measured(options, dtype, tokens, mode)
        rows.append(row)
        ratios = {name: f"{ratio:.3f}" for name, ratio in row["ratios"].items()}
        plain = 1e3 * row["seconds"]["plain"]
        print(
            f"{mode:10}{dtype:6}{tokens:7}{plain:10.1f}{ratios['ours']:>8}{ratios.get('torchao', '-'):>9}", flush=True
        )
    write_json(options, parameters=parameters, form=str(ours), rows=rows)


if __name__ == "__main__":
    main()
