"""What watches a run: the moments at which it is told something, and what it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from .accesses import Access
    from .calls import Call
    from .matching import Channel


@dataclass(frozen=True, eq=False)
class Exchange:
    """A collective, or a message, that has been executed.

    Attributes:
        kind: name of the collective; "send" for a message.
        channel: its process group.
        number: which collective of the group it is, from 0; for a message, which message of the run.
        calls: of a collective every member's call, in the group's order; of a message the send and the receive.
        ranks: the global ranks of `calls`.
        matrix: bytes, int64 [sender, receiver], both as places in `ranks`; what a rank keeps is not counted.
    """

    kind: str
    channel: Channel
    number: int
    calls: Sequence[Call]
    ranks: tuple[int, ...]
    matrix: np.ndarray


class Instrument:
    """Watches a run. All methods do nothing here; ranks are global ranks.

    Exactly one rank runs at a time, so that an instrument needs no lock.
    """

    watches_operations = False
    """Whether `before` and `after` are to be called: every operation of every rank then costs some microseconds."""

    def is_watching(self, rank: int) -> bool:
        """Whether they are to be called for the rank's next operation."""
        return self.watches_operations

    def finish(self) -> None:
        """All ranks have returned; not called where one raised. Called again after each joint backward pass."""

    def issued(self, rank: int, call: Call) -> None:
        """The rank has called a collective, a send or a receive. Nothing of it has happened yet."""

    def executed(self, exchange: Exchange) -> None:
        """The last rank has called, and the bytes have moved."""

    def waited(self, rank: int, call: Call) -> None:
        """The rank may use the call's outputs, and write to its inputs."""

    def backward(
        self, rank: int, tensors: Sequence[Tensor], inputs: Sequence[Any], accumulates: bool
    ) -> None:
        """The rank begins a backward pass from `tensors` that, if `accumulates`, adds to the leaves' `.grad`."""

    def before(self, rank: int, operation: Any, accesses: Sequence[Access]) -> None:
        """The rank is about to run an operation of PyTorch on the memory that it has."""

    def after(
        self, rank: int, operation: Any, args: Any, kwargs: Any, result: Any, accesses: Sequence[Access]
    ) -> None:
        """The rank has run it. `accesses` now have the memory of the result, too."""


class Instruments:
    """All instruments of a run. A moment costs nothing for those that do nothing at it."""

    def __init__(self, instruments: Sequence[Instrument]) -> None:
        self.all = tuple(instruments)
        self.finish = self._listeners("finish")
        self.issued = self._listeners("issued")
        self.executed = self._listeners("executed")
        self.waited = self._listeners("waited")
        self.backward = self._listeners("backward")

    def _listeners(self, moment: str) -> Callable[..., None]:
        own = [x for x in self.all if getattr(type(x), moment) is not getattr(Instrument, moment)]
        methods = [getattr(instrument, moment) for instrument in own]

        def tell(*facts: Any) -> None:
            for method in methods:
                method(*facts)

        return methods[0] if len(methods) == 1 else tell
