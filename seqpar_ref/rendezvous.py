"""How the ranks of a command find each other: as env:// says, with a word on who is missing."""

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from .errors import ArgumentError, SeqparError
from .standing import first_line
from .torchrun import number_of

ARRIVING = 0.9  # part of the timeout in which a rank has to come, so that all is said within the whole of it
Found = TypeVar("Found")


class MissingRankError(SeqparError, RuntimeError):
    """A rank that is needed did not come, or is gone."""


@dataclass(frozen=True)
class Meeting:
    """Where this rank is among the ranks, and the store through which they know of each other.

    Args:
        store, second: two connections to it, because one may be busy for long.
        keeper: who keeps the store, for messages.
        keeps_store: whether the store ends with this process.
    """

    store: dist.Store
    second: dist.Store
    rank: int
    size: int
    keeper: str
    keeps_store: bool


def meet(timeout: float) -> Meeting:
    """Make or reach the store that MASTER_ADDR and MASTER_PORT name. Seconds.

    Raises:
        ArgumentError: an environment variable is missing, or is no number that it can be.
        MissingRankError: nobody keeps the store there, or it cannot be kept there.
    """
    rank, size, port = (number_of(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if not 0 <= rank < size:
        raise ArgumentError(f"RANK is {rank} and WORLD_SIZE {size}.", f"Give RANK 0 to {max(0, size - 1)}.")
    if not 0 < port < 65536:
        raise ArgumentError(f"MASTER_PORT is {port}.", "Give it a free port of rank 0's host, 1 to 65535.")
    host = os.environ.get("MASTER_ADDR")
    if not host:
        raise ArgumentError("MASTER_ADDR is not set.", "Give it the host of rank 0, or use torchrun.")
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeper = f"{'torchrun on the first node' if of_agent else 'rank 0'} ({host}, port {port})"
    keeps_store = rank == 0 and not of_agent
    store, second = _stores(host, port, rank, size, keeper, keeps_store, timeout)
    return Meeting(store, second, rank, size, keeper, keeps_store)


def _stores(
    host: str, port: int, rank: int, size: int, keeper: str, keeps_store: bool, timeout: float
) -> tuple[dist.Store, dist.Store]:
    """Two connections to the store."""
    seconds = ARRIVING * timeout
    deadline = time.monotonic() + seconds
    listens = threading.Event()

    def connect() -> tuple[dist.Store, dist.Store]:
        # Who keeps the store needs a name that is known; the others need somebody who listens there.
        _until_it_works(socket.getaddrinfo if keeps_store else _listens, host, port, deadline)
        listens.set()
        left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
        found: Any = dist.TCPStore(
            host, port, size, keeps_store, left, wait_for_workers=False, multi_tenant=True
        )
        attempt = f"seqpar/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        store: Any = dist.PrefixStore(attempt, found)
        _claim(store, rank, keeper)
        return store, store.clone()

    # Whoever listens may be no store, or a stopped one: PyTorch waits for its first answer without a limit.
    found = outcome_in_time(connect, seconds + 0.05 * timeout)
    if isinstance(found, tuple):
        return found
    if isinstance(found, SeqparError) or not isinstance(found, OSError | RuntimeError | ValueError | None):
        raise found
    why = f"no answer within {seconds:.0f} s" if found is None else first_line(found)
    if keeps_store:
        raise MissingRankError(
            f"rank 0 cannot keep a store at {host}, port {port}: {why}.",
            "Set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port of it.",
        ) from found
    if not listens.is_set():
        raise MissingRankError(
            f"{keeper} is missing: nobody has kept the store there for {seconds:.0f} s ({why}).",
            "Start it within the timeout or give more with --timeout; see that this host can reach it.",
        ) from found
    raise MissingRankError(
        f"{keeper} keeps no store, though something listens there: {why}.",
        "Look at what it printed and whether it is stopped; see that no other program has that port.",
    ) from found


def _claim(store: dist.Store, rank: int, keeper: str) -> None:
    """Refuse to be a rank that is there already."""
    own = f"host {socket.gethostname()}, pid {os.getpid()}"
    first = store.compare_set(f"rank/{rank}", "", own).decode()
    if first != own:
        raise ArgumentError(
            f"rank {rank} is there already ({first}), in the store of {keeper}.",
            "Start each rank once, and give each run a MASTER_PORT of its own.",
        )


def _until_it_works(attempt: Callable[[str, int], object], host: str, port: int, deadline: float) -> None:
    while True:
        try:
            attempt(host, port)
            return
        except OSError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.2)


def _listens(host: str, port: int) -> None:
    socket.create_connection((host, port), timeout=5.0).close()


def outcome_in_time(call: Callable[[], Found], seconds: float) -> Found | BaseException | None:
    """What the call returns or raises; None if it has not ended by then. It goes on behind."""
    outcome: Future[Found | BaseException] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_result(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return outcome.result(seconds)
    except TimeoutError:
        return None
