"""What each rank runs for a case of `validate`, virtual or real: nothing in here knows which.

A case has several variants that must not differ in a single bit: without overlap and with each kind of it, or one
for each wire form. The first of them is compared with one device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .errors import SeqparError
from .validate_calls import canonical, own_tokens, prepare
from .validate_cases import AUTOCAST, Case, sequence_of

Tensors = dict[str, Tensor]
VARIANTS = {
    "attention": ("plain", "chunks"),
    "wire": ("separate", "fused", "pipelined"),
    "block": ("none", "projections", "chunks"),
    "deepspeed": ("module", "side stream"),
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
        tokens), of each call; and of each weight (from this rank's tokens). None of what is frozen.
    """
    with _group_of(case) as group:
        rank = dist.get_rank()
        sequence = sequence_of(case, case.group_of(rank))
        inputs, weights, compute = prepare(case, variant, sequence, group, device)
        calls = [inputs]
        if len(case.calls) > 1:
            calls.append({name: (-leaf.detach()).requires_grad_() for name, leaf in inputs.items()})
        with torch.autocast(device.type, AUTOCAST, enabled=case.call == "autocast"):
            outputs = [_checkpointed(case, compute, list(tensors.values())) for tensors in calls]
        for output in outputs:
            output.backward(own_tokens(case, sequence.gradient, device).to(output))
    results = {}
    for prefix, tensors, output in zip(case.calls, calls, outputs, strict=True):
        results[f"{prefix}output"] = output.detach()
        results |= {f"{prefix}{name}": leaf for name, leaf in _gradients(tensors)}
    results |= dict(_gradients(weights))
    return {name: canonical(case, tensor).cpu() for name, tensor in results.items()}


def equal_bits(a: Tensors, b: Tensors) -> bool:
    """Whether all tensors are the same, element for element and in dtype."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


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


def _checkpointed(case: Case, compute: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    if case.checkpoint is None:
        return compute(*inputs)
    output: Tensor = checkpoint(compute, *inputs, use_reentrant=case.checkpoint == "reentrant")
    return output


def _gradients(leaves: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Of the leaves that need one."""
    for name, leaf in leaves.items():
        if leaf.requires_grad and leaf.grad is None:
            raise MissingGradientError(
                f"{name} got no gradient.", "This is a defect of seqpar: please report it."
            )
        if leaf.grad is not None:
            yield name, leaf.grad
