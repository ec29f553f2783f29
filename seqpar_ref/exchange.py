r"""From a shard of the sequence to a shard of the heads, and back.

$$A[B, S_P, H, D] \leftrightarrow A[B, S, H_P, D]$$

Each direction is pack, one all-to-all, unpack (see `wire.py`). The gradient of one direction is the other
one: its cuts change places. So there is one autograd node, whose backward applies itself.

Every rank communicates, forward and backward, whatever it owns: an empty shard takes part like any other.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from .checks import check_tensor, no_type_check
from .errors import ArgumentError, ShapeError, TensorError
from .group import Group, GroupLike, check_size, group_of
from .plan import Heads, Plan
from .shapes import Layout, layout_of
from .wire import Cut, Part

MOST_KEPT_RANKS = 256

Eager = TypeVar("Eager", bound=Callable[..., Any])


def outside_graphs(function: Eager) -> Eager:
    """Under torch.compile, leave the graph for this call: a collective among ranks stays plain Python."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


@outside_graphs
@no_type_check
def sequence_to_heads(
    shard: Float[Tensor, "_ _ _ dim"],
    plan: Plan,
    group: GroupLike = None,
    *,
    layout: str = "b s h d",
    heads: Literal["query", "kv"] = "query",
) -> Float[Tensor, "_ _ _ dim"]:
    r"""Give up most heads, receive the whole sequence.

    $$A[B, S_P, H, D] \to A[B, S, H_P, D]$$

    With equal tokens and heads that divide by the P ranks each rank sends $\frac{P-1}{P} B \frac{S}{P} H D$
    elements; in general rank i sends `B * D * plan.vectors(heads)[i, j]` elements to rank j.

    Args:
        shard: all heads of this rank's tokens, `[batch, seq_local, heads, dim]` in the order of `layout`.
        plan: who owns what.
        group: process group or one-axis device mesh; all ranks of the world unless given.
        layout: "b s h d", "s b h d" or "b h s d".
        heads: "query", or "kv" for key and value heads, each of which goes to every rank that uses it.

    Returns:
        This rank's heads of all tokens in global order, `[batch, seq, heads_local, dim]` in the order of
        `layout`. The gradient of a head that went to several ranks is the sum of theirs, in rank order, half
        types in float32.

    Raises:
        GroupError, LayoutError, TensorError, ShapeError, ArgumentError: before any communication.
    """
    kind, member, order = _check(plan, group, layout, heads)
    check_tensor("shard", shard, order)
    total = plan.heads if kind == "query" else plan.kv_heads
    _check_sizes("shard", shard, order, member.rank, len(plan.tokens_of(member.rank)), total)
    by_heads, by_tokens = _cuts_for(plan, member.rank, order, (kind,), shard)
    return _Exchange.apply(member, by_heads, by_tokens, shard)[0]


@outside_graphs
@no_type_check
def heads_to_sequence(
    shard: Float[Tensor, "_ _ _ dim"],
    plan: Plan,
    group: GroupLike = None,
    *,
    layout: str = "b s h d",
    heads: Literal["query", "kv"] = "query",
) -> Float[Tensor, "_ _ _ dim"]:
    r"""Give up most of the sequence, receive all heads: the inverse of `sequence_to_heads`.

    $$A[B, S, H_P, D] \to A[B, S_P, H, D]$$

    Rank i sends `B * D * plan.vectors(heads)[j, i]` elements to rank j. Of a kv head that several ranks hold,
    the lowest rank sends its copy and the others send nothing ("kv once" in `Plan.vectors`); in the backward
    pass the copies that sent nothing get a gradient of zeros.

    Args:
        shard: this rank's heads of all tokens, `[batch, seq, heads_local, dim]` in the order of `layout`.
        plan, group, layout, heads: as for `sequence_to_heads`.

    Returns:
        All heads of this rank's tokens, `[batch, seq_local, heads, dim]` in the order of `layout`.

    Raises:
        GroupError, LayoutError, TensorError, ShapeError, ArgumentError: before any communication.
    """
    kind, member, order = _check(plan, group, layout, heads)
    check_tensor("shard", shard, order)
    held = plan.query_heads(member.rank) if kind == "query" else plan.kv_heads_of(member.rank)
    _check_sizes("shard", shard, order, member.rank, plan.tokens, len(held))
    by_heads, by_tokens = _cuts_for(
        plan, member.rank, order, ("query" if kind == "query" else "kv once",), shard
    )
    return _Exchange.apply(member, by_tokens, by_heads, shard)[0]


@outside_graphs
@no_type_check
def qkv_to_heads(
    query: Float[Tensor, "_ _ _ dim"],
    key: Float[Tensor, "_ _ _ dim"],
    value: Float[Tensor, "_ _ _ value_dim"],
    plan: Plan,
    group: GroupLike = None,
    *,
    layout: str = "b s h d",
) -> tuple[Float[Tensor, "_ _ _ dim"], Float[Tensor, "_ _ _ dim"], Float[Tensor, "_ _ _ value_dim"]]:
    """`sequence_to_heads` of query, key and value in one collective, and of their gradients in one.

    The chunk for a rank holds its query heads, then its key heads, then its value heads. Values and gradients
    equal those of three calls to the bit. All three gradients travel, even where only one is needed, so that
    ranks need not agree on which. The value's head dim may differ.

    Raises:
        GroupError, LayoutError, TensorError, ShapeError, ArgumentError: before any communication.
    """
    _, member, order = _check(plan, group, layout, "query")
    check_qkv(query, key, value, order)
    tokens = len(plan.tokens_of(member.rank))
    _check_sizes("query", query, order, member.rank, tokens, plan.heads)
    _check_sizes("key", key, order, member.rank, tokens, plan.kv_heads)
    by_heads, by_tokens = _cuts_for(plan, member.rank, order, ("query", "kv", "kv"), query, key, value)
    return _Exchange.apply(member, by_heads, by_tokens, query, key, value)


@no_type_check
def check_qkv(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> None:
    """Refuse query, key and value that do not belong together.

    Raises:
        TensorError, ShapeError: with the sizes.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor, layout)
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise TensorError(
                f"query is {query.dtype} on {query.device}, {name} is {tensor.dtype} on {tensor.device}.",
                f"Convert {name} to the dtype and device of query.",
            )
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)} ({layout.name})"
    for word, dim in (("batch", layout.batch), ("tokens", layout.sequence)):
        if not query.shape[dim] == key.shape[dim] == value.shape[dim]:
            raise ShapeError(f"{word} differ: {shapes}.", f"Give query, key and value the same {word}.")
    if key.shape[layout.heads] != value.shape[layout.heads]:
        raise ShapeError(f"kv heads differ: {shapes}.", "Give key and value the same heads.")
    if query.shape[3] != key.shape[3]:
        raise ShapeError(f"head dims differ: {shapes}.", "Give query and key the same head dim.")


class _Exchange(torch.autograd.Function):
    """Pack along one cut, one all-to-all, unpack along the other. The gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, group: Group, outgoing: Cut, incoming: Cut, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.reverse = (group, incoming, outgoing)
        ctx.save_for_backward(tensors[0].new_empty(0))
        sent = outgoing.pack(tensors)
        received, chunks = incoming.new_buffer(tensors[0].dtype)
        group.all_to_all_single(chunks, sent, incoming.splits, outgoing.splits)
        return incoming.unpack(received)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # A non-reentrant checkpoint recomputes when a saved tensor is first asked for. Each exchange saves
        # one and asks for it before it communicates, so all ranks recompute at the same collective, without
        # heads or with.
        _ = ctx.saved_tensors
        return (None, None, None, *_Exchange.apply(*ctx.reverse, *gradients))


def _cuts_for(
    plan: Plan, rank: int, layout: Layout, heads: tuple[Heads, ...], *tensors: Tensor
) -> tuple[Cut, Cut]:
    dims = tuple(tensor.shape[3] for tensor in tensors)
    batch, device = tensors[0].shape[layout.batch], tensors[0].device
    kept = _cuts_by_rank(plan, layout, batch, heads, dims, device)
    cuts = kept.get(rank) or _cuts(plan, rank, layout, batch, heads, dims, device)
    if len(kept) < MOST_KEPT_RANKS:
        kept[rank] = cuts
    return cuts


@lru_cache(maxsize=64)
def _cuts_by_rank(*sizes: Any) -> dict[int, tuple[Cut, Cut]]:
    """Kept cuts of one plan and size, because the positions of ragged chunks take a while to work out.

    A process has one rank of a group and keeps one entry; one that plays all ranks keeps those of the first 256.
    """
    return {}


def _cuts(
    plan: Plan,
    rank: int,
    layout: Layout,
    batch: int,
    heads: tuple[Heads, ...],
    dims: tuple[int, ...],
    device: torch.device,
) -> tuple[Cut, Cut]:
    """The cut by heads of the rank's tokens, and the cut by tokens of the rank's heads."""
    by_heads, by_tokens = [], []
    for kind, dim in zip(heads, dims, strict=True):
        total = plan.heads if kind == "query" else plan.kv_heads
        held = plan.query_heads(rank) if kind == "query" else plan.kv_heads_of(rank)
        sent = plan.head_runs[kind][rank]
        window = None
        if sent != held:
            window = (layout.heads, sent.start - held.start, sent.stop - held.start)
        own_tokens = layout.shape(batch, len(plan.tokens_of(rank)), total, dim)
        own_heads = layout.shape(batch, plan.tokens, len(held), dim)
        by_heads.append(Part(own_tokens, plan.head_runs[kind]))
        by_tokens.append(Part(own_heads, plan.token_runs, window))
    return Cut(layout.heads, tuple(by_heads), device), Cut(layout.sequence, tuple(by_tokens), device)


@no_type_check
def _check(plan: Plan, group: GroupLike, layout: str, heads: Heads) -> tuple[Heads, Group, Layout]:
    """What every exchange checks first."""
    if not isinstance(plan, Plan):
        raise ArgumentError(f"plan is a {type(plan).__name__}.", "Pass what seqpar_ref.make_plan returns.")
    if not isinstance(heads, str) or heads not in ("query", "kv"):
        raise ArgumentError(f"heads is {heads!r}.", 'Use "query" or "kv".')
    order = layout_of(layout)
    member = group_of(group)
    check_size(member, plan.ranks)
    return heads, member, order


def _check_sizes(name: str, tensor: Tensor, layout: Layout, rank: int, tokens: int, heads: int) -> None:
    found = (tensor.shape[layout.sequence], tensor.shape[layout.heads])
    if found != (tokens, heads):
        raise ShapeError(
            f"{name} is {tuple(tensor.shape)}, in {layout.name!r} {found[0]} tokens and {found[1]} heads; "
            f"the plan says {tokens} tokens and {heads} heads on rank {rank}.",
            "Pass a tensor of those sizes, the layout that it has, or a plan made for it.",
        )
