"""How the ranks of a command find each other: as env:// says, with a word on who is missing."""

import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from .errors import ArgumentError, SeqparError
from .standing import first_line
from .torchrun import number_of

ARRIVING = 0.9  # part of the timeout in which a rank has to come, so that all is said within the whole of it


class MissingRankError(SeqparError, RuntimeError):
    """A rank that is needed did not come, or is gone."""


@dataclass(frozen=True)
class Meeting:
    """Where this rank is among the ranks, and the store through which they know of each other.

    Args:
        keeper: who keeps the store, for messages.
        keeps_store: whether the store ends with this process.
    """

    store: dist.Store
    rank: int
    size: int
    keeper: str
    keeps_store: bool


def meet(timeout: float) -> Meeting:
    """Make or reach the store that MASTER_ADDR and MASTER_PORT name. Seconds.

    Raises:
        ArgumentError: an environment variable is missing or is no number.
        MissingRankError: nobody keeps the store there, or the port is not free to keep it.
    """
    rank, size, port = (number_of(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if not 0 <= rank < size:
        raise ArgumentError(f"RANK is {rank} and WORLD_SIZE {size}.", f"Give RANK 0 to {max(0, size - 1)}.")
    host = os.environ.get("MASTER_ADDR")
    if not host:
        raise ArgumentError("MASTER_ADDR is not set.", "Give it the host of rank 0, or use torchrun.")
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeper = f"{'torchrun on the first node' if of_agent else 'rank 0'} ({host}, port {port})"
    keeps_store = rank == 0 and not of_agent
    deadline = time.monotonic() + ARRIVING * timeout
    if not keeps_store:
        _wait_until_someone_listens(host, port, keeper, timeout)
    left = max(1.0, deadline - time.monotonic())
    try:
        store = dist.TCPStore(
            host, port, size, keeps_store, timedelta(seconds=left), wait_for_workers=False, multi_tenant=True
        )
    except (dist.DistError, ValueError) as error:
        found = first_line(error)
        if keeps_store:
            raise MissingRankError(
                f"rank 0 cannot keep a store at port {port}: {found}.", "Set MASTER_PORT to a free port."
            ) from error
        raise MissingRankError(f"{keeper} keeps no store: {found}.", "Look at what it printed.") from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Meeting(dist.PrefixStore(f"seqpar/{attempt}", store), rank, size, keeper, keeps_store)


def _wait_until_someone_listens(host: str, port: int, keeper: str, timeout: float) -> None:
    deadline = time.monotonic() + ARRIVING * timeout
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host, port), timeout=max(0.1, left)).close()
            return
        except OSError as error:
            if left <= 0:
                raise MissingRankError(
                    f"{keeper} is missing: nobody has kept the store there for {ARRIVING * timeout:.0f} s "
                    f"({error}).",
                    "Start it within the timeout or give more with --timeout; see that this host can reach it.",
                ) from error
        time.sleep(0.2)
