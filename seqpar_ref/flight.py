"""An exchange in two pieces: started here and finished there, forward and backward.

The gradient of an exchange is the exchange the other way. Start and finish are a node of autograd each, and the
backward of each is the other: what stands between start and finish in the forward pass stands between the gradient's
start and finish in the backward pass, and the collective travels behind it both times. Through autograd only an empty
token goes from start to finish; the buffers and the Work belong to the `Flight`. (In one piece: `direct.py`.)

Every rank communicates, forward and backward, whatever it owns: an empty shard takes part like any other.

Source: this package's own; what it has to get right is D2, D3, D4 and D20 in docs/defects.md (DeepSpeed #8342).
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import LocalAttentionError, OrderError
from .graphs import outside_graphs, recompute_here
from .group import Group, Work
from .routes import Route
from .wire import Cut, Received


class Flight:
    """One exchange under way, made for one call: `start` it, do something else, `finish` it.

    An exchange has one stage. Where heads travel in chunks (`routes.py`), it has one for each chunk: they share
    the tensors on the side of the sequence, and start or finish there together. Of stages that start together each
    leaves when the one before it has come, to travel behind what is computed with that one.

    The next stage is packed before one is waited for, and issued when that one has come, all its routes together.
    Where results return while chunks come, that is so for both (`packed`): from the second chunk on, the next one to
    come is issued when the result of the one before is packed.

    Args:
        routes: of tensors that start and finish together; each route has collectives of its own.
        packed: what is packed and not issued, in a list shared with the flight of what returns.
    """

    def __init__(
        self, group: Group, *routes: Route, packed: "list[tuple[Flight, _Parcel]] | None" = None
    ) -> None:
        self.group, self.routes = group, routes
        self._waits_for_results = packed is not None
        self._packed = [] if packed is None else packed
        self._tokens: dict[int, Tensor] = {}  # of stages that are started and not finished
        self._works: dict[tuple[Route, int], tuple[Work | None, Tensor]] = {}
        self._received: dict[Cut, Received] = {}
        self._started: set[int] = set()
        self._to_leave: list[int] = []  # stages that are started and not issued
        self._tensors: tuple[Tensor, ...] = ()  # what they share
        self._has_come = False  # a stage of it, so that there is a result to return
        self._gradients: Flight | None = None

    @outside_graphs
    def start(self, *tensors: Tensor, stage: int = 0) -> None:
        """Pack the tensors, and issue their collective; of stages that share them, the first one's.

        They have the shapes of the route, and must not be written to before all is finished. `stage` counts from 0.

        Raises:
            OrderError: they were started before.
        """
        stages = self.routes[0].started_with(stage)
        if not self._started.isdisjoint(stages):
            raise OrderError("an exchange is started a second time.", "Make a new one for each call.")
        token = _Start.apply(self, stages, *tensors)
        self._tokens.update(dict.fromkeys(stages, token))

    @outside_graphs
    def finish(self, stage: int = 0) -> tuple[Tensor, ...]:
        """Wait for the collective, and unpack what has come, in the shapes of the route. `stage` counts from 0.

        Raises:
            OrderError: it was not started, or is finished already.
        """
        stages = self.routes[0].finished_with(stage)
        if not self._tokens.keys() >= set(stages):
            state = "finished already" if self._started.issuperset(stages) else "not started yet"
            raise OrderError(
                f"an exchange that is {state} is to be finished.",
                "Start each exchange and finish it once, both inside of the same activation checkpoint.",
            )
        result: tuple[Tensor, ...] = _Finish.apply(self, stages, *map(self._tokens.pop, stages))
        return result

    def leave(self, stages: tuple[int, ...], tensors: tuple[Tensor, ...]) -> None:
        """`start` of stages that share these tensors, without autograd. Tensors in the shapes of the routes.

        Raises:
            LocalAttentionError: a tensor is memory in which an earlier stage is under way.
        """
        self._check_memory(tensors)
        self._started.update(stages)
        self._to_leave, self._tensors = [*stages], tensors
        self._pack_next()
        self._issue()

    def _check_memory(self, tensors: tuple[Tensor, ...]) -> None:
        """What is sent without a copy must not be written to before it has arrived."""
        packed = (parcel.sent for flight, parcel in self._packed if flight is self)
        under_way = [_addresses(sent) for sent in (*packed, *(sent for _, sent in self._works.values()))]
        for own in map(_addresses, tensors) if under_way else ():
            if any(own.start < other.stop and other.start < own.stop for other in under_way):
                raise LocalAttentionError(
                    "the local attention returned a chunk's result, or its gradients, in memory in which those of an "
                    "earlier chunk are under way.",
                    "Return new memory in each call, or use DistributedAttention.",
                )

    def _pack_next(self) -> None:
        """Pack a stage, if there is one to leave."""
        if self._to_leave:
            stage, tensors = self._to_leave.pop(0), self._tensors
            for route in self.routes:
                own, tensors = tensors[: route.tensors], tensors[route.tensors :]
                self._packed.append((self, self._pack(route, stage, own)))
        if not self._to_leave:
            self._tensors = ()

    def _issue(self) -> None:
        """Send all that is packed."""
        while self._packed:
            flight, (key, received, sent, splits) = self._packed.pop(0)
            work = flight.group.all_to_all_single(received, sent, *splits, async_op=True)
            flight._works[key] = work, sent

    def _pack(self, route: Route, stage: int, tensors: tuple[Tensor, ...]) -> "_Parcel":
        """One stage of a route, ready to be sent."""
        outgoing, place = route.outgoing_at(stage)
        incoming, place_there = route.incoming_at(stage)
        sent = outgoing.pack(tensors, place)
        received = self._received.get(incoming)
        if received is None:
            received = self._received[incoming] = incoming.new_buffer(sent)
        route.copy_kept(stage, tensors, received)
        splits = incoming.splits[place_there], outgoing.splits[place]
        return _Parcel((route, stage), incoming.chunks_of(received, place_there), sent, splits)

    def wait(self, stages: tuple[int, ...]) -> tuple[Tensor, ...]:
        """`finish` of stages that are unpacked together, without autograd. Tensors in the shapes of the routes."""
        while not set(stages).isdisjoint(self._to_leave):
            self._pack_next()
        self._issue()
        self._pack_next()
        for route, stage in itertools.product(self.routes, stages):
            self._arrive(route, stage)
        if not (self._waits_for_results and self._has_come):
            self._issue()
        self._has_come = True
        results: list[Tensor] = []
        for route in self.routes:
            results += self._unpack(route, stages[0])
        return tuple(results)

    def _arrive(self, route: Route, stage: int) -> None:
        """Wait for a collective. What was sent is free then."""
        work, _ = self._works.pop((route, stage))
        if work is not None:
            work.wait()

    def _unpack(self, route: Route, stage: int) -> tuple[Tensor, ...]:
        """The tensors of a stage, and of all that are unpacked with it. What was received is free then."""
        incoming, _ = route.incoming_at(stage)
        return incoming.unpack(self._received.pop(incoming))

    def gradients(self, stages: tuple[int, ...], again: bool) -> "Flight":
        """The exchange of the gradients, one for each backward pass: `again` begins a new pass where due.

        Raises:
            OrderError: no gradient was sent for these stages.
        """
        flight = self._gradients
        if again and (flight is None or not flight._started.isdisjoint(stages)):
            packed = self._packed if self._waits_for_results else None
            there = [route.reverse() for route in self.routes]
            flight = self._gradients = Flight(self.group, *there, packed=packed)
        if flight is None or not (again or flight._started.issuperset(stages)):
            raise OrderError(
                "some chunks of an exchange got a gradient and others did not.",
                "Let the loss depend on every chunk that was started.",
            )
        return flight


def _addresses(tensor: Tensor) -> range:
    """The bytes from the first to the last element of a tensor; none where there is no memory, as of fake tensors."""
    try:
        first = tensor.data_ptr()
    except RuntimeError:
        first = 0
    if not first or not tensor.numel():
        return range(0)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return range(first, first + (last + 1) * tensor.element_size())


class _Parcel(NamedTuple):
    """One stage of a route, packed: what is sent, and the memory for what comes."""

    key: tuple[Route, int]
    received: Tensor
    sent: Tensor
    splits: tuple[list[int], list[int]]


class _Start(torch.autograd.Function):
    """Pack and issue. The gradient is finished here."""

    @staticmethod
    def forward(ctx: Any, flight: Flight, stages: tuple[int, ...], *tensors: Tensor) -> Tensor:
        ctx.flight, ctx.stages = flight, stages
        flight.leave(stages, tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor | None, ...]:
        flight = ctx.flight.gradients(ctx.stages, again=False)
        return None, None, *_Finish.apply(flight, ctx.stages, token)


class _Finish(torch.autograd.Function):
    """Wait and unpack. The gradient is started here, the last chunk first."""

    @staticmethod
    def forward(ctx: Any, flight: Flight, stages: tuple[int, ...], *tokens: Tensor) -> tuple[Tensor, ...]:
        ctx.flight, ctx.stages, ctx.tokens = flight, stages, len(tokens)
        ctx.save_for_backward(tokens[0].new_empty(0))
        return flight.wait(stages)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        recompute_here(ctx)
        flight = ctx.flight.gradients(ctx.stages, again=True)
        token = _Start.apply(flight, ctx.stages[::-1], *gradients)
        return None, None, *[token] * ctx.tokens
