"""A small Llama that needs no download: trained on the spot on Python's standard library, then cached.

::

    standard library -> byte-level BPE -> windows -> a few hundred steps -> a transformers directory in the user's cache

The cache is keyed by a hash of everything that shaped the model, built in a directory of its own and moved into place
when it is whole, so that neither an interruption nor a second process leaves half a model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat_plugin.cache import cache_directory
from qat_plugin.data.documents import SEPARATOR
from qat_plugin.data.embedded import TRAIN_CHARACTERS, VALID_CHARACTERS, Corpus, embedded_corpus
from qat_plugin.data.text import TextData
from qat_plugin.errors import ConfigError
from qat_plugin.kernels.torchao_import import known_noise_dropped
from qat_plugin.measure import Progress, progressing
from qat_plugin.qlora.source import quiet_transformers

_MARK = "complete.json"
_FORMAT = 1
_BUILDING = ".building-"
_ABANDONED_S = 24 * 3600.0


@dataclass(frozen=True)
class EmbeddedRecipe:
    """What shapes the embedded model; its hash names the cache entry.

    Attributes:
        hidden, ffn, vocabulary: multiples of 256, so that every group size and every kernel fits.
        layers, heads: of the transformer.
        steps, batch_size, sequence_length: of its training.
        learning_rate: peak of a linear warm-up and a cosine decay.
        seed: of weights and data order.
        train_characters, valid_characters: how much source text.
    """

    hidden: int = 256
    ffn: int = 768
    vocabulary: int = 2048
    layers: int = 4
    heads: int = 4
    steps: int = 360
    batch_size: int = 8
    sequence_length: int = 256
    learning_rate: float = 3e-3
    seed: int = 0
    train_characters: int = TRAIN_CHARACTERS
    valid_characters: int = VALID_CHARACTERS

    def key(self, corpus: Corpus) -> str:
        """A hash of the recipe and its text."""
        content = json.dumps({**asdict(self), "corpus": corpus.fingerprint, "format": _FORMAT}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def embedded_lm(*, seed: int = 0, progress: Progress | bool = True, recipe: EmbeddedRecipe | None = None) -> Path:
    """The directory of the embedded model; trains it first when it is not cached (about a minute and a half).

    Args:
        seed: of weights and data order; ignored when ``recipe`` is given.
        progress: shown while training, as in :func:`~qat_plugin.measure.progressing`.
        recipe: another size.

    Raises:
        DataError: when this Python comes without its standard library's source.
        ConfigError: when the cache directory cannot be written.
    """
    recipe = recipe or EmbeddedRecipe(seed=seed)
    corpus = embedded_corpus(train_characters=recipe.train_characters, valid_characters=recipe.valid_characters)
    target = cache_directory() / f"embedded-{recipe.key(corpus)}"
    if _is_whole(target):
        return target
    if target.exists():
        print(f"the cached model {target} is damaged: training it again", file=sys.stderr)
        shutil.rmtree(target, ignore_errors=True)
    building = _place_to_build(target.parent)
    try:
        _build(building, recipe, corpus, progress)
        _move(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _place_to_build(cache: Path) -> Path:
    """A new directory beside the place of the model, so that the move at the end is a rename."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for abandoned in cache.glob(f"{_BUILDING}*"):  # of a process that was killed: nothing could tidy up after it
            if time.time() - abandoned.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(abandoned, ignore_errors=True)
        return Path(tempfile.mkdtemp(dir=cache, prefix=_BUILDING))
    except OSError as error:
        raise ConfigError(
            f"the embedded model cannot be kept in {cache} ({error.strerror}); set QAT_PLUGIN_CACHE to a directory "
            "that can be written"
        ) from error


def _is_whole(folder: Path) -> bool:
    """Whether every file is there with the sha256 it was saved with."""
    try:
        sums: dict[str, str] = json.loads((folder / _MARK).read_text(encoding="utf-8"))
        return bool(sums) and all(_sha256(folder / name) == expected for name, expected in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _move(building: Path, target: Path) -> None:
    """Into place; when another process was first, its model is as good."""
    try:
        os.replace(building, target)
    except OSError:
        if not _is_whole(target):
            raise


def _build(folder: Path, recipe: EmbeddedRecipe, corpus: Corpus, progress: Progress | bool) -> None:
    tokenizer = _tokenizer(recipe, corpus)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = _model(recipe, tokenizer)
        data = TextData(
            tokenizer, corpus.train_documents, corpus.valid_documents,
            sequence_length=recipe.sequence_length, batch_size=recipe.batch_size, seed=recipe.seed, progress=progress,
        )  # fmt: skip
        _train(model, data, recipe, progress)
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sums = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
    (folder / _MARK).write_text(json.dumps(sums, indent=1), encoding="utf-8")


def _tokenizer(recipe: EmbeddedRecipe, corpus: Corpus) -> Any:
    """Byte-level BPE; end of text and beginning of text are one token, as in GPT-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    with known_noise_dropped():
        from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus.train_documents.texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=SEPARATOR, eos_token=SEPARATOR)


def _model(recipe: EmbeddedRecipe, tokenizer: Any) -> Any:
    with known_noise_dropped():
        from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocabulary,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.ffn,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=2 * recipe.sequence_length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _train(model: Any, data: TextData, recipe: EmbeddedRecipe, progress: Progress | bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, recipe.steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - warmup) / max(1, recipe.steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    batches: Iterator[dict[str, Tensor]] = iter(())
    epoch = 0
    model.train()
    with progressing(progress, "training the embedded model", recipe.steps) as advance:
        for step in range(recipe.steps):
            batch = next(batches, None)
            if batch is None:
                loader = data.train_dataloader()
                loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
                batches, epoch = iter(loader), epoch + 1
                batch = next(batches)
            with _autocast():
                loss: Tensor = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance(step + 1)
    model.eval()


def _autocast() -> Any:
    """bf16 where the CPU multiplies in it; elsewhere it would be emulated, slowly."""
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.autocast("cpu", torch.bfloat16) if fast else nullcontext()
