r"""The public names of `deepspeed.sequence.layer`, with its signatures and defaults, over this package's core.

    from deepspeed.sequence.layer import DistributedAttention      # before
    from seqpar_ref.deepspeed import DistributedAttention          # after

Where the original (0.19.0) is right, this is equal to it, to the last bit. Where it is not, the docstrings say
which of the defects in docs/defects.md (D1, D2, ...) is meant. docs/deepspeed.md goes through the names.

Source: `deepspeed/sequence/layer.py` of deepspeed 0.19.0.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .agreement import gradients
from .attention import DistributedAttention as CoreAttention
from .checks import is_integer, needs_gradient, no_type_check
from .deepspeed_exchanges import (
    WithGradient,
    _DimZeroAllToAll,
    _SeqAllToAll,
    check_batch_dim,
    single_all_to_all,
    uneven_heads_all2all,
)
from .deepspeed_results import attend_alike
from .deepspeed_rotary import apply_rotary_pos_emb, checked_tables, own_tables
from .deepspeed_sizes import check_shards, plans_of
from .device import keep_for_current_stream, wait_for_event, wait_for_stream
from .errors import ArgumentError
from .exchange import followed, heads_to_sequence, qkv_to_heads, start_sequence_to_heads
from .graphs import outside_graphs
from .group import GroupLike, TorchGroup, check_kind, group_of
from .plan import Plan, check_plan
from .shapes import LAYOUTS, Layout

__all__ = [
    "DistributedAttention",
    "_DimZeroAllToAll",
    "_SeqAllToAll",
    "apply_rotary_pos_emb",
    "single_all_to_all",
    "uneven_heads_all2all",
]

# (scatter_idx, gather_idx) -> the layout's name by batch_dim_idx
LAYOUTS_OF_INDICES = {
    (2, 0): {0: "b s h d", 1: "s b h d"},
    (2, 1): {0: "b s h d", 1: "s b h d"},
    (1, 2): {0: "b h s d"},
}


@no_type_check
class DistributedAttention(nn.Module):
    """The original's `DistributedAttention`, and its attributes `local_attn`, `spg`, `sp_stream`.

    Sequence-first tensors come back in their shape (D1). Heads and tokens need not divide by the ranks, and kv
    heads may be fewer than query heads and than ranks (D7, D8, D9, D12, D14): what the original reads from
    globals stands in the plan of each call (D6, D17). Query may have other tokens than key and value.

    Args:
        local_attention: `(query, key, value, *args, **kwargs) -> output`, for all tokens and this rank's heads, in
            the order of dims of the inputs. Where it returns heads and dim merged, so does the module (D15).
        sequence_process_group: the ranks that share the sequence; None for the world.
        scatter_idx, gather_idx: the dims of the heads and of the sequence. (2, 0) and (2, 1) mean the same:
            which of the two it is follows from batch_dim_idx (D10). (1, 2) is [batch, heads, sequence, dim]
            (D11).
        sp_stream: a stream on which the caller computes query, key and value. The current stream, as it is in
            each call (D19), waits for each of them before it sends it, and all three travel asynchronously, in
            the backward pass too. Everything belongs to the call: leaf tensors, fused projections, operations
            behind a projection and several micro-batches in flight are all right (D2, D3, D4, D20), and
            streams are never compared (D5). Without one, query, key and value travel together if they are
            small (D16).
        plan: who owns what, from `seqpar_ref.make_plan`. Without one the ranks exchange a record of 120 bytes
            with each other in every call, and one of 40 behind the local attention, and the host waits for both.

    Raises:
        ArgumentError, GroupError: what cannot be called, waited for, or is no plan or group, and indices that
            the original has no meaning for.
    """

    def __init__(
        self,
        local_attention: Callable[..., Tensor],
        sequence_process_group: GroupLike,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: torch.Stream | None = None,
        *,
        plan: Plan | None = None,
    ) -> None:
        super().__init__()
        if not callable(local_attention):
            kind = type(local_attention).__name__
            raise ArgumentError(f"local_attention is a {kind}.", "Pass a module, or any other callable.")
        if plan is not None:
            check_plan(plan)
        if sp_stream is not None and not hasattr(sp_stream, "wait_stream"):
            kind = type(sp_stream).__name__
            raise ArgumentError(f"sp_stream is a {kind}.", "Pass a torch.Stream, or None.")
        check_kind(sequence_process_group)
        self.local_attn = local_attention
        self.spg = sequence_process_group
        self.scatter_idx, self.gather_idx = scatter_idx, gather_idx
        self.sp_stream = sp_stream
        self.plan = plan
        self._layouts()

    def layer_sync(self, layer: Any) -> None:
        """What comes next on the current stream comes after what made the layer's output, `layer`.

        That is the event `layer.done_event`, which may be recorded on any stream. A layer without one comes
        after all that `sp_stream` has been given so far (D19: the original does not wait then).
        """
        event = getattr(layer, "done_event", None)
        if event is not None:
            wait_for_event(event)
        elif self.sp_stream is not None:
            wait_for_stream(self.sp_stream)
        if self.sp_stream is not None and isinstance(layer, Tensor):
            keep_for_current_stream(layer)

    @outside_graphs
    def forward(
        self,
        query: Float[Tensor, "_ _ _ dim"],
        key: Float[Tensor, "_ _ _ dim"],
        value: Float[Tensor, "_ _ _ value_dim"],
        batch_dim_idx: int,
        rotary_pos_emb: Sequence[Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Float[Tensor, "_ _ *heads_dim"]:
        """Attention of this rank's tokens over all tokens.

        Args:
            query, key, value: this rank's tokens, `[batch, sequence, heads, dim]` for batch_dim_idx 0,
                `[sequence, batch, heads, dim]` for 1.
            batch_dim_idx: 0 or 1. An argument of the local attention in its place is refused (D18).
            rotary_pos_emb: cosines and sines, each `[sequence, batch or 1, 1, rotary dim]`, of all tokens or of
                this rank's, for query and key (D13: in any layout). Refused where key has other tokens than query.
            args, kwargs: go to the local attention as they are.

        Returns:
            The output in the layout of the inputs, heads and dim merged if the local attention merges them.

        Raises:
            SeqparError: one of its classes. What a rank can see alone is raised before it communicates, what
                only all can see on all alike.
        """
        layout = self._layout(batch_dim_idx)
        check_shards(query, key, value, layout)
        tables = checked_tables(rotary_pos_emb, query, layout)
        group = group_of(self.spg)
        core = CoreAttention(self.local_attn, group, layout=layout.name)
        attend = core.own_attention(query, args, kwargs)
        sources = (query, key, value, *(tables or ()))
        needed = gradients(sources, attend.others)
        plan, kv_plan = plans_of(query, key, value, tables, layout, group, self.plan, needed)
        own = own_tables(tables, plan, group.rank, layout)
        shards = self._when_ready(query, key, value, own)
        apart, all_gradients = self.sp_stream is not None, needs_gradient(*sources)
        query, key, value = _travel(shards, plan, kv_plan, group, layout, apart, all_gradients)
        context, merge = attend_alike(attend, query, key, value, plan, group, compare=self.plan is None)
        if self.sp_stream is not None:
            context = WithGradient.apply(context, lambda gradient: wait_for_stream(self.sp_stream))
        output = heads_to_sequence(context, plan, group, layout=layout.name)
        return output.movedim(layout.heads, 2).flatten(2) if merge else output

    def extra_repr(self) -> str:
        """What print(module) shows beside the local attention."""
        plan = "made in each call" if self.plan is None else f"of {self.plan.ranks} ranks"
        indices = f"scatter_idx={self.scatter_idx}, gather_idx={self.gather_idx}"
        return f"{indices}, sp_stream={self.sp_stream}, plan {plan}"

    def _layouts(self) -> dict[int, str]:
        """The layouts that the two indices can mean, by batch_dim_idx."""
        indices = self.scatter_idx, self.gather_idx
        if not all(map(is_integer, indices)) or indices not in LAYOUTS_OF_INDICES:
            raise ArgumentError(
                f"scatter_idx is {self.scatter_idx!r} and gather_idx {self.gather_idx!r}.",
                "Give the dims of the heads and of the sequence: (2, 1) for [batch, sequence, heads, dim], (2, 0) "
                "for [sequence, batch, heads, dim], (1, 2) for [batch, heads, sequence, dim].",
            )
        return LAYOUTS_OF_INDICES[indices]

    def _layout(self, batch_dim_idx: int) -> Layout:
        check_batch_dim(batch_dim_idx)
        layouts = self._layouts()
        if batch_dim_idx not in layouts:
            raise ArgumentError(
                f"scatter_idx is {self.scatter_idx}, gather_idx {self.gather_idx}, batch_dim_idx {batch_dim_idx}: "
                f"heads and batch cannot both be dim {batch_dim_idx}.",
                "Pass batch_dim_idx 0, or make the module with scatter_idx 2.",
            )
        return LAYOUTS[layouts[batch_dim_idx]]

    def _when_ready(
        self, query: Tensor, key: Tensor, value: Tensor, tables: tuple[Tensor, Tensor] | None
    ) -> Iterator[Tensor]:
        """The three, rotated, each when the current stream may read it."""
        for tensor, turns in ((query, True), (key, True), (value, False)):
            self.layer_sync(tensor)
            yield apply_rotary_pos_emb(tensor, *tables) if turns and tables is not None else tensor


def _travel(
    shards: Iterator[Tensor],
    plan: Plan,
    kv_plan: Plan,
    group: TorchGroup,
    layout: Layout,
    apart: bool,
    all_gradients: bool,
) -> Sequence[Tensor]:
    """Query, key and value from a shard of the sequence to one of the heads; all gradients or none travel back."""
    if not apart:
        query, key, value = shards
        if kv_plan == plan and query.dtype == key.dtype == value.dtype:
            return qkv_to_heads(query, key, value, plan, group, layout=layout.name)
        shards = iter((query, key, value))
    kinds: Sequence[Literal["query", "kv"]] = ("query", "kv", "kv")
    started = [
        start_sequence_to_heads(
            followed(shard, all_gradients), own_plan, group, layout=layout.name, heads=heads
        )
        for shard, own_plan, heads in zip(shards, (plan, kv_plan, kv_plan), kinds, strict=True)
    ]
    return [pending.finish() for pending in started]
