"""What QAT with learned scales keeps of a fine-tuned model's quality, against rounding the fine-tuned model.

Every row trains the same number of steps on the same batches in the same order; the float row's learning rate is the
best of those given. Printed is the loss above that row's, in nats a token, on held-out text.

    python benchmarks/qat_accuracy.py MODEL TRAIN VALID --bits 4 3 2 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from qat_plugin import Policy, QuantizationAwareTraining, QuantizationMonitor, prepare
from qat_plugin.data.text import TextData
from qat_plugin.measure import evaluate_lm
from qat_plugin.models.causal_lm import CausalLM, load_causal_lm
from qat_plugin.models.objective import Distillation


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a transformers directory")
    parser.add_argument("train", type=Path)
    parser.add_argument("valid", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--float-rates", type=float, nargs="+", default=[5e-4])
    parser.add_argument("--rates", type=float, nargs="+", help="of QAT, one for each of --bits")
    parser.add_argument("--scale-rate", type=float, default=None)
    parser.add_argument("--initial", choices=("minmax", "mse"), default="mse")
    parser.add_argument("--fixed-scales", action="store_true", help="min-max scales of the weights at each step")
    parser.add_argument("--distill", type=float, default=0.0, help="weight of the fine-tuned model's predictions")
    parser.add_argument("--hidden", type=float, default=0.0)
    parser.add_argument("--freeze", type=float, default=None)
    parser.add_argument("--rules", type=json.loads, default={}, help='group sizes, as {"*.down_proj": 43}')
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


class Bench:
    """One model, its text, and what was measured."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        self.model, self.tokenizer = load_causal_lm(args.model)
        self.data = TextData(
            self.tokenizer, args.train, args.valid, sequence_length=256, batch_size=8, eval_tokens=20_400, seed=seed,
            progress=False,
        )  # fmt: skip

    def policy(self, bits: int) -> Policy:
        """Asymmetric grids of so many bits."""
        rules = {pattern: f"w{bits}a16-g{size}-asym" for pattern, size in self.args.rules.items()}
        return Policy({**rules, "default": f"w{bits}a16-g{self.args.group}-asym"})

    def loss(self, model: Any) -> float:
        """Held-out loss, nats a token."""
        return evaluate_lm(model, self.data.val_dataloader(), progress=False).loss

    def train(self, rate: float, callbacks: list[Any], **learning: Any) -> Any:
        """A trained copy of the model."""
        L.seed_everything(self.seed, verbose=False)
        module = CausalLM(copy.deepcopy(self.model).float(), learning_rate=rate, **learning)
        L.Trainer(
            accelerator="cpu", max_steps=self.args.steps, max_epochs=-1, gradient_clip_val=1.0, callbacks=callbacks,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            limit_val_batches=0,
        ).fit(module, datamodule=self.data)  # fmt: skip
        return module

    def rows(self) -> list[dict[str, Any]]:
        """Everything for one seed."""
        args, found = self.args, []
        tuned = [(self.train(rate, []).model, rate) for rate in args.float_rates]
        losses = [self.loss(model) for model, _ in tuned]
        best = losses.index(min(losses))
        fine, rate = tuned[best]
        found.append({"row": "fine-tuned", "rate": rate, "loss": losses[best]})
        for index, bits in enumerate(args.bits):
            rounded = prepare(copy.deepcopy(fine).eval(), self.policy(bits))
            found.append({"row": f"int{bits} rounded", "rate": rate, "loss": self.loss(rounded)})
            own = args.rates[index] if args.rates else rate
            started = time.monotonic()
            found.append({"row": f"int{bits} QAT", "rate": own, **self.qat(bits, own, fine)})
            found[-1]["seconds"] = round(time.monotonic() - started)
        for row in found:
            row |= {"seed": self.seed, "perplexity": math.exp(row["loss"]), "excess": row["loss"] - losses[best]}
            print(json.dumps(row), flush=True)
        return found

    def qat(self, bits: int, rate: float, teacher: Any) -> dict[str, Any]:
        """One run of QAT."""
        args, monitor = self.args, QuantizationMonitor(every=20)
        learned: dict[str, Any] = {} if args.fixed_scales else {
            "learn_scales": True, "initial": args.initial, "scale_learning_rate": args.scale_rate,
        }  # fmt: skip
        callback = QuantizationAwareTraining(self.policy(bits), freeze=args.freeze, convert=False, **learned)
        taught: dict[str, Any] = {}
        if args.distill:
            distillation = Distillation(args.distill, hidden=args.hidden)
            taught = {"distillation": distillation, "teacher": copy.deepcopy(teacher)}
        module = self.train(rate, [callback, monitor], **taught)
        return {"loss": self.loss(module.model), "advice": monitor.advice}


def main() -> None:
    args = options()
    torch.set_num_threads(args.threads)
    found = [row for seed in args.seeds for row in Bench(args, seed).rows()]
    if args.json:
        args.json.write_text(
            json.dumps({"options": {k: str(v) for k, v in vars(args).items()}, "rows": found}, indent=1)
        )
    print(f"\n{'row':<16}{'excess loss':>24}{'perplexity':>14}   over {len(args.seeds)} seeds")
    for name in dict.fromkeys(row["row"] for row in found):
        excess = [row["excess"] for row in found if row["row"] == name]
        mean = sum(excess) / len(excess)
        spread = f"{mean:.4f} ({min(excess):.4f}..{max(excess):.4f})"
        losses = [row["loss"] for row in found if row["row"] == name]
        print(f"{name:<16}{spread:>24}{math.exp(sum(losses) / len(losses)):>14.4f}")


if __name__ == "__main__":
    main()
