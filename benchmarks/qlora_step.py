"""Training steps of QLoRA side by side: against LoRA on a bf16 base, and against peft + bitsandbytes by hand.

    python benchmarks/qlora_step.py                                    # 124 M parameters, 1 x 512 tokens
    python benchmarks/qlora_step.py --sequence 1024 --rounds 9 --out step.json

Every contender has the same random Llama, rank, bf16 arithmetic, float32 adapters, gradient checkpointing and AdamW:

    lora         ours on the bf16 base              qlora        ours on the NF4 base
    hand-lora    peft on the bf16 base              hand-qlora   peft + bitsandbytes on the NF4 base

The ones by hand are what the libraries' own guides write: ``BitsAndBytesConfig``, ``prepare_model_for_kbit_training``,
``get_peft_model``, ``model(..., labels=...).loss.backward()`` under bf16 autocast. Steps are interleaved, one of each
contender a round, in changing order; the figures are medians, the ratios medians of each round's. Memory is the peak of
torch's allocator over a step, beside the bytes of the model (``--no-memory`` leaves it out: it runs torch's profiler).
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from common import add_model_options

from qat_plugin.measure.memory import cpu_allocations
from qat_plugin.models.objective import Objective
from qat_plugin.qlora import prepare
from qat_plugin.qlora.streaming import base_bytes

MIB = 1 << 20
NAMES = ("lora", "qlora", "hand-lora", "hand-qlora")
RATIOS = (("qlora", "lora"), ("hand-qlora", "hand-lora"), ("hand-qlora", "qlora"), ("hand-lora", "lora"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, layers=8, vocabulary=16384)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def saved(options: argparse.Namespace, folder: Path) -> Path:
    """A random Llama in bf16, as a directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=options.ffn,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=options.kv_heads,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def ours(folder: Path, options: argparse.Namespace, base: str | None) -> tuple[Any, Callable[[Any], Any]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    prepare(model, base, rank=options.rank, alpha=32)
    objective = Objective(model)
    return model, lambda ids: objective({"input_ids": ids, "labels": ids})


def by_hand(folder: Path, options: argparse.Namespace, *, quantized: bool) -> tuple[Any, Callable[[Any], Any]]:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    how: dict[str, Any] = {"quantization_config": four_bits, "device_map": "cpu"} if quantized else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **how)
    recompute = {"use_reentrant": False}
    if quantized:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=recompute)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=recompute)
    lora = LoraConfig(
        r=options.rank, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    peft = get_peft_model(model, lora)
    peft.train()

    def loss(ids: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return peft(input_ids=ids, labels=ids, use_cache=False).loss

    return peft, loss


class Contender:
    """A model, its optimizer and one step of training."""

    def __init__(self, name: str, folder: Path, options: argparse.Namespace) -> None:
        self.name = name
        if name.startswith("hand-"):
            self.model, self.loss = by_hand(folder, options, quantized=name == "hand-qlora")
        else:
            self.model, self.loss = ours(folder, options, "nf4-dq" if name == "qlora" else None)
        self.there = base_bytes(self.model)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trained = sum(parameter.numel() for parameter in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak = 0

    def step(self, ids: Any) -> float:
        """Train on a batch; the seconds it took."""
        started = time.perf_counter()
        loss = self.loss(ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.losses.append(loss.item())
        return time.perf_counter() - started


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = saved(options, Path(name))
        contenders = [Contender(name, folder, options) for name in options.only]
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(
        options.vocabulary, (options.warmup + options.rounds, options.batch, options.sequence), generator=generator
    )
    for contender in contenders:
        if options.memory:  # the first step: gradients and optimizer states are made in it
            with cpu_allocations() as memory:
                contender.step(batches[0])
                contender.step(batches[0])
            contender.peak = contender.there + memory.peak
            gc.collect()
        for ids in batches[: options.warmup]:
            contender.step(ids)
    order = random.Random(0)
    for ids in batches[options.warmup :]:
        for contender in order.sample(contenders, len(contenders)):
            contender.seconds.append(contender.step(ids))
    report(contenders, options)


def report(contenders: list[Contender], options: argparse.Namespace) -> None:
    parameters = sum(p.numel() for p in contenders[0].model.parameters() if not p.requires_grad)
    tokens = options.batch * options.sequence
    print(
        f"{parameters:,} parameters in the {contenders[0].name} base, {contenders[0].trained:,} trained; {tokens} "
        f"tokens a step, {options.threads} threads, {options.rounds} rounds"
    )
    print(f"{'':12}{'s/step':>8}{'tokens/s':>10}{'model MiB':>11}{'peak MiB':>10}  last loss")
    for one in contenders:
        middle = statistics.median(one.seconds)
        peak = f"{one.peak / MIB:.1f}" if one.peak else "-"
        print(
            f"{one.name:12}{middle:8.3f}{tokens / middle:10.1f}{one.there / MIB:11.1f}{peak:>10}  {one.losses[-1]:.4f}"
        )
    found = {one.name: one for one in contenders}
    ratios = {}
    for slow, fast in RATIOS:
        if slow in found and fast in found:
            pairs = zip(found[slow].seconds, found[fast].seconds, strict=True)
            time_ratio = statistics.median(a / b for a, b in pairs)
            ratios[f"{slow}/{fast}"] = {"time": time_ratio}
            line = f"{slow} / {fast}: step time {time_ratio:.3f}"
            if options.memory:
                ratios[f"{slow}/{fast}"]["memory"] = memory = found[slow].peak / found[fast].peak
                line += f", peak memory {memory:.3f}"
            print(line)
    if options.out:
        rows = {
            one.name: {"seconds": one.seconds, "peak": one.peak, "model": one.there, "losses": one.losses}
            for one in contenders
        }
        settings = {name: value for name, value in vars(options).items() if name != "out"}
        found_json = {"settings": settings, "torch": torch.__version__, "contenders": rows, "ratios": ratios}
        options.out.write_text(json.dumps(found_json, indent=1) + "\n")


if __name__ == "__main__":
    main()
