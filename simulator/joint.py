r"""One autograd node over all ranks.

On hardware every rank has an autograd graph of its own, and the collectives in its backward meet those of the other
ranks. In joint mode the tensors that `run` returns are outputs of one node. Its backward re-enters the world: every
rank runs `torch.autograd.grad` over its own graph, the collectives are matched as ever, and a tensor that several ranks
used gets the sum over ranks,

$$
\frac{\partial L}{\partial x} = \sum_r \sum_j
\frac{\partial L}{\partial y_{r,j}} \frac{\partial y_{r,j}}{\partial x}.
$$

With `create_graph` that backward is such a program again, so the hand-written backward passes themselves are what
gradcheck and gradgradcheck judge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from .errors import UnsupportedTransformError

if TYPE_CHECKING:
    from .world import Run

Tensors = Sequence[Tensor]


@dataclass
class Program:
    """What every rank has computed: `outputs[r]` from `leaves[r]`, which stand for the same tensors on all ranks."""

    run: Run
    leaves: Sequence[Tensors]
    outputs: Sequence[Tensors]


def run(world_run: Run, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Run `fn` on all ranks, and tie the tensors that it returns to the tensors that it got or captured."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    given = _unique(x for x in flat if isinstance(x, Tensor) and x.requires_grad)
    copies = [{id(x): x.detach().requires_grad_() for x in given} for _ in range(world_run.size)]

    def body(rank: int) -> Any:
        own_args, own_kwargs = pytree.tree_unflatten([copies[rank].get(id(x), x) for x in flat], spec)
        return fn(*own_args, **own_kwargs)

    results = [pytree.tree_flatten(result) for result in world_run.execute(body)]
    refuse_transforms([values for values, _ in results])
    outputs = [
        _unique(x for x in values if isinstance(x, Tensor) and x.requires_grad) for values, _ in results
    ]
    stand_ins = {id(copy) for own in copies for copy in own.values()}
    captured = _unique(leaf for own in outputs for leaf in _leaves(own) if id(leaf) not in stand_ins)
    leaves = [[*own.values(), *captured] for own in copies]
    tied = _tie(Program(world_run, leaves, outputs), [*given, *captured])
    replaced = [
        {id(x): y for x, y in zip(own, new, strict=True)} for own, new in zip(outputs, tied, strict=True)
    ]
    return [
        pytree.tree_unflatten([own.get(id(x), x) for x in values], spec)
        for (values, spec), own in zip(results, replaced, strict=True)
    ]


def refuse_transforms(values: Any) -> None:
    """Raise where a forward-mode tangent or a functorch transform would be lost without a word."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedTransformError(
            "run() is called inside a functorch transform (torch.func.grad, vmap, jvp, ...), whose derivative would "
            "silently be zero.\n  Use torch.autograd.grad on what a VirtualWorld(..., autograd='joint') returns."
        )
    tensors = (x for x in pytree.tree_leaves(values) if isinstance(x, Tensor))
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise UnsupportedTransformError(
            "run() has a tensor with a forward-mode tangent, which would silently be lost.\n"
            "  Use reverse mode: VirtualWorld(..., autograd='joint') and torch.autograd.grad."
        )


def _tie(program: Program, inputs: Tensors) -> Sequence[Tensors]:
    """The outputs by rank, as outputs of one node over `inputs`."""
    if not any(program.outputs):
        return program.outputs
    flat = iter(_Joint.apply(program, *inputs))  # type: ignore[no-untyped-call]
    return [[next(flat) for _ in own] for own in program.outputs]


class _Joint(torch.autograd.Function):
    """The node. `inputs` are the tensors outside of the world for which the ranks' leaves stand."""

    @staticmethod
    def forward(ctx: Any, program: Program, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.program = program
        ctx.save_for_backward(*inputs)
        return tuple(x.detach() for own in program.outputs for x in own)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        program, inputs, again = ctx.program, ctx.saved_tensors, torch.is_grad_enabled()
        ends = iter(gradients)
        incoming = [[next(ends).detach().requires_grad_(again) for _ in own] for own in program.outputs]

        def body(rank: int) -> Tensors:
            if not program.outputs[rank] or not program.leaves[rank]:
                return []
            return torch.autograd.grad(
                program.outputs[rank],
                program.leaves[rank],
                incoming[rank],
                create_graph=again,
                retain_graph=True,
                allow_unused=True,
            )

        by_rank = [list(own) or [None] * len(inputs) for own in program.run.execute(body)]
        if again:
            by_rank = _tie_again(program, inputs, gradients, incoming, by_rank)
        elif not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.program = None
        shares = [[own[i] for own in by_rank if own[i] is not None] for i in range(len(inputs))]
        return None, *(reduce(torch.add, share) if share else None for share in shares)


def _tie_again(
    program: Program,
    inputs: Tensors,
    gradients: Tensors,
    incoming: list[list[Tensor]],
    by_rank: list[list[Any]],
) -> list[list[Any]]:
    """The backward as a program: gradients by rank as a function of the leaves and of the incoming gradients."""
    outputs = [[x for x in own if x is not None and x.requires_grad] for own in by_rank]
    everyones = [gradient for own in incoming for gradient in own]
    leaves = [[*own, *everyones] for own in program.leaves]
    tied = _tie(Program(program.run, leaves, outputs), [*inputs, *gradients])
    replaced = [
        {id(x): y for x, y in zip(own, new, strict=True)} for own, new in zip(outputs, tied, strict=True)
    ]
    return [[own.get(id(x), x) for x in values] for values, own in zip(by_rank, replaced, strict=True)]


def _leaves(outputs: Tensors) -> list[Tensor]:
    """The leaf tensors that a graph ends in."""
    nodes = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen, leaves = set(nodes), [x for x in outputs if x.grad_fn is None]
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        following = {below for below, _ in node.next_functions if below is not None and below not in seen}
        seen |= following
        nodes.extend(following)
    return leaves


def _unique(tensors: Any) -> list[Tensor]:
    return list({id(x): x for x in tensors}.values())
