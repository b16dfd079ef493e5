"""The file's keys: what the runtime must know of the architecture, and what people want to know of the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qat_plugin.errors import ExportError
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.gguf.families import Family, family_of, head_dim
from qat_plugin.exporting.gguf.layout import Entry
from qat_plugin.exporting.gguf.options import Options
from qat_plugin.exporting.gguf.rope import add_rope, rope_of, sliding_base


def add_metadata(writer: Any, model: Exportable, options: Options, entries: Sequence[Entry]) -> None:
    """All keys but the vocabulary's."""
    import gguf

    config = model.config
    family = family_of(config, model.network)
    writer.add_type("model")
    writer.add_name(options.name or _name(model))
    writer.add_quantized_by("qat_plugin")
    writer.add_file_type(file_type(entries))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add_rope(writer, config)
    window = window_of(model)
    if window is not None:  # of Mistral too: llama.cpp passes over it there, qat_plugin.load does not
        writer.add_sliding_window(window)
    if family.sliding:
        writer.add_sliding_window_pattern(family.sliding)
    for name, value in _caps(config, family).items():
        getattr(writer, f"add_{name}")(value)


def window_of(model: Exportable) -> int | None:
    """Tokens that layers (of families with a pattern: some layers) attend to; ``None`` where it is all of them."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return None
    every = family_of(config, model.network).sliding is None
    return None if every and window >= config.max_position_embeddings else int(window)


def check_metadata(model: Exportable) -> None:
    """Raise unless the keys say what the model computes.

    Raises:
        ExportError: for an architecture that is not known, or a setting that it has no place for.
    """
    family = family_of(model.config, model.network)
    rope_of(model.config)
    sliding_base(model.config)
    _caps(model.config, family)


def file_type(entries: Sequence[Entry]) -> int:
    """llama.cpp's number for the type that most bytes of matrices are in."""
    import gguf

    bytes_of: dict[str, int] = {}
    for entry in entries:
        if len(entry.shape) > 1:
            bytes_of[entry.kind] = bytes_of.get(entry.kind, 0) + entry.nbytes
    kind = max(bytes_of, key=lambda name: bytes_of[name])
    name = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"
    return int(getattr(gguf.LlamaFileType, name))


def _caps(config: Any, family: Family) -> dict[str, float]:
    """Soft limits of logits: what gemma2 has."""
    caps = {name: getattr(config, name, None) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    given = {name: float(value) for name, value in caps.items() if value is not None}
    if family.architecture != "gemma2":
        if given:
            raise ExportError(f"GGUF's {family.architecture} has no place for {', '.join(given)}")
    elif len(given) < len(caps):
        missing = ", ".join(name for name in caps if name not in given)
        raise ExportError(f"llama.cpp always caps the logits of gemma2; this model has no {missing}")
    return given


def _name(model: Exportable) -> str:
    given = str(getattr(model.config, "_name_or_path", "") or "").rstrip("/").rpartition("/")[2]
    return given or type(model.network).__name__.removesuffix("ForCausalLM")
