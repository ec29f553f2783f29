"""What each rank runs for a case of `validate`, virtual or real: nothing in here knows which.

A case has several variants that must not differ in a single bit: without overlap and with each kind of it, or one
for each wire form. The first of them is compared with one device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import DistributedAttention
from .block import UlyssesBlock
from .errors import SeqparError
from .overlap import ChunkedAttention
from .plan import Plan, make_plan
from .rotary import apply_rotary, position_ids_of
from .shapes import layout_of
from .validate_cases import Case, Sequence, sequence_of

CHUNKS = 3
Tensors = dict[str, Tensor]
VARIANTS = {
    "attention": ("plain", "chunks"),
    "wire": ("separate", "fused", "pipelined"),
    "block": ("none", "projections", "chunks"),
}


class MissingGradientError(SeqparError, RuntimeError):
    """Something that the output depends on has no gradient after the backward pass."""


@dataclass(frozen=True)
class Share:
    """What one rank has of a case.

    Args:
        tensors: of the first variant, see `run_variant`.
        differing: the variants that gave other bits on this rank, and what they gave.
        sent: bytes that each variant sent to each rank of the world, forward and backward.
        uncounted: collectives that ran and whose bytes nobody counts.
    """

    tensors: Tensors
    differing: dict[str, Tensors]
    sent: dict[str, np.ndarray]
    uncounted: tuple[str, ...] = ()


def share_of(
    case: Case, results: dict[str, Tensors], sent: dict[str, np.ndarray], uncounted: set[str]
) -> Share:
    """A rank's share, from the results of all variants."""
    first = results[VARIANTS[case.kind][0]]
    differing = {variant: own for variant, own in results.items() if not equal_bits(own, first)}
    return Share(first, differing, sent, tuple(sorted(uncounted)))


def run_variant(case: Case, variant: str, device: torch.device) -> Tensors:
    """One variant on this rank, forward and backward.

    Returns:
        By name, on the CPU: "output", [batch, seq_local, ...], and the gradient of each input (of this rank's
        tokens) and weight (from this rank's tokens).
    """
    with _group_of(case) as group:
        rank = dist.get_rank()
        sequence = sequence_of(case, case.group_of(rank))
        leaves, compute = _prepare(case, variant, sequence, group, device)
        output = _checkpointed(case, compute, leaves)
        output.backward(_own(case, sequence.gradient, device))
    results = {"output": output.detach()} | {name: _gradient(name, leaf) for name, leaf in leaves.items()}
    return {name: _canonical(case, tensor).cpu() for name, tensor in results.items()}


def plan_of(case: Case, group: int) -> Plan:
    """The plan of one of the case's groups."""
    tokens = case.tokens_of(group)
    return make_plan(ranks=len(tokens), heads=case.heads, kv_heads=case.kv_heads, tokens=tokens)


def equal_bits(a: Tensors, b: Tensors) -> bool:
    """Whether all tensors are the same, element for element."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextmanager
def _group_of(case: Case) -> Iterator[dist.ProcessGroup | None]:
    """This rank's group: None for the world. Every rank makes every group."""
    if len(case.groups) == 1:
        yield None
        return
    groups = [dist.new_group(list(members)) for members in case.groups]
    own = groups[case.group_of(dist.get_rank())]
    yield own
    dist.destroy_process_group(own)


def _prepare(
    case: Case, variant: str, sequence: Sequence, group: dist.ProcessGroup | None, device: torch.device
) -> tuple[dict[str, Tensor], Callable[..., Tensor]]:
    """The leaves that get gradients, and what computes the output from this rank's inputs among them."""
    inputs = {name: _own(case, tensor, device).requires_grad_() for name, tensor in sequence.inputs.items()}
    plan = plan_of(case, case.group_of(dist.get_rank()))
    if case.kind == "block":
        block = _block(case, variant, plan if case.planned else None, group, device)
        block.load_state_dict(sequence.weights)
        return inputs | dict(block.named_parameters()), lambda x: block(x, is_causal=case.causal)
    attention = _attention(case, variant, plan if case.planned else None, group)
    positions = position_ids_of(plan, dist.get_rank(group), device)

    def rotate(heads: Tensor) -> Tensor:
        if case.rotary == "none":
            return heads
        return apply_rotary(heads, positions, interleaved=case.rotary == "interleaved", layout=case.layout)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(rotate(query), rotate(key), value, is_causal=case.causal)

    return inputs, attend


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
        theta=None if case.rotary == "none" else 10000.0,
        group=group,
        layout=case.layout,
        plan=plan,
        overlap=variant,
        chunks=CHUNKS,
        device=device,
        dtype=case.dtype,
    )


def _checkpointed(case: Case, compute: Callable[..., Tensor], leaves: dict[str, Tensor]) -> Tensor:
    inputs = [leaves[name] for name in ("query", "key", "value", "x") if name in leaves]
    if case.checkpoint is None:
        return compute(*inputs)
    output: Tensor = checkpoint(compute, *inputs, use_reentrant=case.checkpoint == "reentrant")
    return output


def _own(case: Case, tensor: Tensor, device: torch.device) -> Tensor:
    """This rank's tokens of a tensor of its group, in the case's layout."""
    own = tensor[:, case.own_tokens(dist.get_rank())]
    return _canonical(case, own).to(device).clone(memory_format=torch.contiguous_format)


def _canonical(case: Case, tensor: Tensor) -> Tensor:
    """From batch first, then tokens, to the case's layout, or back: the orders are their own inverse."""
    layout = layout_of(case.layout)
    if tensor.ndim == 4:
        return tensor.permute(layout.batch, layout.sequence, layout.heads, 3)
    if tensor.ndim == 3 and case.layout == "s b h d":
        return tensor.transpose(0, 1)
    return tensor


def _gradient(name: str, leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise MissingGradientError(
            f"{name} got no gradient.", "This is a defect of seqpar: please report it."
        )
    return leaf.grad
