"""One attention problem, cut over ranks, and its answer on one device: what the tests compare with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

INPUTS = ("query", "key", "value")
TOLERANCE = 1e-12  # float64; any two heads, tokens or batch entries differ by more than 0.1


@dataclass(frozen=True)
class Case:
    """Shapes of one problem. `tokens` lists the tokens of each rank; `heads` counts query heads."""

    heads: int
    tokens: tuple[int, ...]
    kv_heads: int | None = None
    batch: int = 2
    dim: int = 4
    layout: str = "b s h d"
    shift: int = 0  # other values for a second problem of the same shape

    def whole(self, name: str) -> Tensor:
        """The global tensor [batch, sequence, heads, dim]; no two elements of the four tensors are equal."""
        number = ("query", "key", "value", "upstream").index(name)
        heads = self.heads if name in ("query", "upstream") else self.kv_heads or self.heads
        shape = (self.batch, sum(self.tokens), heads, self.dim)
        address = torch.arange(math.prod(shape), dtype=torch.float64) + 100_000 * number + self.shift
        return address.sin().reshape(shape)

    def shard(self, whole: Tensor, rank: int) -> Tensor:
        """The tokens of `rank` of a [batch, sequence, heads, dim] tensor, contiguous in the case's layout."""
        start = sum(self.tokens[:rank])
        part = whole[:, start : start + self.tokens[rank]]
        return rearrange(part, f"b s h d -> {self.layout}").contiguous()

    def answer(self) -> dict[str, Tensor]:
        """Output and gradients on one device, whole, [batch, sequence, heads, dim]."""
        query, key, value = (self.whole(name).requires_grad_() for name in INPUTS)
        output = causal_attention("b s h d")(query, key, value)
        output.backward(self.whole("upstream"))
        return {"output": output.detach(), "query": query.grad, "key": key.grad, "value": value.grad}


def causal_attention(layout: str) -> Callable[..., Tensor]:
    """Softmax attention in plain math over tensors of `layout`; query head i uses kv head i // ratio."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (rearrange(x, f"{layout} -> b h s d") for x in (query, key, value))
        ratio = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(ratio, dim=1) for x in (key, value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        output = scores.masked_fill(future, -math.inf).softmax(-1) @ value
        return rearrange(output, f"b h s d -> {layout}")

    return attention


def attend(attention: Callable[..., Tensor], case: Case, rank: int | None = None) -> dict[str, Tensor]:
    """Output and gradients of one rank: its shards through `attention`, forward and backward."""
    rank = dist.get_rank() if rank is None else rank
    query, key, value = (
        case.shard(case.whole(name), rank).requires_grad_() for name in ("query", "key", "value")
    )
    output = attention(query, key, value)
    upstream = case.shard(case.whole("upstream"), rank)
    compare_shape(output, upstream, "output")
    output.backward(upstream)
    return {"output": output.detach(), "query": query.grad, "key": key.grad, "value": value.grad}


def check(case: Case, results: list[dict[str, Tensor]]) -> None:
    """Compare every rank's output and gradients with the single device's."""
    answer = case.answer()
    for rank, result in enumerate(results):
        for name, whole in answer.items():
            what = name if name == "output" else f"gradient of the {name}"
            compare(result[name], case.shard(whole, rank), f"{what} on rank {rank}")


def compare(actual: Tensor, expected: Tensor, what: str) -> None:
    compare_shape(actual, expected, what)
    error = (actual - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= TOLERANCE, f"{what}: off by {error:.3g}"


def compare_shape(actual: Tensor, expected: Tensor, what: str) -> None:
    shapes = f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    assert actual.shape == expected.shape, f"{what}: {shapes}"
