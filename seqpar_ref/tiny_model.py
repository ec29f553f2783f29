"""A small random language model in plain PyTorch: where sequence-parallel attention goes in a model.

Only two things in it know that a rank holds a part of the tokens: the position ids, which are global, and the
attention, which is handed in. On one device it is `one_device_attention`; on several ranks it is a
`DistributedAttention`. Norms, projections and MLP work on single tokens and need no change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from .rotary import apply_rotary

Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of a `TinyModel`. The head counts are SmolLM2's, so that 2 or 4 ranks get uneven shares."""

    layers: int = 4
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 16
    vocabulary: int = 256  # one token for each byte of a text

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


class TinyBlock(nn.Module):
    """Attention and MLP, each on a normed input, each added to what comes in."""

    def __init__(self, config: TinyConfig):
        super().__init__()
        self.config = config
        kv_width = config.kv_heads * config.head_dim
        self.attention_norm = nn.RMSNorm(config.width)
        self.to_query = nn.Linear(config.width, config.width, bias=False)
        self.to_key = nn.Linear(config.width, kv_width, bias=False)
        self.to_value = nn.Linear(config.width, kv_width, bias=False)
        self.from_heads = nn.Linear(config.width, config.width, bias=False)
        self.mlp = nn.Sequential(
            nn.RMSNorm(config.width),
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(),
            nn.Linear(4 * config.width, config.width),
        )

    def forward(
        self,
        hidden: Float[Tensor, "batch seq width"],
        position_ids: Int[Tensor, "batch seq"],
        attention: Attention,
    ) -> Float[Tensor, "batch seq width"]:
        normed = self.attention_norm(hidden)
        query = self.to_query(normed).unflatten(-1, (self.config.heads, self.config.head_dim))
        key = self.to_key(normed).unflatten(-1, (self.config.kv_heads, self.config.head_dim))
        value = self.to_value(normed).unflatten(-1, (self.config.kv_heads, self.config.head_dim))
        query, key = apply_rotary(query, position_ids), apply_rotary(key, position_ids)
        hidden = hidden + self.from_heads(attention(query, key, value, is_causal=True).flatten(-2))
        return hidden + self.mlp(hidden)


class TinyModel(nn.Module):
    """Token ids and global position ids in, hidden states out; `logits` turns those into next-token scores.

    Args:
        config: the sizes.
        seed: of the random weights; the same seed gives the same weights on every rank.
    """

    def __init__(self, config: TinyConfig | None = None, seed: int = 0):
        super().__init__()
        self.config = config or TinyConfig()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(self.config.vocabulary, self.config.width)
            self.blocks = nn.ModuleList(TinyBlock(self.config) for _ in range(self.config.layers))
            self.norm = nn.RMSNorm(self.config.width)
            self.head = nn.Linear(self.config.width, self.config.vocabulary, bias=False)

    def forward(
        self,
        token_ids: Int[Tensor, "batch seq"],
        position_ids: Int[Tensor, "batch seq"],
        attention: Attention,
    ) -> Float[Tensor, "batch seq width"]:
        hidden = self.embedding(token_ids)
        for block in self.blocks:
            hidden = block(hidden, position_ids, attention)
        return self.norm(hidden)

    def logits(self, hidden: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seq vocabulary"]:
        return self.head(hidden)


def one_device_attention(
    query: Float[Tensor, "batch seq heads dim"],
    key: Float[Tensor, "batch seq kv_heads dim"],
    value: Float[Tensor, "batch seq kv_heads dim"],
    is_causal: bool = False,
) -> Float[Tensor, "batch seq heads dim"]:
    """What the ranks together must equal: PyTorch's attention over all tokens and all heads."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out = functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=True)
    return out.transpose(1, 2)
