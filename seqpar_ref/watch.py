"""Notices within a timeout that a rank is missing, has stopped or has failed, and ends every other rank with its name.

Each rank has two threads beside its program. One talks to the store: it writes where this rank stands, rank 0 reads
where all stand, and whoever finds out that something is wrong writes the verdict, which all others read. The other
one never waits for the store: it notices when the store does not answer any more, and signals.

A verdict ends the process at once, whatever its program waits for: a collective cannot be interrupted.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch.distributed as dist

from .errors import SeqparError
from .rendezvous import ARRIVING, Meeting, outcome_in_time
from .standing import Seen, error_in_words, first_line, own_beat, ranks_in_words, where_all_stand

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class AwakeClock:
    """Seconds for which a thread was awake: where the whole machine stands still, nobody is late.

    Args:
        most: how many seconds at most pass from one look to the next.
    """

    def __init__(self, most: float) -> None:
        self.now, self._most, self._last = 0.0, most, time.monotonic()

    def tick(self) -> float:
        """Look at the clock."""
        last, self._last = self._last, time.monotonic()
        self.now += min(self._last - last, self._most)
        return self.now


class CountingStore:
    """A store, and how many of its calls have returned. None that asks returns where the store is stopped."""

    def __init__(self, store: Any) -> None:
        self._store, self.answers = store, 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def ask(*given: Any) -> Any:
            answer = getattr(self._store, name)(*given)
            self.answers += 1
            return answer

        return ask


class Watch:
    """Started before the process group is made, finished after it is gone. Made by the main thread.

    Args:
        meeting: the ranks and their store.
        timeout: seconds. A rank that has not come after 0.9 of them, or is silent for half of them, is missing;
            where no rank goes a step further for 0.8 of them, one of them hangs.
        report: told the verdict on each rank, before the process ends.
    """

    def __init__(self, meeting: Meeting, timeout: float, report: Callable[[str], None]) -> None:
        self.meeting, self.timeout, self.report = meeting, timeout, report
        self.interval = min(0.5, timeout / 20)
        self.grace = min(2.0, timeout / 4)  # for a word from everyone, once someone is in trouble
        self._store = CountingStore(dist.PrefixStore("watch", meeting.second))
        self._clock = AwakeClock(3 * self.interval)  # of the thread that talks
        self._seen = [Seen() for _ in range(meeting.size)]
        self._moved = 0.0
        self._step, self._steps, self._main = "the beginning", 0, threading.main_thread().ident
        self._trouble: str | None = None  # this rank's, that may come from another one
        self._failure: str | None = None  # this rank's own
        self._troubled_at: float | None = None
        self._alarmed_at: float | None = None
        self._everyone, self._finishing, self._finished = (threading.Event() for _ in range(3))
        self._ending = threading.Lock()
        self._listen_to_signals()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._talk, self._guard)]
        for thread in self._threads:
            thread.start()

    def step(self, doing: str) -> None:
        """Say what this rank does next. Each step has to end within 0.8 of the timeout."""
        self._step, self._steps = doing, self._steps + 1

    def wait_for_everyone(self) -> None:
        """Return when every rank has come."""
        self._everyone.wait()

    def fail(self, error: BaseException) -> NoReturn:
        """End all ranks because of what was raised on this one, or because of what that follows from."""
        named = isinstance(error, SeqparError)
        text = f"{type(error).__name__}: {error}" if named else error_in_words(error)
        text = f"rank {self.meeting.rank} failed in {self._step}: {text}"
        if isinstance(error, RuntimeError) and not named:
            self._trouble = text  # a collective fails where another rank is gone
        else:
            self._failure = text
        while True:
            time.sleep(60)

    def finish(self) -> None:
        """Return when every rank is here, so that nobody takes the store away from another one."""
        self._finishing.set()
        self._finished.wait()
        signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for thread in self._threads:
            thread.join()
        for end in (self._signals, self._wakeup):
            end.close()

    def _listen_to_signals(self) -> None:
        """A handler in Python would wait for the collective; the socket is written to at once."""
        self._signals, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        heeded = (number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in heeded}
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)

    def _talk(self) -> None:
        """The thread that talks to the store."""
        while not self._finished.is_set():
            try:
                verdict = self._round(self._clock.tick())
            except Exception as error:
                gone = f"{self.meeting.keeper}, which keeps the store, is gone: {first_line(error)}"
                self._end(gone, store_answers=False)
            if verdict:
                self._end(verdict, store_answers=True)
            time.sleep(self.interval)

    def _guard(self) -> None:
        """The thread that never waits for the store."""
        self._signals.settimeout(self.interval)
        clock = AwakeClock(3 * self.interval)
        answers, answered_at = 0, 0.0
        while not self._finished.is_set():
            try:
                number = signal.Signals(self._signals.recv(1)[0])
                if number in SIGNALS and not self._trouble:
                    self._trouble = f"rank {self.meeting.rank} was stopped by {number.name} in {self._step}"
            except TimeoutError:
                pass
            now = clock.tick()
            if self._store.answers != answers:
                answers, answered_at = self._store.answers, now
            if now - answered_at > self.timeout / 2:
                self._end(
                    f"{self.meeting.keeper}, which keeps the store, has not answered for {now - answered_at:.0f} s: "
                    "it is stopped, or the network to it is down",
                    store_answers=False,
                )

    def _round(self, now: float) -> str | None:
        """Say where this rank stands, look where the others do. Returns the verdict if there is one."""
        rank, done = self.meeting.rank, self._finishing.is_set()
        self._store.set(f"beat/{rank}", own_beat(self._steps, self._step, self._main, done))
        if self._store.check(["verdict"]):
            return str(self._store.get("verdict").decode())
        if self._trouble and self._troubled_at is None:
            self._troubled_at = now
            self._store.set("alarm", str(rank))
        if self._alarmed_at is None and self._store.check(["alarm"]):
            self._alarmed_at = now
        problem = self._failure or (self._look_at_everyone(now) if rank == 0 else self._look_at_rank_0(now))
        if not problem and self._troubled_at is not None:
            nobody_else = now - self._troubled_at > self.grace + 3 * self.interval
            problem = f"{self._trouble}\n  No rank is missing." if nobody_else else None
        if problem:
            return str(self._store.compare_set("verdict", "", problem).decode())
        if not self._everyone.is_set() and self._store.check(["everyone"]):
            self._everyone.set()
        if done and (rank != 0 or all(seen.beat.get("done") for seen in self._seen)):
            self._finished.set()
        return None

    def _look_at_everyone(self, now: float) -> str | None:
        """Rank 0: who is missing?"""
        if not self._everyone.is_set():
            return self._count(now)
        beats = self._store.multi_get([f"beat/{rank}" for rank in range(self.meeting.size)])
        moved = [seen.hear(raw, now) for seen, raw in zip(self._seen, beats, strict=True)]
        if any(moved):
            self._moved = now
        waiting = [rank for rank, seen in enumerate(self._seen) if not seen.beat["done"]]
        most = self.timeout / 2
        if any(self._is_silent(self._seen[rank], now, most, self.grace) for rank in waiting):
            silent = [
                rank for rank in waiting if self._is_silent(self._seen[rank], now, most / 2, self.grace)
            ]
            return "\n".join(self._seen[rank].silence(rank, now) for rank in silent)
        if now - self._moved > 0.8 * self.timeout:
            stand = where_all_stand(self._seen)
            return f"no rank has gone on for {now - self._moved:.0f} s. They stand:\n{stand}"
        return None

    def _count(self, now: float) -> str | None:
        """Rank 0, at the beginning: have all come?"""
        missing = self._not_here()
        for rank in {*range(self.meeting.size)} - {*missing}:
            self._seen[rank].hear(self._store.get(f"beat/{rank}"), now)
        if not missing:
            self._moved = now
            self._store.set("everyone", "here")
        return self._never_came(missing, now)

    def _look_at_rank_0(self, now: float) -> str | None:
        """The other ranks: is the one that looks at everyone there?"""
        if not self._store.check(["beat/0"]):
            return self._never_came(self._not_here(), now)
        seen = self._seen[0]
        seen.hear(self._store.get("beat/0"), now)
        if seen.beat["done"] or not self._is_silent(seen, now, 0.6 * self.timeout, self.grace):
            return None
        return seen.silence(0, now)

    def _is_silent(self, seen: Seen, now: float, most: float, grace: float) -> bool:
        """Nothing for so long, or nothing since someone is in trouble, `grace` ago."""
        alarmed = self._alarmed_at
        since_alarm = alarmed is not None and now - alarmed > grace and seen.at <= alarmed
        return now - seen.at > most or since_alarm

    def _not_here(self) -> list[int]:
        return [rank for rank in range(self.meeting.size) if not self._store.check([f"beat/{rank}"])]

    def _never_came(self, missing: list[int], now: float) -> str | None:
        if not missing or now < ARRIVING * self.timeout:
            return None
        return (
            f"{ranks_in_words(missing)} of {self.meeting.size} never came: the others have waited for {now:.0f} s.\n"
            "  Look at what it printed; start all ranks within the timeout, or give more with --timeout."
        )

    def _end(self, verdict: str, store_answers: bool) -> NoReturn:
        """Report the verdict and end this process; the one that keeps the store ends last.

        A busy disk or a starved core delays the word for seconds, and it must not be lost. But where nobody reads
        what is printed, or the store falls silent now, the process still ends.
        """
        self._ending.acquire()  # never given back: one thread ends the process
        try:
            outcome_in_time(lambda: self._say(verdict), self.timeout / 2)
            if store_answers:
                outcome_in_time(self._let_go_of_the_store, self.timeout / 2)
        finally:
            os._exit(1)

    def _say(self, verdict: str) -> None:
        self.report(verdict)
        sys.stdout.flush()
        sys.stderr.flush()

    def _let_go_of_the_store(self) -> None:
        """Note that this rank has said it; the one that keeps the store waits until all that are there have."""
        self._store.set(f"heard/{self.meeting.rank}", "1")
        if self.meeting.keeps_store:
            recently = self._clock.now - self.grace
            there = [f"heard/{rank}" for rank, seen in enumerate(self._seen) if seen.at > recently]
            while not self._store.check(there):
                time.sleep(self.interval / 4)
