"""The processes of a command that runs on several: what their environment says of them, and starting them.

The environment variables are those of torchrun; where something else starts the processes, it has to set them.
"""

import os
import sys
from typing import NoReturn

from .errors import ArgumentError

DIGITS = 9  # of a rank, a number of ranks or a port
MOST_RANKS = 16384  # on one machine; an exchange has a part for each pair of them


def is_started() -> bool:
    """Whether this process is one of several ranks that were started, or the only one."""
    return "RANK" in os.environ


def is_first() -> bool:
    """Whether this process is rank 0, or none of several: the one that prints and writes."""
    return not os.environ.get("RANK", "").strip("0")


def number_of(variable: str, otherwise: int | None = None) -> int:
    """The number that an environment variable holds, or `otherwise` where it is not set.

    Raises:
        ArgumentError: it holds no number, or is not set and has to be.
    """
    found = os.environ.get(variable, "" if otherwise is None else str(otherwise))
    if not found.isdecimal() or len(found) > DIGITS:
        raise ArgumentError(
            f"{variable} is {found[: 2 * DIGITS]!r} in the environment.",
            "Give it a number, or use torchrun, which sets it.",
        )
    return int(found)


def started_processes(otherwise: int) -> int:
    """How many processes were started, or `otherwise` where this one was started by itself.

    Raises:
        ArgumentError: the environment variable WORLD_SIZE is no number.
    """
    return number_of("WORLD_SIZE", otherwise)


def local_rank() -> tuple[int, int]:
    """This rank among the ranks of its machine, and how many they are.

    Raises:
        ArgumentError: the environment variable LOCAL_RANK or LOCAL_WORLD_SIZE is no number.
    """
    return number_of("LOCAL_RANK", 0), number_of("LOCAL_WORLD_SIZE", 1)


def check_ranks(ranks: int, backend: str) -> None:
    """Refuse a number of ranks that is none, or that contradicts what was started.

    Raises:
        ArgumentError: with the number.
    """
    if ranks < 1:
        raise ArgumentError(f"--ranks {ranks} is no number of ranks.", "Use at least 1, such as 4.")
    if not is_started():
        if ranks > MOST_RANKS:
            raise ArgumentError(f"--ranks {ranks} is more than {MOST_RANKS}.", "Use fewer.")
        return
    processes = started_processes(otherwise=1 if backend == "virtual" else ranks)
    rank = number_of("RANK")
    if rank >= processes:
        raise ArgumentError(f"RANK is {rank} and WORLD_SIZE {processes}.", f"Give RANK 0 to {processes - 1}.")
    if backend == "virtual" and processes > 1:
        raise ArgumentError(
            f"{processes} processes were started (by torchrun) and --backend is virtual.",
            "Use --backend gloo, or run the command without torchrun.",
        )
    if backend != "virtual" and ranks != processes:
        raise ArgumentError(
            f"--ranks is {ranks} and {processes} processes were started.",
            f"Leave it out, or start {ranks} processes.",
        )


def become_torchrun(arguments: list[str], ranks: int) -> NoReturn:
    """Run `seqpar` with these arguments on so many processes of this machine, in the place of this process.

    So whoever started this process has torchrun in its place: it passes a signal on to the ranks, and none of them
    is left behind.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "seqpar_ref.cli", *arguments]
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, {"OMP_NUM_THREADS": threads, **os.environ})
