"""The k-th collective of every member of a group is matched.

A `Meeting` is the k-th place at which all ranks of a group must call the same thing; it executes when its last rank
arrives. A `Channel` is what the ranks of a group share: the sequence of its meetings, and its mailbox.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .buffers import unobserved
from .calls import Call, Waiting
from .errors import CollectiveMismatchError
from .instruments import Exchange
from .messages import Mailbox
from .source_lines import lines_text

if TYPE_CHECKING:
    from .run import Run


@dataclass(frozen=True)
class Collective:
    """How a kind of collective is executed.

    Attributes:
        execute: gives, from all ranks' calls, what goes into each rank's outputs.
        sent: gives, from all ranks' calls, the bytes [sender, receiver]; called before `execute`, it raises
            `CollectiveMismatchError` for what can be wrong although `agree` agrees.
    """

    execute: Callable[[list[Call]], list[Sequence[Tensor]]]
    sent: Callable[[list[Call]], np.ndarray]


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
            with unobserved():
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


class Channel:
    """What the ranks of one process group share: meetings in order, and messages between two ranks."""

    def __init__(self, run: Run, name: str, ranks: tuple[int, ...]) -> None:
        self.run, self.name, self.ranks = run, name, ranks
        self._meetings: dict[int, Meeting] = {}
        self._arrived = [0] * len(ranks)
        self.mailbox = Mailbox(self)

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
        if number not in self._meetings:
            self._meetings[number] = Meeting(self, number)
        meeting = self._meetings[number]
        meeting.arrive(call, collective)
        scheduler.preempt(rank)
        return meeting

    def unfinished(self) -> Iterator[str]:
        """Each call that no other rank has answered, in words."""
        for meeting in self._meetings.values():
            for call in meeting.calls.values():
                yield f"rank {self.ranks[call.rank]} called {call}, {meeting}, at {lines_text(call.where)}"
        for message in self.mailbox.unanswered():
            call = message.call
            yield f"rank {self.ranks[call.rank]} called {call}, {message}, at {lines_text(call.where)}"

    def finished(self, meeting: Meeting) -> None:
        """Forget a meeting that has executed; those who were there still hold it."""
        del self._meetings[meeting.number]


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
