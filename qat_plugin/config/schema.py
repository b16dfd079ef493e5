"""The keys of a recipe: one dataclass a section, one line of help a key.

Hydra composes and type-checks these; what a type cannot say (ranges, allowed words) is checked when the composed
config becomes objects. No torch here: a mistake in a recipe is answered before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from omegaconf import MISSING

from qat_plugin.config.adapter_sections import LoraSection, MergeConfig
from qat_plugin.config.export_section import EXPORT_FORMATS, ExportConfig
from qat_plugin.config.fields import check_above, check_at_least, check_choice, help_text, option
from qat_plugin.errors import ConfigError
from qat_plugin.observers.spelling import DEFAULT_FOR_CALIBRATION, DEFAULT_FOR_TRAINING, KINDS, ObserverSpec

TASKS: Final = ("fit", "ptq", "sensitivity", "merge", "export", "plan", "evaluate", "doctor")
STAGES: Final = (
    "float", "ptq", "fine-tuned", "fine-tuned-ptq", "further", "further-ptq", "qat", "base", "qlora", "merged",
    "converted", "reloaded", "exported", "latency",
)  # fmt: skip
PRECISIONS: Final = ("32-true", "bf16-mixed", "bf16-true")
PTQ_METHODS: Final = ("rtn", "mse", "hqq", "gptq", "awq", "awq-gptq", "smoothquant")
FINE_TUNED: Final = "fine-tuned"
LADDER: Final = "ladder"  # rtn, mse, awq, gptq, then mixed schemes: the first that is good enough
_OBSERVERS: Final = ", ".join(KINDS)
_METHODS: Final = ", ".join(PTQ_METHODS)


@dataclass
class TaskConfig:
    """What to do."""

    name: str = option("fit", "fit, ptq, sensitivity, merge, export, plan, evaluate or doctor; written task=NAME")
    stages: list[str] = field(default_factory=list, metadata=help_text("rungs of the ladder: " + ", ".join(STAGES)))

    def __post_init__(self) -> None:
        check_choice("task", self.name, TASKS)
        for stage in self.stages:
            check_choice("task.stages", stage, STAGES)
        if twice := {stage for stage in self.stages if self.stages.count(stage) > 1}:
            raise ConfigError(f"task.stages names {', '.join(sorted(twice))} more than once")
        self.stages = [stage for stage in STAGES if stage in self.stages]
        _check_needs(self.stages, "fine-tuned-ptq", ["fine-tuned"])
        _check_needs(self.stages, "further", ["fine-tuned"])
        _check_needs(self.stages, "further-ptq", ["further"])
        _check_needs(self.stages, "merged", ["qlora"])
        _check_needs(self.stages, "converted", ["qat", "ptq", "merged"])
        _check_needs(self.stages, "reloaded", ["converted"])
        _check_needs(self.stages, "exported", ["converted", "qlora"])


@dataclass
class AutoConfig:
    """Choosing schemes by measuring: policy=auto with budget= or max_drop=, and task=sensitivity."""

    enabled: bool = option(False, "choose the policy; set by policy=auto")
    candidates: list[str] = field(
        default_factory=lambda: [
            "w8a16", "w4a16-g16-asym", "w4a16-g16", "w4a16-g32-asym", "w4a16-g32", "w4a16-g64-asym", "w4a16-g64",
            "w3a16-g32-asym", "w3a16-g64-asym", "w2a16-g16-asym",
        ],
        metadata=help_text("schemes to rank and to choose from; keep leaves a layer in float"),
    )  # fmt: skip
    method: str = option("kl", "kl: measure each layer in each scheme; gradient: estimate all in one pass")
    quantize: str | None = option(None, "how weights become integers while measuring; null for ptq.method")
    groups: str = option("fused", "fused: query, key and value (gate and up) take one scheme; layers: each its own")
    embeddings: bool = option(False, "let embeddings and output heads take part")
    measurements: int = option(96, "whole policies that are measured at most")
    calibration_batches: int = option(8, "training batches to measure on")

    def __post_init__(self) -> None:
        check_choice("policy.auto.method", self.method, ("kl", "gradient"))
        check_choice("policy.auto.groups", self.groups, ("fused", "layers"))
        check_at_least("policy.auto.measurements", self.measurements, 1)
        check_at_least("policy.auto.calibration_batches", self.calibration_batches, 1)
        if not self.candidates:
            raise ConfigError("policy.auto.candidates is empty: give the schemes to choose from")


@dataclass
class PolicyConfig:
    """Which layer gets which scheme."""

    default: str | None = option(None, "scheme of the linear layers that no rule matches; null keeps them")
    rules: dict[str, Any] = field(
        default_factory=dict,
        metadata=help_text("role or pattern -> scheme, e.g. policy.rules.ffn=w8a8; the first match decides"),
    )
    keep: list[str] = field(
        default_factory=list, metadata=help_text("roles or patterns of layers that stay as they are")
    )
    keep_symmetric: bool = option(
        False, "take symmetric schemes of 3 and 2 bits as given; false takes the -asym ones, and says so"
    )
    indivisible: str = option("divisor", "when a group size does not divide: divisor (largest below), keep or error")
    auto: AutoConfig = field(default_factory=AutoConfig, metadata=help_text("choosing schemes by measuring"))

    def __post_init__(self) -> None:
        check_choice("policy.indivisible", self.indivisible, ("divisor", "keep", "error"))
        if self.auto.enabled and (self.rules or self.default is not None):
            raise ConfigError(
                "policy=auto finds the rules itself: leave policy.rules and policy.default out (policy.keep stays)"
            )


@dataclass
class QatConfig:
    """Quantization-aware training."""

    begin: str = option(
        "pretrained",
        "weights QAT starts from: pretrained, or fine-tuned (those of that stage, whose steps come before QAT's own)",
    )
    start: int | float = option(0, "when fake quantization starts: optimizer step (1000) or fraction of the run (0.1)")
    freeze: int | float | None = option(None, "when scales and observers freeze: step or fraction; null for never")
    learn_scales: bool = option(False, "learn the weight scales with the weights (LSQ)")
    learn_zero_points: bool = option(False, "learn zero points with the scales (LSQ+)")
    initial: str = option(
        "minmax", "where learned scales begin: minmax, mse (least squared error), or gptq (with the keys of ptq)"
    )
    scale_learning_rate: float | None = option(None, "of learned scales; null for the weights'")
    monitor: int | bool = option(False, "log what flips, oscillates and clips: true, or every so many steps")
    observer: str = option(DEFAULT_FOR_TRAINING, f"what static activation scales follow: {_OBSERVERS}")

    def __post_init__(self) -> None:
        ObserverSpec.parse(self.observer, "qat.observer")
        check_choice("qat.begin", self.begin, ("pretrained", FINE_TUNED))
        check_choice("qat.initial", self.initial, ("minmax", "mse", "gptq"))
        check_above("qat.scale_learning_rate", self.scale_learning_rate, 0)
        if self.monitor is not True and self.monitor is not False:
            check_at_least("qat.monitor", self.monitor, 1)
        given = self.initial != "minmax" or self.learn_zero_points or self.scale_learning_rate is not None
        if given and not self.learn_scales:
            raise ConfigError(
                "qat.initial, qat.learn_zero_points and qat.scale_learning_rate need qat.learn_scales=true: they are "
                "of learned scales"
            )


@dataclass
class PtqConfig:
    """Quantization without training."""

    method: str = option("rtn", f"how weights become integers: {_METHODS}; or ladder, which climbs to max_drop")
    calibration_batches: int = option(8, "training batches that inputs and static activations are looked at on")
    observer: str = option(DEFAULT_FOR_CALIBRATION, f"what static activation scales are found by: {_OBSERVERS}")
    damping: float = option(0.1, "gptq: share of the mean second moment added to its diagonal")
    act_order: bool = option(True, "gptq: inputs with the largest second moments first")
    sweeps: int = option(4, "gptq: rounds of coordinate descent afterwards; 0 is the paper's algorithm")
    correct: float = option(0.5, "gptq: share of the way towards the float model's outputs; 0 is the paper's algorithm")

    def __post_init__(self) -> None:
        check_choice("ptq.method", self.method, (*PTQ_METHODS, LADDER))
        check_at_least("ptq.calibration_batches", self.calibration_batches, 1)
        ObserverSpec.parse(self.observer, "ptq.observer")
        check_above("ptq.damping", self.damping, 0)
        check_at_least("ptq.sweeps", self.sweeps, 0)
        check_at_least("ptq.correct", self.correct, 0)
        if self.correct > 1:
            raise ConfigError(f"ptq.correct={self.correct} is not allowed: it is a share, at most 1")


@dataclass
class DistillConfig:
    """Learning from the float model beside the data, in QAT and QAT + LoRA."""

    weight: float = option(0.0, "share of the loss that is KL to the float model's predictions; 0 for none, 1 for all")
    temperature: float = option(1.0, "softens both distributions")
    teacher: str = option("float", "float: the model that training starts from; fine-tuned: the one the ladder trained")
    hidden: float = option(0.0, "weight of the squared error of the states after each block; 0 for none")

    def __post_init__(self) -> None:
        check_at_least("distill.weight", self.weight, 0)
        if self.weight > 1:
            raise ConfigError(f"distill.weight={self.weight} is not allowed: it is a share, at most 1")
        check_above("distill.temperature", self.temperature, 0)
        check_choice("distill.teacher", self.teacher, ("float", "fine-tuned"))
        check_at_least("distill.hidden", self.hidden, 0)
        if self.hidden and not self.weight:
            raise ConfigError("distill.hidden comes beside the predictions: give distill.weight above 0")


@dataclass
class PlanConfig:
    """What task=plan counts with."""

    gpu_gib: float | None = option(
        None,
        "size of the card as it is sold, such as 16, 24, 48 or 80; torch has less of it, as the plan says; null "
        "for the card's, or any that fits",
    )
    card: str | None = option(
        None, "card to plan for, by its memory and peak figures, such as h100; null for what is here or fits"
    )
    shape: str | None = option(
        None, "task=plan: architecture in place of a model where no model.path is given, such as llama-3-70b"
    )

    def __post_init__(self) -> None:
        check_above("plan.gpu_gib", self.gpu_gib, 0)


@dataclass
class TrainerConfig:
    """How each training stage runs."""

    max_steps: int = option(200, "optimizer steps of each training stage")
    precision: str = option("32-true", ", ".join(PRECISIONS))
    accumulate: int = option(1, "batches whose gradients make one optimizer step")
    gradient_clip_val: float | None = option(1.0, "clip the gradient's norm to this; null for no clipping")
    val_interval: int | None = option(None, "validate every so many optimizer steps; null for the end only")
    checkpoint_interval: int | None = option(50, "save a resumable checkpoint every so many steps; null on Ctrl-C only")
    seed: int = option(0, "seed of the weights, the data's order and dropout")
    threads: int | None = option(None, "CPU threads; null for all cores")
    deterministic: bool = option(False, "refuse operations that are not deterministic")
    accelerator: str = option("auto", "cpu, cuda or auto")
    devices: int = option(1, "number of devices")
    logger: bool | str = option(False, "Lightning logger of the training curves: false, csv or tensorboard")

    def __post_init__(self) -> None:
        check_at_least("trainer.max_steps", self.max_steps, 1)
        check_choice("trainer.precision", self.precision, PRECISIONS)
        check_at_least("trainer.accumulate", self.accumulate, 1)
        check_above("trainer.gradient_clip_val", self.gradient_clip_val, 0)
        check_at_least("trainer.val_interval", self.val_interval, 1)
        check_at_least("trainer.checkpoint_interval", self.checkpoint_interval, 1)
        check_at_least("trainer.seed", self.seed, 0)
        check_at_least("trainer.threads", self.threads, 1)
        check_choice("trainer.accelerator", self.accelerator, ("cpu", "cuda", "auto"))
        if self.devices != 1:
            raise ConfigError(
                f"trainer.devices={self.devices} is not supported by the command: it evaluates and converts in one "
                "process; for more devices use the QuantizationAwareTraining callback in a script of your own"
            )
        if self.logger is not False:
            check_choice("trainer.logger", str(self.logger), ("csv", "tensorboard"), also="false")


@dataclass
class MeasureConfig:
    """What is measured at the end."""

    latency_rounds: int = option(30, "timed rounds of each model on each workload")
    latency_budget: float = option(20.0, "seconds after which the timing of a workload ends early")
    latency_tokens: list[int] = field(
        default_factory=lambda: [1, 128], metadata=help_text("workloads: forward passes at batch 1 over so many tokens")
    )

    def __post_init__(self) -> None:
        check_at_least("measure.latency_rounds", self.latency_rounds, 1)
        check_above("measure.latency_budget", self.latency_budget, 0)
        for tokens in self.latency_tokens:
            check_at_least("measure.latency_tokens", tokens, 1)


@dataclass
class RunConfig:
    """The run's folder."""

    dir: str | None = option(None, "folder of the run, continued if it exists; null for runs/<recipe>/<date_time>")


@dataclass
class Config:
    """All of a recipe."""

    name: str | None = option(None, "name of the run in reports; null for the recipe's")
    task: TaskConfig = field(default_factory=TaskConfig, metadata=help_text("what to do"))
    policy: PolicyConfig = field(default_factory=PolicyConfig, metadata=help_text("which layer gets which scheme"))
    budget: Any = field(
        default=None,
        metadata=help_text("policy=auto: 40% of the float file, 4.6bpw of the layers chosen for, or 25MB in all"),
    )
    max_drop: Any = field(
        default=None,
        metadata=help_text("policy=auto and ptq=ladder: KL to the float model in nats (0.02), or perplexity (1%)"),
    )
    qat: QatConfig = field(default_factory=QatConfig, metadata=help_text("quantization-aware training"))
    distill: DistillConfig = field(default_factory=DistillConfig, metadata=help_text("learning from the float model"))
    lora: LoraSection = field(default_factory=LoraSection, metadata=help_text("adapters on a frozen base"))
    merge: MergeConfig = field(default_factory=MergeConfig, metadata=help_text("folding adapters into weights"))
    ptq: PtqConfig = field(default_factory=PtqConfig, metadata=help_text("quantization without training"))
    plan: PlanConfig = field(default_factory=PlanConfig, metadata=help_text("what task=plan counts with"))
    model: Any = field(default=MISSING, metadata=help_text("the model: embedded, transformers, image or custom"))
    data: Any = field(
        default=MISSING, metadata=help_text("the data: embedded, text, instructions, digits, idx or custom")
    )
    optimizer: Any = field(default=MISSING, metadata=help_text("the optimizer: adamw, own or custom"))
    trainer: TrainerConfig = field(default_factory=TrainerConfig, metadata=help_text("how each training stage runs"))
    export: ExportConfig = field(default_factory=ExportConfig, metadata=help_text("a file for another runtime"))
    measure: MeasureConfig = field(default_factory=MeasureConfig, metadata=help_text("what is measured at the end"))
    run: RunConfig = field(default_factory=RunConfig, metadata=help_text("the run's folder"))
    verbose: bool = option(False, "show Lightning's and transformers' own messages")

    def __post_init__(self) -> None:
        given = [key for key in ("budget", "max_drop") if getattr(self, key) is not None]
        climbs = self.ptq.method == LADDER
        if given and not self.policy.auto.enabled and not (climbs and given == ["max_drop"]):
            raise ConfigError(f"{given[0]}={getattr(self, given[0])} is for policy=auto, which spends it")
        if len(given) == 2:
            raise ConfigError("budget and max_drop exclude each other: give one")
        if climbs and self.max_drop is None:
            raise ConfigError(
                "ptq.method=ladder needs to know when to stop: max_drop=1% (of perplexity) or max_drop=0.02 (KL, nats)"
            )
        stages = self.task.stages
        climbing = self.task.name in ("fit", "ptq")
        if self.export.format is not None and climbing and stages and "exported" not in stages:
            self.task.stages = TaskConfig(self.task.name, [*stages, "exported"]).stages
        if self.export.format is None and "exported" in stages:
            raise ConfigError(f"task.stages has 'exported', which needs a format: export={'|'.join(EXPORT_FORMATS)}")
        _check_begin(self.qat.begin, stages)
        if climbs and (self.policy.auto.enabled or "qat" in stages or (stages and "float" not in stages)):
            raise ConfigError(
                "ptq.method=ladder is for task=ptq, with the float stage to compare with, and without policy=auto, "
                "which is its last rung"
            )


def _check_begin(begin: str, stages: Sequence[str]) -> None:
    """QAT can only start from weights that the same run has trained, and only then is there a further rung."""
    if begin == FINE_TUNED and "qat" in stages and FINE_TUNED not in stages:
        added = ",".join(stage for stage in STAGES if stage in stages or stage == FINE_TUNED)
        raise ConfigError(
            "qat.begin=fine-tuned starts QAT from the stage 'fine-tuned', which task.stages leaves out: give "
            f"task.stages=[{added}], or qat.begin=pretrained"
        )
    if "further" in stages and begin != FINE_TUNED:
        raise ConfigError(
            "the stage 'further' trains the fine-tuned model for as many steps again, to compare QAT with that starts "
            "there: it needs qat.begin=fine-tuned; with qat.begin=pretrained 'fine-tuned' has QAT's steps already"
        )


def _check_needs(stages: Iterable[str], stage: str, any_of: Sequence[str]) -> None:
    if stage in stages and not any(other in stages for other in any_of):
        raise ConfigError(f"task.stages has {stage!r}, which needs {' or '.join(map(repr, any_of))} before it")
