"""One run of a world: its ranks' processes, their groups, and what watches them."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed._functional_collectives
import torch.distributed.nn.functional
from torch.utils import _pytree as pytree

from . import observer, process_state
from .boards import Streams
from .calls import Waiting
from .clock import Clock
from .clusters import Cluster
from .errors import DeadlockError
from .generators import Beginning
from .hazards import Hazards, Reports
from .initialization import make_default_group, new_process_group, rendezvous
from .instruments import Exchange, Instruments
from .ledger import Ledger
from .matching import Channel, Meeting
from .scheduler import Scheduler
from .singletons import Singleton
from .source_lines import Lines, lines_of, lines_text, program_lines
from .store import VirtualStore

Result = TypeVar("Result")


class Run:
    """One call of `VirtualWorld.run`: its ranks' process states, its groups, its count of bytes and its instruments."""

    def __init__(
        self,
        size: int,
        seed: int | None,
        reports: Reports,
        ledger: bool,
        cluster: str | Cluster | None,
        singletons: Sequence[Singleton],
    ) -> None:
        self.size, self.seed, self.reports, self._singletons = size, seed, reports, singletons
        self.clock = None if cluster is None else Clock(size, cluster)
        self.streams = Streams(size, reports, self.clock)
        self.ledger = Ledger(size) if ledger else None
        checks = [] if reports.policy == "off" else [Hazards(size, reports)]
        followed = [] if reports.policy == "off" and cluster is None else [self.streams]
        notes = [x for x in (self.ledger, self.clock) if x is not None]
        self.instruments = Instruments([*checks, *followed, *notes])
        self.bytes = np.zeros((size, size), dtype=np.int64)
        self.store = VirtualStore(self)
        self._channels: dict[tuple[str, tuple[int, ...]], Channel] = {}
        self._states: list[process_state.ProcessState] = []
        self._order = itertools.count()
        self._all = tuple(range(size))
        self._own_ranks = {rank: rank for rank in range(size)}
        self.origin: Lines = ()
        self.scheduler: Scheduler

    def execute(self, body: Callable[[int], Result]) -> list[Result]:
        """Run `body(rank)` on all ranks; a later call goes on with the same groups, environment and random numbers."""
        results: list[Any] = [None] * self.size
        modes = _thread_modes()
        self.origin = program_lines()

        def enter_body(rank: int) -> None:
            self._states[rank].adopt_thread()
            with modes(), observer.watching(rank, self.instruments):
                results[rank] = body(rank)
                _wait_for_functional_collectives(results[rank])
            self._states[rank].leave_thread()

        if not self._states:
            beginning, singletons = Beginning(), self._singletons
            self._states = [
                process_state.ProcessState(self, rank, self.size, beginning, singletons)
                for rank in range(self.size)
            ]
        processes = process_state.virtual_processes(
            self._states, new_process_group, rendezvous, self._singletons
        )
        with processes, observer.routed():
            for state in self._states:
                state.groups.reopen()
            self.scheduler = Scheduler(
                self.size,
                self.seed,
                enter=lambda rank: self._states[rank].enter(),
                leave=lambda rank: self._states[rank].leave(),
                explain_deadlock=self._deadlock,
            )
            self.reports.scheduler = self.scheduler
            self.scheduler.run(enter_body)
        self._check_finished()
        self.instruments.finish()
        return results

    def _check_finished(self) -> None:
        """Refuse a run in which a rank called something that the others never answered."""
        unfinished = [line for channel in self._channels.values() for line in channel.unfinished()]
        if unfinished:
            lines = "\n".join(f"  {line}" for line in unfinished)
            raise DeadlockError(
                f"all ranks have returned, and {len(unfinished)} calls are without an answer.\n{lines}\n"
                "  Let every rank of a group make the same calls in the same order, and give every send a receive."
            )

    def channel(self, name: str, ranks: tuple[int, ...]) -> Channel:
        """What the ranks of a group share; every rank that makes the group gets the same."""
        key = name, ranks
        if key not in self._channels:
            self._channels[key] = Channel(self, name, ranks)
        return self._channels[key]

    def make_default_group(self) -> None:
        """On the calling rank the group of all ranks, for a program that does not call init_process_group itself."""
        make_default_group(self._own_ranks)

    def executed(self, exchange: Exchange) -> None:
        """Count the bytes of a collective or a message, and tell the instruments."""
        if exchange.ranks == self._all:
            self.bytes += exchange.matrix
        else:
            self.bytes[np.ix_(exchange.ranks, exchange.ranks)] += exchange.matrix
        self.instruments.executed(exchange)

    def next_order(self) -> int:
        """Numbers that only grow: messages are matched oldest first."""
        return next(self._order)

    def where_ranks_stand(self, meeting: Meeting | None = None) -> str:
        """One line a rank: what it waits for and at which source line, or that it has returned."""
        global_rank = (
            {} if meeting is None else {r: meeting.calls.get(i) for i, r in enumerate(meeting.channel.ranks)}
        )
        frames = sys._current_frames()
        lines = []
        for rank in range(self.size):
            waiting, call = self.scheduler.blocked.get(rank), global_rank.get(rank)
            thread = self.scheduler.thread_of(rank)
            if isinstance(waiting, Waiting) and (call is None or waiting.call is call):
                text = str(waiting)
            elif call is not None:
                text = f"called {call} at {lines_text(call.where)}"
            elif rank in self.scheduler.finished:
                text = "has returned"
            elif waiting is not None:
                text = str(waiting)
            else:
                frame = frames.get(thread.ident) if thread is not None and thread.ident else None
                text = f"runs at {lines_text(lines_of(frame))}" if frame is not None else "has not started"
            lines.append(f"  rank {rank}: {text}")
        return "\n".join(lines)

    def _deadlock(self) -> DeadlockError:
        waiting, returned = len(self.scheduler.blocked), len(self.scheduler.finished)
        return DeadlockError(
            f"no rank can go on: {waiting} of {self.size} ranks wait for a rank that will not come, {returned} have "
            f"returned.\n{self.where_ranks_stand()}\n"
            "  Let every rank of a group make the same calls in the same order, and give every send a receive."
        )


def _wait_for_functional_collectives(result: Any) -> None:
    """Their results wait when they are first used, which outside of the rank would be too late."""
    functional = torch.distributed._functional_collectives
    for value in pytree.tree_leaves(result):
        if isinstance(value, functional.AsyncCollectiveTensor):
            value.trigger_wait()


def _thread_modes() -> Callable[[], contextlib.ExitStack]:
    """The caller's grad and autocast modes and default device, to enter in another thread."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    device = torch.get_default_device()
    autocast = {
        kind: torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
    }

    def enter() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        if inference:
            stack.enter_context(torch.inference_mode())
        if not grad:
            stack.enter_context(torch.no_grad())
        for kind, dtype in autocast.items():
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        if device.type != "cpu":
            stack.enter_context(device)
        return stack

    return enter
