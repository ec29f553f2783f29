"""The call that a case of `validate` makes on a rank: what it is given, and what computes.

Nothing in here knows whether ranks are virtual or real.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from . import deepspeed
from .attention import DistributedAttention
from .block import UlyssesBlock
from .device import side_stream
from .overlap import ChunkedAttention
from .plan import Plan, make_plan
from .rotary import apply_rotary, position_ids_of
from .shapes import layout_of
from .validate_cases import SCALE, THETA, Case, Sequence

CHUNKS = 3
INDICES = {"b s h d": (2, 1, 0), "s b h d": (2, 0, 1), "b h s d": (1, 2, 0)}  # of seqpar_ref.deepspeed


def plan_of(case: Case, group: int) -> Plan:
    """The plan of one of the case's groups."""
    tokens = case.tokens_of(group)
    return make_plan(ranks=len(tokens), heads=case.heads, kv_heads=case.kv_heads, tokens=tokens)


def prepare(
    case: Case, variant: str, sequence: Sequence, group: dist.ProcessGroup | None, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor], Callable[..., Tensor]]:
    """This rank's inputs, the weights, and what computes the output from the inputs."""
    inputs = {
        name: own_tokens(case, tensor, device).requires_grad_(name not in case.frozen)
        for name, tensor in sequence.inputs.items()
    }
    plan = plan_of(case, case.group_of(dist.get_rank()))
    known_plan = plan if case.planned else None
    positions = position_ids_of(plan, dist.get_rank(group), device)
    if case.kind == "block":
        block = _block(case, variant, known_plan, group, device)
        block.load_state_dict(sequence.weights)
        weights: dict[str, Tensor] = dict(block.named_parameters())
        for name, weight in weights.items():
            weight.requires_grad_(name not in case.frozen)
        given = sequence.positions[positions.cpu()].to(device) if case.call == "given positions" else None
        return inputs, weights, lambda x: block(x, given, is_causal=case.causal)
    if case.kind == "deepspeed":
        return inputs, {}, _original_names(case, variant, known_plan, group, sequence, device)
    attention = _attention(case, variant, known_plan, group)
    options: dict[str, Any] = {"is_causal": case.causal}
    if sequence.mask is not None:
        options["attn_mask"] = sequence.mask.to(device)
    if case.call == "mask and scale":
        options["scale"] = SCALE

    def rotate(heads: Tensor) -> Tensor:
        if case.rotary == "none":
            return heads
        return apply_rotary(heads, positions, interleaved=case.rotary == "interleaved", layout=case.layout)

    return inputs, {}, lambda query, key, value: attention(rotate(query), rotate(key), value, **options)


def _attention(case: Case, variant: Any, plan: Plan | None, group: dist.ProcessGroup | None) -> nn.Module:
    if variant == "chunks":
        return ChunkedAttention(None, group, chunks=CHUNKS, layout=case.layout, plan=plan)
    wire: Any = "auto" if variant == "plain" else variant
    return DistributedAttention(None, group, layout=case.layout, plan=plan, wire=wire)


def _block(
    case: Case, variant: Any, plan: Plan | None, group: dist.ProcessGroup | None, device: torch.device
) -> UlyssesBlock:
    return UlyssesBlock(
        case.width,
        case.heads,
        case.kv_heads,
        case.head_dim,
        bias=case.bias,
        theta=None if case.rotary == "none" else THETA,
        group=group,
        layout=case.layout,
        plan=plan,
        overlap=variant,
        chunks=CHUNKS,
        device=device,
        dtype=case.dtype,
    )


def _original_names(
    case: Case,
    variant: str,
    plan: Plan | None,
    group: dist.ProcessGroup | None,
    sequence: Sequence,
    device: torch.device,
) -> Callable[..., Tensor]:
    """The original's `DistributedAttention`, with a local attention as its callers write it."""

    def local_attention(
        query: Tensor, key: Tensor, value: Tensor, is_causal: bool, *, enable_gqa: bool
    ) -> Tensor:
        query, key, value = (canonical(case, heads).transpose(1, 2) for heads in (query, key, value))
        result = scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=enable_gqa)
        return canonical(case, result.transpose(1, 2))

    scatter_idx, gather_idx, batch_dim_idx = INDICES[case.layout]
    stream = side_stream() if variant == "side stream" else None
    module = deepspeed.DistributedAttention(
        local_attention, group, scatter_idx, gather_idx, stream, plan=plan
    )
    tables = None
    if case.rotary == "half-split":
        half = case.head_dim // 2
        pair = torch.arange(2 * half, dtype=torch.float64, device=device) % half
        angle = sequence.positions.to(device)[:, None, None, None] * THETA ** (-pair / half)
        tables = angle.cos().to(case.dtype), angle.sin().to(case.dtype)
    gqa = case.heads != case.kv_heads
    return lambda *qkv: module(*qkv, batch_dim_idx, tables, case.causal, enable_gqa=gqa)


def own_tokens(case: Case, tensor: Tensor, device: torch.device) -> Tensor:
    """This rank's tokens of a tensor of its group, in the case's layout."""
    own = tensor[:, case.own_tokens(dist.get_rank())]
    return canonical(case, own).to(device).clone(memory_format=torch.contiguous_format)


def canonical(case: Case, tensor: Tensor) -> Tensor:
    """From batch first, then tokens, to the case's layout, or back: the orders are their own inverse."""
    layout = layout_of(case.layout)
    if tensor.ndim == 4:
        return tensor.permute(layout.batch, layout.sequence, layout.heads, 3)
    if tensor.ndim == 3 and case.layout == "s b h d":
        return tensor.transpose(0, 1)
    return tensor
