"""How much of the communication hides behind computation, on gloo processes, forward and backward together.

    exposed = time of the step - time of the same step without communication
    hidden = 1 - exposed / time of the communication alone

"communication" is the collectives of the step and nothing else, with their buffers at hand: q, k and v one by one, the
output, and the gradients of the four. "The same step without communication" packs, computes and unpacks, and sends
nothing. So what chunks cost beside (more packing, more calls) is not in "hidden": it is in the time of the step.
Each kind of step runs twice over:

- "stand-in": the computation is a sleep, as if a device computed by itself. Its length follows from the communication,
  `--compute` times: attention takes as long as all four exchanges of a pass, each projection and each weight gradient
  as long as one.
- "cpu": matrix products and scaled_dot_product_attention on the same cores. gloo wants these cores as well.

What can be hidden at most: behind projections 2 of 4 exchanges forward and 3 of 4 backward; in C chunks of heads
(C-1)/C. Packing counts as computation, so the plain step hides something, too: q travels while k is packed.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456 python benchmarks/overlap.py

The variables keep memory that was used before, as the allocator of a GPU does. Without them the kernel clears new
memory for each large buffer, which takes longer than anything else here.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # not this file's folder: a file there is called simulator

import argparse
import itertools
import json
import statistics
import time
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.rounds import Step, Times, interleaved, on_gloo, quartiles
from benchmarks.variants import Point, plan_of
from seqpar_ref import ChunkedAttention, DistributedAttention, UlyssesBlock
from seqpar_ref.group import TorchGroup, group_of
from seqpar_ref.local_attention import fused_attention

CHUNKS = (2, 4, 8)
SILENT = ", silent"  # behind the name of a step that sends nothing
PROJECTIONS_BOUND = 5 / 8


class Sleep(torch.autograd.Function):
    """The query, after some seconds; in the backward pass the gradients, after as many."""

    @staticmethod
    def forward(ctx: Any, seconds: float, *qkv: Tensor) -> Tensor:
        ctx.seconds = seconds
        ctx.save_for_backward(*qkv)
        time.sleep(seconds)
        return qkv[0].view_as(qkv[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        time.sleep(ctx.seconds)
        _, key, value = ctx.saved_tensors
        return None, gradient, key, value


class Done:
    """In the place of a Work."""

    def wait(self) -> bool:
        return True


class SilentGroup(TorchGroup):
    """A group whose all-to-alls send nothing, and are over at once."""

    def all_to_all_single(self, *buffers: Any) -> Any:
        return Done()


def groups() -> dict[str, TorchGroup]:
    """The group that sends, and the one that does not, by what stands behind a step's name."""
    world = group_of(None)
    return {"": world, SILENT: SilentGroup(world.process_group, world.rank, world.size)}


def collectives(point: Point) -> Step:
    """The eight all-to-alls of a forward and a backward pass, with what a rank keeps left out, as in seqpar_ref."""
    rank, pair = dist.get_rank(), point.batch * point.tokens * point.dim // point.ranks**2
    heads = [point.heads, point.kv_heads, point.kv_heads, point.heads] * 2
    splits = [[0 if other == rank else pair * n for other in range(point.ranks)] for n in heads]
    buffers = [(torch.zeros(sum(split)), torch.zeros(sum(split))) for split in splits]

    def step() -> None:
        for split, (received, sent) in zip(splits, buffers, strict=True):
            dist.all_to_all_single(received, sent, split, split)

    return step


def attention_steps(point: Point, sleep: float | None) -> dict[str, Step]:
    """Attention of tensors that are ready: plain, and in chunks."""
    plan = plan_of(point)
    tokens = point.tokens // point.ranks
    shards = [
        torch.randn(point.batch, tokens, heads, point.dim, requires_grad=True)
        for heads in (point.heads, point.kv_heads, point.kv_heads)
    ]
    gradient = torch.randn(point.batch, tokens, point.heads, point.dim)
    own_heads = point.heads // point.ranks

    def local(query: Tensor, *others: Tensor) -> Tensor:
        if sleep is None:
            return fused_attention(query, *others, is_causal=True)
        return Sleep.apply(sleep * query.shape[2] / own_heads, query, *others)

    modules: dict[str, nn.Module] = {}
    for silent, group in groups().items():
        modules[f"plain{silent}"] = DistributedAttention(local, group, plan=plan)
        for chunks in CHUNKS:
            modules[f"{chunks} chunks{silent}"] = ChunkedAttention(local, group, plan=plan, chunks=chunks)
    return {
        name: lambda module=module: torch.autograd.grad(module(*shards), shards, gradient)  # type: ignore[misc]
        for name, module in modules.items()
    }


def block_steps(point: Point, sleep: float | None) -> dict[str, Step]:
    """A block: plain, and with its exchanges behind projections. A block that sleeps has next to no width."""
    steps: dict[str, Step] = {}
    kinds = (("plain", "none"), ("projections", "projections"))
    for (name, overlap), (silent, group) in itertools.product(kinds, groups().items()):
        torch.manual_seed(0)
        width = point.heads * point.dim if sleep is None else 8
        sizes = (width, point.heads, point.kv_heads, point.dim)
        local = None if sleep is None else partial(Sleep.apply, 4 * sleep)
        options: Any = {"theta": None, "local_attention": local, "overlap": overlap, "group": group}
        block = UlyssesBlock(*sizes, plan=plan_of(point), **options)
        if sleep is not None:
            for projection in (block.query, block.key, block.value, block.output):
                projection.register_forward_hook(lambda *_: time.sleep(sleep))
                projection.weight.register_hook(lambda _: time.sleep(sleep))
        x = torch.randn(point.batch, point.tokens // point.ranks, width)
        steps[name + silent] = lambda block=block, x=x: block(x).sum().backward()  # type: ignore[misc]
    return steps


def measure(
    point: Point, against: list[str], compute: list[float], rounds: int, seconds: float
) -> dict[str, Times]:
    """One rank's part: every kind of overlap against these kinds of computation."""
    alone = interleaved({"communication": collectives(point)}, max(3, rounds // 3), seconds)
    one = statistics.median(alone["communication"]) / 8
    sleeps: dict[str, float | None] = {}
    for what in against:
        if what == "stand-in":
            sleeps |= {f"stand-in x{factor:g}": factor * one for factor in compute}
        else:
            sleeps[what] = None
    tables = {}
    for what, sleep in sleeps.items():
        for kind, steps in (
            ("projections", block_steps(point, sleep)),
            ("chunks", attention_steps(point, None if sleep is None else 4 * sleep)),
        ):
            everything = {"communication": collectives(point), **steps}
            tables[f"{kind}, {what}"] = interleaved(everything, rounds, seconds)
    return tables


def bound_of(name: str, point: Point) -> float:
    """The most that overlap can hide; 0 for the plain step, which has none."""
    if name == "plain":
        return 0.0
    if name == "projections":
        return PROJECTIONS_BOUND
    chunks = min(int(name.split()[0]), plan_of(point).most_chunks)
    return (chunks - 1) / chunks


def show(title: str, times: Times, point: Point) -> dict[str, dict[str, float]]:
    """Print one table; quartiles (s), what was hidden, and the bound."""
    communication = statistics.median(times["communication"])
    print(f"\n{title}: {point}; communication alone {communication * 1e3:.1f} ms")
    print(
        f"{'':<13}{'median ms':>10}{'quartiles':>18}{'silent ms':>11}{'hidden':>9}{'bound':>8}{'of bound':>10}"
    )
    table: dict[str, dict[str, float]] = {"communication": {"median": communication}}
    for name in (name for name in times if name + SILENT in times):
        first, median, third = quartiles(times[name])
        silent = statistics.median(times[name + SILENT])
        exposed = statistics.median(a - b for a, b in zip(times[name], times[name + SILENT], strict=True))
        hidden, bound = 1 - exposed / communication, bound_of(name, point)
        table[name] = {"first quartile": first, "median": median, "third quartile": third, "silent": silent}
        table[name] |= {"hidden": hidden, "bound": bound}
        shown = f"{first * 1e3:.1f}-{third * 1e3:.1f}"
        part = f"{bound:>8.3f}{hidden / bound:>10.2f}" if bound else ""
        print(f"{name:<13}{median * 1e3:>10.1f}{shown:>18}{silent * 1e3:>11.1f}{hidden:>9.2f}{part}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--against", nargs="+", choices=["stand-in", "cpu"], default=["stand-in", "cpu"])
    parser.add_argument(
        "--compute", type=float, nargs="+", default=[1, 2], help="of the communication's time"
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each variant in each round, about")
    parser.add_argument("--json", help="write every round's seconds, and the tables, to this file")
    options = parser.parse_args()
    results = []
    for ranks in options.ranks:
        point = Point(ranks, options.tokens, options.heads, heads=options.heads, dim=options.dim)
        for title, times in on_gloo(
            ranks, measure, point, options.against, options.compute, options.rounds, options.seconds
        ).items():
            table = show(title, times, point)
            results.append({"what": title, **asdict(point), "seconds": times, "table": table})
    if options.json:
        versions = {"torch": torch.__version__}
        Path(options.json).write_text(json.dumps({"versions": versions, "results": results}, indent=1))


if __name__ == "__main__":
    main()
