"""What a clock writes down of each lane of each rank, in order, while the program runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .costs import Cost
from .source_lines import Lines

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
