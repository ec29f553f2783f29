"""Run one test body on virtual ranks and on real gloo processes.

A body is a module-level function of picklable arguments that uses torch.distributed and nothing of this file.

Gloo workers are forked once for each size and reused. They come from a nursery: a process that was forked
before any test ran, because autograd refuses to work in a process forked after its parent ran a backward
pass.
"""

import atexit
import itertools
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # binds group.WORLD when it is imported, so before any group is there

Body = Callable[..., Any]
forking = multiprocessing.get_context("fork")


class RankFailed(AssertionError):
    """A body raised, or did not end in time. The message has the traceback of each rank that raised."""


def on_virtual(body: Body, size: int, *args: Any, **options: Any) -> list[Any]:
    """The body's results by rank, on virtual ranks. Options go to the VirtualWorld."""
    from simulator import VirtualWorld

    return VirtualWorld(size, **options).run(body, *args)


def on_gloo(body: Body, size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """The body's results by rank, on gloo processes with one intra-op thread each.

    Raises:
        RankFailed: the body raised on a rank, or some rank did not end within the timeout (seconds).
    """
    start_nursery()
    return _nursery.run(body, size, args, timeout)


def start_nursery() -> None:
    """Fork the process that workers come from. conftest.py does so when all test modules are imported."""
    global _nursery
    if _nursery is None or not _nursery.process.is_alive():
        _nursery = _Nursery()


class _Nursery:
    """This process's end of the nursery."""

    def __init__(self) -> None:
        self.connection, theirs = forking.Pipe()
        self.process = _fork(_nurse, theirs, self.connection)
        theirs.close()
        self.numbers = itertools.count()
        atexit.register(self.connection.close)

    def run(self, body: Body, size: int, args: tuple[Any, ...], timeout: float) -> list[Any]:
        number = next(self.numbers)
        self.connection.send_bytes(pickle.dumps((number, size, timeout, pickle.dumps((body, args)))))
        while True:
            answered, failure, results = pickle.loads(self.connection.recv_bytes())
            if answered != number:  # the answer to a test that was interrupted
                continue
            if failure:
                raise RankFailed(failure)
            return [pickle.loads(result) for result in results]


_nursery: _Nursery | None = None


def _nurse(connection: Connection, unused: Connection) -> None:
    """Keep one team of workers for each size; a team in which a rank failed is ended and replaced."""
    unused.close()
    teams: dict[int, _Team] = {}
    while True:
        try:
            number, size, timeout, job = pickle.loads(connection.recv_bytes())
        except EOFError:
            break
        if size not in teams:
            teams[size] = _Team(size)
        failure, results = teams[size].run(job, timeout)
        if failure:
            teams.pop(size).end()
        connection.send_bytes(pickle.dumps((number, failure, results)))
    for team in teams.values():
        team.end()


class _Team:
    """Gloo processes of one world."""

    def __init__(self, size: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        store = Path(self.folder.name) / "store"
        self.connections, self.workers = [], []
        for rank in range(size):
            ours, theirs = forking.Pipe()
            self.workers.append(_fork(_work, theirs, ours, rank, size, str(store)))
            theirs.close()
            self.connections.append(ours)

    def run(self, job: bytes, timeout: float) -> tuple[str, list[bytes]]:
        """What failed, or nothing, and the results by rank."""
        for connection in self.connections:
            connection.send_bytes(job)
        results: dict[int, bytes] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < len(self.workers):
            waiting = [
                c for rank, c in enumerate(self.connections) if rank not in results and rank not in failures
            ]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = self.connections.index(connection)
                try:
                    fine, answer = pickle.loads(connection.recv_bytes())
                except EOFError:
                    fine, answer = False, "the process died"
                (results if fine else failures)[rank] = answer
            if failures:  # the others may wait for the failed rank: give them a moment, not the whole timeout
                deadline = min(deadline, time.monotonic() + 2.0)
        late = set(range(len(self.workers))) - set(results) - set(failures)
        report = [f"rank {rank}: {text}" for rank, text in sorted(failures.items())]
        report += [f"rank {rank}: not done" for rank in sorted(late)]
        return "\n".join(report), [results[rank] for rank in sorted(results)]

    def end(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join()
        self.folder.cleanup()


def _work(connection: Connection, unused: Connection, rank: int, size: int, store: str) -> None:
    """One gloo process: run bodies until the connection closes."""
    unused.close()
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=40)
    )
    while True:
        try:
            body, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            torch.manual_seed(0)
            answer = (True, pickle.dumps(body(*args)))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))


def _fork(target: Callable[..., None], *args: Any) -> Any:
    process = forking.Process(target=target, args=args)
    with warnings.catch_warnings():  # newer Pythons warn of forking beside threads
        warnings.simplefilter("ignore")
        process.start()
    return process
