"""compile_for_inference: the same model, two of one class apart, any prompt; attention of one token against SDPA."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qat_plugin import convert, native
from qat_plugin.errors import ConversionError
from qat_plugin.inference import ATTENTION, attention, compile_for_inference
from qat_plugin.inference.graph import OneProductPerInput
from tests.qlora.tiny_models import FAMILIES

needs_native = pytest.mark.skipif(not native.available(), reason=f"no native operators: {native.native().reason}")
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@needs_native
@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3), groups=st.integers(1, 3), ratio=st.integers(1, 4), length=st.integers(1, 70),
    width=st.sampled_from([1, 8, 16, 33, 64, 80, 128, 256]), dtype=st.sampled_from(list(DTYPES)),
    masked=st.sampled_from(["none", "one for all", "each"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_one_token_attends_as_in_float64(
    batch: int, groups: int, ratio: int, length: int, width: int, dtype: torch.dtype, masked: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query = random(batch, 1, groups * ratio, width).transpose(1, 2)  # as the models give them: not contiguous
    key, value = (random(batch, length, groups, width).transpose(1, 2) for _ in range(2))
    mask = None
    if masked != "none":
        mask = torch.rand(batch if masked == "each" else 1, 1, 1, length, generator=generator) < 0.6
        mask[..., seed % length] = True
        unseen = ~mask.expand(batch, 1, 1, length).transpose(2, 3)
        key, value = key.masked_fill(unseen, torch.nan), value.masked_fill(unseen, torch.nan)
    found = torch.ops.qat_plugin_native.attend(query, key, value, mask, 0.3)
    wanted = F.scaled_dot_product_attention(
        query.double(), key.nan_to_num().double(), value.nan_to_num().double(), attn_mask=mask, scale=0.3,
        enable_gqa=True,
    )  # fmt: skip
    assert found.shape == (batch, 1, groups * ratio, width) and found.dtype == dtype
    assert (found.double() - wanted.transpose(1, 2)).norm() <= 3 * DTYPES[dtype] * wanted.norm()


@needs_native
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_numbers_that_are_none_stay_none_and_nothing_seen_is_zero(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 2, n, 16).to(dtype) for n in (1, 5, 5))
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1] = False
    found = torch.ops.qat_plugin_native.attend(query, key, value, mask, 0.25)
    assert not found[1].any()
    assert found[0].all()
    query[0, 0, 0, 3] = torch.nan
    found = torch.ops.qat_plugin_native.attend(query, key, value, mask, 0.25)
    assert found[0, 0, 0].isnan().all()
    assert found[0, 0, 1].isfinite().all()


@needs_native
def test_attention_refuses_what_does_not_fit() -> None:
    attend, x = torch.ops.qat_plugin_native.attend, torch.zeros(1, 4, 1, 8)
    with pytest.raises(RuntimeError, match=r"takes query \[B, H, 1, D\]"):
        attend(torch.zeros(1, 4, 2, 8), x, x, None, 1.0)
    with pytest.raises(RuntimeError, match="does not fit key"):
        attend(x, torch.zeros(1, 3, 5, 8), torch.zeros(1, 3, 5, 8), None, 1.0)
    with pytest.raises(RuntimeError, match="the mask is not bool"):
        attend(x, torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), torch.zeros(1, 1, 1, 5), 1.0)
    with pytest.raises(RuntimeError, match="query is Float, key"):
        attend(x, torch.zeros(1, 2, 5, 8).half(), torch.zeros(1, 2, 5, 8).half(), None, 1.0)


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = FAMILIES["llama"]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def decoded(model: Any, ids: torch.Tensor, steps: int = 4, size: int = 24, mask: torch.Tensor | None = None) -> Any:
    """Logits of a prompt's last token and of the tokens fed after it, on a static cache."""
    cache, found = tf.StaticCache(model.config, max_cache_len=size), []
    with torch.inference_mode():
        for step in range(steps + 1):
            found.append(model(input_ids=ids, past_key_values=cache, use_cache=True, attention_mask=mask).logits[:, -1])
            ids = torch.full((ids.shape[0], 1), 5 + step)
            mask = None if mask is None else F.pad(mask, (0, 1), value=1)
    return torch.stack(found, 1)


def prompt(rows: int = 1, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.slow
def test_steps_are_those_of_the_model_and_two_models_stay_apart() -> None:
    """What torch.compile keeps is kept by code object: two models of one class must not take each other's weights."""
    floats = [llama(0), llama(1)]
    originals = [convert(model, "w8a8") for model in copy.deepcopy(floats)]
    compiled = [compile_for_inference(convert(model, "w8a8")) for model in floats]
    for _ in range(2):
        for original, fast in zip(originals, compiled, strict=True):
            torch.testing.assert_close(decoded(fast, prompt()), decoded(original, prompt()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(decoded(compiled[0], prompt()), decoded(compiled[1], prompt()))
    original, fast = originals[0], compiled[0]
    for rows, size in ((3, 30), (2, 40)):  # other caches, other batches
        torch.testing.assert_close(
            decoded(fast, prompt(rows), size=size), decoded(original, prompt(rows), size=size), rtol=1e-4, atol=1e-4
        )
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])  # a batch padded on the left
    torch.testing.assert_close(
        decoded(fast, prompt(2), mask=mask), decoded(original, prompt(2), mask=mask), rtol=1e-4, atol=1e-4
    )
    ids = prompt()
    assert torch.equal(
        fast.generate(ids, max_new_tokens=8, do_sample=False),
        original.generate(ids, max_new_tokens=8, do_sample=False),
    )


@pytest.mark.slow
def test_what_changes_later_is_seen() -> None:
    """A copy, another type, other weights: each has the results of the model that was not compiled."""
    fast = compile_for_inference(llama(0))
    decoded(fast, prompt())
    copied = copy.deepcopy(fast)
    copied.load_state_dict(llama(1).state_dict())
    torch.testing.assert_close(decoded(copied, prompt()), decoded(llama(1), prompt()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoded(fast, prompt()), decoded(llama(0), prompt()), rtol=1e-4, atol=1e-4)
    fast.load_state_dict(llama(1).state_dict())
    torch.testing.assert_close(decoded(fast, prompt()), decoded(llama(1), prompt()), rtol=1e-4, atol=1e-4)
    narrow = llama(1).bfloat16()
    torch.testing.assert_close(decoded(fast.bfloat16(), prompt()), decoded(narrow, prompt()), rtol=0.1, atol=0.1)


@pytest.mark.slow
def test_adapters_are_switched_on_and_off() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    fast = peft.get_peft_model(llama(), lora).eval()
    plain = copy.deepcopy(fast)
    compile_for_inference(fast)
    for _ in range(2):
        torch.testing.assert_close(decoded(fast, prompt()), decoded(plain, prompt()), rtol=1e-4, atol=1e-4)
        with fast.disable_adapter(), plain.disable_adapter():
            torch.testing.assert_close(decoded(fast, prompt()), decoded(plain, prompt()), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_rotary_tables_that_grow() -> None:
    """rope_type="dynamic" remembers how far it has been: what a module keeps is part of what is asked each time."""
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, rope_parameters=rope,
    )  # fmt: skip
    plain = tf.LlamaForCausalLM(config).eval()
    fast = compile_for_inference(copy.deepcopy(plain))
    for length, steps in ((4, 20), (20, 6), (4, 3)):
        one, other = (decoded(model, prompt(1, length), steps=steps, size=48) for model in (fast, plain))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_generate_keeps_what_the_caller_chooses() -> None:
    model = compile_for_inference(llama())
    ids = prompt()
    cache = tf.StaticCache(model.config, max_cache_len=20)
    given = model.generate(ids, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert torch.equal(given, llama().generate(ids, max_new_tokens=4, do_sample=False))
    assert model.generation_config.cache_implementation is None, "nothing is left behind for save_pretrained()"


@pytest.mark.slow
def test_beams_and_models_with_an_encoder() -> None:
    torch.manual_seed(0)
    encoded = tf.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0
    )  # fmt: skip
    ids = prompt(2)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    for plain, beams in ((llama(), 3), (tf.T5ForConditionalGeneration(encoded).eval(), 1)):
        fast = compile_for_inference(copy.deepcopy(plain))
        one, other = (model.generate(ids, num_beams=beams, **options) for model in (fast, plain))
        assert torch.equal(one, other)


def test_heads_of_other_widths_go_to_torch() -> None:
    query, key, value = torch.randn(1, 2, 1, 24), torch.randn(1, 2, 5, 24), torch.randn(1, 2, 5, 12)
    with torch.inference_mode():
        found, _ = attention(nn.Module(), query, key, value, None)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, key, value).transpose(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma3", "gpt2"])
def test_other_families(name: str) -> None:
    torch.manual_seed(0)
    original = convert(FAMILIES[name]().eval(), "w8a16")
    fast = compile_for_inference(copy.deepcopy(original))
    torch.testing.assert_close(decoded(fast, prompt(2)), decoded(original, prompt(2)), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(native.native().instruction_set in (None, "portable"), reason=f"{native.native()}")
@pytest.mark.slow
def test_layers_of_one_input_become_one_product() -> None:
    model = convert(llama(), "w4a16-g32")
    found: list[str] = []

    class Watching(OneProductPerInput):
        def __call__(self, graph: Any) -> None:
            super().__call__(graph)
            found.extend(str(node.target) for node in graph.nodes if "qat_plugin" in str(node.target))

        def uuid(self) -> None:  # not to be taken from a cache
            return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qat_plugin.inference.compiled.OneProductPerInput", Watching)
        decoded(compile_for_inference(model), prompt())
    layers = model.config.num_hidden_layers
    counts = {name: sum(name in target for target in found) for name in (".linears", ".linear.", ".dense", ".attend")}
    assert counts == {".linears": 2 * layers, ".linear.": 2 * layers, ".dense": 1, ".attend": layers}


def test_the_attention_of_one_token_is_ours_where_it_was_sdpa() -> None:
    model = llama()
    eager = tf.LlamaForCausalLM(copy.deepcopy(model.config))
    eager.set_attn_implementation("eager")
    compile_for_inference(eager.eval())
    assert eager.config._attn_implementation == "eager", "a choice of the user's stays"
    assert compile_for_inference(model) is model
    assert compile_for_inference(model) is model, "a second call changes nothing"
    expected = ATTENTION if native.vectorized() else "sdpa"
    assert model.config._attn_implementation == expected
    ids = prompt(2)
    growing = model.generate(ids, max_new_tokens=3, do_sample=False, cache_implementation="dynamic")
    assert growing.shape == (2, 12)


def test_training_and_gradients_are_left_alone() -> None:
    with pytest.raises(ConversionError, match="is in training mode"):
        compile_for_inference(llama().train())
    model = compile_for_inference(llama())
    model(input_ids=prompt(), labels=prompt()).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_without_a_compiler_the_model_stays_as_it_is() -> None:
    model = llama()
    forward = model.forward
    absent = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with absent, pytest.warns(UserWarning, match="LlamaForCausalLM is not compiled: torch.compile needs a C"):
        assert compile_for_inference(model) is model
    assert model.forward == forward


@pytest.mark.slow
def test_any_module_is_compiled_as_a_whole() -> None:
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), "w4a16-g32").eval()
    x = torch.randn(5, 64)
    expected = model(x)
    with torch.inference_mode():
        for rows in (5, 3, 1):
            torch.testing.assert_close(compile_for_inference(model)(x[:rows]), expected[:rows], rtol=1e-5, atol=1e-5)
