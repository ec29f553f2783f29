"""How much of the communication hides behind computation, on gloo processes, forward and backward together.

    exposed = time of the step - time of the same step without communication
    hidden = 1 - exposed / time of the step's collectives alone

"Alone" are the collectives of that step and nothing else, one by one, with their buffers at hand: 8 of the plain step,
up to 64 smaller ones in 8 chunks. "The same step without communication" packs, computes and unpacks, and sends nothing.
So what chunks cost beside (smaller copies, more calls) is not in "hidden": it is in the time of the step. "(of plain)"
is the share of the bound if the exposed time is compared with the 8 collectives of the plain step instead. Each kind of
step runs twice over:

- "stand-in": the computation is a sleep, as if a device computed by itself. Its length follows from the exchanges of
  the plain step, packing included, `--compute` times: attention takes as long as all four exchanges of a pass, each
  projection and each weight gradient as long as one.
  The step in 8 chunks is there as one would write it by hand, too (`chunks_by_hand.py`).
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
from collections import deque
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.chunks_by_hand import one_pass
from benchmarks.rounds import Step, Times, interleaved, on_gloo, quartiles
from benchmarks.variants import Point, plan_of
from seqpar_ref import ChunkedAttention, DistributedAttention, UlyssesBlock
from seqpar_ref.group import TorchGroup, group_of
from seqpar_ref.local_attention import fused_attention

CHUNKS = (2, 4, 8)
BY_HAND = f"{max(CHUNKS)} by hand"
SILENT = ", silent"  # behind the name of a step that sends nothing
ALONE = ", alone"  # behind the name of a step: its collectives and nothing else
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


@dataclass(frozen=True)
class SilentGroup(TorchGroup):
    """A group whose all-to-alls send nothing, and are over at once. It keeps the sizes of the last ones."""

    asked: deque[tuple[int, int, list[int], list[int]]] = field(default_factory=partial(deque, maxlen=1024))

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: list[int],
        input_splits: list[int],
        async_op: bool = False,
    ) -> Any:
        self.asked.append((output.numel(), input.numel(), output_splits, input_splits))
        return Done()


def with_collectives(steps: dict[str, Step], silent: SilentGroup) -> dict[str, Step]:
    """The steps, and for each silent one the collectives that it leaves out. All of them share their buffers."""
    asked = {}
    for name, step in steps.items():
        if name.endswith(SILENT):
            silent.asked.clear()
            step()
            asked[name.removesuffix(SILENT)] = [*silent.asked]
    received, sent = (
        torch.zeros(max(sum(call[side] for call in calls) for calls in asked.values())) for side in (0, 1)
    )
    return steps | {name + ALONE: collectives(calls, received, sent) for name, calls in asked.items()}


def collectives(calls: list[tuple[int, int, list[int], list[int]]], received: Tensor, sent: Tensor) -> Step:
    """These all-to-alls, one after the other, each with a place of its own in the buffers."""
    places = [
        buffer.split([*sizes, len(buffer) - sum(sizes)])
        for buffer, sizes in ((received, [call[0] for call in calls]), (sent, [call[1] for call in calls]))
    ]

    def step() -> None:
        for output, input, (_, _, *splits) in zip(*places, calls, strict=False):
            dist.all_to_all_single(output, input, *splits)

    return step


def attention_steps(point: Point, sleep: float | None, groups: dict[str, TorchGroup]) -> dict[str, Step]:
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
    for silent, group in groups.items():
        modules[f"plain{silent}"] = DistributedAttention(local, group, plan=plan)
        for chunks in CHUNKS:
            modules[f"{chunks} chunks{silent}"] = ChunkedAttention(local, group, plan=plan, chunks=chunks)
    steps: dict[str, Step] = {
        name: lambda module=module: torch.autograd.grad(module(*shards), shards, gradient)  # type: ignore[misc]
        for name, module in modules.items()
    }
    if sleep is not None:
        for silent, group in groups.items():
            steps[BY_HAND + silent] = partial(step_by_hand, group, shards, gradient, sleep, own_heads)
    return steps


def step_by_hand(
    group: TorchGroup, shards: list[Tensor], gradient: Tensor, sleep: float, own_heads: int
) -> list[Tensor]:
    """The step in chunks, written by hand; gradients of query, key and value."""
    chunks, kept = min(max(CHUNKS), own_heads), {}

    def attend(chunk: int, query: Tensor, *others: Tensor) -> list[Tensor]:
        kept[chunk] = others
        time.sleep(sleep / chunks)
        return [query]

    def attend_back(chunk: int, gradient: Tensor) -> list[Tensor]:
        time.sleep(sleep / chunks)
        return [gradient, *kept[chunk]]

    one_pass(group, [shard.detach() for shard in shards], 1, chunks, attend)
    return one_pass(group, [gradient], 3, chunks, attend_back)


def block_steps(point: Point, sleep: float | None, groups: dict[str, TorchGroup]) -> dict[str, Step]:
    """A block: plain, and with its exchanges behind projections. A block that sleeps has next to no width."""
    steps: dict[str, Step] = {}
    kinds = (("plain", "none"), ("projections", "projections"))
    for (name, overlap), (silent, group) in itertools.product(kinds, groups.items()):
        torch.manual_seed(0)
        width = point.heads * point.dim if sleep is None else 8
        sizes = (width, point.heads, point.kv_heads, point.dim)
        local = None if sleep is None else partial(Sleep.apply, 4 * sleep)
        options: Any = {"theta": None, "local_attention": local, "overlap": overlap, "group": group}
        block = UlyssesBlock(*sizes, plan=plan_of(point), **options)
        if sleep is not None:
            for projection in (block.query, block.key, block.value):
                projection.register_forward_hook(lambda *_: time.sleep(sleep))
            for projection in (block.query, block.key, block.value, block.output):
                projection.weight.register_hook(lambda _: time.sleep(sleep))
        x = torch.randn(point.batch, point.tokens // point.ranks, width)
        steps[name + silent] = partial(block_step, block, x, sleep)
    return steps


def block_step(block: UlyssesBlock, x: Tensor, sleep: float | None) -> None:
    """Forward and backward. The output projection, which a hook would make another one, sleeps behind the block."""
    output = block(x)
    if sleep is not None:
        time.sleep(sleep)
    output.sum().backward()


def measure(
    point: Point, kind: str, compute: float | None, rounds: int, seconds: float
) -> tuple[Times, float | None]:
    """One rank's part: a kind of overlap against sleeps, `compute` times as long as the exchanges, or the cores.

    Returns:
        The times, and the seconds that a step sleeps; None where it computes on the cores.
    """
    world = group_of(None)
    silent = SilentGroup(world.process_group, world.rank, world.size)
    groups = {"": world, SILENT: silent}  # by what stands behind a step's name
    sleep = None
    if compute is not None:
        exchanges = {"plain": attention_steps(point, 0.0, groups)["plain"]}
        passes = interleaved(exchanges, max(3, rounds // 3), seconds)["plain"]
        sleep = compute * statistics.median(passes) / 8
    if kind == "projections":
        steps = block_steps(point, sleep, groups)
    else:
        steps = attention_steps(point, None if sleep is None else 4 * sleep, groups)
        check_equal({name: step for name, step in steps.items() if not name.endswith(SILENT)})
    times = interleaved(with_collectives(steps, silent), rounds, seconds)
    # attention is 8 of them; 4 projections and their weight gradients are 8 more
    return times, None if sleep is None else sleep * (16 if kind == "projections" else 8)


def check_equal(steps: dict[str, Step]) -> None:
    """Each step's gradients are those of the plain step, bit for bit."""
    expected = steps["plain"]()
    for name, step in steps.items():
        if not all(map(torch.equal, step(), expected)):
            raise AssertionError(f"{name} differs from the plain step")


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
    print(f"\n{title}: {point}")
    print(
        f"{'ms':<13}{'step':>8}{'quartiles':>18}{'silent':>9}{'exposed':>9}{'alone':>8}"
        f"{'hidden':>9}{'bound':>8}{'of bound':>10}{'(of plain)':>11}",
        flush=True,
    )
    table: dict[str, dict[str, float]] = {}
    for name in (name for name in times if name + SILENT in times):
        first, median, third = quartiles(times[name])
        silent, alone = (statistics.median(times[name + other]) for other in (SILENT, ALONE))
        exposed = statistics.median(a - b for a, b in zip(times[name], times[name + SILENT], strict=True))
        hidden, bound = 1 - exposed / alone, bound_of(name, point)
        of_plain = 1 - exposed / statistics.median(times["plain" + ALONE])
        table[name] = {"first quartile": first, "median": median, "third quartile": third, "silent": silent}
        table[name] |= {"exposed": exposed, "alone": alone, "hidden": hidden, "bound": bound}
        table[name]["hidden of plain"] = of_plain
        shown = f"{first * 1e3:.1f}-{third * 1e3:.1f}"
        parts = f"{silent * 1e3:>9.1f}{exposed * 1e3:>9.1f}{alone * 1e3:>8.1f}{hidden:>9.2f}"
        part = f"{bound:>8.3f}{hidden / bound:>10.2f}{of_plain / bound:>11.2f}" if bound else ""
        print(f"{name:<13}{median * 1e3:>8.1f}{shown:>18}{parts}{part}", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument(
        "--kinds", nargs="+", choices=["projections", "chunks"], default=["projections", "chunks"]
    )
    parser.add_argument("--against", nargs="+", choices=["stand-in", "cpu"], default=["stand-in", "cpu"])
    parser.add_argument("--compute", type=float, nargs="+", default=[1, 2], help="of the exchanges' time")
    parser.add_argument("--tokens", type=int, default=8192, help="with the stand-in")
    parser.add_argument("--cpu-tokens", type=int, default=512, help="with products on the same cores")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each variant in each round, about")
    parser.add_argument("--json", help="write every round's seconds, and the tables, to this file")
    options = parser.parse_args()
    computing: dict[str, float | None] = {
        f"stand-in x{factor:g}": factor for factor in options.compute if "stand-in" in options.against
    }
    if "cpu" in options.against:
        computing["cpu"] = None
    results = []
    for ranks, (what, compute), kind in itertools.product(options.ranks, computing.items(), options.kinds):
        tokens = options.cpu_tokens if compute is None else options.tokens
        point = Point(ranks, tokens, options.heads, heads=options.heads, dim=options.dim)
        title = f"{kind}, {what}"
        times, sleeps = on_gloo(ranks, measure, point, kind, compute, options.rounds, options.seconds)
        computing = "" if sleeps is None else f" (computing takes {sleeps * 1e3:.1f} ms of a step)"
        table = show(title + computing, times, point)
        results.append({"what": title, **asdict(point), "sleeps": sleeps, "seconds": times, "table": table})
    if options.json:
        versions = {"torch": torch.__version__}
        Path(options.json).write_text(json.dumps({"versions": versions, "results": results}, indent=1))


if __name__ == "__main__":
    main()
