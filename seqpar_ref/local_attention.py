"""What runs on each rank between the two exchanges: all tokens, the rank's own heads.

Any callable will do that takes query, key and value in the module's layout and returns the result in the same layout.
Two are here: PyTorch's fused kernel, and the same in plain math, to read and to differentiate twice.
"""

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from .shapes import no_type_check


@no_type_check
def fused_attention(
    query: Float[Tensor, "_ _ _ dim"],
    key: Float[Tensor, "_ _ _ dim"],
    value: Float[Tensor, "_ _ _ value_dim"],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = True,
    layout: str = "b s h d",
) -> Float[Tensor, "_ _ _ value_dim"]:
    """`torch.nn.functional.scaled_dot_product_attention` in any layout, with kv heads that divide the query heads."""
    query, key, value = (rearrange(tensor, f"{layout} -> b h s d") for tensor in (query, key, value))
    gqa = enable_gqa and query.shape[1] != key.shape[1]
    result = F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=gqa
    )
    return rearrange(result, f"b h s d -> {layout}")


@no_type_check
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

    `scale` is c, 1/sqrt(dim) unless given. `attn_mask` is added, or, if boolean, says which keys may be seen; it
    broadcasts to [batch, heads, seq, seq]. A token that may see no key gets zeros. Half types are computed in float32.
    """
    dtype = query.dtype
    query, key, value = (rearrange(tensor, f"{layout} -> b h s d") for tensor in (query, key, value))
    heads = query.shape[1]
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    grouped = rearrange(query * scale, "b (kv ratio) s d -> b kv ratio s d", kv=key.shape[1])
    scores = einsum(grouped, key, "b kv ratio s d, b kv t d -> b kv ratio s t")
    scores = rearrange(scores, "b kv ratio s t -> b (kv ratio) s t")
    if is_causal:
        tokens = scores.shape[-1]
        scores = scores.masked_fill(
            ~torch.ones(tokens, tokens, dtype=torch.bool, device=scores.device).tril(), -math.inf
        )
    if attn_mask is not None:
        scores = (
            scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        )
    weights = rearrange(_softmax(scores), "b (kv ratio) s t -> b kv ratio s t", kv=key.shape[1])
    result = einsum(weights, value, "b kv ratio s t, b kv t d -> b kv ratio s d")
    return rearrange(result.to(dtype), f"b kv ratio s d -> {layout.replace('h', '(kv ratio)')}")


def _softmax(scores: Float[Tensor, "batch heads seq keys"]) -> Float[Tensor, "batch heads seq keys"]:
    """Softmax over the keys, zero where there is no key to see (and no NaN in the gradient)."""
    blind: Bool[Tensor, "batch heads seq 1"] = (scores == -math.inf).all(dim=-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(dim=-1).masked_fill(blind, 0.0)
