"""What a rank does with its own heads between the two exchanges: attention over all tokens.

The rank's kv heads become ones that the local attention understands, what it returns is checked, and the result
is tied to everything that must get a gradient, so that each rank runs the same collectives in the backward pass
whatever its local attention uses, and with no heads at all.

Source: kv heads that query heads share, Ainslie et al., 2023, arXiv:2305.13245.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .checks import is_dense, needs_gradient, no_type_check
from .errors import LocalAttentionError
from .local_attention import check_mask, mask_of_heads
from .plan import Plan
from .shapes import Layout


@dataclass(frozen=True)
class OwnHeads:
    """The heads that a rank attends with at a time: all that it owns, or a chunk of them.

    Args:
        query: query heads.
        kv_of_query: for each of them, which of the kv heads at hand it uses.
        expand: each query head gets a kv head of its own, because they share them unevenly.
    """

    query: range
    kv_of_query: tuple[int, ...]
    expand: bool


@lru_cache(maxsize=256)
def own_heads(plan: Plan, rank: int, chunks: int = 1) -> tuple[OwnHeads, ...]:
    """The rank's heads, in that many chunks (see `Plan.chunk_runs`).

    Chunks expand their kv heads where the whole would, so that gradients are summed in the same order.
    """
    ratio = plan.heads // plan.kv_heads
    used = [head // ratio for head in plan.query_heads(rank)]
    groups = {used.count(kv_head) for kv_head in plan.kv_heads_of(rank)}
    runs = plan.chunk_runs(chunks)
    own = []
    for entry in range(rank * chunks, (rank + 1) * chunks):
        query, kv = runs["query"][entry], runs["kv"][entry]
        kv_of_query = tuple(head // ratio - kv.start for head in query)
        own.append(OwnHeads(query, kv_of_query, expand=len(groups) > 1))
    return tuple(own)


@dataclass(frozen=True)
class OwnAttention:
    """A local attention, with what it is given beside query, key and value.

    Args:
        local: called with the tensors of some heads, `args` and `kwargs`. Not called where there are none.
        layout: of these tensors.
        others: what needs a gradient beside query, key and value; zeros on a rank without heads.
        mask: [batch, heads, seq, seq] or what broadcasts to it, for all tokens and query heads; `local` gets
            `attn_mask`, for the heads at hand.
        free: the result may have another dim and dtype than the value. A rank without heads cannot know them.
    """

    local: Callable[..., Tensor]
    layout: Layout
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    others: Sequence[Tensor]
    mask: Tensor | None = None
    free: bool = False

    def check(self, plan: Plan) -> None:
        """Refuse what does not fit the plan.

        Raises:
            MaskError: the mask does not cover all tokens.
        """
        if self.mask is not None:
            check_mask(self.mask, plan)

    def __call__(
        self,
        query: Float[Tensor, "_ _ _ dim"],
        key: Float[Tensor, "_ _ _ dim"],
        value: Float[Tensor, "_ _ _ value_dim"],
        own: OwnHeads,
    ) -> Float[Tensor, "_ _ _ result_dim"]:
        """Attention of these heads, in the layout.

        Args:
            query, key, value: all tokens, `[batch, seq, heads at hand, dim]` in the order of the layout.
            own: which heads these are.

        Raises:
            LocalAttentionError: the local attention returned something else.
        """
        if not own.query:
            return connected(_nothing(query, key, value), *self.others)
        nodes = {id(tensor.grad_fn): tensor for tensor in (query, key, value)}
        links = [tensor.narrow_copy(0, 0, 0) for tensor in nodes.values()]
        kwargs = dict(self.kwargs)
        if self.mask is not None:
            kwargs["attn_mask"] = mask_of_heads(self.mask, own.query)
        if own.expand:
            key, value = (_expanded(tensor, own.kv_of_query, self.layout) for tensor in (key, value))
        result = self.local(query, key, value, *self.args, **kwargs)
        result = _checked(result, query, value, self.layout, self.free)
        if not result.requires_grad:
            result = connected(result, *self.others)
        return _Tied.apply(result, *links)


def _expanded(
    tensor: Float[Tensor, "_ _ _ dim"], used: tuple[int, ...], layout: Layout
) -> Float[Tensor, "_ _ _ dim"]:
    """A kv head for each query head."""
    # Half types pass through float32, so that the gradients of one head are summed there and rounded once.
    wide = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    return wide.index_select(layout.heads, torch.tensor(used, device=tensor.device)).to(tensor.dtype)


@no_type_check
def _checked(result: Tensor, query: Tensor, value: Tensor, layout: Layout, free: bool) -> Tensor:
    """The local attention's result, in four dims."""
    batch, tokens, heads = (query.shape[dim] for dim in (layout.batch, layout.sequence, layout.heads))
    dim, dtype = value.shape[3], value.dtype
    is_tensor = isinstance(result, Tensor)
    if not is_tensor or not is_dense(result):
        kind = "tensor that is not dense" if is_tensor else type(result).__name__
        expected = layout.shape(batch, tokens, heads, dim)
        raise LocalAttentionError(
            f"the local attention returned a {kind}.", f"Return the output, a dense tensor {expected}."
        )
    if free and result.ndim in (3, 4):
        dim, dtype = result.shape[-1] if result.ndim == 4 else result.shape[-1] // heads, result.dtype
    expected = layout.shape(batch, tokens, heads, dim)
    without_heads = tuple(size for dim, size in enumerate(expected[:3]) if dim != layout.heads)
    if result.shape == (*without_heads, heads * dim):
        result = result.unflatten(-1, (heads, dim)).movedim(2, layout.heads)
    if result.shape != expected or result.dtype != dtype or result.device != value.device:
        raise LocalAttentionError(
            f"the local attention returned {tuple(result.shape)} {result.dtype} on {result.device}.",
            f"Return {expected} {dtype} on {value.device}, in {layout.name!r}; heads and dim may merge.",
        )
    return result


def _nothing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The result on a rank without heads: value's empty share.

    Like attention it depends on all three in derivatives of any order, so that this rank issues the same
    collectives as the others in a double backward too.
    """
    return value * (query.sum() * key.sum()).exp()


def connected(result: Tensor, *others: Tensor) -> Tensor:
    """The result, of any shape, with a path for gradients, all zero, to others that need one.

    These are what the local attention was given beside query, key and value: where it was not called, or
    returned something detached, they get a gradient all the same.
    """
    for other in others:
        if needs_gradient(other):
            result = result + other.flatten()[:0].sum().to(result.dtype)
    return result


class _Tied(torch.autograd.Function):
    """The result as it is, with a path for gradients to the exchanges that query, key and value came from.

    A local attention may use none of the three. Its rank still has to run the backward collectives that the
    others run, in derivatives of any order: see `_nothing`. A link is a copy of no element of one of them.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, *links: Tensor) -> Tensor:
        ctx.save_for_backward(*links)
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            links = len(ctx.needs_input_grad) - 1
            return gradient, *[None] * links  # autograd visits the exchanges without it; zeros travel
        return gradient, *[gradient[:0].sum() * link.exp() for link in ctx.saved_tensors]
