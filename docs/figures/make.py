"""Make the figures of the docs' pages: `python docs/figures/make.py`. The same versions give the same bytes."""

from functools import partial
from pathlib import Path

import torch

from seqpar_ref import Plan, UlyssesBlock, make_plan
from simulator import VirtualWorld
from simulator.draw import Picture, draw_exchange
from simulator.draw_motion import animate_exchange, draw_blocks
from simulator.draw_runs import draw_timeline

FOLDER = Path(__file__).parent
SMALL = make_plan(ranks=4, heads=9, kv_heads=3, tokens=10, policy="balanced")


def exchange() -> Picture:
    """SmolLM2's heads on 4 ranks, evenly: the figure of the first page and of the README."""
    ranks = range(4)
    plan = make_plan(ranks=4, heads=9, kv_heads=3, tokens=4096, policy="balanced")
    return draw_exchange(
        [plan.tokens_of(rank) for rank in ranks],
        {
            "query heads": [plan.query_heads(rank) for rank in ranks],
            "kv heads": [plan.kv_heads_of(rank) for rank in ranks],
        },
        plan.bytes(batch=1, head_dim=64, dtype=torch.float32),
        title="one attention layer: 4,096 tokens, 9 query heads and 3 kv heads on 4 ranks",
    )


def moving_exchange() -> bytes:
    """The same heads and a few tokens, as blocks that go from rank to rank."""
    return animate_exchange(*_ranges(SMALL))


def still_exchange() -> Picture:
    """One frame of it, for readers who want no motion."""
    return draw_blocks(*_ranges(SMALL), 0.35, "one all-to-all there, and one back")


def _ranges(plan: Plan) -> tuple[list[range], list[range]]:
    ranks = range(plan.ranks)
    return [plan.tokens_of(rank) for rank in ranks], [plan.query_heads(rank) for rank in ranks]


def timeline(overlap: str, chunks: int, title: str) -> Picture:
    """One block, forward and backward, on two ranks of a model of devices on PCIe."""
    plan = make_plan(ranks=2, heads=16, tokens=1024)

    def step() -> None:
        torch.manual_seed(0)
        block = UlyssesBlock(1024, 16, theta=None, plan=plan, overlap=overlap, chunks=chunks)
        x = torch.randn(1, 512, 1024, requires_grad=True)
        block(x, is_causal=True).sum().backward()

    world = VirtualWorld(2, cluster="pcie-node")
    world.run(step)
    exposed = max(times.exposed for times in world.trace.by_rank())
    title = f"{title}: {exposed * 1e6:.0f} of {world.trace.seconds * 1e6:.0f} µs wait for communication"
    return draw_timeline([span[:5] for span in world.trace.spans], title)


FIGURES = {
    "exchange.svg": exchange,
    "exchange_still.svg": still_exchange,
    "overlap_none.svg": partial(timeline, "none", 1, "no overlap"),
    "overlap_projections.svg": partial(timeline, "projections", 1, "behind projections"),
    "overlap_chunks.svg": partial(timeline, "chunks", 4, "in 4 chunks of heads"),
}

ANIMATIONS = {"exchange.gif": moving_exchange}

if __name__ == "__main__":
    for name, animation in ANIMATIONS.items():
        (FOLDER / name).write_bytes(animation())
        print(f"{name} written")
    for name, figure in FIGURES.items():
        (FOLDER / name).write_text(figure()._repr_svg_(), encoding="utf-8")
        print(f"{name} written")
