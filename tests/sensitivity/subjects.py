"""Small models that have learned something, so that their layers differ in what they can afford, and their data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

CLASSES = 6


class Classifier(nn.Module):
    """Three linears of different shapes and a hidden width of 172, which 32 does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.middle = nn.Linear(64, 172)
        self.last_hidden = nn.Linear(172, 32)
        self.classifier = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.middle(x))
        out: Tensor = self.classifier(torch.relu(self.last_hidden(x)))
        return out


def images(batches: int = 4, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(32, CLASSES, generator=generator)
    found = []
    for _ in range(batches):
        x = torch.randn(size, 32, generator=generator)
        found.append((x, (x @ teacher + (x**2) @ teacher.flip(0)).argmax(-1)))
    return found


def trained_classifier() -> nn.Module:
    torch.manual_seed(1)
    model, data = Classifier(), images(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def llama(*, tied: bool = True, layers: int = 2) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=86, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
        )
    ).eval()  # fmt: skip


def text(batches: int = 3, *, labels: bool = True) -> list[dict[str, Tensor]]:
    """Sequences in which the next token follows from the last one, most of the time."""
    generator = torch.Generator().manual_seed(5)
    rule = torch.randperm(96, generator=generator)
    found = []
    for _ in range(batches):
        ids = torch.randint(96, (6, 16), generator=generator)
        for t in range(1, 16):
            follows = torch.rand(6, generator=generator) < 0.85
            ids[:, t] = torch.where(follows, rule[ids[:, t - 1]], ids[:, t])
        found.append({"input_ids": ids, "labels": ids.clone()} if labels else {"input_ids": ids})
    return found


def trained_llama(*, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(2)
    model, data = llama(tied=tied).train(), text(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        optimizer.zero_grad()
        model(**data[step % len(data)]).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that measuring must leave alone."""
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "identities": [id(parameter) for parameter in model.parameters()],
        "classes": [type(module) for module in model.modules()],
        "modes": [module.training for module in model.modules()],
        "gradients": [(p.requires_grad, p.grad is None) for p in model.parameters()],
        "random": torch.get_rng_state(),
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    for name, value in before["weights"].items():
        assert torch.equal(after["weights"][name], value), name
    assert torch.equal(before["random"], after["random"])
    for key in ("identities", "classes", "modes", "gradients"):
        assert after[key] == before[key], key
