"""Virtual time: how long a program would take on a `Cluster`.

While the program runs, the clock only writes down, for each rank and lane, what happens in which order: operations,
the calls of collectives and messages, waits, and marks that another lane waits for. Times are computed afterwards, by
playing these notes back against each other. So they depend on what each rank does and not on the order in which the
ranks happened to be run: another seed gives the same times, as long as the program itself does the same. (One that
receives from any source, or asks `is_completed()`, may not.)

The rules of the play, which are those of a GPU whose host is never late:

- A lane does one thing after another. "compute" is the default stream, and each further stream is a lane.
- A collective is ready when every member's lane has come to the call; a message, when sender and receiver have.
- Each rank has one port out and one port in. A collective takes both ports of all its members, a message the port out
  of the sender and the port in of the receiver. It starts when it is ready and its ports are free, first come, first
  served; collectives of one group keep their order.
- Waiting for a call (at once, if it is synchronous) holds the lane until the call ends. Other lanes go on.

The host costs nothing but the launch in each operation, and collectives slow no computation down.
"""

from __future__ import annotations

import heapq
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import numpy as np

from .accesses import Access
from .clusters import Cluster, cluster_of
from .costs import Cost, OperationCosts, transfer_seconds
from .instruments import Exchange, Instrument
from .matching import Call
from .source_lines import Lines, lines_of, lines_text
from .trace import Arrow, Span, Trace

COMPUTE = "compute"
"""The lane of what is on no other stream."""

_HOST = "host"
"""The lane of the host, which does nothing but wait."""

MOST_ARROWS = 256
"""A collective with more pairs of ranks that exchange bytes keeps this many of them, or one for each sender."""

Lane = tuple[int, str]
"""A global rank and one of its lanes."""


@dataclass(slots=True, eq=False)
class Operation:
    """A lane computes."""

    operation: Any
    cost: Cost
    where: Lines


@dataclass(slots=True, eq=False)
class Issue:
    """A lane comes to its part in a transfer. `transfer` is None as long as others are missing."""

    rank: int
    number: int
    transfer: Transfer | None = None


@dataclass(slots=True, eq=False)
class Wait:
    """A lane goes on when its part in a transfer has ended."""

    issue: Issue


@dataclass(slots=True, eq=False)
class Mark:
    """A place on a lane, for other lanes to wait for."""


@dataclass(slots=True, eq=False)
class Join:
    """A lane goes on when another one has passed a mark."""

    mark: Mark


@dataclass(slots=True, eq=False)
class Transfer:
    """A collective or a message, all members of which have called.

    Attributes:
        kind: name of the collective; "send" for a message.
        group: the process group, in words.
        ranks: global ranks; of a message sender and receiver.
        issues: their parts.
        seconds: how long it takes.
        sent, received: bytes of each member by the direct algorithm.
        arrows: (sender, receiver, bytes) as global ranks, at most `MOST_ARROWS` of them.
        pairs: how many pairs of ranks exchange bytes.
        where: source lines of each member.
        is_async: whether the program waits later.
        previous: the collective of the same group before this one.
    """

    kind: str
    group: str
    ranks: tuple[int, ...]
    issues: list[Issue]
    seconds: float
    sent: list[int]
    received: list[int]
    arrows: list[tuple[int, int, int]]
    pairs: int
    where: list[Lines]
    is_async: bool
    previous: Transfer | None

    @property
    def is_message(self) -> bool:
        return self.kind == "send"


Note = Operation | Issue | Wait | Mark | Join


class Clock(Instrument):
    """Notes what each rank does, and what it costs on a cluster.

    Args:
        size: number of ranks.
        cluster: name of a preset, or a `Cluster`.

    Raises:
        ClusterError: there is no such cluster, or it has fewer devices than there are ranks.
    """

    watches_operations = True

    def __init__(self, size: int, cluster: str | Cluster) -> None:
        self.cluster = cluster_of(cluster, size)
        self._costs = OperationCosts(self.cluster)
        self._notes: dict[Lane, list[Note]] = {(rank, COMPUTE): [] for rank in range(size)}
        self._current = [COMPUTE] * size
        self._host: list[Mark | None] = [None] * size
        self._issued: list[dict[Call, Issue]] = [{} for _ in range(size)]
        self._calls = [0] * size
        self._last: dict[Any, Transfer] = {}
        self._is_program: dict[CodeType, bool] = {}

    def current(self, rank: int) -> str:
        """The lane that the rank's next operation runs on."""
        return self._current[rank]

    def switch(self, rank: int, lane: str) -> None:
        """Let the rank's next operations run on a lane, which begins when it is first used."""
        self._current[rank] = lane

    def mark(self, rank: int, lane: str | None = None) -> Mark:
        """A mark behind all that a lane, else the current one, has been given so far."""
        mark = Mark()
        self._lane(rank, lane).append(mark)
        return mark

    def join(self, rank: int, mark: Mark, lane: str | None = None) -> None:
        """Let what comes next on a lane, else on the current one, wait for a mark."""
        self._lane(rank, lane).append(Join(mark))

    def synchronize(self, rank: int, mark: Mark) -> None:
        """The host waits for a mark: so does all that comes next on any lane of the rank, also on new ones."""
        self.join(rank, mark, _HOST)
        self._host[rank] = reached = self.mark(rank, _HOST)
        for (owner, lane), notes in self._notes.items():
            if owner == rank and lane != _HOST:
                notes.append(Join(reached))

    def _lane(self, rank: int, lane: str | None) -> list[Note]:
        key = rank, self._current[rank] if lane is None else lane
        if key not in self._notes:
            host = self._host[rank]
            self._notes[key] = [] if host is None else [Join(host)]
        return self._notes[key]

    def after(
        self, rank: int, operation: Any, args: Any, kwargs: Any, result: Any, accesses: Sequence[Access]
    ) -> None:
        cost = self._costs.of(operation, args, kwargs, result, accesses)
        if cost is not None:
            self._lane(rank, None).append(Operation(operation, cost, self._where()))

    def issued(self, rank: int, call: Call) -> None:
        issue = self._issued[rank][call] = Issue(rank, self._calls[rank])
        self._calls[rank] += 1
        self._lane(rank, None).append(issue)

    def executed(self, exchange: Exchange) -> None:
        issues = [self._issued[rank][call] for rank, call in zip(exchange.ranks, exchange.calls, strict=True)]
        transfer = Transfer(
            exchange.kind,
            str(exchange.channel),
            exchange.ranks,
            issues,
            transfer_seconds(self.cluster, exchange.kind, exchange.matrix, exchange.ranks),
            exchange.matrix.sum(axis=1).tolist(),
            exchange.matrix.sum(axis=0).tolist(),
            _arrows(exchange),
            int(np.count_nonzero(exchange.matrix)),
            [call.where for call in exchange.calls],
            any(call.is_async for call in exchange.calls),
            None,
        )
        if not transfer.is_message:
            transfer.previous = self._last.get(exchange.channel)
            self._last[exchange.channel] = transfer
        for issue in issues:
            issue.transfer = transfer

    def waited(self, rank: int, call: Call) -> None:
        issue = self._issued[rank].pop(call, None)
        if issue is not None:
            self._lane(rank, None).append(Wait(issue))

    def finish(self) -> None:
        for own in self._issued:  # calls that nobody waited for hold their tensors
            own.clear()

    def _where(self) -> Lines:
        """The program's innermost line; faster than `program_lines`, for each operation needs it."""
        frame: Any = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            is_program = self._is_program.get(code)
            if is_program is None:
                is_program = self._is_program[code] = bool(lines_of(frame)[:1] == ((code, frame.f_lineno),))
            if is_program:
                return ((code, frame.f_lineno),)
            frame = frame.f_back
        return ()

    def trace(self) -> Trace:
        """The times of all that has been noted so far."""
        return _Play(self._notes).trace(self.cluster)


@dataclass
class _Play:
    """The notes of all lanes, played back against each other.

    Every lane goes on until it waits. Of the transfers that are ready then, the one that can start first does. What
    becomes ready later cannot start before it, because its lanes were waiting for it or for a later one.
    """

    notes: dict[Lane, list[Note]]
    now: dict[Lane, float] = field(default_factory=dict)
    place: dict[Lane, int] = field(default_factory=dict)
    ready: dict[Transfer, dict[Issue, float]] = field(default_factory=lambda: defaultdict(dict))
    ended: dict[Transfer, float] = field(default_factory=dict)
    passed: dict[Mark, float] = field(default_factory=dict)
    ports: dict[tuple[int, str], float] = field(default_factory=lambda: defaultdict(float))
    waiting: dict[Any, list[Lane]] = field(default_factory=lambda: defaultdict(list))
    held: dict[Transfer, list[Transfer]] = field(default_factory=lambda: defaultdict(list))
    queue: list[tuple[Any, Transfer]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)
    pairs: int = 0

    def trace(self, cluster: Cluster) -> Trace:
        for lane in self.notes:
            self.now[lane], self.place[lane] = 0.0, 0
        for lane in self.notes:
            self.advance(lane)
        while self.queue:
            (earliest, *_), transfer = heapq.heappop(self.queue)
            start = self.start_of(transfer)
            if start > earliest:
                self.enqueue(transfer)
            else:
                self.run(transfer, start)
        self.spans.sort(key=lambda span: (span.rank, span.lane, span.start))
        return Trace(self.spans, self.arrows, self.pairs, cluster)

    def advance(self, lane: Lane) -> None:
        """Go on until the lane waits, or ends."""
        notes = self.notes[lane]
        while self.place[lane] < len(notes):
            note = notes[self.place[lane]]
            if isinstance(note, Operation):
                self.compute(lane, note)
            elif isinstance(note, Issue):
                self.arrive(note, self.now[lane])
            elif isinstance(note, Mark):
                self.passed[note] = self.now[lane]
                self.resume(note)
            else:
                awaited: Any = note.mark if isinstance(note, Join) else note.issue.transfer
                times: Any = self.passed if isinstance(note, Join) else self.ended
                if awaited not in times:
                    self.waiting[awaited].append(lane)
                    return
                self.now[lane] = max(self.now[lane], times[awaited])
            self.place[lane] += 1

    def resume(self, awaited: Mark | Transfer) -> None:
        for lane in self.waiting.pop(awaited, ()):
            self.advance(lane)

    def compute(self, lane: Lane, note: Operation) -> None:
        start, (seconds, flops, moved) = self.now[lane], note.cost
        facts = {"bytes": moved, "FLOPs": flops, "line": lines_text(note.where)}
        self.spans.append(Span(*lane, str(note.operation), start, seconds, facts))
        self.now[lane] = start + seconds

    def arrive(self, issue: Issue, time: float) -> None:
        """A member has come to the call; the last one makes the transfer ready."""
        transfer = issue.transfer
        if transfer is None:
            return
        self.ready[transfer][issue] = time
        if len(self.ready[transfer]) == len(transfer.issues):
            self.enqueue(transfer)

    def enqueue(self, transfer: Transfer) -> None:
        """Put a transfer in line, behind the one of the same group before it."""
        if transfer.previous is not None and transfer.previous not in self.ended:
            self.held[transfer.previous].append(transfer)
            return
        ready = max(self.ready[transfer].values())
        numbers = [issue.number for issue in transfer.issues]
        heapq.heappush(self.queue, ((self.start_of(transfer), ready, transfer.ranks, numbers), transfer))

    def start_of(self, transfer: Transfer) -> float:
        return max([*self.ready[transfer].values(), *(self.ports[port] for port in _ports(transfer))])

    def run(self, transfer: Transfer, start: float) -> None:
        end = self.ended[transfer] = start + transfer.seconds
        for port in _ports(transfer):
            self.ports[port] = end
        for place, rank in enumerate(transfer.ranks):
            facts = {
                "bytes sent": transfer.sent[place],
                "bytes received": transfer.received[place],
                "group": transfer.group,
                "asynchronous": transfer.is_async,
                "line": lines_text(transfer.where[place][:1]),
            }
            lane, name = _row(transfer, place)
            self.spans.append(Span(rank, lane, name, start, transfer.seconds, facts))
        lanes = [_row(transfer, place)[0] for place in (0, -1)]
        self.pairs += transfer.pairs
        for sender, receiver, moved in transfer.arrows:
            self.arrows.append(
                Arrow(transfer.kind, sender, lanes[0], receiver, lanes[1], moved, start, transfer.seconds)
            )
        for following in self.held.pop(transfer, ()):
            self.enqueue(following)
        self.resume(transfer)


def _row(transfer: Transfer, place: int) -> tuple[str, str]:
    """The lane and the name under which a member's part is shown."""
    if not transfer.is_message:
        return "communication", transfer.kind
    sender, receiver = transfer.ranks
    return ("receive", f"receive from {sender}") if place else ("send", f"send to {receiver}")


def _ports(transfer: Transfer) -> list[tuple[int, str]]:
    if transfer.is_message:
        return [(transfer.ranks[0], "out"), (transfer.ranks[1], "in")]
    return [(rank, way) for rank in transfer.ranks for way in ("out", "in")]


def _arrows(exchange: Exchange) -> list[tuple[int, int, int]]:
    """The pairs that exchange bytes. Of too many, each sender keeps those who follow it in the group."""
    size, ranks, sent = len(exchange.ranks), exchange.ranks, exchange.matrix
    if np.count_nonzero(sent) <= MOST_ARROWS:
        pairs = [(int(sender), int(receiver)) for sender, receiver in np.argwhere(sent)]
    else:
        near = max(1, MOST_ARROWS // size)
        pairs = [(sender, (sender + step) % size) for sender in range(size) for step in range(1, 1 + near)]
    return [(ranks[s], ranks[r], int(sent[s, r])) for s, r in pairs if sent[s, r]]
