r"""The same attention, with communication behind computation.

Both kinds are an order of calls and no more: an exchange is started, something is computed, the exchange is
finished. Autograd runs the nodes of the backward pass in the reverse order of their creation, and the backward
of a finish is a start, so the backward pass overlaps as well.

(a) `behind_projections`: q travels while k is projected, k while v is.

    forward    project q | start q | project k | start k | project v | start v | finish q k v | attention | start o
    backward   finish do | attention | start dv dk dq | finish dv | dWv | finish dk | dWk | finish dq | dWq

At most 2 of the 4 exchanges are hidden in the forward pass (q and k), and 3 of 4 in the backward pass: dk and dq
behind the weight gradients of v and k, and the output's gradient behind that of the output projection
(`late_weight.py`).

(b) `in_chunks`: each rank's heads in C chunks. While it attends with one, the next one comes and the one before
returns.

    forward    start 0 | finish 0, start 1 | attention 0 | finish 1, start 2, return 0 | attention 1 | ... | finish all
    backward   start 2 | finish 2, start 1 | attention 2 | finish 1, start 0, return 2 | attention 1 | ... | finish all

All but the first chunk's coming and the last one's return can be hidden: (C-1)/C of the communication. The heads
of a chunk are whole groups of query heads that share a kv head, so that no sum is cut in two: values and
gradients equal those of `DistributedAttention` to the bit (where a kernel's do: see docs/difference.md).

Source: (a) is what `sp_stream` of `deepspeed.sequence.layer` is for (D2 to D5 in docs/defects.md); (b) is this
package's own.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from .attention import DistributedAttention
from .checks import no_type_check
from .exchange import Pending, followed, start_heads_to_sequence, start_sequence_to_heads
from .flight import Flight
from .graphs import outside_graphs
from .group import TorchGroup
from .own_heads import OwnAttention, own_heads
from .plan import Plan, check_chunks
from .routes import Load, qkv_loads, routes_to_heads, wire_of
from .shards import check_shares


@outside_graphs
def behind_projections(
    projections: Sequence[Callable[[], Tensor]],
    attend: OwnAttention,
    plan: Plan,
    group: TorchGroup,
    gradients: bool,
) -> Pending:
    """Attention whose q, k and v each travel while the next one is made.

    Args:
        projections: make this rank's query, key and value, `[batch, seq_local, heads, dim]` in the order of
            the layout of `attend`. Called in this order.
        attend: attention of this rank's heads.
        plan, group: who owns what, and the ranks that share it.
        gradients: any of the three needs one, on each rank alike; then those of all three travel.

    Returns:
        The output's exchange, started: `[batch, seq_local, heads, value_dim]` when finished.

    Raises:
        GroupError, LayoutError, TensorError, ShapeError, ArgumentError: of a shard, before it communicates.
    """
    layout = attend.layout.name
    kinds: tuple[Literal["query", "kv"], ...] = ("query", "kv", "kv")
    started = [
        start_sequence_to_heads(followed(project(), gradients), plan, group, layout=layout, heads=kind)
        for project, kind in zip(projections, kinds, strict=True)
    ]
    query, key, value = (pending.finish() for pending in started)
    (own,) = own_heads(plan, group.rank)
    return start_heads_to_sequence(attend(query, key, value, own), plan, group, layout=layout)


@outside_graphs
def in_chunks(
    query: Float[Tensor, "_ _ _ dim"],
    key: Float[Tensor, "_ _ _ dim"],
    value: Float[Tensor, "_ _ _ value_dim"],
    attend: OwnAttention,
    plan: Plan,
    group: TorchGroup,
    chunks: int,
) -> Pending:
    """Attention whose heads come, are attended with, and return in chunks.

    Args:
        query, key, value: `[batch, seq_local, heads, dim]` in the order of the layout of `attend`.
        attend: attention of a chunk of this rank's heads.
        plan, group: who owns what, and the ranks that share it.
        chunks: how many; `Plan.most_chunks` where that is less.

    Returns:
        The output's exchange, started: `[batch, seq_local, heads, value_dim]` when finished.

    Raises:
        GroupError, LayoutError, TensorError, ShapeError, ArgumentError: before any communication.
        LocalAttentionError: of what the local attention returned, on the ranks that called it; in the backward
            pass too, of memory in which earlier gradients are under way.
    """
    member, layout = check_shares(query, key, value, plan, group, attend.layout.name)
    chunks = min(chunks, plan.most_chunks)
    dims = query.shape[3], key.shape[3], value.shape[3]
    wire = wire_of("auto", plan, query.shape[layout.batch], dims, query.dtype, chunks)
    there = routes_to_heads(plan, member.rank, layout, qkv_loads(wire, dims), query, chunks)
    returning = Load(("query",), (value.shape[3],))
    (back,) = routes_to_heads(plan, member.rank, layout, (returning,), query, chunks)
    packed: list[Any] = []  # what either has packed is issued together: see `Flight`
    coming, going = Flight(member, *there, packed=packed), Flight(member, back.reverse(), packed=packed)
    coming.start(query, key, value)
    own_query, own_key, own_value = coming.finish(0)
    for chunk, own in enumerate(own_heads(plan, member.rank, chunks)):
        result = attend(own_query, own_key, own_value, own)
        if chunk < chunks - 1:
            own_query, own_key, own_value = coming.finish(chunk + 1)  # the one behind it leaves
        going.start(result, stage=chunk)
    return Pending(going)


@no_type_check
class ChunkedAttention(DistributedAttention):
    """`DistributedAttention` whose heads travel in chunks, behind the attention of other chunks.

    Use it where query, key and value are ready at the same time: as it is called from Hugging Face, or after a
    fused QKV projection. What it returns equals `DistributedAttention` to the bit, gradients too, where the
    local attention gives a head the same bits whatever heads come with it. Not so are dropout, whose random numbers
    are drawn chunk by chunk, gradients of what all heads share, such as a mask, which are summed chunk by chunk, and
    PyTorch's kernels for a CPU with head dims that fill no vector (see docs/difference.md).

    Args:
        local_attention, group, layout, plan: as for `DistributedAttention`. The local attention is called once
            for each chunk of this rank's heads, `[batch, seq, heads of the chunk, dim]` in the order of the
            layout, and does not learn which heads these are: parameters by head are not possible. It returns new
            memory in each call, because a result is under way while the next chunk is attended with.
        chunks: how many; fewer where no rank has so many kv heads.

    Raises:
        PlanError: `chunks` is no integer of at least 1.
        LayoutError, ArgumentError, GroupError: as for `DistributedAttention`.
        LocalAttentionError: in a call, where a result is memory in which an earlier chunk's is still under way; in
            the backward pass the same of gradients.
    """

    def __init__(
        self,
        local_attention: Callable[..., Tensor] | None = None,
        group: Any = None,
        *,
        chunks: int = 4,
        layout: str = "b s h d",
        plan: Plan | None = None,
    ) -> None:
        super().__init__(local_attention, group, layout=layout, plan=plan)
        self.chunks = check_chunks(chunks)

    def exchange_and_attend(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Plan, group: TorchGroup, attend: OwnAttention
    ) -> Tensor:
        output: Tensor = in_chunks(query, key, value, attend, plan, group, self.chunks).finish()
        return output

    def extra_repr(self) -> str:
        """What print(module) shows beside the local attention."""
        return f"{super().extra_repr()}, chunks={self.chunks}"
