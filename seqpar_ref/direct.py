"""An exchange in one piece: packed, sent, waited for and unpacked in one autograd node.

The gradient of an exchange is the exchange the other way, so the backward pass of the node is the node itself. Every
rank communicates, forward and backward, whatever it owns: an empty shard takes part like any other.

Source: this package's own; what it has to get right is D3 and D4 in docs/defects.md.
"""

from typing import Any

import torch
from torch import Tensor

from .graphs import recompute_here
from .group import Group
from .routes import Route


class Exchange(torch.autograd.Function):
    """Tensors from the shapes that their routes begin with to those that they end with; the gradients go back.

    Args:
        group: the ranks that exchange.
        routes: each has a collective of its own and one stage.
        async_op: each route's tensors are packed while those before them travel, and unpacked while those behind
            them do. Otherwise one goes after the other.
        tensors: of the first route, then of the next ones.
    """

    @staticmethod
    def forward(
        ctx: Any, group: Group, routes: tuple[Route, ...], async_op: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.reverse = group, tuple([route.reverse() for route in routes]), async_op
        ctx.save_for_backward(tensors[0].new_empty(0))
        return exchange(group, routes, async_op, *tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        recompute_here(ctx)
        there = Exchange.apply if torch.is_grad_enabled() else exchange
        return None, None, None, *there(*ctx.reverse, *gradients)


def exchange(group: Group, routes: tuple[Route, ...], async_op: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`Exchange` without autograd: tensors in the shapes of the routes, `[batch, seq, heads, dim]` in any layout."""
    results: list[Tensor] = []
    for together in [routes] if async_op else [(route,) for route in routes]:
        under_way = []
        for route in together:
            own, tensors = tensors[: route.tensors], tensors[route.tensors :]
            (outgoing,), (incoming,) = route.outgoing, route.incoming
            sent = outgoing.pack(own)
            received = incoming.new_buffer(sent)
            arriving, splits = incoming.chunks_of(received, 0), (incoming.splits[0], outgoing.splits[0])
            work = group.all_to_all_single(arriving, sent, *splits, async_op or route.keeps)
            route.copy_kept(0, own, received)  # meanwhile
            under_way.append((work, sent, incoming, received))
        while under_way:
            work, sent, incoming, received = under_way.pop(0)
            if work is not None:
                work.wait()
            del sent, work  # so that what is unpacked can have the memory
            results += incoming.unpack(received)
    return tuple(results)
