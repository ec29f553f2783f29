"""What happened when, on every rank: a file for Perfetto, a figure, and a table.

`save` writes Chrome's trace event format: one process a rank, one thread a lane, a complete event for each span and
a flow event from the sender's slice to the receiver's for each pair of ranks that exchanges bytes. Open it at
ui.perfetto.dev or chrome://tracing.

Source: "Trace Event Format", docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .clusters import Cluster

if TYPE_CHECKING:
    from .pictures import Picture

COMMUNICATION = ("communication", "send", "receive")
"""The lanes of transfers: collectives, and the two directions of messages. All others compute."""

Interval = tuple[float, float]


class Span(NamedTuple):
    """One thing on one lane.

    Attributes:
        rank: global rank.
        lane: "compute" or a stream's name; "communication" for collectives, "send" and "receive" for messages.
        name: the operation or the collective.
        start: seconds from the beginning of the run.
        duration: seconds.
        facts: of an operation its bytes, FLOPs and source line; of a transfer bytes sent and received (of the direct
            algorithm, as in `world.bytes`), group, source line and whether it is asynchronous.
    """

    rank: int
    lane: str
    name: str
    start: float
    duration: float
    facts: dict[str, Any]


class Arrow(NamedTuple):
    """Bytes that go from a lane of one rank to a lane of another, during one transfer. Times in seconds."""

    name: str
    sender: int
    sender_lane: str
    receiver: int
    receiver_lane: str
    bytes: int
    start: float
    duration: float


@dataclass(frozen=True)
class RankTimes:
    """Where one rank's time goes, in seconds.

    Attributes:
        rank: global rank.
        compute: at least one of its lanes computes.
        communication: it takes part in a collective or message that has started.
        exposed: of that, the time in which nothing computes.
        idle: neither, until the last rank of the world ends: it waits for others.
    """

    rank: int
    compute: float
    communication: float
    exposed: float
    idle: float


@dataclass(frozen=True)
class Trace:
    """The spans of a run, by rank, lane and start, and the arrows between them.

    Attributes:
        spans: what each lane did. Two of one lane do not overlap.
        arrows: pairs of ranks that exchange bytes. A collective with more than 256 pairs keeps for each sender those
            that follow it in the group, 256 in all or one a sender. An all-reduce and the like have the pairs of the
            direct algorithm, as `world.bytes`, although their time is that of a ring.
        pairs: how many pairs there were.
        cluster: the hardware model.
    """

    spans: Sequence[Span]
    arrows: Sequence[Arrow]
    pairs: int
    cluster: Cluster

    @cached_property
    def seconds(self) -> float:
        """When the last rank ends."""
        return max((span.start + span.duration for span in self.spans), default=0.0)

    def by_rank(self) -> list[RankTimes]:
        """Busy, exposed and idle time of each rank."""
        compute: dict[int, list[Interval]] = {}
        transfers: dict[int, list[Interval]] = {}
        for span in self.spans:
            own = transfers if span.lane in COMMUNICATION else compute
            own.setdefault(span.rank, []).append((span.start, span.start + span.duration))
        return [
            self._times(rank, compute.get(rank, []), transfers.get(rank, []))
            for rank in sorted(compute.keys() | transfers.keys())
        ]

    def _times(self, rank: int, compute: list[Interval], transfers: list[Interval]) -> RankTimes:
        busy, moving, either = _covered(compute), _covered(transfers), _covered([*compute, *transfers])
        return RankTimes(rank, busy, moving, either - busy, self.seconds - either)

    def __str__(self) -> str:
        lines = [
            f"{_readable(self.seconds)} on {self.cluster.name!r}, a model of the hardware",
            f"{'rank':>4} {'compute':>12} {'communication':>14} {'exposed':>12} {'idle':>12}",
        ]
        for times in self.by_rank():
            compute, moving, exposed, idle = (
                _readable(x) for x in (times.compute, times.communication, times.exposed, times.idle)
            )
            lines.append(f"{times.rank:>4} {compute:>12} {moving:>14} {exposed:>12} {idle:>12}")
        return "\n".join(lines)

    def draw(self) -> Picture:
        """The timeline as a figure: a row for each lane of each rank."""
        from .draw_runs import draw_timeline

        return draw_timeline([span[:5] for span in self.spans])

    def _repr_svg_(self) -> str:
        return self.draw()._repr_svg_()

    def save(self, path: str | Path) -> None:
        """Write the file that Perfetto opens.

        Raises:
            OSError: it cannot be written there.
        """
        Path(path).write_text(json.dumps(self.as_json(), indent=None, separators=(",", ":")))

    def as_json(self) -> dict[str, Any]:
        """What `save` writes: `traceEvents` with times in microseconds, and what the numbers stand for."""
        rows = _Rows(self.spans)
        events = rows.metadata() + [rows.slice_of(span) for span in self.spans]
        for number, arrow in enumerate(self.arrows):
            events += rows.arrow(number, arrow)
        return {
            "traceEvents": events,
            "displayTimeUnit": "ns",
            "otherData": {
                "cluster": asdict(self.cluster),
                "arrows": f"{len(self.arrows)} of {self.pairs} pairs of ranks that exchange bytes; a collective with "
                "more than 256 pairs keeps, for each sender, the receivers that follow it in the group",
            },
        }


class _Rows:
    """The processes and threads of the file. Times are rounded to nanoseconds, so that rows stay without overlaps."""

    def __init__(self, spans: Iterable[Span]) -> None:
        lanes = sorted({(x.rank, x.lane) for x in spans}, key=lambda x: (x[0], x[1] in COMMUNICATION, x[1]))
        self.thread = {
            lane: number - [rank for rank, _ in lanes].index(lane[0]) for number, lane in enumerate(lanes)
        }

    def metadata(self) -> list[dict[str, Any]]:
        events = []
        for rank in sorted({rank for rank, _ in self.thread}):
            events.append(self._fact(rank, 0, "process_name", name=f"rank {rank}"))
            events.append(self._fact(rank, 0, "process_sort_index", sort_index=rank))
        for (rank, lane), thread in self.thread.items():
            events.append(self._fact(rank, thread, "thread_name", name=lane))
            events.append(self._fact(rank, thread, "thread_sort_index", sort_index=thread))
        return events

    def slice_of(self, span: Span) -> dict[str, Any]:
        start, end = _nanoseconds(span.start), _nanoseconds(span.start + span.duration)
        return {
            "ph": "X",
            "name": span.name,
            "cat": "communication" if span.lane in COMMUNICATION else "compute",
            "pid": span.rank,
            "tid": self.thread[span.rank, span.lane],
            "ts": start / 1000,
            "dur": (end - start) / 1000,
            "args": span.facts,
        }

    def arrow(self, number: int, arrow: Arrow) -> list[dict[str, Any]]:
        """From the beginning of the sender's slice to three quarters of the receiver's."""
        start = _nanoseconds(arrow.start)
        end = _nanoseconds(arrow.start + 0.75 * arrow.duration)
        both = {"name": arrow.name, "cat": "bytes", "id": number, "args": {"bytes": arrow.bytes}}
        sender = {"pid": arrow.sender, "tid": self.thread[arrow.sender, arrow.sender_lane]}
        receiver = {"pid": arrow.receiver, "tid": self.thread[arrow.receiver, arrow.receiver_lane]}
        return [
            {"ph": "s", **both, **sender, "ts": start / 1000},
            {"ph": "f", "bp": "e", **both, **receiver, "ts": end / 1000},
        ]

    @staticmethod
    def _fact(rank: int, thread: int, kind: str, **args: Any) -> dict[str, Any]:
        return {"ph": "M", "name": kind, "pid": rank, "tid": thread, "ts": 0, "args": args}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _covered(intervals: Iterable[Interval]) -> float:
    """The length of the union."""
    total, reached = 0.0, 0.0
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _readable(seconds: float) -> str:
    """With a unit that leaves a number from 1 on."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.2f} {unit}"
    return f"{seconds * 1e6:.2f} us"
