"""What runs on each rank between the two exchanges: attention over all tokens, for the rank's own heads.

Any callable will do that takes query, key and value in the module's layout and returns its result in the same
layout. Two are here: PyTorch's fused kernel, and the same in plain math, to read and to differentiate twice.

Source: Vaswani et al., 2017, arXiv:1706.03762, equation 1; shared kv heads, Ainslie et al., 2023, arXiv:2305.13245.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from .checks import is_dense, is_finite, no_type_check
from .errors import ArgumentError, MaskError
from .plan import Plan
from .shapes import Layout


def fused_attention(
    query: Float[Tensor, "_ _ _ dim"],
    key: Float[Tensor, "_ _ _ dim"],
    value: Float[Tensor, "_ _ _ value_dim"],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    layout: str = "b s h d",
) -> Float[Tensor, "_ _ _ value_dim"]:
    """`torch.nn.functional.scaled_dot_product_attention` in any layout; kv heads divide the query heads.

    Args:
        query: `[batch, seq, heads, dim]` in the order of `layout`.
        key, value: `[batch, seq, kv_heads, dim]` in that order; the value's dim may differ.
        attn_mask: [batch, heads, seq, seq], or what broadcasts to it; boolean, True where a key may be seen, or
            added to the scores.
        dropout_p: probability that a weight is dropped, 0 to 1.
        is_causal: no token sees a later one.
        scale: factor of the scores; 1/sqrt(dim) unless given.
        layout: "b s h d", "s b h d" or "b h s d".

    Returns:
        `[batch, seq, heads, value_dim]` in the order of `layout`.
    """
    query, key, value = (rearrange(tensor, f"{layout} -> b h s d") for tensor in (query, key, value))
    gqa = query.shape[1] != key.shape[1]
    result = F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=gqa
    )
    return rearrange(result, f"b h s d -> {layout}")


def plain_attention(
    query: Float[Tensor, "_ _ _ dim"],
    key: Float[Tensor, "_ _ _ dim"],
    value: Float[Tensor, "_ _ _ value_dim"],
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    layout: str = "b s h d",
) -> Float[Tensor, "_ _ _ value_dim"]:
    r"""Attention as the formula says it.

    $$O_{hi} = \sum_j \operatorname{softmax}_j\left(c \, Q_{hi} \cdot K_{h'j} + M_{hij}\right) V_{h'j}, \quad
    h' = \lfloor h H_{kv} / H_q \rfloor$$

    `scale` is c, 1/sqrt(dim) unless given. `attn_mask` is M, or, if boolean, says which keys may be seen; it
    broadcasts to [batch, heads, seq, seq]. A token that may see no key gets zeros. Half types are computed in
    float32.
    """
    dtype = query.dtype
    query, key, value = (rearrange(tensor, f"{layout} -> b h s d") for tensor in (query, key, value))
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    kv_heads = key.shape[1]
    by_group = rearrange(query * scale, "b (kv ratio) s d -> b kv ratio s d", kv=kv_heads)
    scores = einsum(by_group, key, "b kv ratio s d, b kv t d -> b kv ratio s t")
    scores = rearrange(scores, "b kv ratio s t -> b (kv ratio) s t")
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = rearrange(_softmax(scores), "b (kv ratio) s t -> b kv ratio s t", kv=kv_heads)
    result = einsum(weights, value, "b kv ratio s t, b kv t d -> b kv ratio s d")
    result = rearrange(result, "b kv ratio s d -> b (kv ratio) s d")
    return rearrange(result.to(dtype), f"b h s d -> {layout}")


def _softmax(scores: Float[Tensor, "batch heads seq keys"]) -> Float[Tensor, "batch heads seq keys"]:
    """Softmax over the keys; zeros, with zero gradients, where there is no key to see."""
    blind: Bool[Tensor, "batch heads seq 1"] = (scores == -math.inf).all(dim=-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(dim=-1).masked_fill(blind, 0.0)


@no_type_check
def fused_options(
    query: Float[Tensor, "_ _ _ dim"],
    layout: Layout,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = True,
) -> dict[str, Any]:
    """The keyword arguments of scaled_dot_product_attention, checked, for `fused_attention`.

    `enable_gqa` is accepted and has no effect: query heads share kv heads where there are fewer of these.

    Args:
        query: `[batch, seq_local, heads, dim]` in the order of `layout`.
        attn_mask: [batch, heads, seq, seq], or what broadcasts to it.
        dropout_p: probability, 0 to 1.
        is_causal: True or False.
        scale: factor of the scores, a finite number, or None.

    Raises:
        ArgumentError, MaskError: what a rank can see before the number of all tokens is known.
    """
    if not is_finite(dropout_p) or not 0.0 <= dropout_p <= 1.0:
        raise ArgumentError(f"dropout_p is {dropout_p!r}.", "Use a probability, 0 to 1.")
    if scale is not None and not is_finite(scale):
        raise ArgumentError(f"scale is {scale!r}.", "Use a finite number, or None for 1/sqrt(head dim).")
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise ArgumentError(f"{name} is {flag!r}.", "Use True or False.")
    if attn_mask is None:
        return {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if is_causal:
        raise ArgumentError("both attn_mask and is_causal are given.", "Put the causal rule into the mask.")
    if not isinstance(attn_mask, Tensor) or attn_mask.dtype not in (torch.bool, query.dtype):
        found = attn_mask.dtype if isinstance(attn_mask, Tensor) else type(attn_mask).__name__
        raise MaskError(f"attn_mask is {found}.", f"Pass a tensor of torch.bool or {query.dtype}.")
    if not is_dense(attn_mask):
        raise MaskError(
            "attn_mask is a sparse or nested tensor.", "Pass a dense one, such as mask.to_dense()."
        )
    batch, heads = query.shape[layout.batch], query.shape[layout.heads]
    leading = attn_mask.shape[:-2]
    if not 2 <= attn_mask.ndim <= 4 or attn_mask.device != query.device:
        raise MaskError(
            f"attn_mask is {tuple(attn_mask.shape)} on {attn_mask.device}; query is on {query.device}.",
            "Give it two to four dims, [batch, heads, seq, seq], on the device of query.",
        )
    if leading[-1:] not in ((), (1,), (heads,)) or leading[:-1] not in ((), (1,), (batch,)):
        raise MaskError(
            f"attn_mask is {tuple(attn_mask.shape)}; there are {heads} query heads and batch {batch}.",
            f"Give it for all {heads} query heads or for 1: [{batch} or 1, {heads} or 1, seq, seq].",
        )
    return {"attn_mask": attn_mask, "dropout_p": dropout_p, "scale": scale}


def check_mask(mask: Tensor, plan: Plan) -> None:
    """Refuse a mask that does not cover all tokens.

    Args:
        mask: [..., seq, seq], each of the two all tokens or 1.

    Raises:
        MaskError: with the sizes.
    """
    if any(size not in (1, plan.tokens) for size in mask.shape[-2:]):
        raise MaskError(
            f"attn_mask is {tuple(mask.shape)}; the sequence has {plan.tokens} tokens on all ranks together.",
            f"Give it for all tokens in global order, [..., {plan.tokens}, {plan.tokens}].",
        )


def mask_of_heads(mask: Tensor, heads: range) -> Tensor:
    """The mask for these query heads, from one [..., heads, seq, seq] for all; one without a head dim as it is."""
    if mask.ndim == 2 or mask.shape[-3] == 1:
        return mask
    return mask.narrow(-3, heads.start, len(heads))
