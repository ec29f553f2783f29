"""Stands in for the package flash_attn, which needs a GPU: the few functions that yunchang calls.

Plain torch, with flash-attn's signatures. Tensors are [batch, seq, heads, dim], log-sum-exps [batch, heads, seq]. As
there, sums and exponentials are more precise than the tensors.
"""

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def scores_of(query: Tensor, key: Tensor, scale: float | None, causal: bool) -> Tensor:
    """Scaled dot products [batch, heads, query, key] in float64; what lies in the future is -inf."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) * scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf) if causal else scores


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    **options: Any,
) -> Tensor:
    """Attention that autograd differentiates."""
    weights = scores_of(q, k, softmax_scale, causal).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.double()).to(q.dtype)


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    **options: Any,
) -> tuple[Tensor, Tensor, None, None]:
    """Output and log-sum-exp of one block of keys."""
    scores = scores_of(q, k, softmax_scale, causal)
    output = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())
    return output.to(q.dtype), scores.logsumexp(-1).float(), None, None


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    *options: Any,
) -> None:
    r"""One block's share of the gradients, written into dq, dk and dv.

    $P = \exp(S - \mathrm{lse})$, $dS = P \odot (dO V^T - \mathrm{rowsum}(dO \odot O))$ (FlashAttention-2, algorithm 2)
    """
    dout, out, query, key, v = (x.double() for x in (dout, out, q, k, v))
    weights = (scores_of(q, k, softmax_scale, causal) - softmax_lse[..., None]).exp()
    delta = (dout * out).sum(-1).transpose(1, 2)[..., None]
    slopes = weights * (torch.einsum("bqhd,bkhd->bhqk", dout, v) - delta) * softmax_scale
    dq.copy_(torch.einsum("bhqk,bkhd->bqhd", slopes, key))
    dk.copy_(torch.einsum("bhqk,bqhd->bkhd", slopes, query))
    dv.copy_(torch.einsum("bhqk,bqhd->bkhd", weights, dout))


def modules() -> dict[str, ModuleType]:
    """What `sys.modules` must have while yunchang is imported."""
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.__version__ = "2.8.0"
    package.__path__ = []
    package.flash_attn_func = flash_attn_func
    package.flash_attn_interface = interface
    interface._flash_attn_forward = _flash_attn_forward
    interface._flash_attn_backward = _flash_attn_backward
    interface._flash_attn_varlen_forward = interface._flash_attn_varlen_backward = (
        None  # imported, not called
    )
    return {"flash_attn": package, "flash_attn.flash_attn_interface": interface}
