"""Processes of a command that runs on several: how many were started, or starting them through torchrun."""

import os
import subprocess
import sys

from .errors import ArgumentError


def started_processes(otherwise: int) -> int:
    """How many processes torchrun started, or `otherwise` where it did not start this one.

    Raises:
        ArgumentError: the environment variable WORLD_SIZE is no number of processes.
    """
    found = os.environ.get("WORLD_SIZE", str(otherwise))
    if not found.isdecimal():
        raise ArgumentError(f"WORLD_SIZE is {found!r} in the environment.", "Unset it, or use torchrun.")
    return int(found)


def run_under_torchrun(arguments: list[str], ranks: int) -> int:
    """Start `seqpar` with these arguments on so many processes of this machine. Returns the exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "seqpar_ref.cli", *arguments]
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    return subprocess.run(command, env={"OMP_NUM_THREADS": threads, **os.environ}, check=False).returncode
