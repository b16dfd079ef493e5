"""Tokenizers of each kind that GGUF holds, trained on a few lines."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = [
    "Once upon a time there was a little girl who lived near the forest, and the river.",
    "They said: don't run away! It's 12345 steps to the other side; we've seen 67 of them.",
    "def f(x):\n    return x + 1\n\n\tand tabs\ttoo", "naïve café, 日本語 and 😀 emoji", "THE OTHER Time, Other The",
]  # fmt: skip
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def wrapped(tokenizer: Tokenizer, **special: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_level(pattern: str | None = None, *, ignore_merges: bool = False, bos: bool = False) -> Any:
    """Byte-level BPE, 400 tokens; GPT-2's splitting without a pattern."""
    bpe = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if pattern is None:
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|begin|>", "<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(LINES * 3, trainer)
    bpe.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", bpe.token_to_id("<|begin|>"))]
        )
    return wrapped(bpe, bos_token="<|begin|>", eos_token="<|end|>")


def sentencepiece_like(*, prefix: bool = True, metaspace: bool = False) -> Any:
    """BPE over pieces with byte tokens, every way of joining a piece among its merges: Llama 2's form, or Gemma's."""
    words = sorted({word for line in LINES for word in line.split()}, key=len)
    pieces = [chr(code) for code in range(33, 127)] + ["▁", "日", "本", "é"]
    joined = ["▁t", "he", "▁a", "▁the", "re", "nd", "▁and", "er", "▁▁", "ing"] + [
        f"▁{word}"[:end] for word in words[:8] if word.isascii() for end in range(2, len(word) + 2)
    ]
    pieces += joined
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in vocabulary
        if not piece.startswith("<")
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    if metaspace:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first" if prefix else "never", split=False)
    else:
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
