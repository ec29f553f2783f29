"""How long the exchanges of one attention take on gloo processes, side by side with DeepSpeed, yunchang and by hand.

"exchange" is what travels and nothing else: query, key and value to the heads, the output back, and the gradients of
both. In place of attention the output is the query, and the gradients of key and value are known tensors. "step" has
PyTorch's scaled_dot_product_attention in between. Everything is float32, "b s h d", each process has one thread.

Before anything is timed each variant's output and gradients are compared, bit for bit, with what one device gives.
Ratios are medians over rounds of (time of the variant / time of the base in the same round): `rounds.py`.

    DS_BUILD_OPS=0 pip install --no-deps --no-build-isolation --target FOLDER deepspeed==0.19.8
    python benchmarks/exchange.py --deepspeed FOLDER

Without --deepspeed the one of this environment is measured. On a machine that does other things as well, only ratios
mean anything, and those of less than 5 % do not.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # not this file's folder: a file there is called simulator

import argparse
import itertools
import json
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.rounds import Step, Times, interleaved, on_gloo, quartiles, ratio
from benchmarks.variants import VARIANTS, Attention, Point, import_peers

BY_HAND = [name for name in VARIANTS if name.startswith("by hand")]
LIMITS = {"best by hand": 1.05, "DeepSpeed": 0.92, "yunchang": 0.80}


class Identity(torch.autograd.Function):
    """In place of attention: the output is the query. The gradients of key and value are given tensors."""

    @staticmethod
    def forward(ctx: Any, key_gradient: Tensor, value_gradient: Tensor, *qkv: Tensor) -> Tensor:
        ctx.gradients = key_gradient, value_gradient
        return qkv[0].view_as(qkv[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, None, gradient, *ctx.gradients


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's attention of [batch, seq, heads, dim]."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)


def problem(point: Point) -> list[Tensor]:
    """Query, key, value and the gradient of the output of all tokens."""
    generator = torch.Generator().manual_seed(0)
    heads = (point.heads, point.kv_heads, point.kv_heads, point.heads)
    return [torch.randn(point.batch, point.tokens, n, point.dim, generator=generator) for n in heads]


def run(attention: Attention, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> list[Tensor]:
    """One forward and one backward pass: output and the gradients of query, key and value."""
    output = attention(query, key, value)
    return [output, *torch.autograd.grad(output, (query, key, value), gradient)]


def steps_of(point: Point, what: str, names: list[str]) -> tuple[dict[str, Step], list[Tensor]]:
    """A step for each variant, and what each should give on this rank."""
    rank, tokens = dist.get_rank(), point.tokens // point.ranks
    whole = problem(point)
    mine = [x[:, rank * tokens :][:, :tokens].contiguous() for x in whole]
    for tensor in mine[:3]:
        tensor.requires_grad_()
    if what == "exchange":
        query, key, value, gradient = mine
        right = [query, gradient, key, value]
        own = slice(rank * point.kv_heads // point.ranks, (rank + 1) * point.kv_heads // point.ranks)
        local: Attention = partial(Identity.apply, *(x[:, :, own].contiguous() for x in whole[1:3]))
    else:
        for tensor in whole[:3]:
            tensor.requires_grad_()
        right = [x[:, rank * tokens :][:, :tokens] for x in run(attend, *whole)]
        local = attend
    return {name: partial(run, VARIANTS[name](point, local), *mine) for name in names}, right


def measure(point: Point, what: str, names: list[str], rounds: int, seconds: float) -> Times:
    """One rank's part. A variant that gives anything else than one device is an error."""
    if "DeepSpeed" in names:
        import deepspeed.comm

        deepspeed.comm.init_distributed("gloo", verbose=False)
    steps, right = steps_of(point, what, names)
    for name, step in steps.items():
        for found, expected in zip(step(), right, strict=True):
            if not torch.equal(found, expected):
                raise AssertionError(f"{point}: {name} differs from one device")
    return interleaved(steps, rounds, seconds)


def show(point: Point, what: str, times: Times) -> dict[str, dict[str, float]]:
    """Print the table of one point; for each variant its quartiles (s) and its ratios."""
    best = min((name for name in times if name in BY_HAND), key=lambda name: quartiles(times[name])[1])
    bases = {"DeepSpeed": "DeepSpeed", "best by hand": best, "yunchang": "yunchang"}
    print(f"\n{what}: {point} ({point.pair_bytes:,} bytes of q, k and v from each rank to each other)")
    print(f"{'':<28}{'median ms':>10}{'quartiles':>18}{'/ DeepSpeed':>13}{'/ by hand':>11}{'/ yunchang':>12}")
    table = {}
    for name in times:
        first, median, third = quartiles(times[name])
        ratios = {base: ratio(times, name, there) for base, there in bases.items() if there in times}
        table[name] = {"first quartile": first, "median": median, "third quartile": third, **ratios}
        shown = "".join(
            f"{ratios.get(base, float('nan')):>{width}.2f}"
            for base, width in zip(bases, (13, 11, 12), strict=True)
        )
        spread = f"{first * 1e3:.2f}-{third * 1e3:.2f}"
        print(f"{name:<28}{median * 1e3:>10.2f}{spread:>18}{shown}{' best' if name == best else ''}")
    for name in ("ours: auto", "ours: DistributedAttention"):
        missed = [
            f"{table[name][base]:.2f} of {base} > {limit}"
            for base, limit in LIMITS.items()
            if table.get(name, {}).get(base, 0.0) > limit
        ]
        if missed:
            print(f"  {name}: {', '.join(missed)}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", nargs="+", choices=["exchange", "step"], default=["exchange", "step"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 4096])
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[16, 4])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.1, help="of each variant in each round, about")
    parser.add_argument(
        "--variants", default="", help="only those whose name contains this, and those by hand"
    )
    parser.add_argument("--deepspeed", help="the folder that another DeepSpeed was installed to")
    parser.add_argument("--json", help="write every round's seconds, and the tables, to this file")
    options = parser.parse_args()
    versions = {"torch": torch.__version__, **import_peers(options.deepspeed)}
    print("\n".join(f"{name}: {version}" for name, version in versions.items()))
    names = [name for name in VARIANTS if "not measured" not in versions.get(name, "")]
    names = [name for name in names if options.variants in name or name in BY_HAND]
    results = []
    for what, ranks, kv_heads, batch, tokens in itertools.product(
        options.what, options.ranks, options.kv_heads, options.batch, options.tokens
    ):
        point = Point(ranks, tokens, kv_heads, batch)
        times = on_gloo(ranks, measure, point, what, names, options.rounds, options.seconds)
        table = show(point, what, times)
        results.append({"what": what, **asdict(point), "seconds": times, "table": table})
    if options.json:
        Path(options.json).write_text(json.dumps({"versions": versions, "results": results}, indent=1))


if __name__ == "__main__":
    main()
