"""The way of query, key and value from a shard of the sequence to a shard of the heads, for one plan and size.

What an exchange needs is worked out here once and kept: the positions of ragged chunks take a while.

Source: this package's own; the bound between one collective and three is measured, see docs/benchmarks.md.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .checks import check_choice, no_type_check
from .parts import Part
from .plan import Heads, Plan
from .shapes import Layout
from .wire import Cut, Received

MOST_KEPT_RANKS = 256
FUSED_UP_TO = 2**20
"""Bytes of query, key and value that a rank sends to another one, on average, up to which one collective beats
three. Measured on gloo, see docs/benchmarks.md; no other network has been measured."""

Wire = Literal["auto", "fused", "separate", "pipelined"]


@dataclass(frozen=True, eq=False)
class Route:
    """How some tensors are cut apart on this rank, and how what arrives is put together.

    There are as many stages as all-to-alls. On one side a single cut has all of them; on the other each stage
    has a cut and tensors of its own.
    """

    outgoing: tuple[Cut, ...]
    incoming: tuple[Cut, ...]

    @property
    def tensors(self) -> int:
        """How many of them travel in one stage."""
        return len(self.outgoing[0].parts)

    @property
    def keeps(self) -> bool:
        """Whether this rank's own chunk is left out of what travels."""
        return self.outgoing[0].kept is not None

    def copy_kept(self, stage: int, tensors: tuple[Tensor, ...], received: Received) -> None:
        """Copy this rank's own chunk, if it is left out, from what is sent to what is received.

        The tensors are those that the stage is packed from, `[batch, seq, heads, dim]` in any layout; `stage` counts
        from 0.
        """
        if not self.keeps:
            return
        (outgoing, place), (incoming, place_there) = self.outgoing_at(stage), self.incoming_at(stage)
        blocks = zip(outgoing.own_blocks[place], incoming.own_blocks[place_there], strict=True)
        for tensor, result, (block, block_there) in zip(tensors, received.tensors, blocks, strict=True):
            block_there.in_tensor(result).copy_(block.in_tensor(tensor))

    def reverse(self) -> "Route":
        """The way back."""
        return Route(self.incoming, self.outgoing)

    def outgoing_at(self, stage: int) -> tuple[Cut, int]:
        """The cut that packs the stage, and which of that cut's stages it is.

        `stage` counts from 0.
        """
        return _at(self.outgoing, stage)

    def incoming_at(self, stage: int) -> tuple[Cut, int]:
        """The cut that unpacks the stage, and which of that cut's stages it is.

        `stage` counts from 0.
        """
        return _at(self.incoming, stage)

    def started_with(self, stage: int) -> tuple[int, ...]:
        """The stages that share their tensors with it when they are packed, itself included.

        `stage` counts from 0.
        """
        return _sharing(self.outgoing, stage)

    def finished_with(self, stage: int) -> tuple[int, ...]:
        """The stages that share their tensors with it when they are unpacked, itself included.

        `stage` counts from 0.
        """
        return _sharing(self.incoming, stage)


def _at(cuts: tuple[Cut, ...], stage: int) -> tuple[Cut, int]:
    return (cuts[stage], 0) if len(cuts) > 1 else (cuts[0], stage)


def _sharing(cuts: tuple[Cut, ...], stage: int) -> tuple[int, ...]:
    return (stage,) if len(cuts) > 1 else tuple(range(cuts[0].stages))


@dataclass(frozen=True)
class Load:
    """What travels together: which heads of each tensor, and the head dim of each."""

    heads: tuple[Heads, ...]
    dims: tuple[int, ...]


def qkv_loads(wire: Wire, dims: tuple[int, int, int]) -> tuple[Load, ...]:
    """Query, key and value in one load if the wire is "fused", else in three. `dims` are their head dims."""
    together = Load(("query", "kv", "kv"), dims)
    if wire == "fused":
        return (together,)
    return tuple(Load((kind,), (dim,)) for kind, dim in zip(together.heads, dims, strict=True))


@no_type_check
def check_wire(wire: Wire) -> Wire:
    """The wire, if there is such a one.

    Raises:
        ArgumentError: there is none.
    """
    check_choice("wire", wire, get_args(Wire))
    return wire


@no_type_check
def wire_of(
    wire: Wire, plan: Plan, batch: int, dims: tuple[int, ...], dtype: torch.dtype, chunks: int = 1
) -> Wire:
    """How query, key and value travel: as the caller says, or by size.

    A collective costs a time of its own, however little it carries: small tensors are best sent as one. Large
    ones are best sent one by one, so that each is packed and unpacked while another one travels. The rule
    looks at the bytes that one rank sends to another one on average, because all ranks must choose alike; where
    heads travel in chunks, in one chunk.

    Args:
        wire: what the caller says; "auto" for the rule.
        plan: who owns what.
        batch: rows of the batch.
        dims: elements of one vector of query, key and value.
        dtype: what travels.
        chunks: chunks of heads, 1 or more.

    Raises:
        ArgumentError: no such wire.
    """
    if check_wire(wire) != "auto":
        return wire
    return "fused" if _mean_bytes(plan, batch, dims, dtype) <= FUSED_UP_TO * chunks else "pipelined"


@lru_cache(maxsize=64)
def _mean_bytes(plan: Plan, batch: int, dims: tuple[int, ...], dtype: torch.dtype) -> int:
    pairs = max(1, plan.ranks * (plan.ranks - 1))
    query, kv = (int(plan.vectors(heads).sum()) for heads in ("query", "kv"))
    return batch * dtype.itemsize * (dims[0] * query + (dims[1] + dims[2]) * kv) // pairs


def routes_to_heads(
    plan: Plan, rank: int, layout: Layout, loads: tuple[Load, ...], like: Tensor, chunks: int = 1
) -> tuple[Route, ...]:
    """A route for each load, from all heads of the rank's tokens to all tokens of the rank's heads.

    Args:
        plan, layout: who owns what; where each dim stands.
        rank: this rank in the group, from 0.
        loads: what travels together.
        like: a tensor that has the batch and the device of those that are to travel, and four dims in any shape.
        chunks: stages of each route; in each travels a chunk of every rank's heads (see `Plan.chunk_runs`).
    """
    batch, device = like.shape[layout.batch], like.device
    kept = _routes_by_rank(plan, layout, batch, loads, device, chunks)
    routes = kept.get(rank)
    if routes is None:
        routes = tuple(_route(plan, rank, layout, batch, load, device, chunks) for load in loads)
        if len(kept) < MOST_KEPT_RANKS:
            kept[rank] = routes
    return routes


@lru_cache(maxsize=64)
def _routes_by_rank(*sizes: Any) -> dict[int, tuple[Route, ...]]:
    """Kept routes of one plan and size.

    A process has one rank of a group and keeps one entry; one that plays all ranks keeps those of the first 256.
    """
    return {}


def _route(
    plan: Plan, rank: int, layout: Layout, batch: int, load: Load, device: torch.device, chunks: int
) -> Route:
    sent_runs = plan.head_runs if chunks == 1 else plan.chunk_runs(chunks)
    by_heads = []
    by_tokens: list[list[Part]] = [[] for _ in range(chunks)]
    for kind, dim in zip(load.heads, load.dims, strict=True):
        total = plan.heads if kind == "query" else plan.kv_heads
        own_tokens = layout.shape(batch, len(plan.tokens_of(rank)), total, dim)
        by_heads.append(Part(own_tokens, sent_runs[kind]))
        for chunk in range(chunks):
            sent = held = sent_runs[kind][rank * chunks + chunk]
            window = None
            if kind == "kv once":
                held = plan.kv_heads_of(rank)
                if sent != held:
                    window = (layout.heads, sent.start - held.start, sent.stop - held.start)
            own_heads = layout.shape(batch, plan.tokens, len(held), dim)
            by_tokens[chunk].append(Part(own_heads, plan.token_runs, window))

    def cuts(kept: int | None) -> Route:
        return Route(
            (Cut(layout.heads, tuple(by_heads), device, kept),),
            tuple(Cut(layout.sequence, tuple(parts), device, kept) for parts in by_tokens),
        )

    route = cuts(None)
    may_keep = all(cut.may_keep(rank) for cut in (*route.outgoing, *route.incoming))
    return cuts(rank) if may_keep else route
