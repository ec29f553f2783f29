"""Virtual time: how long a program would take on a `Cluster`.

While the program runs, the clock only writes down, for each rank and lane, what happens in which order: operations,
the calls of collectives and messages, waits, and marks that another lane waits for. Times are computed afterwards, by
playing these notes back against each other. So they depend on what each rank does and not on the order in which the
ranks happened to be run: another seed gives the same times, as long as the program itself does the same. (One that
receives from any source, or asks `is_completed()`, may not.)

Source: this package's own; what an operation and a transfer take is in `simulator.costs`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import CodeType
from typing import Any

import numpy as np

from .accesses import Access
from .calls import Call
from .clusters import Cluster, cluster_of
from .costs import OperationCosts, transfer_seconds
from .instruments import Exchange, Instrument
from .notes import Issue, Join, Lane, Mark, Note, Operation, Transfer, Wait
from .playback import Play
from .source_lines import Lines, lines_of
from .trace import Trace

COMPUTE = "compute"
"""The lane of what is on no other stream."""

_HOST = "host"
"""The lane of the host, which does nothing but wait."""

MOST_ARROWS = 256
"""A collective with more pairs of ranks that exchange bytes keeps this many of them, or one for each sender."""


class Clock(Instrument):
    """Notes what each rank does, and what it costs on a cluster.

    Args:
        size: number of ranks. In the methods `rank` is the global rank, from 0.
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
        return Play(self._notes).trace(self.cluster)


def _arrows(exchange: Exchange) -> list[tuple[int, int, int]]:
    """The pairs that exchange bytes. Of too many, each sender keeps those who follow it in the group."""
    size, ranks, sent = len(exchange.ranks), exchange.ranks, exchange.matrix
    if np.count_nonzero(sent) <= MOST_ARROWS:
        pairs = [(int(sender), int(receiver)) for sender, receiver in np.argwhere(sent)]
    else:
        near = max(1, MOST_ARROWS // size)
        pairs = [(sender, (sender + step) % size) for sender in range(size) for step in range(1, 1 + near)]
    return [(ranks[s], ranks[r], int(sent[s, r])) for s, r in pairs if sent[s, r]]
