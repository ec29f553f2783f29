r"""Which accesses to memory are ordered: vector clocks over the streams of one rank.

Every stream counts its operations. A stream's clock $C_s$ says, for each stream, up to which operation all has happened
before the next operation of $s$. Operation $n$ of stream $t$ has happened before it if

$$C_s[t] \ge n.$$

Recording an event copies a clock; waiting for it takes the maximum of both, entry by entry. Two accesses to a byte, one
of them a write, race unless one has happened before the other. (Lamport 1978; Mattern 1989. Happens-before detectors of
threads, such as Flanagan and Freund's FastTrack, 2009, do the same.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .accesses import Region
from .source_lines import Lines

Clock = dict[int, int]

DEFAULT = 0
"""Number of the default stream."""


@dataclass(frozen=True, slots=True)
class Touch:
    """An access to memory: its bytes, the stream and the number of the operation, and where the program stood."""

    region: Region
    stream: int
    operation: int
    writes: bool
    what: str
    where: Lines


class Timeline:
    """The clocks of one rank's streams, and who touched its memory last.

    Memory that nobody has touched since the first stream was made counts as written on the default stream before.
    """

    def __init__(self) -> None:
        self.clocks: dict[int, Clock] = {DEFAULT: {DEFAULT: 1}}
        self.host: Clock = {}
        self._touches: dict[int, tuple[StorageWeakRef, list[Touch]]] = {}
        self._enough = 1024

    def new_stream(self) -> int:
        """A stream that has waited for nothing but what the host has."""
        number = len(self.clocks)
        self.clocks[number] = {number: 0, **self.host}
        return number

    def join(self, clock: Clock, other: Clock) -> None:
        """All that has happened before `other` has now happened before `clock`."""
        for stream, operation in other.items():
            if clock.get(stream, -1) < operation:
                clock[stream] = operation

    def launch(self, stream: int) -> int:
        """The next operation of a stream; it comes after all that the host has waited for."""
        clock = self.clocks[stream]
        self.join(clock, self.host)
        clock[stream] += 1
        return clock[stream]

    def allocate(self, tensor: Tensor) -> None:
        """The memory is new, and holds nothing yet."""
        self._touches_of(tensor, new=True)

    def touch(self, tensor: Tensor, touch: Touch) -> Iterator[Touch]:
        """Note an access, and give the earlier ones that it races with."""
        touches, clock = self._touches_of(tensor), self.clocks[touch.stream]
        kept = []
        for earlier in touches:
            if not (earlier.writes or touch.writes) or not earlier.region.meets(touch.region):
                kept.append(earlier)
                continue
            if clock.get(earlier.stream, -1) < earlier.operation:
                yield earlier
            if not touch.region.covers(earlier.region):
                kept.append(earlier)
        if not touch.writes:
            kept = [
                x for x in kept if x.writes or x.stream != touch.stream or not touch.region.covers(x.region)
            ]
        touches[:] = [*kept, touch]

    def _touches_of(self, tensor: Tensor, new: bool = False) -> list[Touch]:
        storage = tensor.untyped_storage()
        known = self._touches.get(storage._cdata)
        if known is not None:
            return known[1]
        everything = Region(storage.data_ptr(), (), storage.nbytes())
        before: list[Any] = [] if new else [Touch(everything, DEFAULT, 1, True, "an earlier operation", ())]
        self._touches[storage._cdata] = StorageWeakRef(storage), before
        if len(self._touches) > self._enough:
            self._touches = {key: x for key, x in self._touches.items() if not x[0].expired()}
            self._enough = 2 * len(self._touches) + 1024
        return before
