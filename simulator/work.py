"""`Work` handles: what an asynchronous call receives is there after `wait()`, and not before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import process_state
from .calls import Call
from .matching import Meeting
from .messages import Message

_POLLS_BEFORE_BLOCKING = 10_000
"""A rank that asks this often whether a call is complete does nothing else: it waits."""


class VirtualWork(dist.Work):
    """The handle of one call. What the call receives arrives in its outputs in `wait()` and not before."""

    def __init__(self, call: Call, place: Meeting | Message) -> None:
        super().__init__()
        self._call, self._place = call, place
        self._polls = 0
        self._waited = False

    def wait(self, timeout: Any = None) -> bool:
        if not self._call.landed:
            self._place.wait(self._call)
        if not self._waited:
            self._waited = True
            channel = self._place.channel
            channel.run.instruments.waited(channel.ranks[self._call.rank], self._call)
        return True

    def is_completed(self) -> bool:
        """Whether what the call receives has arrived, in which case it may be used as after `wait()`."""
        self._polls += 1
        state = process_state.current()
        if state is not None and not self._place.executed:
            state.run.scheduler.step_aside(state.rank)
        if self._place.executed or self._polls > _POLLS_BEFORE_BLOCKING:
            return self.wait()
        return False

    def is_success(self) -> bool:
        return self._call.landed

    def exception(self) -> None:
        return None

    def synchronize(self) -> None:
        self.wait()

    def result(self) -> list[Tensor]:
        self.wait()
        return list(self._call.outputs)

    def source_rank(self) -> int:
        return self._place.peer if isinstance(self._place, Message) and self._place.peer is not None else -1

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future:
        """A future that is complete: waiting for a future would stop all virtual ranks, so this call waits."""
        self.wait()
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(list(self._call.outputs))
        return future


class AllOf(dist.Work):
    """Several calls under one handle."""

    def __init__(self, works: Sequence[dist.Work]) -> None:
        super().__init__()
        self._works = works

    def wait(self, timeout: Any = None) -> bool:
        for work in self._works:
            work.wait()
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def get_future(self) -> torch.futures.Future:
        self.wait()
        future: torch.futures.Future = torch.futures.Future()
        future.set_result([tensor for work in self._works for tensor in work.result()])
        return future
