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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from .errors import UnsupportedOperationError, UnsupportedTransformError
from .graphs import leaves_of, unique

if TYPE_CHECKING:
    from .run import Run

Tensors = Sequence[Tensor]


@dataclass
class Program:
    """What every rank has computed, and from which tensors.

    Attributes:
        run: the ranks, to be entered again.
        outputs: by rank, the tensors at the end of its graph.
        leaves: by rank, the leaf tensors that its graph begins with.
        places: by rank and leaf, the number of the tensor outside of the world that the leaf is or stands for.
    """

    run: Run
    outputs: Sequence[Tensors]
    leaves: Sequence[Tensors]
    places: Sequence[Sequence[int]]


@dataclass
class StandIns:
    """Leaf tensors that stand inside of the world for tensors outside, so that a rank's graph ends at them."""

    outer: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def make(self, tensor: Tensor, requires_grad: bool = True) -> Tensor:
        """A new leaf for a tensor."""
        leaf = tensor.detach().requires_grad_(requires_grad)
        self.outer[id(leaf)] = leaf, tensor
        return leaf

    def behind(self, leaf: Tensor) -> Tensor:
        """What the leaf stands for: itself, unless it was made here."""
        return self.outer.get(id(leaf), (leaf, leaf))[1]


def run(world_run: Run, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Run `fn` on all ranks, and tie the tensors that it returns to the tensors that it got or captured."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    cut = [
        isinstance(x, Tensor) and x.requires_grad and (not x.is_leaf or bool(x._backward_hooks)) for x in flat
    ]
    stand_ins = StandIns()

    def body(rank: int) -> Any:
        if not any(cut):
            return fn(*args, **kwargs)
        copies = {id(x): stand_ins.make(x) for x, is_cut in zip(flat, cut, strict=True) if is_cut}
        own_args, own_kwargs = pytree.tree_unflatten([copies.get(id(x), x) for x in flat], spec)
        return fn(*own_args, **own_kwargs)

    results = [pytree.tree_flatten(result) for result in world_run.execute(body)]
    refuse_transforms([values for values, _ in results])
    tied = _tie(world_run, [values for values, _ in results], stand_ins)
    return [pytree.tree_unflatten(values, spec) for values, (_, spec) in zip(tied, results, strict=True)]


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


def _tie(run: Run, values: Sequence[Sequence[Any]], stand_ins: StandIns) -> list[list[Any]]:
    """The values by rank, those with a gradient as outputs of one node over all that they were computed from."""
    outputs = [unique(x for x in own if isinstance(x, Tensor) and x.requires_grad) for own in values]
    leaves = [leaves_of(own) for own in outputs]
    _refuse_hooks(leaf for own in leaves for leaf in own)
    inputs = unique(stand_ins.behind(leaf) for own in leaves for leaf in own)
    number = {id(x): place for place, x in enumerate(inputs)}
    places = [[number[id(stand_ins.behind(leaf))] for leaf in own] for own in leaves]
    if not inputs:
        return [list(own) for own in values]
    flat = iter(_Joint.apply(Program(run, outputs, leaves, places), *inputs))  # type: ignore[no-untyped-call]
    tied = [{id(x): next(flat) for x in own} for own in outputs]
    return [[new.get(id(x), x) for x in own] for own, new in zip(values, tied, strict=True)]


class _Joint(torch.autograd.Function):
    """The node. Its inputs are the tensors outside of the world that the ranks' leaves are or stand for."""

    @staticmethod
    def forward(ctx: Any, program: Program, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.program = program
        ctx.save_for_backward(*inputs)
        return tuple(x.detach() for own in program.outputs for x in own)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        program, inputs, again = ctx.program, ctx.saved_tensors, torch.is_grad_enabled()
        stand_ins, ends = StandIns(), iter(gradients)
        for own, places in zip(program.leaves, program.places, strict=True):
            stand_ins.outer.update({id(x): (x, inputs[place]) for x, place in zip(own, places, strict=True)})
        incoming = [[stand_ins.make(next(ends), again) for _ in own] for own in program.outputs]

        def body(rank: int) -> Tensors:
            outputs, leaves = program.outputs[rank], program.leaves[rank]
            if not leaves:
                return []
            return torch.autograd.grad(
                outputs, leaves, incoming[rank], create_graph=again, retain_graph=True, allow_unused=True
            )

        by_rank: Sequence[Sequence[Any]] = program.run.execute(body)
        if again:
            by_rank = _tie(program.run, by_rank, stand_ins)
        elif not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.program = None
        shares: list[list[Tensor]] = [[] for _ in inputs]
        for own, places in zip(by_rank, program.places, strict=True):
            for gradient, place in zip(own, places, strict=True):
                if gradient is not None:
                    shares[place].append(gradient)
        return None, *(reduce(torch.add, share) if share else None for share in shares)


def _refuse_hooks(leaves: Iterable[Tensor]) -> None:
    """A hook of a captured leaf would run once on every rank, and once more outside."""
    for leaf in leaves:
        if leaf._backward_hooks:
            raise UnsupportedOperationError(
                f"a captured tensor of shape {list(leaf.shape)} has {len(leaf._backward_hooks)} hooks, which would see "
                "each rank's gradient.\n  Pass it to run() as an argument, or take the hooks off."
            )
