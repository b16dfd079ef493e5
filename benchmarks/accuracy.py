"""What quantization costs a language model, without training and with it, as loss above the float model's.

    python benchmarks/accuracy.py MODEL TRAIN VALID --quick            int4 and int3, one seed; minutes
    python benchmarks/accuracy.py MODEL TRAIN VALID --seeds 0 1 2      all of it, mean and spread

Without training: each method on the model as it is, against it. With training: the baseline is the fine-tuned float
model, at the best of the learning rates given, and that model quantized afterwards. "QAT" has as many steps on the same
batches in the same order, from the float model, and by default the fine-tuned model for a teacher (which costs those
steps beside its own). "QAT on" begins where fine-tuning ended, with the same teacher: twice the steps in all, so the
float model fine-tuned on for as many stands beside it, and what is left of that after GPTQ. All with training are told
above the model fine-tuned once. Automatic policies spend a budget of bits per weight. Calibration and training see
TRAIN alone; VALID is only measured, behind the choice of nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from common import write_json

from qat_plugin import Policy, QuantizationAwareTraining, auto_policy, calibrate
from qat_plugin.data.text import TextData
from qat_plugin.measure import evaluate_lm
from qat_plugin.models.causal_lm import CausalLM, load_causal_lm
from qat_plugin.models.objective import Distillation

METHODS = ("rtn", "mse", "awq", "gptq", "awq-gptq")
TRAINED = ("rtn", "gptq")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a transformers directory")
    parser.add_argument("train", type=Path)
    parser.add_argument("valid", type=Path)
    parser.add_argument("--quick", action="store_true", help="int4 and int3, one seed, one budget")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--float-rates", type=float, nargs="+", default=[5e-4])
    parser.add_argument("--rates", type=json.loads, default={}, help='of QAT by bits, as {"4": 3e-4}')
    parser.add_argument("--scale-rate", type=float, default=1e-3)
    parser.add_argument("--distill", type=float, default=1.0, help="weight of the fine-tuned model's predictions")
    parser.add_argument("--hidden", type=float, default=3.0, help="weight of the error of its states")
    parser.add_argument("--on-rates", type=json.loads, default={}, help='of "QAT on", by bits')
    parser.add_argument("--rules", type=json.loads, default={}, help='group sizes, as {"*.down_proj": 43}')
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--budgets", nargs="*", default=["4.6bpw", "5.6bpw"])
    parser.add_argument("--measurements", type=int, default=72, help="whole policies measured for a budget")
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.bits, args.seeds, args.budgets, args.measurements = [4, 3], args.seeds[:1], args.budgets[:1], 24
    args.rates = {"4": 4e-4, "3": 5e-4, "2": 1.5e-3, **args.rates}
    args.on_rates = {"4": 2e-4, "3": 5e-4, "2": 1.5e-3, **args.on_rates}
    return args


class Bench:
    """One model, its text, and what was measured."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        self.model, self.tokenizer = load_causal_lm(args.model)
        self.model = self.model.float().eval()
        self.data = TextData(
            self.tokenizer, args.train, args.valid, sequence_length=256, batch_size=8, eval_tokens=20_400, seed=seed,
            progress=False,
        )  # fmt: skip
        self.data.setup("fit")
        L.seed_everything(seed, verbose=False)
        self.calibration = list(islice(self.data.train_dataloader(), 8))

    def policy(self, bits: int, suffix: str = "-asym") -> Policy:
        """Grids of so many bits."""
        rules = {pattern: f"w{bits}a16-g{size}{suffix}" for pattern, size in self.args.rules.items()}
        return Policy({**rules, "default": f"w{bits}a16-g{self.args.group}{suffix}"})

    def loss(self, model: Any) -> float:
        """Held-out loss, nats a token."""
        return evaluate_lm(model, self.data.val_dataloader(), progress=False).loss

    def quantized(self, model: Any, policy: Any, method: str) -> dict[str, Any]:
        """A model quantized without training."""
        started, mine = time.monotonic(), copy.deepcopy(model).eval()
        calibrate(mine, policy, self.calibration, method=method, progress=False)
        return {"loss": self.loss(mine), "seconds": time.monotonic() - started}

    def train(self, rate: float, callbacks: list[Any], start: Any = None, **learning: Any) -> Any:
        """A trained copy of the model, or of one to start from."""
        L.seed_everything(self.seed, verbose=False)
        module = CausalLM(copy.deepcopy(self.model if start is None else start), learning_rate=rate, **learning)
        L.Trainer(
            accelerator="cpu", max_steps=self.args.steps, max_epochs=-1, gradient_clip_val=1.0, callbacks=callbacks,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            limit_val_batches=0,
        ).fit(module, datamodule=self.data)  # fmt: skip
        return module.model.eval()

    def untrained(self) -> list[dict[str, Any]]:
        """The methods that do not train, and policies found for a budget."""
        args, found = self.args, [{"row": "float", "loss": self.loss(self.model), "base": True}]
        for bits in args.bits:
            for method in METHODS:
                found.append({"row": f"int{bits} {method}", **self.quantized(self.model, self.policy(bits), method)})
        attention = Policy({"attention": "w8a16", **{p: f"w4a16-g{g}-asym" for p, g in args.rules.items()},
                            "default": f"w4a16-g{args.group}-asym"})  # fmt: skip
        found.append({"row": "attention int8, rest int4, gptq", **self.quantized(self.model, attention, "gptq")})
        for budget in args.budgets:
            started = time.monotonic()
            chosen = auto_policy(
                copy.deepcopy(self.model), self.calibration, budget=budget, method="gradient", quantize="gptq",
                measurements=args.measurements, progress=False,
            )  # fmt: skip
            row = self.quantized(self.model, chosen.policy, "gptq")
            row["seconds"] = time.monotonic() - started
            found.append({"row": f"auto {budget}, gptq", "bits": chosen.bits_per_weight, **row})
        return found

    def trained(self) -> list[dict[str, Any]]:
        """Fine-tuning, what is left of it after quantization, and QAT."""
        args, found = self.args, []
        tuned = [(self.train(rate, []), rate) for rate in args.float_rates]
        losses = [self.loss(model) for model, _ in tuned]
        fine, rate = tuned[losses.index(min(losses))]
        found.append({"row": "fine-tuned", "rate": rate, "loss": min(losses), "base": True})
        further = self.train(rate, [], fine)
        found.append({"row": "fine-tuned on", "rate": rate, "loss": self.loss(further)})
        for bits in args.bits:
            for method in TRAINED:
                row = self.quantized(fine, self.policy(bits), method)
                found.append({"row": f"int{bits} fine-tuned, {method}", **row})
            row = self.quantized(further, self.policy(bits), "gptq")
            found.append({"row": f"int{bits} fine-tuned on, gptq", **row})
            found.append({"row": f"int{bits} QAT", **self.qat(bits, args.rates[str(bits)], None, fine)})
            found.append({"row": f"int{bits} QAT on", **self.qat(bits, args.on_rates[str(bits)], fine, fine)})
        return found

    def qat(self, bits: int, rate: float, start: Any, teacher: Any) -> dict[str, Any]:
        """One run of QAT with learned scales."""
        args, started = self.args, time.monotonic()
        callback = QuantizationAwareTraining(
            self.policy(bits), convert=False, learn_scales=True, initial="mse", scale_learning_rate=args.scale_rate
        )
        taught: dict[str, Any] = {"final_share": 0.0}
        if args.distill:
            objective = Distillation(args.distill, hidden=args.hidden)
            taught |= {"distillation": objective, "teacher": copy.deepcopy(teacher)}
        model = self.train(rate, [callback], start, **taught)
        return {"rate": rate, "loss": self.loss(model), "seconds": time.monotonic() - started}

    def rows(self) -> list[dict[str, Any]]:
        """Everything for one seed, each beside the float model that it is compared with."""
        found, base = [], math.nan
        for row in [*self.untrained(), *([] if self.args.no_training else self.trained())]:
            base = row["loss"] if row.pop("base", False) else base
            found.append({**row, "seed": self.seed, "excess": row["loss"] - base})
            print(json.dumps(found[-1]), flush=True)
        return found


def main() -> None:
    args = options()
    torch.set_num_threads(args.threads)
    found = [row for seed in args.seeds for row in Bench(args, seed).rows()]
    write_json(args, rows=found)
    print(f"\n{'row':<34}{'perplexity':>12}{'loss above float':>28}{'seconds':>9}   {len(args.seeds)} seed(s)")
    for name in dict.fromkeys(row["row"] for row in found):
        rows = [row for row in found if row["row"] == name]
        excess = [row["excess"] for row in rows]
        spread = f"{sum(excess) / len(excess):.4f} ({min(excess):.4f}..{max(excess):.4f})"
        perplexity = math.exp(sum(row["loss"] for row in rows) / len(rows))
        seconds = sum(row.get("seconds", 0.0) for row in rows) / len(rows)
        print(f"{name:<34}{perplexity:>12.4f}{spread:>28}{seconds:>9.0f}")


if __name__ == "__main__":
    main()
