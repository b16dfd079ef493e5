from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import qat_plugin.measure.predictions as predictions
from qat_plugin.errors import DataError, QatError
from qat_plugin.measure import LMMetrics, evaluate_lm, evaluating

VOCABULARY = 50
Batch = dict[str, torch.Tensor]


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).train()


def bigrams() -> nn.Sequential:
    """A model that takes ids by position only."""
    return nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY))


def windows(*shapes: tuple[int, int], ignored: float = 0.0) -> list[Batch]:
    batches = []
    for shape in shapes:
        ids = torch.randint(0, VOCABULARY, shape)
        labels = torch.where(torch.rand(shape) < ignored, -100, ids)
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def in_float64(model: nn.Module, batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits [N, V] in float64 and all targets [N], shifted by hand."""
    logits, targets = [], []
    model.eval()
    with torch.no_grad():
        for batch in batches:
            output = model(batch["input_ids"])
            output = getattr(output, "logits", output)
            for row, labels in zip(output, batch["labels"], strict=True):
                for t in range(len(labels) - 1):
                    if labels[t + 1] != -100:
                        logits.append(row[t].double())
                        targets.append(labels[t + 1])
    return torch.stack(logits), torch.stack(targets)


def test_loss_is_the_one_of_transformers() -> None:
    model, [batch] = llama(), windows((3, 12))
    metrics = evaluate_lm(model, [batch])
    model.eval()
    with torch.no_grad():
        theirs = model(**batch).loss.item()
    assert metrics.loss == pytest.approx(theirs, rel=1e-6)
    assert metrics.perplexity == pytest.approx(math.exp(theirs), rel=1e-6)
    assert metrics.tokens == 3 * 11


def test_ignored_labels_are_left_out_as_in_transformers() -> None:
    model, [batch] = llama(), windows((4, 16), ignored=0.4)
    metrics = evaluate_lm(model, [batch])
    model.eval()
    with torch.no_grad():
        assert metrics.loss == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    assert metrics.tokens == int((batch["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("make", [llama, bigrams])
def test_batches_of_unequal_size_are_weighted_by_tokens(make: type[nn.Module]) -> None:
    model, batches = make(), windows((4, 9), (1, 30), (2, 3), ignored=0.2)
    metrics = evaluate_lm(model, batches)
    logits, targets = in_float64(model, batches)
    assert metrics.loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)
    assert metrics.tokens == len(targets)


def test_the_batch_size_changes_nothing() -> None:
    model = bigrams()
    [whole] = windows((6, 20), ignored=0.1)
    singles = [{name: tensor[i : i + 1] for name, tensor in whole.items()} for i in range(6)]
    together, apart = evaluate_lm(model, [whole]), evaluate_lm(model, singles)
    assert together.counts == apart.counts
    assert together.loss == pytest.approx(apart.loss, rel=1e-6)
    assert together.losses == pytest.approx(apart.losses, rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), ignored=st.floats(0, 0.9))
def test_the_windows_losses_average_to_the_loss(seed: int, ignored: float) -> None:
    torch.manual_seed(seed)
    batches = windows((3, 8), (2, 8), ignored=ignored)
    batches[0]["labels"][0, 1] = 7  # at least one
    metrics = evaluate_lm(bigrams(), batches)
    assert sum(metrics.counts) == metrics.tokens
    mean = sum(n * loss for n, loss in zip(metrics.counts, metrics.losses, strict=True)) / metrics.tokens
    assert metrics.loss == pytest.approx(mean, rel=1e-12)
    assert 0 not in metrics.counts


def test_divergence_is_reference_to_model_in_nats() -> None:
    model, reference, batches = bigrams(), llama(), windows((3, 10), (2, 7), ignored=0.3)
    metrics = evaluate_lm(model, batches, reference=reference)
    (ours, _), (theirs, _) = in_float64(model, batches), in_float64(reference, batches)
    p, q = theirs.softmax(1), ours.softmax(1)
    assert metrics.kl == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-5)
    assert metrics.top1_agreement == (p.argmax(1) == q.argmax(1)).double().mean().item()
    assert metrics.loss == evaluate_lm(model, batches).loss


def test_a_model_does_not_diverge_from_itself() -> None:
    model = llama()
    metrics = evaluate_lm(model, windows((2, 9)), reference=model)
    assert (metrics.kl, metrics.top1_agreement) == (0.0, 1.0)
    assert model.training


def test_tokens_that_both_models_rule_out_do_not_make_the_divergence_nan() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bigrams()

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.inner(ids).index_fill(-1, torch.tensor([VOCABULARY - 1]), -math.inf)

    batches = [{"input_ids": torch.randint(0, VOCABULARY - 1, (2, 8))}]
    batches[0]["labels"] = batches[0]["input_ids"]
    metrics = evaluate_lm(Masked(), batches, reference=Masked())
    assert metrics.kl is not None
    assert 0 < metrics.kl < math.inf


def test_half_precision_logits_are_scored_in_float32() -> None:
    model, batches = llama().bfloat16(), windows((2, 30))
    metrics = evaluate_lm(model, batches)
    logits, targets = in_float64(model, batches)
    assert metrics.loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)


def test_large_vocabularies_are_scored_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference, batches = bigrams(), bigrams(), windows((2, 40), ignored=0.1)
    whole = evaluate_lm(model, batches, reference=reference)
    monkeypatch.setattr(predictions, "_CHUNK", 7 * VOCABULARY)
    pieces = evaluate_lm(model, batches, reference=reference)
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-12)
    assert pieces.kl == pytest.approx(whole.kl, rel=1e-12)
    assert pieces.top1_agreement == whole.top1_agreement


def test_logits_are_dropped_batch_by_batch() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bigrams()

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            nonlocal most
            most = max(most, sum(reference() is not None for reference in alive))
            logits = self.inner(ids)
            alive.append(weakref.ref(logits))
            return logits

    metrics = evaluate_lm(Watched(), windows(*[(2, 5)] * 12))
    assert len(alive) == len(metrics.losses) / 2 == 12
    assert most <= 1


def test_an_overflowing_perplexity_is_infinite() -> None:
    model = bigrams()
    with torch.no_grad():
        model[1].weight.mul_(1e5)
    metrics = evaluate_lm(model, windows((2, 20)))
    assert math.isfinite(metrics.loss)
    assert metrics.perplexity == math.inf


@pytest.mark.parametrize("wrap", [lambda x: (x, None), lambda x: {"logits": x}, lambda x: [x.sum(), x]])
def test_logits_are_found_in_what_models_return(wrap: object) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bigrams()

        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            return wrap(self.inner(input_ids))  # type: ignore[operator]

    model, batches = Wrapped(), windows((2, 5))
    assert evaluate_lm(model, batches) == evaluate_lm(model.inner, batches)


def test_the_attention_mask_reaches_the_model() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    [batch] = windows((2, 10))
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[0, :6] = 0
    metrics = evaluate_lm(model, [{**batch, "attention_mask": mask}])
    model.eval()
    with torch.no_grad():
        assert metrics.loss == pytest.approx(model(**batch, attention_mask=mask).loss.item(), rel=1e-6)
    assert metrics.loss != evaluate_lm(model, [batch]).loss


def test_a_loss_that_is_not_finite_names_its_batch() -> None:
    model, batches = bigrams(), windows((2, 5), (2, 5), (2, 5))
    with torch.no_grad():
        model[0].weight[VOCABULARY - 1] = math.nan
    for index, batch in enumerate(batches):
        batch["input_ids"] = batch["input_ids"].clamp(max=VOCABULARY - 2)
        batch["input_ids"][1, 2] = VOCABULARY - 1 if index == 2 else 0
    with pytest.raises(QatError, match=r"not finite on batch 2 \(1 of 4"):
        evaluate_lm(model, batches)
    assert model.training
    with pytest.raises(QatError, match="reference model's logits hold NaN on batch 2"):
        evaluate_lm(bigrams(), batches, reference=model)


IDS = torch.zeros(1, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "no token"),
        ([{"input_ids": IDS, "labels": torch.full_like(IDS, -100)}], "no token"),
        ([{"input_ids": IDS[:, :1], "labels": IDS[:, :1]}], "no token"),
        ([{"input_ids": IDS}], "batch 0 lacks 'labels'; it has 'input_ids'"),
        ([IDS], "batch 0 is Tensor"),
        ([{"input_ids": IDS, "labels": IDS[:, :3]}], r"\(1, 4\) and 'labels' \(1, 3\)"),
        ([{"input_ids": IDS[0], "labels": IDS[0]}], r"same shape \[batch, tokens\]"),
        (
            [{"input_ids": IDS, "labels": IDS + VOCABULARY}],
            "targets from 50 to 50, the model predicts classes 0 to",
        ),
        ([{"input_ids": IDS + VOCABULARY, "labels": IDS}], "token ids from 50 to 50"),
    ],
)
def test_unusable_data_is_explained(batches: list[object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        evaluate_lm(bigrams(), batches)  # type: ignore[arg-type]


def test_a_reference_with_another_vocabulary_is_refused() -> None:
    larger = nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY + 1))
    with pytest.raises(QatError, match="same vocabulary"):
        evaluate_lm(bigrams(), windows((1, 4)), reference=larger)


def test_a_stream_is_read_once_and_progress_follows_it() -> None:
    batches = windows(*[(1, 6)] * 3)

    def stream() -> Iterator[Batch]:
        yield from batches

    seen: list[tuple[int, int | None]] = []
    streamed = evaluate_lm(model := bigrams(), stream(), progress=lambda *now: seen.append(now))
    assert seen == [(1, None), (2, None), (3, None)]
    seen.clear()
    assert evaluate_lm(model, batches, progress=lambda *now: seen.append(now)) == streamed
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_modes_gradients_and_random_numbers_are_as_before() -> None:
    model = llama()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    loader = DataLoader(windows((4, 8))[0]["input_ids"], batch_size=2, shuffle=True)  # draws from the global generator
    batches = ({"input_ids": ids, "labels": ids} for ids in loader)
    state = torch.get_rng_state()
    evaluate_lm(model, batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_training_goes_on_after_an_evaluation() -> None:
    model = llama()
    evaluate_lm(model, windows((2, 8)))
    model(**windows((2, 8))[0]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(tensor.is_inference() for tensor in model.buffers())


def test_what_a_model_caches_while_it_is_measured_can_be_trained_on() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bigrams()
            self.cached: torch.Tensor | None = None

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            if self.cached is None:
                self.cached = torch.linspace(1, 2, VOCABULARY)
            return self.inner(ids) * self.cached

    model = Caching()
    evaluate_lm(model, windows((2, 8)))
    model(windows((2, 8))[0]["input_ids"]).sum().backward()
    assert model.inner[0].weight.grad is not None


def test_modes_are_restored_when_the_evaluation_fails() -> None:
    model = bigrams()
    model[1].eval()
    with pytest.raises(IndexError), evaluating(model):
        model(torch.tensor([[VOCABULARY]]))
    assert [module.training for module in model.modules()] == [True, True, False]


@pytest.mark.real
def test_a_real_model_on_real_text(shared_data: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(shared_data / "stories260K", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "stories260K")
    text = (shared_data / "tinystories_valid.txt").read_text(encoding="utf-8")[:40_000]
    ids = torch.tensor(tokenizer(text)["input_ids"])
    ids = ids[: len(ids) // 256 * 256].view(-1, 256)
    batches = [{"input_ids": part, "labels": part} for part in ids.split(8)]
    metrics = evaluate_lm(model, batches)
    with torch.no_grad():
        theirs = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in ids]).double().mean()
    assert metrics.loss == pytest.approx(theirs.item(), rel=1e-6)
    assert 3 < metrics.perplexity < 7  # a trained model, not noise over 512 tokens
    assert isinstance(metrics, LMMetrics)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_models_on_cuda_take_batches_from_the_cpu() -> None:
    model, reference, batches = llama(), llama(), windows((2, 12), ignored=0.2)
    on_cpu = evaluate_lm(model, batches, reference=reference)
    on_gpu = evaluate_lm(model.cuda(), batches, reference=reference)
    assert on_gpu.loss == pytest.approx(on_cpu.loss, rel=1e-3)
    assert on_gpu.kl == pytest.approx(on_cpu.kl, rel=1e-2)
