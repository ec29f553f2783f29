"""How long the parts of a step take on these ranks, how fast the exchange is, and how much of it overlap hides.

Every part is timed in rounds, one after the other in each round, so that a slow moment hits all alike; a time is
that of the slowest rank, the median over the rounds. These are numbers to look at: nothing passes or fails by them.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from .block import Overlap, UlyssesBlock
from .device import synchronize
from .exchange import heads_to_sequence, qkv_to_heads
from .local_attention import fused_attention
from .plan import Plan, make_plan

ROUNDS = 7
CHUNKS = 4
BOUNDS = {"projections": 5 / 8, "chunks": (CHUNKS - 1) / CHUNKS}
"""The most that can be hidden: of 4 exchanges 2 forward and 3 backward; of C chunks all but one's."""


@dataclass(frozen=True)
class Sizes:
    """One attention, in which everything divides by the ranks."""

    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    batch: int = 1

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"batch {self.batch}, {self.tokens:,} tokens, {self.heads} heads of {self.head_dim}, {dtype}"


@dataclass(frozen=True)
class Time:
    """One line of the timing table.

    Args:
        seconds: of the slowest rank.
        bytes_sent: by the first rank; all send as much here. None where the part computes as well.
        hidden: the part of the communication that overlap hides; None where there is no overlap.
        bound: the most that `hidden` can be.
    """

    part: str
    seconds: float
    bytes_sent: int | None = None
    hidden: float | None = None
    bound: float | None = None

    @property
    def gigabytes_per_second(self) -> float | None:
        """Effective bandwidth: what this rank sends, divided by the time that the exchange takes."""
        return self.bytes_sent / self.seconds / 1e9 if self.bytes_sent else None


def sizes_for(ranks: int, device: torch.device) -> Sizes:
    """Enough for a device to be busy; on the CPU, little enough for a look."""
    on_cpu = device.type == "cpu"
    heads = ranks * max(1, (8 if on_cpu else 32) // ranks)
    tokens = ranks * max(1, (1024 if on_cpu else 16384) // ranks)
    return Sizes(tokens, heads, 64 if on_cpu else 128, torch.float32 if on_cpu else torch.bfloat16)


def measure(sizes: Sizes, device: torch.device, step: Callable[[str], None]) -> list[Time]:
    """All times. Every rank of the world calls this.

    Args:
        step: told what comes next.
    """
    plan = make_plan(ranks=dist.get_world_size(), heads=sizes.heads, tokens=sizes.tokens)
    parts = dict(_parts(sizes, plan, device))
    samples: dict[str, list[float]] = {part: [] for part in parts}
    for number in range(ROUNDS + 1):
        for part, run in parts.items():
            step(f"timing, round {number} of {ROUNDS}: {part}")
            seconds = _seconds(run)
            if number > 0:  # the first round warms up
                samples[part].append(seconds)
    slowest = torch.tensor(list(samples.values()), device=device, dtype=torch.float32)  # [part, round]
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return list(_lines(dict(zip(parts, slowest.tolist(), strict=True)), sizes, plan))


def _parts(sizes: Sizes, plan: Plan, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    rank = dist.get_rank()

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=sizes.dtype, requires_grad=True)

    own_tokens = sizes.batch, len(plan.tokens_of(rank)), sizes.heads, sizes.head_dim
    own_heads = sizes.batch, sizes.tokens, len(plan.query_heads(rank)), sizes.head_dim
    shards = draw(*own_tokens), draw(*own_tokens), draw(*own_tokens)
    heads = draw(*own_heads), draw(*own_heads), draw(*own_heads)

    def exchange() -> Tensor:
        query, _, _ = qkv_to_heads(*shards, plan)  # all three gradients travel, whatever is used
        result: Tensor = heads_to_sequence(query, plan)
        return result

    def attention() -> Tensor:
        return fused_attention(*heads, is_causal=True)

    for name, forward in (("exchange", exchange), ("attention", attention)):
        yield f"{name}, forward", torch.no_grad()(forward)
        yield f"{name}, forward and backward", partial(_step, forward)
    width = sizes.heads * sizes.head_dim
    x = draw(sizes.batch, len(plan.tokens_of(rank)), width)
    for overlap in get_args(Overlap):
        block = UlyssesBlock(
            width, sizes.heads, plan=plan, overlap=overlap, chunks=CHUNKS, device=device, dtype=sizes.dtype
        )
        yield f"step, overlap {overlap}", partial(_step, block, x, is_causal=True)


def _step(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> None:
    forward(*args, **kwargs).sum().backward()


def _seconds(run: Callable[[], object]) -> float:
    synchronize()
    dist.barrier()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def _lines(seconds: dict[str, list[float]], sizes: Sizes, plan: Plan) -> Iterator[Time]:
    """From the seconds of each round. What overlap saves is compared round by round."""
    one_way = int(plan.bytes(sizes.batch, sizes.head_dim, sizes.dtype)[0].sum())
    exchange = statistics.median(seconds["exchange, forward and backward"])
    for part, taken in seconds.items():
        sent = hidden = bound = None
        if part.startswith("exchange"):
            sent = 2 * one_way if part.endswith("backward") else one_way
        overlap = part.removeprefix("step, overlap ")
        if overlap in BOUNDS and plan.ranks > 1:
            saved = [plain - own for plain, own in zip(seconds["step, overlap none"], taken, strict=True)]
            hidden, bound = statistics.median(saved) / exchange, _bound(overlap, plan)
        yield Time(part, statistics.median(taken), sent, hidden, bound)


def _bound(overlap: str, plan: Plan) -> float:
    chunks = min(CHUNKS, plan.most_chunks)
    return (chunks - 1) / chunks if overlap == "chunks" else BOUNDS[overlap]
