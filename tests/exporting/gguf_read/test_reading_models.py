"""Files of each family, read onto this project's kernels, against transformers' own reading of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

import qat_plugin
from qat_plugin.errors import CheckpointError
from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.gguf.header import read_header
from qat_plugin.exporting.verification import relative_difference
from tests.exporting.gguf_read.files import IDS, SIZES, by_transformers, llama, logits, model_of, put, write

EXACT = 2e-6  # float32 sums in another order


def loaded(path: Path, **options: Any) -> Any:
    return qat_plugin.load(path, **options)[0]


def schemes(model: Any) -> set[str]:
    return {str(layer.scheme) for layer in Exportable(model, ()).layers.values()}


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [(Kind.F32, None), (Kind.Q4_0, "w4a16-g32"), (Kind.Q8_0, "w8a16-g32")],
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_third_partys_llama_runs_on_our_kernels(kind: Kind, scheme: str | None, tied: bool, tmp_path: Path) -> None:
    path = write(llama(tie_word_embeddings=tied), tmp_path / "m.gguf", kind)
    model = loaded(path)
    assert schemes(model) == ({scheme} if scheme else set())
    if scheme:
        assert model.lm_head.weight is model.model.embed_tokens.weight or not tied
        assert len(Exportable(model, ()).layers) == 2 * 7 + (1 if tied else 2)
    assert relative_difference(logits(model), by_transformers(path)) < EXACT


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16])
def test_half_precision_is_kept_as_it_is(kind: Kind, tmp_path: Path) -> None:
    path = write(llama(), tmp_path / "m.gguf", kind)
    model = loaded(path)
    assert relative_difference(logits(model), by_transformers(path)) < EXACT
    assert model.model.layers[0].mlp.up_proj.weight.data_.dtype is {Kind.F16: torch.float16}.get(kind, torch.bfloat16)


def test_grids_that_are_not_ours_become_float_numbers_and_are_told(tmp_path: Path) -> None:
    def kind(name: str) -> Kind:
        return Kind.Q5_0 if "ffn_down" in name else Kind.Q4_1 if "ffn_up" in name else Kind.Q4_0

    path = write(llama(), tmp_path / "m.gguf", kind)
    with pytest.warns(UserWarning, match="read as float numbers") as told:
        model = loaded(path)
    lines = [str(one.message) for one in told if "read as float numbers" in str(one.message)]
    assert len(lines) == 2
    assert any("2 tensors (blk.0.ffn_down.weight, blk.1.ffn_down.weight): Q5_0 is no grid" in line for line in lines)
    assert any("Q4_1 with minima that are no integer zero point" in line for line in lines)
    assert relative_difference(logits(model), by_transformers(path)) < EXACT


def test_k_quants_become_the_numbers_that_they_stand_for(tmp_path: Path) -> None:
    """Of random bytes, but for the scale at each block's end: the gguf package writes none."""
    model = llama(hidden_size=256, num_hidden_layers=1, tie_word_embeddings=True)
    blocks = np.random.default_rng(0).integers(0, 256, (128, 210), dtype=np.uint8)
    blocks[:, 208:] = np.array([1e-5], "<f2").view(np.uint8)
    state = model.state_dict()
    model.state_dict = lambda: {name: state[name] for name in state if "embed_tokens" not in name}

    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("token_embd.weight", blocks, raw_dtype=Kind.Q6_K)

    path = write(model, tmp_path / "m.gguf", Kind.Q4_0, more=more)
    with pytest.warns(UserWarning, match=r"read as float numbers: 1 tensor \(token_embd.weight\): Q6_K is no grid"):
        read = loaded(path)
    assert relative_difference(logits(read), by_transformers(path)) < EXACT


def test_an_integer_outside_our_grid_makes_its_tensor_float(tmp_path: Path) -> None:
    path = write(llama(), tmp_path / "m.gguf", Kind.Q8_0)
    put(path, read_header(path).tensors["blk.1.ffn_up.weight"].start + 34 * 7 + 2, 0x80)
    with pytest.warns(UserWarning, match=r"1 tensor \(blk.1.ffn_up.weight\): Q8_0 with integers of -128"):
        read = loaded(path)
    assert relative_difference(logits(read), by_transformers(path)) < EXACT


def test_q4_1_with_zero_points_keeps_its_integers(tmp_path: Path) -> None:
    from qat_plugin.numerics import round_to_nearest
    from qat_plugin.scheme import Scheme

    model = llama()
    held = {}
    with torch.no_grad():
        for layer in model.model.layers:  # onto the grid, so that the gguf package finds the same integers
            held[layer] = round_to_nearest(layer.mlp.up_proj.weight, Scheme.parse("w4a16-g32-asym"))
            layer.mlp.up_proj.weight.copy_(held[layer].dequantize())
    path = write(model, tmp_path / "m.gguf", lambda name: Kind.Q4_1 if "ffn_up" in name else Kind.F32)
    _as_ours(path, held)
    read = loaded(path)
    assert schemes(read) == {"w4a16-g32-asym"}
    assert relative_difference(logits(read), by_transformers(path)) < EXACT
    for layer, ours in zip(read.model.layers, held.values(), strict=True):
        found = layer.mlp.up_proj.weight.integers()
        assert torch.equal(found.q, ours.q) and torch.equal(found.scale, ours.scale)
        assert torch.equal(found.zero_point, ours.zero_point)


def _as_ours(path: Path, held: dict[Any, Any]) -> None:
    """Writes our blocks over those of the gguf package's own quantization."""
    header = read_header(path)
    with path.open("r+b") as file:
        for index, ours in enumerate(held.values()):
            scale = ours.scale.reshape(-1, 1).numpy()
            least = -(ours.zero_point.reshape(-1, 1).numpy() * scale)
            q = ours.q.reshape(-1, 32).numpy()
            blocks = np.concatenate(
                [scale.astype("<f2").view(np.uint8), least.astype("<f2").view(np.uint8), q[:, :16] | q[:, 16:] << 4], 1
            )
            file.seek(header.tensors[f"blk.{index}.ffn_up.weight"].start)
            file.write(blocks.tobytes())


def test_scales_stay_fp16_to_the_bit_and_so_do_the_files_bytes(tmp_path: Path) -> None:
    path = write(llama(), tmp_path / "m.gguf", Kind.Q4_0)
    held = loaded(path).model.layers[1].mlp.down_proj.weight.integers()
    assert not torch.equal(held.scale.bfloat16().float(), held.scale)  # bf16 would have changed them
    u = (held.q.reshape(-1, 32) + 8).numpy().astype(np.uint8)
    blocks = np.concatenate(
        [held.scale.reshape(-1, 1).numpy().astype("<f2").view(np.uint8), u[:, :16] | u[:, 16:] << 4], axis=1
    )
    assert blocks.tobytes() == read_header(path).data("blk.1.ffn_down.weight").tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_read_is_exported_again_without_loss(dtype: torch.dtype, tmp_path: Path) -> None:
    model = loaded(write(llama(), tmp_path / "m.gguf", Kind.Q4_0), dtype=dtype)
    made = qat_plugin.exporting.export_model(model, "converted", tmp_path / "again", progress=False)
    assert made.verification is not None
    assert (made.verification.integers, made.verification.scales, made.verification.rounded) == (0, 0, 0)
    assert torch.equal(logits(qat_plugin.load(made.path, dtype=dtype)[0]), logits(model))


def test_it_can_be_measured(tmp_path: Path) -> None:
    from qat_plugin.measure import evaluate_lm

    model = loaded(write(llama(), tmp_path / "m.gguf", Kind.Q4_0))
    quality = evaluate_lm(model, [{"input_ids": IDS, "labels": IDS}])
    wanted = model(input_ids=IDS, labels=IDS).loss.exp()
    assert quality.perplexity == pytest.approx(float(wanted), rel=1e-4)


def families() -> dict[str, Any]:
    import transformers as t

    heads = {**SIZES, "head_dim": 32}
    return {
        "qwen2": t.Qwen2Config(**SIZES, rms_norm_eps=1e-5),
        "qwen3": t.Qwen3Config(**heads),
        "gemma": t.GemmaConfig(**heads),
        "gemma2": t.Gemma2Config(**{**heads, "head_dim": 256}, sliding_window=8),
        "gemma3": t.Gemma3TextConfig(
            **{**heads, "num_hidden_layers": 7}, sliding_window=8, query_pre_attn_scalar=32,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
    }  # fmt: skip


def described(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    theta = config.rope_parameters.get("full_attention", config.rope_parameters).get("rope_theta")
    writer.add_rope_freq_base(theta)
    if getattr(config, "sliding_window", None) and architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma3":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma", "gemma2", "gemma3"])
def test_each_family_gives_what_the_written_model_gave(architecture: str, tmp_path: Path) -> None:
    config = families()[architecture]
    model = model_of(config)
    path = write(
        model, tmp_path / "m.gguf", architecture=architecture, more=lambda w: described(w, config, architecture)
    )
    read = loaded(path)
    assert type(read) is type(model)
    assert relative_difference(logits(read), logits(model)) < EXACT
    quantized = write(
        model, tmp_path / "q.gguf", Kind.Q4_0, architecture=architecture,
        more=lambda w: described(w, config, architecture),
    )  # fmt: skip
    read = loaded(quantized)
    assert schemes(read) == {"w4a16-g32"}
    if architecture in ("qwen2", "gemma2"):  # transformers itself reads less of the others' metadata
        assert relative_difference(logits(read), by_transformers(quantized)) < EXACT


def test_llamas_biases_are_permuted_too(tmp_path: Path) -> None:
    model = llama(attention_bias=True, mlp_bias=True)
    assert relative_difference(logits(loaded(write(model, tmp_path / "m.gguf"))), logits(model)) < EXACT


def test_mistrals_window_is_kept(tmp_path: Path) -> None:
    from transformers import MistralConfig

    model = model_of(MistralConfig(**SIZES, sliding_window=4, tie_word_embeddings=False))
    path = write(model, tmp_path / "m.gguf", more=lambda w: w.add_sliding_window(4))
    read = loaded(path)
    assert read.config.sliding_window == 4
    assert relative_difference(logits(read), logits(model)) < EXACT


@pytest.mark.parametrize("attention_factor", [None, 1.3])
def test_yarn_is_read_as_transformers_computes_it(attention_factor: float | None, tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    model = llama(rope_parameters=rope if attention_factor is None else {**rope, "attention_factor": attention_factor})

    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)
        if attention_factor is not None:  # beside 0.1 ln 4 + 1, which llama.cpp multiplies by
            writer.add_rope_scaling_attn_factors(attention_factor / (0.1 * np.log(4.0) + 1))

    read = loaded(write(model, tmp_path / "m.gguf", more=more))
    assert relative_difference(logits(read), logits(model)) < EXACT


@pytest.mark.parametrize("original", [8192, 64])
def test_llama_3s_frequencies_are_found_again(original: int, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": original,
    }  # fmt: skip
    model = llama(rope_parameters=rope, head_dim=32)
    plain = model.config.rope_parameters["rope_theta"] ** (-torch.arange(0, 32, 2).double() / 32)
    divisors = (plain / model.model.rotary_emb.inv_freq.double()).float()
    assert divisors.max() == pytest.approx(8)

    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_freq_base(500000.0)
        writer.add_key_length(32)
        writer.add_tensor("rope_freqs.weight", divisors.numpy())

    read = loaded(write(model, tmp_path / "m.gguf", more=more))
    assert read.config.rope_parameters == rope
    assert relative_difference(logits(read), logits(model)) < EXACT
    divisors *= 1.01
    with pytest.raises(CheckpointError, match="is not what Llama 3's frequencies are divided by"):
        loaded(write(model, tmp_path / "other.gguf", more=more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
            "scaled by 'longrope', which cannot be read",
        ),
        (lambda w: w.add_uint16("split.count", 3), "it is one of 3 parts of a model; join them first"),
        (lambda w: w.add_expert_count(8), "models of experts cannot be read"),
        (lambda w: w.add_rope_dimension_count(8), "a part of each head is rotated"),
        (lambda w: w.add_eos_token_id(128), "eos_token_id is 128, no row of the embedding"),
        (lambda w: w.add_tensor("blk.0.extra.weight", np.ones(4, np.float32)), "no place for blk.0.extra.weight"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(more: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        loaded(write(llama(), tmp_path / "m.gguf", more=more))


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
def test_a_window_of_layers_that_the_file_does_not_name_is_refused(kind: str, tmp_path: Path) -> None:
    from qat_plugin import convert
    from qat_plugin.exporting import export_model
    from tests.exporting.gguf.families import network

    windowed = {"use_sliding_window": True, "max_window_layers": 1}
    model = convert(network(kind, sliding_window=16, **windowed), "w4a16-g32")
    made = export_model(model, "gguf", tmp_path / "m", options={"outputs": False})
    with pytest.raises(CheckpointError, match="a window of 16 tokens, and it does not say which"):
        loaded(made.path)
    model = convert(network(kind, sliding_window=128, **windowed), "w4a16-g32")  # as long as its context
    loaded(export_model(model, "gguf", tmp_path / "whole", options={"outputs": False}).path)


def test_another_architecture_is_told_which_there_are(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"architecture phi2.*those that can: llama, qwen2"):
        loaded(empty_file(tmp_path / "m.gguf", "phi2"))


def empty_file(path: Path, architecture: str) -> Path:
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_model_larger_than_its_tensors_is_never_built(tmp_path: Path) -> None:
    model = llama()
    for name, value in (("hidden_size", 1 << 20), ("intermediate_size", 1 << 30), ("num_hidden_layers", 1 << 30),
                        ("num_attention_heads", 1 << 20)):  # fmt: skip
        wrong = write_with(model, tmp_path / "m.gguf", name, value)
        with pytest.raises(CheckpointError, match=r"is \d+, but|cannot share"):
            loaded(wrong)


def write_with(model: Any, path: Path, name: str, value: int) -> Path:
    """The model's tensors under metadata of another one."""
    write(model, path)
    header = read_header(path)
    key = {"hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
           "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count"}[name]  # fmt: skip
    with path.open("r+b") as file:
        file.seek(header.spans[f"llama.{key}"][0])
        file.write(value.to_bytes(4, "little"))
    return path


def test_scales_that_are_no_numbers_are_damage(tmp_path: Path) -> None:
    path = write(llama(), tmp_path / "m.gguf", Kind.Q4_0)
    start = read_header(path).tensors["blk.1.ffn_up.weight"].start
    with path.open("r+b") as file:
        file.seek(start + 5 * 18)
        file.write(b"\x00\x7c")
    with pytest.raises(CheckpointError, match=r"blk.1.ffn_up.weight is damaged: block 5 has a scale"):
        loaded(path)


def test_the_plan_names_the_kernels_that_run(tmp_path: Path) -> None:
    from qat_plugin import native

    path = write(llama(vocab_size=64), tmp_path / "m.gguf", Kind.Q4_0)
    with native.native_disabled():
        model = loaded(path, dtype=torch.bfloat16)
    entry = Exportable(model, ()).plan["model.layers.0.self_attn.q_proj"]
    assert entry.kernel == model.model.layers[0].self_attn.q_proj.weight.kernel_name == "dequantize"
    assert "aten-int4 takes scales in bfloat16, which does not hold this weight's exactly" in entry.note
    assert entry.bytes_after == 64 * 32 + 2 * 64 * 2
    wanted = logits(loaded(path, dtype=torch.bfloat16))
    assert relative_difference(logits(model), wanted) < 2e-2
