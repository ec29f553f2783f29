"""What single-device attention gives, in float64 and plain torch. It uses nothing of the code under test."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AXES = {"b s h d": (0, 1, 2, 3), "s b h d": (1, 0, 2, 3), "b h s d": (0, 2, 1, 3)}


@dataclass
class Case:
    """One attention over the whole sequence.

    `tokens` are by rank; `query`, `key`, `value` and the gradient of the output are [batch, seq, heads, dim].
    """

    tokens: list[int]
    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor
    causal: bool = False
    layout: str = "b s h d"

    @classmethod
    def make(
        cls,
        tokens: list[int],
        heads: int,
        kv_heads: int,
        *,
        batch: int = 2,
        dim: int = 4,
        value_dim: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        **rest: Any,
    ) -> "Case":
        """Random values of those sizes."""
        generator = torch.Generator().manual_seed(seed)

        def draw(count: int, width: int) -> Tensor:
            numbers = torch.randn(batch, sum(tokens), count, width, generator=generator, dtype=torch.float64)
            return numbers.to(dtype)

        value_dim = dim if value_dim is None else value_dim
        sizes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim), (heads, value_dim))
        return cls(tokens, *(draw(count, width) for count, width in sizes), **rest)

    def shard(self, tensor: Tensor, rank: int) -> Tensor:
        """The rank's tokens of a [batch, seq, heads, dim] tensor, in the case's layout."""
        return to_layout(tensor.split(self.tokens, dim=1)[rank], self.layout)

    def gather(self, shards: list[Tensor]) -> Tensor:
        """The [batch, seq, heads, dim] tensor that the ranks' shards make up."""
        return torch.cat([from_layout(shard, self.layout) for shard in shards], dim=1)


def to_layout(tensor: Tensor, layout: str) -> Tensor:
    """A [batch, seq, heads, dim] tensor in the layout, contiguous."""
    return tensor.permute(AXES[layout]).contiguous()


def from_layout(tensor: Tensor, layout: str) -> Tensor:
    """A tensor of the layout as [batch, seq, heads, dim]. Each of the three orders is its own inverse."""
    return tensor.permute(AXES[layout])


def attention(
    query: Tensor, key: Tensor, value: Tensor, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """Softmax attention of [batch, seq, heads, dim] tensors; query head i uses kv head i // ratio."""
    ratio = query.shape[2] // key.shape[2]
    key, value = (torch.repeat_interleave(tensor, ratio, dim=2) for tensor in (key, value))
    scores = torch.einsum("bshd,bthd->bhst", query, key) / query.shape[3] ** 0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.einsum("bhst,bthd->bshd", scores.softmax(dim=-1), value)


def expected(case: Case, mask: Tensor | None = None) -> list[Tensor]:
    """Output and the gradients of query, key and value on one device, each [batch, seq, heads, dim]."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in (case.query, case.key, case.value)]
    output = attention(*inputs, causal=case.causal, mask=mask)
    return [output.detach(), *torch.autograd.grad(output, inputs, case.gradient.double())]
