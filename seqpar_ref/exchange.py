r"""From a shard of the sequence to a shard of the heads, and back.

$$A[B, S_P, H, D] \leftrightarrow A[B, S, H_P, D]$$

Each direction is pack, one all-to-all, unpack (see `wire.py`). The gradient of one direction is the other one
(see `direct.py`). Each function has a twin that only starts the exchange and returns a `Pending`; whatever
runs before its `finish()` runs while the collective travels (see `flight.py`). A shard that needs no gradient
has no exchange in the backward pass, so each shard has to need one on all ranks or on none.

Source: DeepSpeed-Ulysses (Jacobs et al., 2023, arXiv:2309.14509).
"""

from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from .checks import check_tensor, no_type_check
from .direct import Exchange
from .flight import Flight
from .graphs import outside_graphs
from .group import Group, GroupLike
from .plan import Heads, Plan
from .routes import Load, Route, Wire, qkv_loads, routes_to_heads, wire_of
from .shapes import Layout
from .shards import check_call, check_shares, check_sizes


class Pending:
    """An exchange that was started: the result of one of the `start_...` functions.

    The collective is issued; the tensors that were given must not be written to before `finish`. Differentiable:
    the gradient's exchange is started where `finish` stands, and finished where the start stands.
    """

    def __init__(self, flight: Flight) -> None:
        self._flight = flight

    def finish(self) -> Any:
        """Wait, and return what the function without `start_` returns. On a GPU the current stream waits.

        Raises:
            OrderError: it is finished already.
        """
        result = self._flight.finish()
        return result[0] if len(result) == 1 else result


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
    member, route = _to_heads(shard, plan, group, layout, heads)
    return Exchange.apply(member, (route,), False, shard)[0]


@outside_graphs
@no_type_check
def start_sequence_to_heads(
    shard: Float[Tensor, "_ _ _ dim"],
    plan: Plan,
    group: GroupLike = None,
    *,
    layout: str = "b s h d",
    heads: Literal["query", "kv"] = "query",
) -> Pending:
    """`sequence_to_heads`, started.

    Args:
        shard: `[batch, seq_local, heads, dim]` in the order of `layout`; not to be written to before `finish()`.
        plan, group, layout, heads: as for `sequence_to_heads`.

    Returns:
        What is under way. Its `finish()` returns `[batch, seq, heads_local, dim]` in the order of `layout`.

    Raises:
        GroupError, LayoutError, TensorError, ShapeError, ArgumentError: before any communication.
    """
    member, route = _to_heads(shard, plan, group, layout, heads)
    return _started(member, route, shard)


@no_type_check
def _to_heads(
    shard: Tensor, plan: Plan, group: GroupLike, layout: str, heads: Literal["query", "kv"]
) -> tuple[Group, Route]:
    kind, member, order = check_call(plan, group, layout, heads)
    check_tensor("shard", shard, order)
    total = plan.heads if kind == "query" else plan.kv_heads
    check_sizes("shard", shard, order, member.rank, len(plan.tokens_of(member.rank)), total)
    (route,) = routes_to_heads(plan, member.rank, order, (Load((kind,), (shard.shape[3],)),), shard)
    return member, route


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
    member, route = _to_sequence(shard, plan, group, layout, heads)
    return Exchange.apply(member, (route,), False, shard)[0]


@outside_graphs
@no_type_check
def start_heads_to_sequence(
    shard: Float[Tensor, "_ _ _ dim"],
    plan: Plan,
    group: GroupLike = None,
    *,
    layout: str = "b s h d",
    heads: Literal["query", "kv"] = "query",
) -> Pending:
    """`heads_to_sequence`, started.

    Args:
        shard: `[batch, seq, heads_local, dim]` in the order of `layout`; not to be written to before `finish()`.
        plan, group, layout, heads: as for `heads_to_sequence`.

    Returns:
        What is under way. Its `finish()` returns `[batch, seq_local, heads, dim]` in the order of `layout`.

    Raises:
        GroupError, LayoutError, TensorError, ShapeError, ArgumentError: before any communication.
    """
    member, route = _to_sequence(shard, plan, group, layout, heads)
    return _started(member, route, shard)


@no_type_check
def _to_sequence(
    shard: Tensor, plan: Plan, group: GroupLike, layout: str, heads: Literal["query", "kv"]
) -> tuple[Group, Route]:
    kind, member, order = check_call(plan, group, layout, heads)
    check_tensor("shard", shard, order)
    held = plan.query_heads(member.rank) if kind == "query" else plan.kv_heads_of(member.rank)
    check_sizes("shard", shard, order, member.rank, plan.tokens, len(held))
    return member, _route_to_sequence(shard, plan, member, order, kind)


def _route_to_sequence(shard: Tensor, plan: Plan, group: Group, layout: Layout, kind: Heads) -> Route:
    load = Load(("query" if kind == "query" else "kv once",), (shard.shape[3],))
    (route,) = routes_to_heads(plan, group.rank, layout, (load,), shard)
    return route.reverse()


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
    wire: Wire = "auto",
) -> tuple[Float[Tensor, "_ _ _ dim"], Float[Tensor, "_ _ _ dim"], Float[Tensor, "_ _ _ value_dim"]]:
    """`sequence_to_heads` of query, key and value, and of their gradients.

    Values and gradients equal those of three calls to the bit. All three gradients travel, even where only one
    is needed, so that ranks need not agree on which. The value's head dim may differ.

    Args:
        query: `[batch, seq_local, heads, dim]` in the order of `layout`.
        key, value: `[batch, seq_local, kv_heads, dim]` in that order.
        plan, group, layout: as for `sequence_to_heads`.
        wire: "fused": one collective; the chunk for a rank holds its query heads, then its key heads, then its
            value heads. "pipelined": three collectives, each tensor packed while the one before it travels.
            "separate": three collectives, one after the other. "auto": by size, see `routes.wire_of`. The same
            on all ranks.

    Returns:
        Query, key and value, `[batch, seq, heads_local, dim]` in the order of `layout`: all tokens, and this rank's
        query heads or the kv heads that they use.

    Raises:
        GroupError, LayoutError, TensorError, ShapeError, ArgumentError: before any communication.
    """
    member, order = check_shares(query, key, value, plan, group, layout)
    return unchecked_qkv_to_heads(query, key, value, plan, member, order, wire)


@no_type_check
def unchecked_qkv_to_heads(
    query: Float[Tensor, "_ _ _ dim"],
    key: Float[Tensor, "_ _ _ dim"],
    value: Float[Tensor, "_ _ _ value_dim"],
    plan: Plan,
    group: Group,
    layout: Layout,
    wire: Wire,
) -> tuple[Float[Tensor, "_ _ _ dim"], Float[Tensor, "_ _ _ dim"], Float[Tensor, "_ _ _ value_dim"]]:
    """`qkv_to_heads`, where the caller has checked the tensors, and that they fit the plan and the group.

    Tensors are `[batch, seq_local, heads, dim]` in the order of the layout, results `[batch, seq, heads_local, dim]`.

    Raises:
        ArgumentError: no such `wire`.
    """
    dims = query.shape[3], key.shape[3], value.shape[3]
    wire = wire_of(wire, plan, query.shape[layout.batch], dims, query.dtype)
    routes = routes_to_heads(plan, group.rank, layout, qkv_loads(wire, dims), query)
    return Exchange.apply(group, routes, wire == "pipelined", query, key, value)


def unchecked_heads_to_sequence(
    shard: Float[Tensor, "_ _ _ dim"], plan: Plan, group: Group, layout: Layout
) -> Float[Tensor, "_ _ _ dim"]:
    """`heads_to_sequence` of query heads, where the caller has checked the shard, and that it fits plan and group.

    The shard is `[batch, seq, heads_local, dim]` in the order of the layout, what is returned
    `[batch, seq_local, heads, dim]`.
    """
    route = _route_to_sequence(shard, plan, group, layout, "query")
    return Exchange.apply(group, (route,), False, shard)[0]


def followed(shard: Tensor, gradients: bool) -> Tensor:
    """The shard, which autograd follows if gradients travel, so that its own does whether it is needed or not.

    For exchanges that belong together, such as those of query, key and value: `[batch, seq, heads, dim]` in any
    layout.
    """
    return shard.detach().requires_grad_() if gradients and not shard.requires_grad else shard


def _started(group: Group, route: Route, *tensors: Tensor) -> Pending:
    flight = Flight(group, route)
    flight.start(*tensors)
    return Pending(flight)
