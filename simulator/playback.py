"""Plays the notes of all lanes back against each other, which gives everything its virtual time.

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
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from .clusters import Cluster
from .notes import Issue, Join, Lane, Mark, Note, Operation, Transfer
from .source_lines import lines_text
from .trace import Arrow, Span, Trace


@dataclass
class Play:
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
