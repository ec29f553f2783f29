"""Ranks are threads, and exactly one of them runs at a time.

A rank keeps the baton until it blocks; then it hands the baton to a rank that can go on. So a program without a seed
runs in one fixed order, a seed draws other legal orders, and "nobody can go on" is a fact that is seen at once, not a
timeout. Threads, because autograd keeps its grad mode, autocast and running graph task per operating-system thread.
On Linux they share the core that the caller runs on: to wake a thread on another core takes up to three times as long.
"""

from __future__ import annotations

import contextlib
import contextvars
import random
import threading
import time
from collections import deque
from collections.abc import Callable

from .cores import on_one_core
from .errors import WorldError

DRAIN_SECONDS = 0.5
"""How long the other ranks may still run to the place where they stand, once the world is known to be wrong."""

SWALLOWED_STOPS = 1000
"""How many times a rank may catch the order to stop and call another collective before its thread is parked."""


INTERRUPT_SECONDS = 5.0
"""How long an interrupted run waits for the rank that has the baton: one that never communicates cannot be stopped."""


class RankStopped(BaseException):
    """Unwinds a rank after the world has failed; not an `Exception`, so that `except Exception` lets it through."""


class Scheduler:
    """Runs `body(rank)` for every rank, one rank at a time.

    Args:
        size: number of ranks.
        seed: None runs ranks in the order in which they became able to run; an integer draws that order.
        enter: called as `enter(rank)` in the rank's thread each time it gets the baton.
        leave: called as `leave(rank)` in the rank's thread each time it gives the baton away.
        explain_deadlock: makes the error for a world in which no rank can go on.
    """

    def __init__(
        self,
        size: int,
        seed: int | None,
        enter: Callable[[int], None],
        leave: Callable[[int], None],
        explain_deadlock: Callable[[], BaseException],
    ) -> None:
        self.size = size
        self.failure: BaseException | None = None
        self.blocked: dict[int, object] = {}
        self.finished: set[int] = set()
        self._random = None if seed is None else random.Random(seed)
        self._enter, self._leave, self._explain_deadlock = enter, leave, explain_deadlock
        self._batons = [threading.Lock() for _ in range(size)]
        self._threads: dict[int, threading.Thread] = {}
        self._runnable = deque(range(size))
        self._suspicion: tuple[Callable[[], BaseException], float] | None = None
        self._stops = [0] * size
        self._parked: set[int] = set()
        self._done = threading.Event()

    def run(self, body: Callable[[int], None]) -> None:
        """Run every rank to its end, then raise the first failure of the world, if there is one."""
        self._context, self._body = contextvars.copy_context(), body
        for baton in self._batons:
            baton.acquire()
        with on_one_core():
            try:
                self._pass_on(self._choose())
                self._done.wait()
            except BaseException as interrupt:
                self.fail(interrupt)
                if not self._done.wait(INTERRUPT_SECONDS):
                    raise
        for rank, thread in self._threads.items():
            if rank not in self._parked:
                thread.join()
        del self._body, self._context  # they hold what the ranks got and returned
        if self.failure is not None:
            raise self.failure

    def thread_of(self, rank: int) -> threading.Thread | None:
        """The thread of a rank that has started, else None."""
        return self._threads.get(rank)

    def block(self, rank: int, waits_for: object) -> None:
        """Give the baton away until somebody calls `ready(rank)`; called by the rank itself."""
        self.check(rank)
        self.blocked[rank] = waits_for
        self._hand_over(rank)
        self.check(rank)

    def step_aside(self, rank: int) -> None:
        """Let another rank that can run go first, if there is one; called by the rank itself."""
        self.check(rank)
        self._runnable.append(rank)
        self._hand_over(rank)
        self.check(rank)

    def preempt(self, rank: int) -> None:
        """A point at which another schedule may go on with another rank: nothing happens without a seed."""
        if self._random is not None:
            self.step_aside(rank)

    def ready(self, rank: int) -> None:
        """What a blocked rank waits for has happened."""
        if rank in self.blocked:
            del self.blocked[rank]
            self._runnable.append(rank)

    def check(self, rank: int) -> None:
        """Stop this rank if the world has failed: a rank that swallows the stop meets it again at its next call."""
        if self.failure is None:
            return
        self._stops[rank] += 1
        if self._stops[rank] > SWALLOWED_STOPS:
            self._parked.add(rank)
            self._end(rank)
            threading.Event().wait()
        raise RankStopped(f"the world has stopped: {self.failure}")

    def suspect(self, explain: Callable[[], BaseException]) -> None:
        """The world is wrong: let the other ranks run to where they stand, then fail with what `explain` makes."""
        if self._suspicion is None:
            self._suspicion = (explain, time.monotonic() + DRAIN_SECONDS)

    def fail(self, error: BaseException) -> None:
        """Stop the world: every rank is woken to unwind. The first failure is the one that counts."""
        if self.failure is None:
            self.failure = self._suspicion[0]() if self._suspicion else error
        for rank in list(self.blocked):
            self.ready(rank)

    def _choose(self) -> int | None:
        """The rank to go on with; None when all have finished."""
        if self.failure is None and self._suspicion is not None:
            explain, deadline = self._suspicion
            if not self._runnable or time.monotonic() > deadline:
                self.fail(explain())
        if not self._runnable and self.blocked:
            self.fail(self._explain_deadlock())
        if not self._runnable:
            return None
        if self._random is not None:
            self._runnable.rotate(-self._random.randrange(len(self._runnable)))
        return self._runnable.popleft()

    def _hand_over(self, rank: int) -> None:
        following = self._choose()
        if following == rank:
            return
        self._exchange(self._leave, rank)
        self._pass_on(following)
        self._batons[rank].acquire()
        self._exchange(self._enter, rank)

    def _exchange(self, hook: Callable[[int], None], rank: int) -> None:
        """Call `enter` or `leave`; if that fails the world does, and the baton goes on all the same."""
        try:
            hook(rank)
        except BaseException as error:
            self.fail(error)

    def _pass_on(self, rank: int | None) -> None:
        while rank is not None and rank not in self._threads:
            if self._start(rank):
                return
            self.finished.add(rank)
            rank = self._choose()
        if rank is None:
            self._done.set()
        else:
            self._batons[rank].release()

    def _start(self, rank: int) -> bool:
        """Give the baton to a rank that has none yet; False if it need not, or cannot, begin."""
        if self.failure is not None:
            return False
        try:
            context = self._context.copy()
            thread = threading.Thread(
                target=context.run, args=(self._main, rank), name=f"rank {rank}", daemon=True
            )
            self._threads[rank] = thread
            thread.start()
        except (RuntimeError, MemoryError, OSError) as error:
            self._threads.pop(rank, None)
            self.fail(
                WorldError(
                    f"rank {rank} of {self.size} cannot begin, because the machine gives no thread: {error}.\n"
                    "Use fewer ranks, or allow more threads and memory (`ulimit -u`, `ulimit -v`)."
                )
            )
            return False
        return True

    def _main(self, rank: int) -> None:
        self._exchange(self._enter, rank)
        try:
            if self.failure is None:
                self._body(rank)
        except RankStopped:
            pass
        except BaseException as error:
            first = self.failure is None
            self.fail(error)
            if first and self.failure is error:
                with contextlib.suppress(Exception):
                    error.add_note(f"raised on virtual rank {rank}")
        finally:
            self._end(rank)

    def _end(self, rank: int) -> None:
        self.finished.add(rank)
        self._exchange(self._leave, rank)
        self._pass_on(self._choose())
