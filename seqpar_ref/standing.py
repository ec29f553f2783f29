"""Where a rank stands, in words: for messages about ranks that are missing or go no further."""

import json
import os
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

TORCH = str(Path(torch.__file__).parent)


@dataclass
class Seen:
    """The last word of a rank, and when it came."""

    raw: bytes = b""
    beat: dict[str, Any] = field(default_factory=dict)
    at: float = 0.0

    def hear(self, raw: bytes, now: float) -> bool:
        """Take in what the rank says, if it is new. Returns whether the rank went a step further."""
        if not raw or raw == self.raw:
            return False
        steps = self.beat.get("steps")
        self.raw, self.beat, self.at = raw, json.loads(raw), now
        return bool(self.beat["steps"] != steps)

    @property
    def place(self) -> str:
        """What the rank was doing, and at which line."""
        return f"{self.beat['step']}, at {self.beat['at']}"

    def silence(self, rank: int, now: float) -> str:
        """The message about a rank that says nothing any more."""
        return (
            f"rank {rank} (host {self.beat['host']}, pid {self.beat['pid']}) is missing: it has said nothing for "
            f"{now - self.at:.1f} s. It was last heard of in {self.place}.\n"
            "  It died or was stopped, or its host cannot be reached: look at what it printed and at that host."
        )


def own_beat(steps: int, step: str, thread: int | None, done: bool) -> str:
    """What a rank says of itself."""
    return json.dumps(
        {
            "time": time.time(),  # no two are alike
            "steps": steps,
            "step": step,
            "at": _line_of(thread),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "done": done,
        }
    )


def where_all_stand(seen: list[Seen]) -> str:
    """One line for each place, with the ranks that are there."""
    by_place: dict[str, list[int]] = {}
    for rank, one in enumerate(seen):
        by_place.setdefault(one.place, []).append(rank)
    return "\n".join(f"  {ranks_in_words(ranks)}: {place}" for place, ranks in by_place.items())


def ranks_in_words(ranks: list[int]) -> str:
    """For example: rank 3; ranks 0-2, 5."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(shown)}"


def error_in_words(error: BaseException) -> str:
    """The error's first line, and the innermost line of the program that it comes from."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith(TORCH):
            place = f" (at {Path(code.co_filename).name}:{trace.tb_lineno} in {code.co_name})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {first_line(error)}{place}"


def first_line(error: BaseException) -> str:
    """Errors of PyTorch's C++ parts go on with a stack trace."""
    return (str(error).splitlines() or [""])[0]


def _line_of(thread: int | None) -> str:
    """The innermost line of the thread that is not PyTorch's own."""
    frame = sys._current_frames().get(thread or 0)
    while frame is not None and frame.f_code.co_filename.startswith(TORCH):
        frame = frame.f_back
    if frame is None:
        return "its end"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
