"""Gloo processes for the original, started for one test: hangs and crashes are reported rank by rank."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import re
import signal
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

LIMIT_S = 20.0  # for one test, the start of the processes included
FIRST_LIMIT_S = 300.0  # the very first start compiles an extension of DeepSpeed's


class RanksFailed(Exception):
    """Some rank raised, died or never returned; one line a rank."""


def on_deepspeed(body: Callable[..., Any], size: int, *args: Any, limit: float = LIMIT_S) -> list[Any]:
    """Run `body(*args)` on `size` forked processes, DeepSpeed's communication over gloo; results by rank."""
    _import_deepspeed()
    fork = multiprocessing.get_context("fork")
    port = _free_port()
    workers, pipes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(size):
            receiver, sender = fork.Pipe(duplex=False)
            words = os.path.join(folder, str(rank))
            worker = fork.Process(
                target=_rank, args=(rank, size, port, sender, words, body, args), daemon=True
            )
            worker.start()
            sender.close()
            workers.append(worker)
            pipes.append(receiver)
        outcomes = _collect(pipes, limit)
        for rank, worker in enumerate(workers):
            if outcomes[rank] == ("ended", None):
                worker.join(5)
                outcomes[rank] = ("ended", _cause_of_death(worker.exitcode, os.path.join(folder, str(rank))))
            worker.kill()
            worker.join()
    if all(kind == "returned" for kind, _ in outcomes):
        return [value for _, value in outcomes]
    told = {"returned": "returned", "waiting": f"still waiting after {limit:.0f} s"}
    raise RanksFailed(
        "\n".join(f"rank {rank}: {told.get(kind, value)}" for rank, (kind, value) in enumerate(outcomes))
    )


def _collect(pipes: list[Any], limit: float) -> list[tuple[str, Any]]:
    outcomes: list[tuple[str, Any]] = [("waiting", None)] * len(pipes)
    deadline = time.monotonic() + limit
    left = dict(zip(pipes, range(len(pipes)), strict=True))
    while left and (seconds := deadline - time.monotonic()) > 0:
        for pipe in multiprocessing.connection.wait(list(left), timeout=seconds):
            try:
                outcomes[left[pipe]] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                outcomes[left[pipe]] = ("ended", None)
            del left[pipe]
    return outcomes


def _cause_of_death(exit_code: int | None, words: str) -> str:
    """The signal that ended a process, and what gloo said before it called abort()."""
    cause = signal.Signals(-exit_code).name if exit_code and exit_code < 0 else f"exit code {exit_code}"
    with open(words) as file:
        said = [line.split("what():")[1] for line in file if "what():" in line]
    return f"process ended by {cause}" + "".join(f": {_first_sentence(line)}" for line in said[:1])


def _first_sentence(message: str) -> str:
    """Without the explanations after it, and without the paths of the machine that built torch."""
    line = (message.strip().splitlines() or [""])[0]
    line = re.sub(r"\[?(enforce fail at )?/\S*/gloo/(\S+:\d+)\]", r"[gloo/\2]", line)
    return re.split(r"\. (?=This|Is|Received)", line)[0]


def _rank(
    rank: int, size: int, port: int, sender: Any, words: str, body: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    here = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in here.items()})
    warnings.simplefilter("ignore")
    file = os.open(words, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        import deepspeed.comm

        from tests.defects.implementations import Original

        deepspeed.comm.init_distributed("gloo", verbose=False, timeout=timedelta(seconds=120))
        Original.declare_sequence_parallel_size(size)
        torch.distributed.barrier()
        outcome = ("returned", body(*args))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(place.filename)}:{place.lineno}"
        outcome = ("raised", f"{type(error).__name__}: {_first_sentence(str(error))}  [{where}]")
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()
    os._exit(0)


def _import_deepspeed() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed.comm
        import deepspeed.sequence.layer  # noqa: F401


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
