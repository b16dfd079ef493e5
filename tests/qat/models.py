"""Small random models of each family, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 96


class MLP(nn.Module):
    """Two linears; 64 -> 128 -> 64, sizes that every kernel takes."""

    def __init__(self, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(x)))
        return out


def mlp() -> nn.Module:
    return MLP()


def sequential() -> nn.Module:
    return nn.Sequential(nn.Embedding(VOCABULARY, 64), nn.Linear(64, 64, bias=False), nn.GELU(), nn.Linear(64, 32))


def llama(*, tied: bool = True) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
        )
    ).eval()


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=64,
            n_layer=1,
            n_head=4,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()


def bert() -> nn.Module:
    return BertModel(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).eval()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


class Scaled(nn.Linear):
    """Its own forward scales the input feature by feature before the product: activations must be rounded after."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.gain = nn.Parameter(torch.linspace(0.1, 9.0, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.gain)


class WithOptions(nn.Linear):
    """Its own forward takes its input by keyword and wants another argument."""

    def forward(self, *, hidden: Tensor, factor: float) -> Tensor:  # type: ignore[override]
        return F.linear(hidden, self.weight, self.bias) * factor


class OwnForwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scaled = Scaled(64, 128)
        self.options = WithOptions(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.options(hidden=torch.tanh(self.scaled(x)), factor=0.5)
        return out


def own_forwards() -> nn.Module:
    return OwnForwards()


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "sequential": sequential,
    "llama": llama,
    "gpt2": gpt2,
    "bert": bert,
    "encoder": encoder,
    "own_forwards": own_forwards,
}


def batch(family: str, *, rows: int = 3) -> Tensor:
    """A fixed input of a family."""
    generator = torch.Generator().manual_seed(7)
    if family in ("mlp", "own_forwards"):
        return torch.randn(rows, 64, generator=generator)
    if family == "encoder":
        return torch.randn(rows, 6, 64, generator=generator)
    return torch.randint(VOCABULARY, (rows, 8), generator=generator)


def output(model: nn.Module, x: Tensor) -> Tensor:
    """The tensor a model computes: transformers models return records."""
    result: Any = model(x)
    for name in ("logits", "last_hidden_state"):
        result = getattr(result, name, result)
    assert isinstance(result, Tensor)
    return result
