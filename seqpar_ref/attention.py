r"""Attention over a sequence that is split across ranks.

    q, k, v  [B, S_P, H, D]  -- one all-to-all -->  [B, S, H_P, D]
    any local attention, over all tokens and this rank's heads
    output   [B, S, H_P, D]  -- one all-to-all -->  [B, S_P, H, D]

Heads, kv heads and tokens need not divide by the ranks.

Source: DeepSpeed-Ulysses (Jacobs et al., 2023, arXiv:2309.14509).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .agreement import Record, agree, gradients
from .checks import check_tensor, no_type_check
from .errors import ArgumentError, ShapeError, UnsupportedError
from .exchange import unchecked_heads_to_sequence, unchecked_qkv_to_heads
from .graphs import outside_graphs
from .group import GroupLike, TorchGroup, check_kind, check_size, group_of
from .local_attention import fused_attention, fused_options
from .own_heads import OwnAttention, own_heads
from .plan import Plan, check_plan
from .routes import Wire, check_wire
from .shapes import LAYOUTS, Layout, layout_of
from .shards import check_qkv


@no_type_check
class DistributedAttention(nn.Module):
    """A local attention made one over a split sequence: the same result as on one device.

    Args:
        local_attention: any callable `(query, key, value, *args, **kwargs) -> output`. It gets all tokens in
            global order and this rank's heads, `[batch, seq, heads_local, dim]` in the order of the layout,
            and returns the output in that order,
            with the value's head dim and dtype; heads and dim may be merged into one last dim. Its kv heads
            always divide its query heads: query head i uses kv head i // ratio. It is not called on a rank
            without heads. Unless given it is PyTorch's scaled_dot_product_attention, with that function's
            keyword arguments.
        group: process group or one-axis device mesh of the ranks that share the sequence; the world unless
            given.
        layout: "b s h d", "s b h d" or "b h s d".
        plan: who owns what. Without one the ranks exchange a record of 72 bytes with each other in every
            call, and plan from those (see `agreement.py`). With one they tell each other nothing, and have to agree
            in batch, dims, dtype, and whether query, key or value need a gradient.
        wire: how query, key and value travel, see `qkv_to_heads`; chosen by size unless given.

    The module keeps no state between calls: one module may serve several micro-batches at a time, and modules
    with different heads live side by side. What holds beyond plain attention:

    - Packed documents: tokens come in global order, so a mask or `cu_seqlens` of the whole sequence means on
      every rank what it means on one device.
    - Parameters by head (slopes, sinks): the callable slices its own, `plan.query_heads(rank)`. Parameters of
      a module passed as `local_attention` get zero gradients on a rank without heads.
    - Gradients of anything else that the callable uses: pass the tensor as an argument, or make it a parameter
      of a module. One that is captured in a closure is unknown on a rank without heads.
    - Activation checkpointing: with use_reentrant=True the ranks cannot compare whose gradients are needed, since the
      first pass needs none. Let inputs need gradients on all ranks or on none.
    - Dropout: each rank draws for its own heads from its own generator, so the result depends on the number
      of ranks. Ranks that are seeded alike drop the same positions: seed each with its rank.
    - Autocast: query, key and value are cast before they travel.
    - torch.compile: the module runs as it is, between the graphs before and behind it; `fullgraph=True` is
      refused by PyTorch. A compiled callable may be passed as `local_attention`.

    Raises:
        LayoutError, ArgumentError, GroupError: an unknown layout, something that cannot be called, something
            that is no plan, something that is no group.
    """

    def __init__(
        self,
        local_attention: Callable[..., Tensor] | None = None,
        group: GroupLike = None,
        *,
        layout: str = "b s h d",
        plan: Plan | None = None,
        wire: Wire = "auto",
    ) -> None:
        super().__init__()
        if local_attention is not None and not callable(local_attention):
            kind = type(local_attention).__name__
            raise ArgumentError(f"local_attention is a {kind}.", "Pass a callable, or None for the default.")
        if plan is not None:
            check_plan(plan)
        check_kind(group)
        self.layout = layout_of(layout).name
        self.local_attention = local_attention
        self.group = group
        self.plan = plan
        self.wire = check_wire(wire)

    @outside_graphs
    def forward(
        self,
        query: Float[Tensor, "_ _ _ dim"],
        key: Float[Tensor, "_ _ _ dim"],
        value: Float[Tensor, "_ _ _ value_dim"],
        *args: Any,
        **kwargs: Any,
    ) -> Float[Tensor, "_ _ _ value_dim"]:
        """Attention of this rank's tokens over all tokens.

        Args:
            query: this rank's tokens, `[batch, seq_local, heads, dim]` in the order of the layout.
            key, value: the same tokens, `[batch, seq_local, kv_heads, dim]`; the value's dim may differ.
            args, kwargs: go to the local attention as they are. For the default, an `attn_mask` is given for
                all tokens and, where it has a head dim, for all query heads; each rank uses its own heads of
                it.

        Returns:
            `[batch, seq_local, heads, value_dim]` in the order of the layout.

        Raises:
            SeqparError: one of its classes. What a rank can see alone is raised before it communicates, what
                only all can see on all alike.
        """
        layout = LAYOUTS[self.layout]
        _check_shards(query, key, value, layout)
        group = group_of(self.group)
        query, key, value = _autocast(query, key, value)
        attend = self.own_attention(query, args, kwargs)
        if self.plan is None:
            needed = gradients((query, key, value), attend.others)
            record = Record.of(query, layout, key.shape[layout.heads], value.shape[3], needed)
            plan = agree(group, record, query.device)
        else:
            plan = self.plan
            check_size(group, plan.ranks)
            _check_plan(query, key, layout, plan, group)
        attend.check(plan)
        return self.exchange_and_attend(query, key, value, plan, group, attend)

    def exchange_and_attend(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Plan, group: TorchGroup, attend: OwnAttention
    ) -> Tensor:
        """From the shards to the shard of the output, where the shards are checked and fit the plan and the group.

        Args:
            query, key, value: as for `forward`, `[batch, seq_local, heads, dim]` in the order of the layout.
            plan, group: who owns what, and the ranks that share it.
            attend: attention of this rank's heads.

        Returns:
            `[batch, seq_local, heads, value_dim]` in the order of the layout.

        Raises:
            LocalAttentionError: the local attention returned something else than it should.
            ArgumentError: the attribute `wire` was set to something else.
        """
        (own,) = own_heads(plan, group.rank)
        layout = LAYOUTS[self.layout]
        qkv = unchecked_qkv_to_heads(query, key, value, plan, group, layout, self.wire)
        result = attend(*qkv, own)
        del qkv  # where no gradient needs them, the output's exchange can have their memory
        return unchecked_heads_to_sequence(result, plan, group, layout)

    def own_attention(self, query: Tensor, args: Any, kwargs: Any) -> OwnAttention:
        """The local attention with its arguments, checked against this rank's query.

        Args:
            query: `[batch, seq_local, heads, dim]` in the order of the layout.
            args, kwargs: what `forward` was given beside query, key and value.

        Raises:
            ArgumentError, MaskError: arguments that the default local attention does not take.
        """
        layout = LAYOUTS[self.layout]
        others = list(self._other_tensors(args, kwargs))
        if self.local_attention is not None:
            return OwnAttention(self.local_attention, layout, args, kwargs, others)
        options = _options(query, layout, args, kwargs)
        mask = options.pop("attn_mask", None)
        return OwnAttention(partial(fused_attention, layout=self.layout), layout, (), options, others, mask)

    def _other_tensors(self, args: Any, kwargs: Any) -> Iterator[Tensor]:
        """What else needs a gradient: parameters of the local attention, tensors among its arguments."""
        parameters = self.local_attention.parameters() if isinstance(self.local_attention, nn.Module) else ()
        arguments = tree_leaves((args, kwargs)) if args or kwargs else ()
        for leaf in (*parameters, *arguments):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                yield leaf

    def extra_repr(self) -> str:
        """What print(module) shows beside the local attention."""
        plan = "made in each call" if self.plan is None else f"of {self.plan.ranks} ranks"
        return f"layout={self.layout!r}, plan {plan}"


@no_type_check
def _check_shards(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor, layout)
    tokens, kv_tokens = query.shape[layout.sequence], key.shape[layout.sequence]
    if tokens != kv_tokens:
        raise UnsupportedError(
            f"query has {tokens} tokens on this rank and key {kv_tokens}: cross attention is not supported.",
            f"Pass query, key and value of the same tokens, in the layout {layout.name!r}.",
        )
    check_qkv(query, key, value, layout)
    heads, kv_heads = query.shape[layout.heads], key.shape[layout.heads]
    if not heads or not kv_heads or heads % kv_heads:
        raise ShapeError(
            f"{kv_heads} kv heads cannot serve {heads} query heads in equal groups: "
            f"query {tuple(query.shape)}, key {tuple(key.shape)} ({layout.name}).",
            "Give a number of kv heads that divides the query heads, or the layout that the tensors have.",
        )


def _check_plan(query: Tensor, key: Tensor, layout: Layout, plan: Plan, group: TorchGroup) -> None:
    found = (query.shape[layout.sequence], query.shape[layout.heads], key.shape[layout.heads])
    planned = (len(plan.tokens_of(group.rank)), plan.heads, plan.kv_heads)
    if found != planned:
        raise ShapeError(
            f"rank {group.rank} has {found[0]} tokens, {found[1]} query heads and {found[2]} kv heads "
            f"({layout.name}); the plan says {planned[0]}, {planned[1]} and {planned[2]}.",
            "Pass tensors of those sizes, the layout that they have, or a plan made for them.",
        )


def _autocast(*tensors: Tensor) -> Iterator[Tensor]:
    """Under autocast, what the local attention would make of its inputs, made before they travel."""
    device = tensors[0].device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if enabled and tensors[0].dtype != torch.float64:
        return (tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
    return iter(tensors)


def _options(query: Tensor, layout: Layout, args: Any, kwargs: Any) -> dict[str, Any]:
    """The default local attention's arguments, checked, all as keyword arguments."""
    try:
        return fused_options(query, layout, *args, **kwargs)
    except TypeError as error:
        message = str(error).removeprefix("fused_options() ")
        raise ArgumentError(
            f"the default local attention {message}.",
            "It takes attn_mask, dropout_p, is_causal, scale and enable_gqa.",
        ) from None
