"""Sends and receives between two ranks of a group: each is matched with the oldest of the other side that fits."""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .buffers import nbytes, unobserved
from .calls import Call, Waiting
from .errors import CollectiveMismatchError
from .instruments import Exchange

if TYPE_CHECKING:
    from .matching import Channel


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
            with unobserved():
                call.land([] if self.content is None else [self.content])


class Mailbox:
    """The messages of a group that nobody has answered yet, by rank and tag."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._sends: dict[tuple[int, int], deque[Message]] = defaultdict(deque)
        self._receives: dict[tuple[int, int], deque[Message]] = defaultdict(deque)

    def unanswered(self) -> Iterator[Message]:
        """All of them."""
        for queues in (self._sends, self._receives):
            yield from itertools.chain.from_iterable(queues.values())

    def post(self, message: Message) -> None:
        """A send or a receive: it is matched with the oldest message of the other side that fits."""
        rank = self.channel.ranks[message.call.rank]
        self.channel.run.scheduler.check(rank)
        own, other = (self._sends, self._receives) if message.sends else (self._receives, self._sends)
        here, there = (message.call.rank, message.tag), (message.peer, message.tag)
        partner = self._partner(message, other, there)
        if partner is None:
            own[here].append(message)
        elif message.sends:
            self._deliver(message, partner)
        else:
            self._deliver(partner, message)
        self.channel.run.scheduler.preempt(rank)

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
            self.channel.run.scheduler.suspect(lambda: self._mismatched_message(send, receive))
            return
        source = send.call.inputs[0]
        receive.peer, receive.content = send.call.rank, source
        calls = (send.call, receive.call)
        ranks = tuple(self.channel.ranks[call.rank] for call in calls)
        matrix = np.array([[0, nbytes(source) if ranks[0] != ranks[1] else 0], [0, 0]], dtype=np.int64)
        self.channel.run.executed(Exchange("send", self.channel, send.order, calls, ranks, matrix))
        send.executed = receive.executed = True
        for rank in send.waiting + receive.waiting:
            self.channel.run.scheduler.ready(rank)

    def _mismatched_message(self, send: Message, receive: Message) -> CollectiveMismatchError:
        sender, receiver = (self.channel.ranks[side.call.rank] for side in (send, receive))
        return CollectiveMismatchError(
            f"{self.channel}: rank {sender} sends {send.call} and rank {receiver} receives {receive.call}.\n"
            f"  Give both the same dtype and shape.\n{self.channel.run.where_ranks_stand()}"
        )
