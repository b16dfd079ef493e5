from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from qat_plugin.errors import DataError, QatError
from qat_plugin.measure import evaluate_classifier


def images(sizes: tuple[int, ...] = (4, 4, 2)) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(size, 3, 4, 4), torch.randint(0, 5, (size,))) for size in sizes]


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 5))


def test_loss_and_accuracy_are_means_over_examples() -> None:
    model, batches = net(), images()
    metrics = evaluate_classifier(model, batches)
    assert model.training
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(x) for x, _ in batches]).double()
    labels = torch.cat([y for _, y in batches])
    assert metrics.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert metrics.accuracy == (logits.argmax(1) == labels).double().mean().item()
    assert metrics.samples == 10
    assert metrics.counts == (4, 4, 2)
    assert (metrics.kl, metrics.top1_agreement) == (None, None)
    assert metrics.losses[2] == pytest.approx(F.cross_entropy(logits[8:], labels[8:]).item(), rel=1e-6)


def test_divergence_from_a_reference() -> None:
    model, reference, batches = net(), net(), images()
    metrics = evaluate_classifier(model, batches, reference=reference)
    x = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        p, q = (m.eval()(x).double().softmax(1) for m in (reference, model))
    assert metrics.kl == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-5)
    assert metrics.top1_agreement == (p.argmax(1) == q.argmax(1)).double().mean().item()


def test_a_mapping_gives_the_model_its_keywords() -> None:
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    model = BertForSequenceClassification(config)
    batch = {
        "input_ids": torch.randint(0, 30, (6, 7)),
        "attention_mask": torch.ones(6, 7, dtype=torch.int64),
        "labels": torch.randint(0, 3, (6,)),
    }
    metrics = evaluate_classifier(model, [batch])
    model.eval()
    with torch.no_grad():
        assert metrics.loss == pytest.approx(model(**batch).loss.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "no example"),
        ([(torch.randn(0, 3, 4, 4), torch.zeros(0, dtype=torch.int64))], "no example"),
        ([torch.randn(2, 3, 4, 4)], "batch 0 is Tensor"),
        ([(torch.randn(2, 3, 4, 4), torch.tensor([0, 5]))], "targets from 0 to 5, the model predicts classes 0 to 4"),
        ([(torch.randn(2, 3, 4, 4), torch.tensor([0, 1, 2]))], r"labels \(3,\) do not fit logits \(2, 5\)"),
    ],
)
def test_unusable_data_is_explained(batches: list[object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        evaluate_classifier(net(), batches)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_names_its_batch() -> None:
    batches = images()
    batches[1][0][0, 0, 0, 0] = math.nan
    with pytest.raises(QatError, match="not finite on batch 1"):
        evaluate_classifier(net(), batches)


def test_an_output_without_logits_is_explained() -> None:
    with pytest.raises(QatError, match="without logits of 2 dimensions"):
        evaluate_classifier(nn.Flatten(0), images())
