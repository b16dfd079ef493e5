"""QLoRA at the shape of Llama-3-70B with random weights: does it fit, how fast is it, and was the forecast right?

    python benchmarks/qlora_70b.py --seq 2048 4096 --rank 16 --steps 3                      # one 80 GB card
    python benchmarks/qlora_70b.py --seq 2048 --optimizer adamw8bit --offload               # one 48 GB card
    python benchmarks/qlora_70b.py --scale 0.1 --device cpu --seq 256 --out small.json      # the same code, on a CPU

Weights are drawn on the device tensor by tensor and quantized at once, so the bf16 model is never there. Then real
training steps: NF4 base with double quantization, float32 adapters on all linear layers, gradient checkpointing,
chunked loss, AdamW. Throughput leaves out the first step. ``--scale`` narrows hidden and inner widths (to multiples
of 256), layers and vocabulary alike. Peaks are torch's allocator's: exact bytes on both
devices; on CUDA also what it reserved.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from qat_plugin.measure.memory import cpu_allocations, cuda_allocations
from qat_plugin.models.objective import Objective
from qat_plugin.models.optimizers import adamw
from qat_plugin.qlora import prepare, summary
from qat_plugin.qlora.architecture import empty_model
from qat_plugin.qlora.cards import measured_host, present_card, roofline
from qat_plugin.qlora.forecast import GIB, Settings, forecast_of
from qat_plugin.qlora.offload import offloading
from qat_plugin.qlora.outline import Outline, outline
from qat_plugin.qlora.prepare import base_plan
from qat_plugin.qlora.shell import Shell
from qat_plugin.qlora.streaming import base_bytes

DTYPE = torch.bfloat16
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCABULARY = 8192, 28672, 80, 64, 8, 128256


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", nargs="+", type=int, default=[2048])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--optimizer", choices=("adamw", "adamw8bit"), default="adamw")
    parser.add_argument("--offload", action="store_true", help="keep what is saved for backward in host memory")
    parser.add_argument("--whole-loss", action="store_true", help="all logits at once")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps {options.steps}: at least 2, the first is left out of the throughput")
    if not 0 < options.scale <= 1:
        parser.error(f"--scale {options.scale}: above 0, at most 1")
    return options


def shape(scale: float) -> Any:
    """Llama-3-70B's configuration, or one that is narrower and shallower; heads keep their width of 128."""
    from transformers import LlamaConfig

    def scaled(full: int, step: int) -> int:
        return max(step, round(full * scale / step) * step)

    hidden = scaled(HIDDEN, 256)
    heads = hidden // (HIDDEN // HEADS)
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=scaled(INNER, 256), num_hidden_layers=scaled(LAYERS, 1),
        num_attention_heads=heads, num_key_value_heads=max(h for h in range(1, KV_HEADS + 1) if heads % h == 0),
        vocab_size=scaled(VOCABULARY, 256), max_position_embeddings=8192, rope_theta=500000.0,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip


def built(config: Any, device: torch.device) -> tuple[Any, Outline, float]:
    """The model with random NF4 weights on the device, its outline, and the seconds it took."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        model = empty_model(Path(folder), DTYPE)
    plan = base_plan(model, "nf4-dq")
    facts = outline(model, plan)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    shell = Shell(model, plan, backend="bitsandbytes", dtype=DTYPE, device=device)
    for name, size in shapes.items():
        weight = torch.empty(size, dtype=DTYPE, device=device)
        shell.put(name, weight.normal_(std=0.02) if len(size) > 1 else weight.fill_(1))
        del weight
    shell.finish(set())
    return model, facts, time.perf_counter() - started


def trained(model: Any, options: argparse.Namespace, length: int, device: torch.device) -> dict[str, Any]:
    """Bytes and speed of some training steps."""
    there = base_bytes(model)
    objective = Objective(model, chunked=not options.whole_loss)
    ids = torch.randint(0, model.config.vocab_size, (options.batch, length), device=device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    seconds, losses = [], []
    with cuda_allocations(device) if device.type == "cuda" else cpu_allocations() as memory:
        optimizer = adamw(parameters, lr=1e-4, bits=8 if options.optimizer == "adamw8bit" else 32)
        for _ in range(options.steps):
            started = time.perf_counter()
            with ExitStack() as stack:
                if options.offload:
                    stack.enter_context(offloading(model))
                loss = objective({"input_ids": ids, "labels": ids})
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            losses.append(loss.item())  # waits for the device
            seconds.append(time.perf_counter() - started)
    model.zero_grad(set_to_none=True)
    speed = options.batch * length * (len(seconds) - 1) / sum(seconds[1:])
    return {
        "allocated": there + memory.peak, "reserved": memory.reserved, "model": there, "seconds": seconds,
        "tokens_per_s": speed, "losses": losses,
    }  # fmt: skip


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    torch.manual_seed(0)
    model, facts, seconds = built(shape(options.scale), device)
    print(f"{facts.parameters:,} parameters drawn and quantized on {device} in {seconds:.0f} s", flush=True)
    prepare(model, rank=options.rank)
    print(summary(model), flush=True)
    card = present_card() if device.type == "cuda" else measured_host()
    runs = []
    for length in options.seq:
        settings = Settings(
            rank=options.rank, batch_size=options.batch, sequence_length=length, dtype=DTYPE,
            optimizer=options.optimizer, offload=options.offload, device=str(device),
            chunked_loss=not options.whole_loss,
        )  # fmt: skip
        expected = forecast_of(facts, settings)
        speed = roofline(expected, card) if card else None
        print(f"\n{options.batch} x {length} tokens\n{expected.table()}", flush=True)
        found = trained(model, options, length, device)
        tensors = expected.total - sum(part.bytes for part in expected.parts if part.name == "reserve")
        print(
            f"measured: tensors {found['allocated'] / GIB:.3f} GiB (forecast {tensors / GIB:.3f}, "
            f"{tensors / found['allocated']:.3f} of it)"
            + (f", reserved {found['reserved'] / GIB:.3f} GiB" if found["reserved"] is not None else "")
        )
        wanted = f"roofline of {card.name}: {speed[0]:,.0f} to {speed[1]:,.0f}" if card and speed else "no roofline"
        print(f"{found['tokens_per_s']:,.1f} tokens/s ({wanted}); losses {[round(x, 3) for x in found['losses']]}")
        runs.append({**found, "forecast": expected.to_dict(), "forecast_tensors": tensors, "roofline": speed})
    if options.out:
        options.out.write_text(json.dumps({
            "parameters": facts.parameters, "scale": options.scale, "build_seconds": seconds, "device": str(device),
            "card": card and card.name, "torch": torch.__version__, "runs": runs,
        }, indent=1) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
