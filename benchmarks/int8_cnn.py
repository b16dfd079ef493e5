"""The small image net in INT8: accuracy after PTQ and QAT beside float, and speed beside fp32 and bf16.

    python benchmarks/int8_cnn.py                          # scikit-learn's digits, three seeds, some minutes
    python benchmarks/int8_cnn.py --data DIR --width 16    # a folder in MNIST's format
    python benchmarks/int8_cnn.py --seeds 0 --sizes 28 --widths 32 64 --threads 1      # speed alone

Accuracy is that of held-out images, a split and a net a seed; PTQ calibrates on eight training batches, QAT and
"fine-tuned" train the float net on for the same steps. A speed is the median of calls that take turns, of nets with
random weights, eager: batch norm, activations, additions and concatenation included. "int8" computes in float32 between
its convolutions, "int8, bf16" in bf16. ``--cpu-time`` counts the CPU time of one thread, for a machine that is busy.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from common import write_json
from torch import nn

from qat_plugin import QuantizationAwareTraining, convert
from qat_plugin.data.images import ImageData
from qat_plugin.measure import evaluate_classifier, interleaved_latency
from qat_plugin.models.image import ImageClassifier, ImageRecipe, trained_net
from qat_plugin.models.resnet import SmallResNet
from qat_plugin.ptq import calibrate

SCHEME = "w8a8-static"
CALIBRATION_BATCHES = 8


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder in MNIST's format; scikit-learn's digits without it")
    parser.add_argument("--seeds", type=int, default=3, help="0 for speed alone")
    parser.add_argument("--width", type=int, default=32, help="of the net whose accuracy is measured")
    parser.add_argument("--steps", type=int, default=200, help="of the float net's training")
    parser.add_argument("--qat-steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of QAT and of fine-tuning")
    parser.add_argument("--start", type=float, default=0.5, help="share of QAT's steps before norms are folded")
    parser.add_argument("--sizes", nargs="*", type=int, default=[8, 28], help="pixels of a side, for speed")
    parser.add_argument("--widths", nargs="+", type=int, default=[32, 64], help="of the nets that are timed")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, not the clock's")
    parser.add_argument("--json", type=Path, help="write all figures there")
    return parser.parse_args()


def fitted(net: nn.Module, data: ImageData, options: argparse.Namespace, callbacks: list[Any]) -> nn.Module:
    """A copy of the net, trained on for ``--qat-steps``."""
    L.seed_everything(data.seed, verbose=False)
    module = ImageClassifier(copy.deepcopy(net), learning_rate=options.learning_rate)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=options.qat_steps, max_epochs=-1, callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, data)
    return module.model


def accuracies(seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Accuracy in percent on held-out images, of one seed."""
    data = ImageData(options.data, seed=seed)
    net = trained_net(ImageRecipe(width=options.width, steps=options.steps, seed=seed), data)
    batches = list(islice(data.train_dataloader(), CALIBRATION_BATCHES))
    nets = {
        "float": net,
        "PTQ": convert(calibrate(copy.deepcopy(net), SCHEME, batches, progress=False)),
        "fine-tuned": fitted(net, data, options, []),
        "QAT": fitted(net, data, options, [QuantizationAwareTraining(SCHEME, start=options.start)]),
    }
    nets["QAT, bf16"] = copy.deepcopy(nets["QAT"]).bfloat16()
    found = {}
    for name, one in nets.items():
        dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
        batched = [(images.to(dtype), labels) for images, labels in data.val_dataloader()]
        found[name] = 100 * evaluate_classifier(one, batched, progress=False).accuracy
    return found


def report_accuracy(options: argparse.Namespace) -> list[dict[str, float]]:
    rows = []
    for seed in range(options.seeds):
        rows.append(accuracies(seed, options))
        print(f"seed {seed}  " + "  ".join(f"{name} {value:.2f}" for name, value in rows[-1].items()))
    if len(rows) > 1:
        print("\n" + f"{'accuracy':12} {'mean':>8} {'spread':>8} {'to float':>9} {'worst':>7}   (points)")
        for name in rows[0]:
            values = [row[name] for row in rows]
            to_float = [row[name] - row["float"] for row in rows]
            mean, spread = statistics.mean(values), statistics.stdev(values)
            print(f"{name:12} {mean:8.2f} {spread:8.2f} {statistics.mean(to_float):+9.2f} {min(to_float):+7.2f}")
    return rows


def contenders(width: int, size: int) -> dict[str, tuple[nn.Module, torch.dtype]]:
    """The nets to time, on one set of weights with statistics of random images."""
    torch.manual_seed(0)
    net = SmallResNet(width=width).train()
    images = torch.rand(32, 1, size, size)
    with torch.no_grad():
        net(images)
    prepared = calibrate(copy.deepcopy(net.eval()), SCHEME, [images], progress=False)
    narrow = convert(copy.deepcopy(prepared), dtype=torch.bfloat16)
    return {
        "fp32": (net, torch.float32),
        "bf16": (copy.deepcopy(net).bfloat16(), torch.bfloat16),
        "int8": (convert(prepared), torch.float32),
        "int8, bf16": (narrow, torch.bfloat16),
    }


def timed(calls: dict[str, Callable[[], Any]], options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each call; they take turns."""
    if not options.cpu_time:
        found = interleaved_latency(calls, rounds=options.rounds, warmup=3, budget_s=60, progress=False)
        return {name: one.p50 for name, one in found.items()}
    took: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(options.rounds + 3):
        for name, call in calls.items():
            began = time.thread_time()
            call()
            if round_ >= 3:
                took[name].append(time.thread_time() - began)
    return {name: statistics.median(values) for name, values in took.items()}


def report_speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    cells = []
    print(f"\n{'net':>12} {'batch':>5} {'fp32':>8} {'bf16':>8} {'int8':>8} {'int8, bf16':>10} ms  against bf16; fp32")
    for size in options.sizes:
        for width in options.widths:
            nets = contenders(width, size)
            for batch in options.batches:
                x = torch.rand(batch, 1, size, size)
                inputs = {dtype: x.to(dtype) for _, dtype in nets.values()}
                calls = {name: partial(net, inputs[dtype]) for name, (net, dtype) in nets.items()}
                with torch.inference_mode():
                    ms = {name: 1e3 * seconds for name, seconds in timed(calls, options).items()}
                ratio = {base: [ms[base] / ms[name] for name in ("int8", "int8, bf16")] for base in ("bf16", "fp32")}
                print(
                    f"{f'{width} x {size}px':>12} {batch:5} {ms['fp32']:8.2f} {ms['bf16']:8.2f} {ms['int8']:8.2f} "
                    f"{ms['int8, bf16']:10.2f}     {ratio['bf16'][0]:.2f}x {ratio['bf16'][1]:.2f}x;  "
                    f"{ratio['fp32'][0]:.2f}x {ratio['fp32'][1]:.2f}x"
                )
                cells.append({"width": width, "size": size, "batch": batch, "ms": ms})
    return cells


def main() -> None:
    options = arguments()
    torch.set_num_threads(1 if options.cpu_time else options.threads)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = report_accuracy(options)
    cells = report_speed(options) if options.sizes and options.widths else []
    write_json(options, accuracy=rows, speed=cells)


if __name__ == "__main__":
    main()
