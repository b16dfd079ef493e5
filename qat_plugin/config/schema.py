"""The keys of a recipe: one dataclass a section, one line of help a key.

Hydra composes and type-checks these; what a type cannot say (ranges, allowed words) is checked when the composed
config becomes objects. No torch here: a mistake in a recipe is answered before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Final

from omegaconf import MISSING

from qat_plugin.errors import ConfigError, did_you_mean

TASKS: Final = ("fit", "ptq", "plan", "evaluate", "doctor")
STAGES: Final = ("float", "ptq", "fine-tuned", "fine-tuned-ptq", "qat", "converted", "reloaded", "latency")
PRECISIONS: Final = ("32-true", "bf16-mixed", "bf16-true")


def _absolute(path: str) -> str:
    """A path that means the same from any working directory: a run may be resumed from another one."""
    return str(Path(path).expanduser().absolute())


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def _key(default: Any, help: str) -> Any:
    return field(default=default, metadata=_help(help))


@dataclass
class TaskConfig:
    """What to do."""

    name: str = _key("fit", "fit, ptq, plan, evaluate or doctor; written task=NAME")
    stages: list[str] = field(default_factory=list, metadata=_help("rungs of the ladder: " + ", ".join(STAGES)))

    def __post_init__(self) -> None:
        check_choice("task", self.name, TASKS)
        for stage in self.stages:
            check_choice("task.stages", stage, STAGES)
        if twice := {stage for stage in self.stages if self.stages.count(stage) > 1}:
            raise ConfigError(f"task.stages names {', '.join(sorted(twice))} more than once")
        self.stages = [stage for stage in STAGES if stage in self.stages]
        _check_needs(self.stages, "fine-tuned-ptq", ["fine-tuned"])
        _check_needs(self.stages, "converted", ["qat", "ptq"])
        _check_needs(self.stages, "reloaded", ["converted"])


@dataclass
class PolicyConfig:
    """Which layer gets which scheme."""

    default: str | None = _key(None, "scheme of the linear layers that no rule matches; null keeps them")
    rules: dict[str, Any] = field(
        default_factory=dict,
        metadata=_help("role or pattern -> scheme, e.g. policy.rules.ffn=w8a8; the first match decides"),
    )
    keep: list[str] = field(default_factory=list, metadata=_help("roles or patterns of layers that stay as they are"))
    indivisible: str = _key("divisor", "when a group size does not divide: divisor (largest below), keep or error")

    def __post_init__(self) -> None:
        check_choice("policy.indivisible", self.indivisible, ("divisor", "keep", "error"))


@dataclass
class QatConfig:
    """Quantization-aware training."""

    start: int | float = _key(0, "when fake quantization starts: optimizer step (1000) or fraction of the run (0.1)")
    freeze: int | float | None = _key(None, "when scales and observers freeze: step or fraction; null for never")
    learn_scales: bool = _key(False, "learn the weight scales with the weights (LSQ)")


@dataclass
class PtqConfig:
    """Quantization without training."""

    method: str = _key("rtn", "rtn: round to nearest")
    calibration_batches: int = _key(8, "training batches that static activation scales are calibrated on")

    def __post_init__(self) -> None:
        check_choice("ptq.method", self.method, ("rtn",))
        check_at_least("ptq.calibration_batches", self.calibration_batches, 1)


@dataclass
class EmbeddedModel:
    """A small Llama, trained on the spot and cached."""

    kind: str = _key("embedded", "set by model=embedded")
    seed: int = _key(0, "seed of its weights and of its data's order")
    hidden: int = _key(256, "width")
    ffn: int = _key(768, "width of the feed-forward layers")
    vocabulary: int = _key(2048, "entries of its byte-level BPE")
    layers: int = _key(4, "blocks")
    heads: int = _key(4, "attention heads")
    steps: int = _key(360, "optimizer steps of its own training")
    batch_size: int = _key(8, "windows in a batch of its own training")
    sequence_length: int = _key(256, "tokens in a window of its own training")
    learning_rate: float = _key(3e-3, "peak learning rate of its own training")
    train_characters: int = _key(4_000_000, "characters of source text that it learns from")
    valid_characters: int = _key(250_000, "characters of source text that are held out")

    def __post_init__(self) -> None:
        for name in ("hidden", "ffn", "layers", "heads", "steps", "batch_size", "train_characters", "valid_characters"):
            check_at_least(f"model.{name}", getattr(self, name), 1)
        check_at_least("model.vocabulary", self.vocabulary, 257)
        check_at_least("model.sequence_length", self.sequence_length, 2)
        check_above("model.learning_rate", self.learning_rate, 0)
        if self.hidden % self.heads:
            raise ConfigError(f"model.hidden ({self.hidden}) must be divisible by model.heads ({self.heads})")


@dataclass
class TransformersModel:
    """A causal language model in a local transformers directory."""

    kind: str = _key("transformers", "set by model=transformers")
    path: str = _key(MISSING, "local directory with config.json, weights and tokenizer")

    def __post_init__(self) -> None:
        self.path = _absolute(self.path)


@dataclass
class Windows:
    """How a text is cut and batched."""

    kind: str = _key(MISSING, "set by data=OPTION")
    sequence_length: int = _key(256, "tokens in a window")
    batch_size: int = _key(8, "windows in a training batch")
    eval_batch_size: int | None = _key(None, "windows in an evaluation batch; null for batch_size")
    eval_tokens: int | None = _key(None, "evaluate on the first so many held-out tokens; null for all")

    def __post_init__(self) -> None:
        check_at_least("data.sequence_length", self.sequence_length, 2)
        check_at_least("data.batch_size", self.batch_size, 1)
        check_at_least("data.eval_batch_size", self.eval_batch_size, 1)
        check_at_least("data.eval_tokens", self.eval_tokens, 2)


@dataclass
class EmbeddedText(Windows):
    """The source text of Python's standard library."""

    kind: str = _key("embedded", "set by data=embedded")


@dataclass
class TextFiles(Windows):
    """Text files."""

    kind: str = _key("text", "set by data=text")
    train: str = _key(MISSING, "training text: a .txt (documents separated by <|endoftext|>) or .jsonl file")
    valid: str | None = _key(None, "held-out text of the same form; null holds out the end of the training text")
    key: str = _key("text", "entry of each JSONL line that holds the text")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.train = _absolute(self.train)
        self.valid = None if self.valid is None else _absolute(self.valid)


@dataclass
class AdamW:
    """AdamW with a linear warm-up and a cosine decay."""

    kind: str = _key("adamw", "set by optimizer=adamw")
    learning_rate: float = _key(1e-4, "peak learning rate")
    weight_decay: float = _key(0.01, "decoupled weight decay of matrices")
    warmup_steps: int = _key(10, "optimizer steps of linear warm-up")

    def __post_init__(self) -> None:
        check_above("optimizer.learning_rate", self.learning_rate, 0)
        check_at_least("optimizer.weight_decay", self.weight_decay, 0)
        check_at_least("optimizer.warmup_steps", self.warmup_steps, 0)


@dataclass
class TrainerConfig:
    """How each training stage runs."""

    max_steps: int = _key(200, "optimizer steps of each training stage")
    precision: str = _key("32-true", ", ".join(PRECISIONS))
    accumulate: int = _key(1, "batches whose gradients make one optimizer step")
    gradient_clip_val: float | None = _key(1.0, "clip the gradient's norm to this; null for no clipping")
    val_interval: int | None = _key(None, "validate every so many optimizer steps; null for the end only")
    checkpoint_interval: int | None = _key(50, "save a resumable checkpoint every so many steps; null on Ctrl-C only")
    seed: int = _key(0, "seed of the weights, the data's order and dropout")
    threads: int | None = _key(None, "CPU threads; null for all cores")
    deterministic: bool = _key(False, "refuse operations that are not deterministic")
    accelerator: str = _key("auto", "cpu, cuda or auto")
    devices: int = _key(1, "number of devices")
    logger: bool | str = _key(False, "Lightning logger of the training curves: false, csv or tensorboard")

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

    latency_rounds: int = _key(30, "timed rounds of each model on each workload")
    latency_budget: float = _key(20.0, "seconds after which the timing of a workload ends early")
    latency_tokens: list[int] = field(
        default_factory=lambda: [1, 128], metadata=_help("workloads: forward passes at batch 1 over so many tokens")
    )

    def __post_init__(self) -> None:
        check_at_least("measure.latency_rounds", self.latency_rounds, 1)
        check_above("measure.latency_budget", self.latency_budget, 0)
        for tokens in self.latency_tokens:
            check_at_least("measure.latency_tokens", tokens, 1)


@dataclass
class RunConfig:
    """The run's folder."""

    dir: str | None = _key(None, "folder of the run, continued if it exists; null for runs/<recipe>/<date_time>")


@dataclass
class Config:
    """All of a recipe."""

    name: str | None = _key(None, "name of the run in reports; null for the recipe's")
    task: TaskConfig = field(default_factory=TaskConfig, metadata=_help("what to do"))
    policy: PolicyConfig = field(default_factory=PolicyConfig, metadata=_help("which layer gets which scheme"))
    qat: QatConfig = field(default_factory=QatConfig, metadata=_help("quantization-aware training"))
    ptq: PtqConfig = field(default_factory=PtqConfig, metadata=_help("quantization without training"))
    model: Any = field(default=MISSING, metadata=_help("the model: embedded, transformers or custom"))
    data: Any = field(default=MISSING, metadata=_help("the data: embedded, text or custom"))
    optimizer: Any = field(default=MISSING, metadata=_help("the optimizer: adamw, own or custom"))
    trainer: TrainerConfig = field(default_factory=TrainerConfig, metadata=_help("how each training stage runs"))
    measure: MeasureConfig = field(default_factory=MeasureConfig, metadata=_help("what is measured at the end"))
    run: RunConfig = field(default_factory=RunConfig, metadata=_help("the run's folder"))
    verbose: bool = _key(False, "show Lightning's and transformers' own messages")


def keys_with_help(section: type = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, default, help) of every key below a section."""
    for entry in fields(section):
        name = prefix + entry.name
        default: Any = entry.default if entry.default_factory is NO_DEFAULT else entry.default_factory()
        if is_dataclass(default):
            yield from keys_with_help(type(default), name + ".")
        else:
            yield name, _spelled(default), entry.metadata["help"]


def help_of(section: object, name: str) -> str:
    """The line of help of one key of a section's dataclass; empty where there is none."""
    entries = fields(section) if isinstance(section, type) and is_dataclass(section) else ()
    return next((str(entry.metadata["help"]) for entry in entries if entry.name == name), "")


def _spelled(value: Any) -> str:
    """A default as it is written on the command line."""
    if isinstance(value, list):
        return "[" + ",".join(map(str, value)) + "]"
    return {"None": "null", "True": "true", "False": "false", "???": "(needed)"}.get(str(value), str(value))


def check_choice(key: str, value: str, allowed: Sequence[str], also: str = "") -> None:
    """Raise ConfigError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        listed = ", ".join([*allowed, also] if also else allowed)
        raise ConfigError(f"{key}={value} is not allowed: it is one of {listed}.{did_you_mean(value, allowed)}")


def check_at_least(key: str, value: float | None, least: float) -> None:
    """Raise ConfigError when a number is given and below ``least`` (or NaN)."""
    if value is not None and not value >= least:
        raise ConfigError(f"{key}={value} is not allowed: it must be at least {least}")


def check_above(key: str, value: float | None, bound: float) -> None:
    """Raise ConfigError when a number is given and not above ``bound``."""
    if value is not None and not value > bound:
        raise ConfigError(f"{key}={value} is not allowed: it must be above {bound}")


def _check_needs(stages: Iterable[str], stage: str, any_of: Sequence[str]) -> None:
    if stage in stages and not any(other in stages for other in any_of):
        raise ConfigError(f"task.stages has {stage!r}, which needs {' or '.join(map(repr, any_of))} before it")
