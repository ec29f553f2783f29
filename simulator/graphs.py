"""Walks over autograd's graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor


def leaves_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The leaf tensors that a graph begins with."""
    nodes = {x.grad_fn: None for x in outputs if x.grad_fn is not None}
    leaves, stack = [x for x in outputs if x.grad_fn is None], list(nodes)
    while stack:
        node = stack.pop()
        if type(node).__name__ == "AccumulateGrad":
            leaves.append(node.variable)  # type: ignore[attr-defined]
        for below, _ in node.next_functions:
            if below is not None and below not in nodes:
                nodes[below] = None
                stack.append(below)
    return unique(leaves)


def unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Each tensor once, in the order in which they come."""
    return list({id(x): x for x in tensors}.values())
