"""Notices within a timeout that a rank is missing, has stopped or has failed, and ends every other rank with its name.

Each rank has two threads beside its program. One talks to the store: it writes where this rank stands, rank 0 reads
where all stand, and whoever finds out that something is wrong writes the verdict, which all others read. The other
one never waits for the store: it notices when the store does not answer any more, and signals.

A verdict ends the process at once, whatever its program waits for: a collective cannot be interrupted.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from .errors import SeqparError
from .rendezvous import ARRIVING, Meeting

TORCH = str(Path(torch.__file__).parent)
HERE = __file__


@dataclass
class Seen:
    """What rank 0 knows of a rank: its last word and when that came."""

    raw: bytes = b""
    beat: dict[str, Any] = field(default_factory=dict)
    at: float = 0.0

    @property
    def place(self) -> str:
        """Where the rank stands, in words."""
        return f"{self.beat['step']}, at {self.beat['at']}"


class Watch:
    """Started before the process group is made, finished after it is gone.

    Args:
        meeting: the ranks and their store.
        timeout: seconds. A rank that has not come after 0.9 of them, is silent for half of them, or is no step
            further than 0.8 of them ago is missing.
        report: told the verdict on each rank, before the process ends.
    """

    def __init__(self, meeting: Meeting, timeout: float, report: Callable[[str], None]) -> None:
        self.meeting, self.timeout, self.report = meeting, timeout, report
        self.interval = min(0.5, timeout / 20)
        self.grace = min(2.0, timeout / 4)  # for a word from everyone, once someone is in trouble
        store: Any = dist.PrefixStore("watch", meeting.store)
        self._store = store.clone()  # a connection of its own: another one may be busy for long
        self._seen = [Seen() for _ in range(meeting.size)]
        self._began = self._answered = self._moved = time.monotonic()
        self._step, self._steps, self._main = "starting", 0, threading.main_thread().ident
        self._trouble: tuple[float, str] | None = None  # that this rank is in, and since when
        self._alarm: float | None = None  # when this rank learnt that someone is in trouble
        self._failure: str | None = None
        self._everyone, self._finishing, self._finished = (threading.Event() for _ in range(3))
        self._ending = threading.Lock()
        self._signals, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        self._wakeup = wakeup
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        for target in (self._talk, self._guard):
            threading.Thread(target=target, daemon=True).start()

    def step(self, doing: str) -> None:
        """Say what this rank does next. Each step has to end within 0.8 of the timeout."""
        self._step, self._steps = doing, self._steps + 1

    def wait_for_everyone(self) -> None:
        """Return when every rank has come."""
        self._everyone.wait()

    def fail(self, error: BaseException) -> NoReturn:
        """End all ranks because of what was raised on this one, or because of what that follows from."""
        text = f"{type(error).__name__}: {error}" if isinstance(error, SeqparError) else _shown(error)
        text = f"rank {self.meeting.rank} failed in {self._step}: {text}"
        if isinstance(error, RuntimeError) and not isinstance(error, SeqparError):
            self._trouble = time.monotonic(), text  # a collective may fail because another rank is gone
        else:
            self._failure = text
        while True:
            time.sleep(60)

    def finish(self) -> None:
        """Return when every rank is here, so that nobody takes the store away from another one."""
        self._finishing.set()
        self._finished.wait()
        signal.set_wakeup_fd(-1)

    def _talk(self) -> None:
        """The thread that talks to the store."""
        while not self._finished.is_set():
            try:
                verdict = self._round()
            except Exception as error:
                verdict = (
                    f"{self.meeting.keeper}, which keeps the store, is gone: {str(error).splitlines()[0]}"
                )
            self._answered = time.monotonic()
            if verdict:
                self._end(verdict, store_answers=True)
            time.sleep(self.interval)

    def _guard(self) -> None:
        """The thread that never waits for the store."""
        self._signals.settimeout(self.interval)
        silence = self.timeout / 2
        while not self._finished.is_set():
            try:
                number = signal.Signals(self._signals.recv(1)[0])
                if number == signal.SIGINT:
                    self._end("stopped by SIGINT", store_answers=False)
                self._trouble = self._trouble or (time.monotonic(), f"stopped by {number.name}")
            except TimeoutError:
                pass
            if time.monotonic() - self._answered > silence:
                self._end(
                    f"{self.meeting.keeper}, which keeps the store, has not answered for {silence:.0f} s: it is "
                    "stopped, or the network to it is down",
                    store_answers=False,
                )

    def _round(self) -> str | None:
        """Say where this rank stands, look where the others do. Returns the verdict if there is one."""
        rank, now = self.meeting.rank, time.monotonic()
        done = self._finishing.is_set()
        if rank == 0 and not self._seen[0].raw:
            others = range(1, self.meeting.size)
            known = [other for other in others if self._store.check([f"beat/{other}"])]
            self._store.multi_set(
                [f"beat/{r}" for r in others if r not in known], [""] * (len(others) - len(known))
            )
        self._store.set(f"beat/{rank}", self._beat(done))
        if self._store.check(["verdict"]):
            return self._store.get("verdict").decode()
        if self._trouble:
            self._store.set("alarm", str(rank))
        if self._alarm is None and self._store.check(["alarm"]):
            self._alarm = now
        problem = self._failure or (self._look_at_everyone(now) if rank == 0 else self._look_at_rank_0(now))
        if not problem and self._trouble and now - self._trouble[0] > self.grace + 3 * self.interval:
            problem = self._trouble[1]
        if problem:
            return self._store.compare_set("verdict", "", problem).decode()
        if rank == 0 and all(seen.beat for seen in self._seen):
            self._store.set("everyone", "here")
        if not self._everyone.is_set() and self._store.check(["everyone"]):
            self._everyone.set()
        if done and (rank != 0 or all(seen.beat.get("done") for seen in self._seen)):
            self._finished.set()
        return None

    def _beat(self, done: bool) -> str:
        return json.dumps(
            {
                "time": time.time(),
                "steps": self._steps,
                "step": self._step,
                "at": _place(self._main),
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "done": done,
            }
        )

    def _look_at_everyone(self, now: float) -> str | None:
        """Rank 0: who is missing?"""
        beats = self._store.multi_get([f"beat/{rank}" for rank in range(self.meeting.size)])
        moved = False
        for seen, raw in zip(self._seen, beats, strict=True):
            if raw and raw != seen.raw:
                beat = json.loads(raw)
                moved = moved or beat["steps"] != seen.beat.get("steps")
                seen.raw, seen.beat, seen.at = raw, beat, now
        if moved:
            self._moved = now
        missing = [rank for rank, seen in enumerate(self._seen) if not seen.beat]
        if missing:
            return self._never_came(missing, now)
        since = self._alarm
        silent = [
            rank
            for rank, seen in enumerate(self._seen)
            if not seen.beat["done"]
            and (
                now - seen.at > self.timeout / 2
                or (since is not None and now - since > self.grace and seen.at <= since)
            )
        ]
        if silent:
            return "\n".join(self._silence(rank, now) for rank in silent)
        if now - self._moved > 0.8 * self.timeout:
            return f"no rank has gone on for {now - self._moved:.0f} s. They stand:\n{self._places()}"
        return None

    def _look_at_rank_0(self, now: float) -> str | None:
        """The other ranks: is the one that looks at everyone there?"""
        seen = self._seen[0]
        if not self._store.check(["beat/0"]):
            ranks = range(self.meeting.size)
            return self._never_came([r for r in ranks if not self._store.check([f"beat/{r}"])], now)
        raw = self._store.get("beat/0")
        if raw != seen.raw:
            seen.raw, seen.beat, seen.at = raw, json.loads(raw), now
        alarmed = self._alarm is not None and now - self._alarm > 2 * self.grace and seen.at <= self._alarm
        if seen.beat["done"] or (now - seen.at <= 0.6 * self.timeout and not alarmed):
            return None
        return self._silence(0, now)

    def _never_came(self, missing: list[int], now: float) -> str | None:
        waited = now - self._began
        if waited < ARRIVING * self.timeout:
            return None
        return (
            f"{_ranks(missing)} of {self.meeting.size} never came: the others have waited for {waited:.0f} s.\n"
            "  Look at what it printed; start all ranks within the timeout, or give more with --timeout."
        )

    def _silence(self, rank: int, now: float) -> str:
        seen = self._seen[rank]
        return (
            f"rank {rank} (host {seen.beat['host']}, pid {seen.beat['pid']}) is missing: it has said nothing for "
            f"{now - seen.at:.1f} s. It was in {seen.place}.\n"
            "  It died or was stopped, or its host cannot be reached: look at what it printed and at that host."
        )

    def _places(self) -> str:
        """Where all ranks stand, those in one place together."""
        by_place: dict[str, list[int]] = {}
        for rank, seen in enumerate(self._seen):
            by_place.setdefault(seen.place, []).append(rank)
        return "\n".join(f"  {_ranks(ranks)}: {place}" for place, ranks in by_place.items())

    def _end(self, verdict: str, store_answers: bool) -> NoReturn:
        """Report the verdict and end this process; the one that keeps the store ends last."""
        self._ending.acquire()  # never given back: only one thread ends the process
        try:
            if store_answers:
                self._store.set(f"heard/{self.meeting.rank}", "1")
            self.report(verdict)
            sys.stdout.flush()
            sys.stderr.flush()
            if store_answers and self.meeting.keeps_store:
                self._wait_until_all_have_heard()
        finally:
            os._exit(1)

    def _wait_until_all_have_heard(self) -> None:
        now = time.monotonic()
        there = [f"heard/{rank}" for rank, seen in enumerate(self._seen) if seen.at > now - self.grace]
        while not self._store.check(there) and time.monotonic() - now < self.grace:
            time.sleep(self.interval / 4)


def _place(thread: int | None) -> str:
    """The innermost line of the thread that is not PyTorch's own."""
    frame = sys._current_frames().get(thread or 0)
    while frame is not None and frame.f_code.co_filename.startswith(TORCH):
        frame = frame.f_back
    if frame is None:
        return "its end"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


def _shown(error: BaseException) -> str:
    """The error's first line, and the innermost line of the program that it comes from."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith(TORCH):
            place = f" (at {Path(code.co_filename).name}:{trace.tb_lineno} in {code.co_name})"
        trace = trace.tb_next
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}{place}"


def _ranks(ranks: list[int]) -> str:
    """rank 3; ranks 0-2, 5."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(shown)}"
