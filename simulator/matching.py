"""The k-th collective of every member of a group is matched.

A `Call` is what one rank passes, a `Meeting` the k-th place at which all ranks of a group must call the same thing, and
a `Channel` the group's sequence of meetings plus its sends and receives. A meeting executes when its last rank arrives.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .buffers import nbytes, unobserved
from .errors import CollectiveMismatchError
from .instruments import Exchange
from .source_lines import Lines, lines_text

if TYPE_CHECKING:
    from .world import Run


@dataclass(eq=False)
class Call:
    """One rank's part in a collective.

    Attributes:
        kind: name of the collective.
        group: the channel of its process group.
        rank: rank within the group.
        agree: what all ranks must pass alike, by name: dtype, shape, root, reduction.
        inputs: tensors that are read.
        outputs: tensors that `Meeting.results` are copied into, in the same order.
        where: the program's source lines, innermost first.
        splits: for all_to_all, the rows along dim 0 sent to each rank and received from each rank, int64.
        is_async: the outputs are filled when the rank waits, and not before; else as soon as the collective executes.
        is_functional: called by a functional collective, which waits when its result is first used.
        landed: the outputs are filled.
    """

    kind: str
    group: Channel
    rank: int
    agree: dict[str, Any]
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    where: Lines
    splits: tuple[np.ndarray, np.ndarray] | None = None
    is_async: bool = True
    is_functional: bool = False
    landed: bool = False

    def land(self, received: Sequence[Tensor]) -> None:
        """Fill the outputs; a rank that is not the root of a reduce has none."""
        with unobserved():
            for output, tensor in zip(self.outputs, received, strict=False):
                output.detach().copy_(tensor.view(output.shape))
        self.landed = True

    def __str__(self) -> str:
        facts = ", ".join(f"{name} {_readable(value)}" for name, value in self.agree.items())
        return f"{self.kind}({facts})"


@dataclass(frozen=True)
class Collective:
    """How a kind of collective is executed.

    Attributes:
        execute: gives, from all ranks' calls, what goes into each rank's outputs.
        sent: gives, from all ranks' calls, the bytes [sender, receiver].
        check: raises `CollectiveMismatchError` for what can be wrong although `agree` agrees.
    """

    execute: Callable[[list[Call]], list[Sequence[Tensor]]]
    sent: Callable[[list[Call]], np.ndarray]
    check: Callable[[list[Call]], None] = lambda calls: None


class Meeting:
    """The k-th collective of a group: its calls by rank and, once all have arrived, its results by rank."""

    def __init__(self, channel: Channel, number: int) -> None:
        self.channel, self.number = channel, number
        self.calls: dict[int, Call] = {}
        self.executed = False
        self._results: dict[int, Sequence[Tensor]] = {}
        self._waiting: list[int] = []

    def __str__(self) -> str:
        return f"collective {self.number} of {self.channel}"

    def arrive(self, call: Call, collective: Collective) -> None:
        """Add a rank's call; the last one executes the collective."""
        first = next(iter(self.calls.values()), call)
        self.calls[call.rank] = call
        if (first.kind, first.agree) != (call.kind, call.agree):
            self.channel.run.scheduler.suspect(self._disagreement)
        if len(self.calls) < len(self.channel.ranks) or self._differs():
            return
        calls = [self.calls[rank] for rank in range(len(self.channel.ranks))]
        try:
            collective.check(calls)
            self._execute(calls, collective)
        except CollectiveMismatchError as error:
            self.channel.run.scheduler.suspect(partial(self._explain, str(error)))
            return
        self.channel.finished(self)
        for rank in self._waiting:
            self.channel.run.scheduler.ready(rank)

    def _execute(self, calls: list[Call], collective: Collective) -> None:
        channel = self.channel
        matrix = collective.sent(calls)
        channel.run.executed(Exchange(calls[0].kind, channel, self.number, calls, channel.ranks, matrix))
        with unobserved():
            for call, received in zip(calls, _snapshot(collective.execute(calls), calls), strict=True):
                if call.is_async:
                    self._results[call.rank] = received
                else:
                    call.land(received)
        for call in calls:
            call.inputs = ()
        self.executed = True

    def wait(self, call: Call) -> None:
        """Block the calling rank until the collective has executed and its outputs are filled."""
        scheduler, rank = self.channel.run.scheduler, self.channel.ranks[call.rank]
        scheduler.check(rank)
        while not self.executed:
            self._waiting.append(rank)
            scheduler.block(rank, Waiting(call, self))
        if not call.landed:
            call.land(self._results.pop(call.rank))

    def _differs(self) -> bool:
        first = next(iter(self.calls.values()))
        return any((first.kind, first.agree) != (call.kind, call.agree) for call in self.calls.values())

    def _disagreement(self) -> CollectiveMismatchError:
        kinds = {call.kind for call in self.calls.values()}
        if len(kinds) > 1:
            what = f"different operations ({', '.join(sorted(kinds))})"
        else:
            facts = [call.agree for call in self.calls.values()]
            names = [name for name in facts[0] if any(fact.get(name) != facts[0][name] for fact in facts)]
            what = f"{kinds.pop()} with different {', '.join(names)}"
        return self._explain(
            f"the ranks call {what}.\n  Make every rank of the group call the same, in the same order."
        )

    def _explain(self, what: str) -> CollectiveMismatchError:
        return CollectiveMismatchError(f"{self}: {what}\n{self.channel.run.where_ranks_stand(self)}")


@dataclass(frozen=True)
class Waiting:
    """Why a rank is blocked: its call, and the meeting or partner that it waits for."""

    call: Call
    place: object

    def __str__(self) -> str:
        return f"waits in {self.call}, {self.place}, at {lines_text(self.call.where)}"


class Channel:
    """What the ranks of one process group share: meetings in order, and messages between two ranks."""

    def __init__(self, run: Run, name: str, ranks: tuple[int, ...]) -> None:
        self.run, self.name, self.ranks = run, name, ranks
        self._meetings: dict[int, Meeting] = {}
        self._arrived = [0] * len(ranks)
        self._sends: dict[tuple[int, int], deque[Message]] = defaultdict(deque)
        self._receives: dict[tuple[int, int], deque[Message]] = defaultdict(deque)

    def __str__(self) -> str:
        members = (
            f"all {self.run.size} ranks" if len(self.ranks) == self.run.size else f"ranks {list(self.ranks)}"
        )
        return f"group {self.name!r} of {members}"

    def meet(self, call: Call, collective: Collective) -> Meeting:
        """This rank's next collective on this group."""
        scheduler, rank = self.run.scheduler, self.ranks[call.rank]
        scheduler.check(rank)
        number = self._arrived[call.rank]
        self._arrived[call.rank] += 1
        meeting = self._meetings.setdefault(number, Meeting(self, number))
        meeting.arrive(call, collective)
        scheduler.preempt(rank)
        return meeting

    def unfinished(self) -> Iterator[str]:
        """Each call that no other rank has answered, in words."""
        for meeting in self._meetings.values():
            for call in meeting.calls.values():
                yield f"rank {self.ranks[call.rank]} called {call}, {meeting}, at {lines_text(call.where)}"
        for queues in (self._sends, self._receives):
            for message in itertools.chain.from_iterable(queues.values()):
                call = message.call
                yield f"rank {self.ranks[call.rank]} called {call}, {message}, at {lines_text(call.where)}"

    def finished(self, meeting: Meeting) -> None:
        """Forget a meeting that has executed; those who were there still hold it."""
        del self._meetings[meeting.number]

    def post(self, message: Message) -> None:
        """A send or a receive: it is matched with the oldest message of the other side that fits."""
        rank = self.ranks[message.call.rank]
        self.run.scheduler.check(rank)
        own, other = (self._sends, self._receives) if message.sends else (self._receives, self._sends)
        here, there = (message.call.rank, message.tag), (message.peer, message.tag)
        partner = self._partner(message, other, there)
        if partner is None:
            own[here].append(message)
        elif message.sends:
            self._deliver(message, partner)
        else:
            self._deliver(partner, message)
        self.run.scheduler.preempt(rank)

    def _partner(
        self, message: Message, other: dict[tuple[int, int], deque[Message]], there: Any
    ) -> Message | None:
        if message.peer is None:
            queues = [queue for (_, tag), queue in other.items() if tag == message.tag]
        else:
            queues = [other[there]]
        fitting = [m for queue in queues for m in queue if m.peer in (message.call.rank, None)]
        if not fitting:
            return None
        partner = min(fitting, key=lambda m: m.order)
        other[partner.call.rank, partner.tag].remove(partner)
        return partner

    def _deliver(self, send: Message, receive: Message) -> None:
        if send.call.agree != receive.call.agree:
            self.run.scheduler.suspect(lambda: self._mismatched_message(send, receive))
            return
        source = send.call.inputs[0]
        receive.peer, receive.content = send.call.rank, source
        calls = (send.call, receive.call)
        ranks = tuple(self.ranks[call.rank] for call in calls)
        matrix = np.array([[0, nbytes(source) if ranks[0] != ranks[1] else 0], [0, 0]], dtype=np.int64)
        self.run.executed(Exchange("send", self, send.order, calls, ranks, matrix))
        send.executed = receive.executed = True
        for rank in send.waiting + receive.waiting:
            self.run.scheduler.ready(rank)

    def _mismatched_message(self, send: Message, receive: Message) -> CollectiveMismatchError:
        return CollectiveMismatchError(
            f"{self}: rank {self.ranks[send.call.rank]} sends {send.call} and rank {self.ranks[receive.call.rank]} "
            f"receives {receive.call}.\n  Give both the same dtype and shape.\n{self.run.where_ranks_stand()}"
        )


@dataclass(eq=False)
class Message:
    """One side of a point-to-point transfer; `peer` is a rank of the group, None for a receive from any source."""

    channel: Channel
    call: Call
    sends: bool
    peer: int | None
    tag: int
    order: int
    content: Tensor | None = None
    executed: bool = False
    waiting: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        peer = "any rank" if self.peer is None else f"rank {self.channel.ranks[self.peer]}"
        return f"{'to' if self.sends else 'from'} {peer}, tag {self.tag}"

    def wait(self, call: Call) -> None:
        """Block the calling rank until the other side is there and, on the receiver, the output is filled."""
        scheduler, rank = self.channel.run.scheduler, self.channel.ranks[self.call.rank]
        scheduler.check(rank)
        while not self.executed:
            self.waiting.append(rank)
            scheduler.block(rank, Waiting(call, self))
        if not call.landed:
            call.land([] if self.content is None else [self.content])


def _snapshot(results: list[Sequence[Tensor]], calls: list[Call]) -> list[Sequence[Tensor]]:
    """Copy what is still some rank's own input: that rank may write to it before another has fetched its result."""
    own = {x.untyped_storage()._cdata for call in calls for x in call.inputs}
    copies: dict[int, Any] = {}

    def copy(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.clone() if tensor.untyped_storage()._cdata in own else tensor
        return copies[id(tensor)]

    for row in results:
        if id(row) not in copies:
            copies[id(row)] = [copy(tensor) for tensor in row]
    return [copies[id(row)] for row in results]


def _readable(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")
