"""The options of the groups model, data and optimizer that this package brings, each with its own keys."""

from __future__ import annotations

from dataclasses import dataclass, fields

from omegaconf import MISSING

from qat_plugin.config.fields import absolute, check_above, check_at_least, check_choice, is_hub_name, option
from qat_plugin.errors import ConfigError


@dataclass
class EmbeddedModel:
    """A small Llama, trained on the spot and cached."""

    kind: str = option("embedded", "set by model=embedded")
    path: str | None = option(None, "use this directory, .gguf file or hub name instead, as model=transformers does")
    seed: int = option(0, "seed of its weights and of its data's order")
    hidden: int = option(256, "width")
    ffn: int = option(768, "width of the feed-forward layers")
    vocabulary: int = option(2048, "entries of its byte-level BPE")
    layers: int = option(4, "blocks")
    heads: int = option(4, "attention heads")
    steps: int = option(360, "optimizer steps of its own training")
    batch_size: int = option(8, "windows in a batch of its own training")
    sequence_length: int = option(256, "tokens in a window of its own training")
    learning_rate: float = option(3e-3, "peak learning rate of its own training")
    train_characters: int = option(4_000_000, "characters of source text that it learns from")
    valid_characters: int = option(250_000, "characters of source text that are held out")

    def __post_init__(self) -> None:
        for name in ("hidden", "ffn", "layers", "heads", "steps", "batch_size", "train_characters", "valid_characters"):
            check_at_least(f"model.{name}", getattr(self, name), 1)
        check_at_least("model.vocabulary", self.vocabulary, 257)
        check_at_least("model.sequence_length", self.sequence_length, 2)
        check_above("model.learning_rate", self.learning_rate, 0)
        if self.hidden % self.heads:
            raise ConfigError(f"model.hidden ({self.hidden}) must be divisible by model.heads ({self.heads})")

    def given(self) -> EmbeddedModel | TransformersModel:
        """The directory that was named, or itself."""
        return self if self.path is None else TransformersModel(path=self.path)


@dataclass
class TransformersModel:
    """A causal language model in a local transformers directory, or on a hub."""

    kind: str = option("transformers", "set by model=transformers")
    path: str = option(
        MISSING, "local directory with config.json, weights and tokenizer; a .gguf file; or a hub's org/name"
    )
    revision: str | None = option(None, "commit, tag or branch on the hub; what it meant is recorded")
    cache: bool = option(False, "QLoRA: keep the quantized base in the user's cache and reuse it")
    checksums: bool = option(True, "of a sealed .gguf file: refuse it when it was changed; false for a requantized one")

    def __post_init__(self) -> None:
        if not is_hub_name(self.path):
            self.path = absolute(self.path)


@dataclass
class ImageModel:
    """A small residual network for grey images, trained on the spot and cached."""

    kind: str = option("image", "set by model=image")
    width: int = option(32, "channels of its first block; the last has four times as many")
    classes: int = option(10, "number of classes")
    steps: int = option(200, "optimizer steps of its own training")
    learning_rate: float = option(3e-3, "peak learning rate of its own training")
    seed: int = option(0, "seed of its weights")

    def __post_init__(self) -> None:
        check_at_least("model.width", self.width, 2)
        check_at_least("model.classes", self.classes, 2)
        check_at_least("model.steps", self.steps, 1)
        check_above("model.learning_rate", self.learning_rate, 0)
        if self.width % 2:
            raise ConfigError(f"model.width={self.width} is not allowed: it must be even")


@dataclass
class Images:
    """How images are batched and split."""

    kind: str = option(MISSING, "set by data=OPTION")
    batch_size: int = option(64, "images in a training batch")
    eval_batch_size: int = option(32, "images in an evaluation batch, which is timed too")
    valid_fraction: float = option(0.2, "share that is held out where the folder does not say")

    def __post_init__(self) -> None:
        check_at_least("data.batch_size", self.batch_size, 1)
        check_at_least("data.eval_batch_size", self.eval_batch_size, 1)
        check_above("data.valid_fraction", self.valid_fraction, 0)
        if self.valid_fraction >= 1:
            raise ConfigError(f"data.valid_fraction={self.valid_fraction} is not allowed: it is a share, below 1")


@dataclass
class Digits(Images):
    """The 1,797 handwritten digits that come with scikit-learn."""

    kind: str = option("digits", "set by data=digits")
    path: str | None = option(None, "use this folder in MNIST's format instead, as data=idx does")

    def given(self) -> Digits | IdxFolder:
        """The folder that was named, or itself."""
        if self.path is None:
            return self
        images = {entry.name: getattr(self, entry.name) for entry in fields(Images) if entry.name != "kind"}
        return IdxFolder(path=self.path, **images)


@dataclass
class IdxFolder(Images):
    """A folder of images in MNIST's format."""

    kind: str = option("idx", "set by data=idx")
    path: str = option(MISSING, "folder with train-images-idx3-ubyte.gz and -labels-idx1-, or t10k's, or both")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.path = absolute(self.path)


@dataclass
class Windows:
    """How a text is cut and batched."""

    kind: str = option(MISSING, "set by data=OPTION")
    sequence_length: int = option(256, "tokens in a window")
    batch_size: int = option(8, "windows in a training batch")
    eval_batch_size: int | None = option(None, "windows in an evaluation batch; null for batch_size")
    eval_tokens: int | None = option(None, "evaluate on the first so many held-out tokens; null for all")

    def __post_init__(self) -> None:
        check_at_least("data.sequence_length", self.sequence_length, 2)
        check_at_least("data.batch_size", self.batch_size, 1)
        check_at_least("data.eval_batch_size", self.eval_batch_size, 1)
        check_at_least("data.eval_tokens", self.eval_tokens, 2)


@dataclass
class EmbeddedText(Windows):
    """The source text of Python's standard library."""

    kind: str = option("embedded", "set by data=embedded")
    train: str | None = option(None, "learn from this text file instead, as data=text does")
    valid: str | None = option(None, "its held-out file; null holds out the end of the training text")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.valid is not None and self.train is None:
            raise ConfigError(f"data.valid={self.valid} needs data.train=FILE beside it")

    def given(self) -> EmbeddedText | TextFiles:
        """The text files that were named, or itself."""
        if self.train is None:
            return self
        windows = {entry.name: getattr(self, entry.name) for entry in fields(Windows) if entry.name != "kind"}
        return TextFiles(train=self.train, valid=self.valid, **windows)


@dataclass
class TextFiles(Windows):
    """Text files."""

    kind: str = option("text", "set by data=text")
    train: str = option(MISSING, "training text: a .txt (documents separated by <|endoftext|>) or .jsonl file")
    valid: str | None = option(None, "held-out text of the same form; null holds out the end of the training text")
    key: str = option("text", "entry of each JSONL line that holds the text")
    packing: bool = option(False, "windows of whole documents that do not see each other; false for one running text")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.train = absolute(self.train)
        self.valid = None if self.valid is None else absolute(self.valid)


@dataclass
class InstructionFiles(Windows):
    """Prompts and answers: chat, Alpaca or prompt/completion records in JSONL files."""

    kind: str = option("instructions", "set by data=instructions")
    train: str = option(MISSING, "JSONL of {messages}, {instruction, input, output} or {prompt, completion}")
    valid: str | None = option(None, "held-out file of the same form; null holds out the end of the training file")
    packing: bool = option(True, "several examples in a window, none of which sees another")
    answers_only: bool = option(True, "learn the answers, not the prompts")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.train = absolute(self.train)
        self.valid = None if self.valid is None else absolute(self.valid)


@dataclass
class AdamW:
    """AdamW with a linear warm-up and a cosine decay."""

    kind: str = option("adamw", "set by optimizer=adamw")
    learning_rate: float = option(1e-4, "peak learning rate")
    weight_decay: float = option(0.01, "decoupled weight decay of matrices")
    warmup_steps: int = option(10, "optimizer steps of linear warm-up")
    final_share: float = option(0.1, "learning rate at the end of the cosine, as a share of the peak; 0 suits low bits")
    bits: int = option(32, "of the two moments: 32, or 8 (bitsandbytes' paged AdamW on CUDA, torchao's elsewhere)")

    def __post_init__(self) -> None:
        check_above("optimizer.learning_rate", self.learning_rate, 0)
        check_choice("optimizer.bits", str(self.bits), ("32", "8"))
        check_at_least("optimizer.weight_decay", self.weight_decay, 0)
        check_at_least("optimizer.warmup_steps", self.warmup_steps, 0)
        check_at_least("optimizer.final_share", self.final_share, 0)
        if self.final_share > 1:
            raise ConfigError(f"optimizer.final_share={self.final_share} is not allowed: it is a share, at most 1")
