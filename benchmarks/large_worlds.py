"""How long one uneven causal attention takes on many virtual ranks, forward and backward, world start included.

P ranks with one token each, P + 3 heads, head dim 16, float32; the plan is made before the clock starts. Prints seconds
of every repetition and the peak memory of the process.

    python benchmarks/large_worlds.py --ranks 256 1024 --autograd faithful --repeats 3
"""

import sys

if __name__ == "__main__":
    del sys.path[0]  # this file's folder, where a benchmark is called as the package that is imported here

import argparse
import resource
import statistics
import time

import torch
import torch.distributed as dist

from seqpar_ref import DistributedAttention, make_plan
from simulator import VirtualWorld

HEAD_DIM = 16


def attention_step(shards, plan, backward):
    """One rank's forward, and in faithful mode its backward."""
    query, key, value = (x[dist.get_rank()] for x in shards)
    result = DistributedAttention(plan=plan)(query, key, value, is_causal=True)
    if not backward:
        return result
    gradients = torch.autograd.grad((result * result).sum(), (query, key, value))
    return [gradient.sum() for gradient in gradients]


def measure(ranks: int, autograd: str) -> float:
    """Seconds of one world, from its start to the last gradient."""
    heads = ranks + 3
    plan = make_plan(ranks=ranks, heads=heads, tokens=ranks)
    shards = [
        [torch.randn(1, 1, heads, HEAD_DIM, requires_grad=True) for _ in range(ranks)] for _ in range(3)
    ]
    start = time.perf_counter()
    results = VirtualWorld(ranks, autograd=autograd).run(attention_step, shards, plan, autograd == "faithful")
    if autograd == "joint":
        sum((result * result).sum() for result in results).backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--autograd", choices=("faithful", "joint"), default="faithful")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for ranks in options.ranks:
        seconds = []
        for repeat in range(options.repeats):
            print(f"{ranks} ranks, run {repeat + 1} of {options.repeats} ...", file=sys.stderr, flush=True)
            seconds.append(measure(ranks, options.autograd))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(
            f"{ranks:5d} ranks  {options.autograd}  median {statistics.median(seconds):.2f} s  "
            f"({', '.join(f'{s:.2f}' for s in seconds)})  peak memory {peak:.2f} GB",
            flush=True,
        )


if __name__ == "__main__":
    main()
