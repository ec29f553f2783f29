"""Which cores of the machine a thread may run on.

Ranks run one at a time, so one core serves them all. On two, each hand-over wakes a core that has gone to sleep: a
world of 64 ranks that do nothing but communicate then takes 1.7 times as long, measured on two virtual cores.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator


@contextlib.contextmanager
def on_one_core() -> Iterator[None]:
    """Bind the calling thread, and those that are started meanwhile, to the core that it runs on."""
    cores = allowed_cores()
    if cores:
        allow_cores({ctypes.CDLL(None).sched_getcpu()})
    try:
        yield
    finally:
        allow_cores(cores)


def allowed_cores() -> set[int]:
    """The cores that the calling thread may run on; empty where the system does not tell, as only Linux does."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def allow_cores(cores: set[int]) -> None:
    """Bind the calling thread to these cores. Nothing happens without any, or where the system does not let it."""
    if cores:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores)
