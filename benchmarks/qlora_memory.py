"""Does the forecast of memory hold? Trains a random Llama with an NF4 base on the CPU and compares peaks to the byte.

    python benchmarks/qlora_memory.py                      # 124 M parameters, 16 cases, some minutes on two cores
    python benchmarks/qlora_memory.py --dtypes bf16 --sequences 512 --hidden 512 --layers 4 --out memory.json

The peak is that of torch's allocator over two training steps (exact, qat_plugin.measure.memory), on top of the bytes of
the prepared model. Prints one line a case, ratios of forecast to measured; writes JSON with --out; exits with 1 when a
total is off by more than --tolerance.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from common import add_model_options

from qat_plugin.losses import chunked_cross_entropy
from qat_plugin.measure.memory import cpu_allocations
from qat_plugin.models.head import SplitModel, split
from qat_plugin.models.objective import next_tokens
from qat_plugin.qlora import prepare
from qat_plugin.qlora.forecast import Settings, forecast_of
from qat_plugin.qlora.outline import Outline, outline
from qat_plugin.qlora.prepare import base_plan, checkpoint_blocks
from qat_plugin.qlora.streaming import base_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 1 << 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, layers=8, vocabulary=16384)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--sequences", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=64, help="rows of logits in the chunked cases")
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def prepared(options: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, Outline]:
    """A random Llama with an NF4 base and adapters, and its outline from before."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=options.ffn,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=options.kv_heads,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    facts = outline(model, base_plan(model, "nf4-dq"))
    return prepare(model, rank=options.rank, dropout=options.dropout), facts


def measured(model: Any, settings: Settings, vocabulary: int, steps: int = 2) -> int:
    """Most bytes of tensors during training; gradients stay between steps, as when they are accumulated."""
    if settings.gradient_checkpointing:
        checkpoint_blocks(model)
    else:  # the second name is that of transformers before 5.20
        (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
    ids = torch.randint(0, vocabulary, (settings.batch_size, settings.sequence_length))
    parts, targets = split(model), next_tokens(ids)
    assert isinstance(parts, SplitModel), parts

    def loss() -> torch.Tensor:
        if settings.chunked_loss:
            hidden = parts.hidden({"input_ids": ids})
            return chunked_cross_entropy(hidden, parts.head, targets, chunk=int(settings.chunked_loss))
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    loss()  # what is made once is there before the measurement
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with cpu_allocations() as memory:
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        for _ in range(steps):
            loss().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    model.zero_grad(set_to_none=True)
    return base_bytes(model) + memory.peak


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    cases, worst = [], 0.0
    for name in options.dtypes:
        model, facts = prepared(options, DTYPES[name])
        for length, checkpointing, chunked in itertools.product(options.sequences, (True, False), (options.chunk, 0)):
            settings = Settings(
                rank=options.rank, batch_size=options.batch, sequence_length=length, dtype=DTYPES[name], device="cpu",
                gradient_checkpointing=checkpointing, chunked_loss=chunked, dropout=options.dropout,
            )  # fmt: skip
            expected, there = forecast_of(facts, settings), base_bytes(model)
            peak = measured(model, settings, options.vocabulary)
            ratio, moving = expected.total / peak, (expected.total - there) / (peak - there)
            worst = max(worst, abs(ratio - 1))
            cases.append({**expected.to_dict(), "measured": peak, "model": there, "ratio": ratio, "beside": moving})
            print(
                f"{name} T={length} checkpointing={checkpointing!s:5} chunk={chunked:3} measured "
                f"{peak / MIB:7.1f} MiB, forecast {expected.total / MIB:7.1f} ({ratio:.3f}; beside the model "
                f"{moving:.3f}), largest in the {expected.moment}", flush=True,
            )  # fmt: skip
    print(f"{facts.parameters:,} parameters; largest error of a total {worst:.1%}")
    if options.out:
        options.out.write_text(json.dumps({"parameters": facts.parameters, "cases": cases}, indent=1) + "\n")
    return int(worst > options.tolerance)


if __name__ == "__main__":
    sys.exit(main())
