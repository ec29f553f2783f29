"""Make the figures of the docs' pages: `python docs/figures/make.py`. The same versions give the same bytes."""

from pathlib import Path

import torch

from seqpar_ref import make_plan
from simulator.draw import Picture, draw_exchange

FOLDER = Path(__file__).parent


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


FIGURES = {"exchange.svg": exchange}

if __name__ == "__main__":
    for name, figure in FIGURES.items():
        (FOLDER / name).write_text(figure()._repr_svg_(), encoding="utf-8")
        print(f"{name} written")
