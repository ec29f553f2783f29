"""Steps that are measured side by side on gloo processes, and what a table says about them.

Variants alternate: in each round every variant runs some steps, in an order of its own for each round, so that what
else the machine does meets all of them alike. Ratios are taken within a round and their median is printed.
"""

import gc
import math
import os
import pickle
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

Step = Callable[[], Any]
Times = dict[str, list[float]]
"""Seconds of one step, by variant and round."""


def on_gloo(ranks: int, body: Callable[..., Any], *args: Any) -> Any:
    """What `body` returns on rank 0, run by forked gloo processes with one thread each.

    Forked processes find every module imported, but autograd works in them only if this process never ran a
    backward pass. An exception on any rank ends all of them and is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _rank, (ranks, folder, body, args), nprocs=ranks, start_method="fork"
        )
        return pickle.loads((Path(folder) / "result").read_bytes())


def _rank(rank: int, ranks: int, folder: str, body: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what is imported is not looked at by every collection
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(minutes=5),
    )
    result = body(*args)
    if rank == 0:
        (Path(folder) / "result").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def interleaved(steps: dict[str, Step], rounds: int, seconds: float) -> Times:
    """Measure all steps, round by round, on every rank at once.

    Args:
        seconds: how long one variant runs in one round, about; at least one step.

    Returns:
        For each variant and round the time of a step on the slowest rank, divided by nothing else.
    """
    counts = {name: max(1, math.ceil(seconds / _slowest(_timed(step, 2)))) for name, step in steps.items()}
    times: Times = {name: [] for name in steps}
    for number in range(rounds):
        if dist.get_rank() == 0:
            print(f"round {number + 1} of {rounds} ...", file=sys.stderr, flush=True)
        for name in random.Random(number).sample(list(steps), len(steps)):
            times[name].append(_slowest(_timed(steps[name], counts[name])))
    return times


def _timed(step: Step, count: int) -> float:
    """Seconds of one step. Python's garbage collector runs before, not within.

    One more step comes first and is not timed: it meets the memory that the variant before has left.
    """
    gc.collect()
    gc.disable()
    step()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(count):
        step()
    seconds = time.perf_counter() - start
    gc.enable()
    return seconds / count


def _slowest(seconds: float) -> float:
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def ratio(times: Times, name: str, base: str) -> float:
    """The median over the rounds of one variant's time divided by the other one's in the same round."""
    return statistics.median(own / other for own, other in zip(times[name], times[base], strict=True))
