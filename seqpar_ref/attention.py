r"""Attention over a sequence that is split across ranks.

    q, k, v [B, S_P, H, D]  --one all-to-all-->  [B, S, H_P, D]
    local attention, any, over all tokens and this rank's heads
    output  [B, S, H_P, D]  --one all-to-all-->  [B, S_P, H, D]

The method is DeepSpeed-Ulysses (Jacobs et al., 2023, arXiv:2309.14509), with heads that need not divide by the ranks.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .agreement import Record, agree
from .errors import ArgumentError, LocalAttentionError, MaskError, ShapeError, UnsupportedError
from .exchange import check_qkv, heads_to_sequence, qkv_to_heads
from .group import Group, GroupLike, check_size, group_of
from .local_attention import fused_attention
from .plan import Plan
from .shapes import DTYPES, LAYOUTS, Layout, check_tensor, layout_of, no_type_check


@no_type_check
class DistributedAttention(nn.Module):
    """A module around a local attention: the same result as on one device, with the sequence split over ranks.

    Args:
        local_attention: any callable `(query, key, value, *args, **kwargs) -> output`. It gets all tokens in global
            order and this rank's heads, in the module's layout, and returns the output in that layout, with the
            value's head dim and dtype; heads and dim may be merged into a last dim. The kv heads that it gets always
            divide its query heads: query head i uses kv head i // ratio. It is not called on a rank without heads.
            Unless given it is PyTorch's scaled_dot_product_attention, with its keyword arguments.
        group: process group or one-axis device mesh of the ranks that share the sequence; the world unless given.
        layout: "b s h d", "s b h d" or "b h s d".
        plan: who owns what. Without one the ranks exchange a record of their sizes (9 integers of 8 bytes to each
            other rank) in every call, and plan from that.

    Raises:
        LayoutError, ArgumentError: an unknown layout; a local attention that cannot be called; no plan.
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
            raise ArgumentError(
                f"local_attention is a {type(local_attention).__name__}.",
                "Pass a callable, or None for the default.",
            )
        if plan is not None and not isinstance(plan, Plan):
            raise ArgumentError(
                f"plan is a {type(plan).__name__}.", "Pass what seqpar_ref.make_plan returns, or None."
            )
        self.layout = layout_of(layout).name
        self.local_attention = local_attention
        self.group = group
        self.plan = plan

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
            args, kwargs: go to the local attention as they are. For the default, an `attn_mask` with a head dim is
                given for all query heads and all tokens; each rank uses its own heads of it.

        Returns:
            `[batch, seq_local, heads, value_dim]` in the order of the layout.

        Raises:
            SeqparError: one of its classes. What a rank can see alone is raised before it communicates.
        """
        layout = LAYOUTS[self.layout]
        _check_shards(query, key, value, layout)
        group = group_of(self.group)
        query, key, value = _autocast(query, key, value)
        others = list(self._other_tensors(args, kwargs))
        if self.plan is None:
            plan = agree(group, _record(query, key, value, layout, others), query.device)
        else:
            plan = self.plan
            check_size(group, plan.ranks)
            _check_plan(query, key, layout, plan, group)
        local = self._local(args, kwargs, plan, group, layout, query.device)
        query, key, value = qkv_to_heads(query, key, value, plan, group, layout=self.layout)
        if plan.query_heads(group.rank):
            key, value = (_uniform(tensor, plan, group.rank, layout) for tensor in (key, value))
            result = _checked(local(query, key, value), query, value, layout)
        else:
            result = _connected(value, others)
        return heads_to_sequence(result, plan, group, layout=self.layout)

    def _local(
        self, args: Any, kwargs: Any, plan: Plan, group: Group, layout: Layout, device: torch.device
    ) -> Callable[..., Tensor]:
        """The local attention with its arguments bound. The default's are checked here, before any exchange."""
        if self.local_attention is not None:
            local = self.local_attention
            return lambda query, key, value: local(query, key, value, *args, **kwargs)
        try:
            bound = inspect.signature(partial(fused_attention, layout=self.layout)).bind(
                None, None, None, *args, **kwargs
            )
        except TypeError as error:
            raise ArgumentError(
                f"the default local attention: {error}.",
                "It takes attn_mask, dropout_p, is_causal, scale and enable_gqa.",
            ) from None
        options = dict(list(bound.arguments.items())[3:])
        mask = options.get("attn_mask")
        if mask is not None:
            if options.get("is_causal"):
                raise ArgumentError(
                    "both attn_mask and is_causal are given.", "Put the causal rule into the mask."
                )
            options["attn_mask"] = _own_heads_of_mask(mask, plan, group.rank)
        if not 0.0 <= options.get("dropout_p", 0.0) <= 1.0:
            raise ArgumentError(f"dropout_p is {options['dropout_p']}.", "Use a probability, 0 to 1.")
        return partial(fused_attention, **{**options, "layout": self.layout})

    def _other_tensors(self, args: Any, kwargs: Any) -> Iterator[Tensor]:
        """What else the result may depend on: the local attention's parameters and tensors among its arguments."""
        if isinstance(self.local_attention, nn.Module):
            yield from (
                parameter for parameter in self.local_attention.parameters() if parameter.requires_grad
            )
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                yield leaf

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        plan = "made in each call" if self.plan is None else f"{self.plan.ranks} ranks"
        return f"layout={self.layout!r}, plan: {plan}"


def _check_shards(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor, layout)
    if query.shape[layout.sequence] != key.shape[layout.sequence]:
        raise UnsupportedError(
            f"query has {query.shape[layout.sequence]} tokens on this rank, key has {key.shape[layout.sequence]}: "
            "cross attention.",
            f"Pass query, key and value of the same tokens, in the layout {layout.name!r}.",
        )
    check_qkv(query, key, value, layout)
    heads, kv_heads = query.shape[layout.heads], key.shape[layout.heads]
    if not heads or not kv_heads or heads % kv_heads:
        raise ShapeError(
            f"{kv_heads} kv heads cannot serve {heads} query heads in equal groups, "
            f"query {tuple(query.shape)} and key {tuple(key.shape)} read as {layout.name!r}.",
            "Give a number of kv heads that divides the query heads, or the layout that the tensors have.",
        )


def _check_plan(query: Tensor, key: Tensor, layout: Layout, plan: Plan, group: Group) -> None:
    found = (query.shape[layout.sequence], query.shape[layout.heads], key.shape[layout.heads])
    planned = (len(plan.tokens_of(group.rank)), plan.heads, plan.kv_heads)
    if found != planned:
        raise ShapeError(
            f"rank {group.rank} has {found[0]} tokens, {found[1]} query heads and {found[2]} kv heads in the layout "
            f"{layout.name!r}; the plan says {planned[0]}, {planned[1]} and {planned[2]}.",
            "Pass tensors of those sizes, the layout that they have, or a plan made for them.",
        )


def _autocast(*tensors: Tensor) -> Iterator[Tensor]:
    """Under autocast, what the local attention would make of its inputs, made before they travel."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device) and tensors[0].dtype != torch.float64:
        return (tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
    return iter(tensors)


def _record(query: Tensor, key: Tensor, value: Tensor, layout: Layout, others: list[Tensor]) -> Record:
    gradient = any(tensor.requires_grad for tensor in (query, key, value, *others))
    return Record(
        tokens=query.shape[layout.sequence],
        query_heads=query.shape[layout.heads],
        kv_heads=key.shape[layout.heads],
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        batch=query.shape[layout.batch],
        dtype=DTYPES.index(query.dtype),
        layout=list(LAYOUTS).index(layout.name),
        requires_grad=int(gradient and torch.is_grad_enabled()),
    )


def _own_heads_of_mask(mask: Tensor, plan: Plan, rank: int) -> Tensor:
    """A mask broadcasts to [batch, heads, seq, seq]. Where it has a head dim, only this rank's heads are passed on."""
    if not isinstance(mask, Tensor):
        raise MaskError(f"attn_mask is a {type(mask).__name__}.", "Pass a tensor.")
    if mask.ndim < 2 or any(size not in (1, plan.tokens) for size in mask.shape[-2:]):
        raise MaskError(
            f"attn_mask is {tuple(mask.shape)}, the sequence has {plan.tokens} tokens on all ranks together.",
            f"Give it for all tokens in global order: [..., {plan.tokens}, {plan.tokens}].",
        )
    if mask.ndim < 3 or mask.shape[-3] == 1:
        return mask
    if mask.shape[-3] != plan.heads:
        raise MaskError(
            f"attn_mask is {tuple(mask.shape)}, with {mask.shape[-3]} heads; there are {plan.heads} query heads.",
            f"Give it for all {plan.heads} query heads, [..., {plan.heads}, {plan.tokens}, {plan.tokens}], or for 1.",
        )
    own = plan.query_heads(rank)
    return mask.narrow(-3, own.start, len(own))


def _uniform(tensor: Tensor, plan: Plan, rank: int, layout: Layout) -> Tensor:
    """Kv heads such that query head i uses kv head i // ratio: as they came, or one for each query head."""
    held = plan.kv_heads_of(rank)
    ratio = plan.heads // plan.kv_heads
    used = [head // ratio - held.start for head in plan.query_heads(rank)]
    if len(used) % len(held) == 0 and used == [i // (len(used) // len(held)) for i in range(len(used))]:
        return tensor
    # Half types go through float32, so that the gradients of one head are summed there and rounded once.
    exact = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    return exact.index_select(layout.heads, torch.tensor(used, device=tensor.device)).to(tensor.dtype)


def _checked(result: Any, query: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """The local attention's result, in four dims."""
    batch, tokens, heads = (query.shape[dim] for dim in (layout.batch, layout.sequence, layout.heads))
    expected = layout.shape(batch, tokens, heads, value.shape[3])
    if not isinstance(result, Tensor):
        raise LocalAttentionError(
            f"the local attention returned a {type(result).__name__}.",
            f"Return the output alone, a tensor {expected}.",
        )
    if result.ndim == 3:
        merged = tuple(size for dim, size in enumerate(expected[:3]) if dim != layout.heads)
        if result.shape == (*merged, heads * value.shape[3]):
            result = result.unflatten(-1, (heads, value.shape[3]))
            result = result if layout.heads == 2 else result.transpose(1, 2)
    if result.shape != expected or result.dtype != value.dtype or result.device != value.device:
        raise LocalAttentionError(
            f"the local attention returned {tuple(result.shape)} {result.dtype} on {result.device}; "
            f"{expected} {value.dtype} on {value.device} was expected ({layout.name}).",
            "Return what attention makes of its input: query's sizes, with the head dim and dtype of value.",
        )
    return result


def _connected(value: Tensor, others: list[Tensor]) -> Tensor:
    """The result on a rank without heads: value's empty share, which hangs on q, k and v by the exchange.

    Other tensors that need a gradient get zeros here, as they get values on the other ranks.
    """
    for tensor in others:
        value = value + tensor.flatten()[:0].sum().to(value.dtype)
    return value
