r"""Attention over a sequence that is split across ranks.

    q, k, v  [B, S_P, H, D]  -- one all-to-all -->  [B, S, H_P, D]
    any local attention, over all tokens and this rank's heads
    output   [B, S, H_P, D]  -- one all-to-all -->  [B, S_P, H, D]

The method is DeepSpeed-Ulysses (Jacobs et al., 2023, arXiv:2309.14509); here heads, kv heads and tokens need
not divide by the ranks.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .agreement import Record, agree
from .checks import DTYPES, check_tensor, no_type_check
from .errors import ArgumentError, LocalAttentionError, ShapeError, UnsupportedError
from .exchange import check_qkv, heads_to_sequence, qkv_to_heads
from .flight import outside_graphs
from .group import Group, GroupLike, check_kind, check_size, group_of
from .local_attention import fused_attention, fused_options, own_heads_of_mask
from .plan import Plan
from .shapes import LAYOUTS, Layout, layout_of


@no_type_check
class DistributedAttention(nn.Module):
    """A local attention made one over a split sequence: the same result as on one device.

    Args:
        local_attention: any callable `(query, key, value, *args, **kwargs) -> output`. It gets all tokens in
            global order and this rank's heads, in the module's layout, and returns the output in that layout,
            with the value's head dim and dtype; heads and dim may be merged into one last dim. Its kv heads
            always divide its query heads: query head i uses kv head i // ratio. It is not called on a rank
            without heads. Unless given it is PyTorch's scaled_dot_product_attention, with that function's
            keyword arguments.
        group: process group or one-axis device mesh of the ranks that share the sequence; the world unless
            given.
        layout: "b s h d", "s b h d" or "b h s d".
        plan: who owns what. Without one the ranks exchange a record of 72 bytes with each other in every
            call, and plan from those (see `agreement.py`).

    The module keeps no state between calls: one module may serve several micro-batches at a time, and modules
    with different heads live side by side. What holds beyond plain attention:

    - Packed documents: tokens come in global order, so a mask or `cu_seqlens` of the whole sequence means on
      every rank what it means on one device.
    - Parameters by head (slopes, sinks): the callable slices its own, `plan.query_heads(rank)`. Parameters of
      a module passed as `local_attention` get zero gradients on a rank without heads.
    - Gradients of anything else that the callable uses: pass the tensor as an argument, or make it a parameter
      of a module. One that is captured in a closure is unknown on a rank without heads.
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
    ) -> None:
        super().__init__()
        if local_attention is not None and not callable(local_attention):
            kind = type(local_attention).__name__
            raise ArgumentError(f"local_attention is a {kind}.", "Pass a callable, or None for the default.")
        if plan is not None and not isinstance(plan, Plan):
            kind = type(plan).__name__
            raise ArgumentError(f"plan is a {kind}.", "Pass what seqpar_ref.make_plan returns, or None.")
        check_kind(group)
        self.layout = layout_of(layout).name
        self.local_attention = local_attention
        self.group = group
        self.plan = plan

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
        local = self.local_attention
        if local is None:
            args, kwargs = (), _options(query, layout, args, kwargs)
            local = partial(fused_attention, layout=self.layout)
        others = list(self._other_tensors(args, kwargs))
        if self.plan is None:
            plan = agree(group, _record(query, key, value, layout, others), query.device)
        else:
            plan = self.plan
            check_size(group, plan.ranks)
            _check_plan(query, key, layout, plan, group)
        if self.local_attention is None and "attn_mask" in kwargs:
            kwargs["attn_mask"] = own_heads_of_mask(kwargs["attn_mask"], plan, group.rank)

        query, key, value = qkv_to_heads(query, key, value, plan, group, layout=self.layout)
        if plan.query_heads(group.rank):
            key, value = (_uniform(tensor, plan, group.rank, layout) for tensor in (key, value))
            result = _checked(local(query, key, value, *args, **kwargs), query, value, layout)
            if not result.requires_grad:
                result = _connected(result, *others)
            result = _Tied.apply(result, query[:0].clone())
        else:
            result = _connected(_nothing(query, key, value), *others)
        return heads_to_sequence(result, plan, group, layout=self.layout)

    def _other_tensors(self, args: Any, kwargs: Any) -> Iterator[Tensor]:
        """What else needs a gradient: parameters of the local attention, tensors among its arguments."""
        parameters = self.local_attention.parameters() if isinstance(self.local_attention, nn.Module) else ()
        for leaf in (*parameters, *tree_leaves((args, kwargs))):
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


def _check_plan(query: Tensor, key: Tensor, layout: Layout, plan: Plan, group: Group) -> None:
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


def _record(query: Tensor, key: Tensor, value: Tensor, layout: Layout, others: list[Tensor]) -> Record:
    gradient = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (query, key, value, *others)
    )
    return Record(
        tokens=query.shape[layout.sequence],
        query_heads=query.shape[layout.heads],
        kv_heads=key.shape[layout.heads],
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        batch=query.shape[layout.batch],
        dtype=DTYPES.index(query.dtype),
        layout=list(LAYOUTS).index(layout.name),
        requires_grad=int(gradient),
    )


def _uniform(
    tensor: Float[Tensor, "_ _ _ dim"], plan: Plan, rank: int, layout: Layout
) -> Float[Tensor, "_ _ _ dim"]:
    """Kv heads such that query head i uses kv head i // ratio: as they came, or one for each query head."""
    held, ratio = plan.kv_heads_of(rank), plan.heads // plan.kv_heads
    used = [head // ratio - held.start for head in plan.query_heads(rank)]
    own_ratio, left_over = divmod(len(used), len(held))
    if not left_over and used == [index // own_ratio for index in range(len(used))]:
        return tensor
    # Half types pass through float32, so that the gradients of one head are summed there and rounded once.
    wide = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    return wide.index_select(layout.heads, torch.tensor(used, device=tensor.device)).to(tensor.dtype)


@no_type_check
def _checked(result: Tensor, query: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """The local attention's result, in four dims."""
    batch, tokens, heads = (query.shape[dim] for dim in (layout.batch, layout.sequence, layout.heads))
    expected = layout.shape(batch, tokens, heads, value.shape[3])
    if not isinstance(result, Tensor):
        raise LocalAttentionError(
            f"the local attention returned a {type(result).__name__}.",
            f"Return the output, a tensor {expected}.",
        )
    without_heads = tuple(size for dim, size in enumerate(expected[:3]) if dim != layout.heads)
    if result.shape == (*without_heads, heads * value.shape[3]):
        result = result.unflatten(-1, (heads, value.shape[3])).movedim(2, layout.heads)
    if result.shape != expected or result.dtype != value.dtype or result.device != value.device:
        raise LocalAttentionError(
            f"the local attention returned {tuple(result.shape)} {result.dtype} on {result.device}.",
            f"Return {expected} {value.dtype} on {value.device}, in {layout.name!r}; heads and dim may merge.",
        )
    return result


def _nothing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The result on a rank without heads: value's empty share.

    Like attention it depends on all three in derivatives of any order, so that this rank issues the same
    collectives as the others in a double backward too.
    """
    return value * (query.sum() * key.sum()).exp()


def _connected(result: Tensor, *others: Tensor) -> Tensor:
    """The result with a path for gradients, all zero, to others that need one.

    These are what the local attention was given beside query, key and value: where it was not called, or
    returned something detached, they get a gradient all the same.
    """
    for other in others:
        if torch.is_grad_enabled() and other.requires_grad:
            result = result + other.flatten()[:0].sum().to(result.dtype)
    return result


class _Tied(torch.autograd.Function):
    """The result as it is, with a path for gradients to the exchange that query, key and value came from.

    A local attention may use none of the three. Its rank still has to run the backward collectives that the
    others run, in derivatives of any order: see `_nothing`. `link` is a copy of no element of the query.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, link: Tensor) -> Tensor:
        ctx.save_for_backward(link)
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        (link,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return gradient, None  # autograd visits the exchange without it, and zeros travel
        return gradient, gradient[:0].sum() * link.exp()
