"""How long one attention step takes on virtual ranks, with each instrument off and on, beside PyTorch's simulators.

One step is forward and backward of one causal attention: P ranks with one token each, head dim 16, float32. "Uneven"
has P + 3 heads, so that ranks hold one or two. The plan is made before the clock starts; the world is started within.

- "loop": no ranks at all. One thread packs, attends (SDPA) and unpacks for each rank in turn, and differentiates; the
  exchange itself is one `stack` of all ranks' tensors.
- "ours": `seqpar_ref.DistributedAttention` on a `VirtualWorld`. "off" watches nothing; "ledger", "hazards" and "clock"
  are one instrument each; "everything" is all three, and "clock" and "everything" include the trace's times.
- "even": P heads, and a body in plain torch.distributed that PyTorch's simulators run as well, because LocalTensorMode
  has one tensor for all ranks and no process for each. Its exchange is one all_to_all_single each way.
- LocalTensorMode (torch.distributed._local_tensor) and multi_threaded_pg (torch.testing._internal.distributed).

Every variant's result is compared with the loop's before anything is timed. Runs alternate, variant by variant, after
one warm run of each; Python's garbage collector is off within a run and runs between them, as in timeit. A variant
whose warm run takes more than 10 s is run three times in all. Variants with uneven and with even heads are compared
among themselves only, so each number of ranks and each of the two kinds has a fresh process of its own: memory that
other variants have left in pieces costs up to 15 %.

    python benchmarks/simulator.py --ranks 8 64 256
"""

import sys

if __name__ == "__main__":
    del sys.path[0]  # this file's folder: the file is called as the package that it imports

import argparse
import gc
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from seqpar_ref import DistributedAttention, make_plan
from simulator import VirtualWorld

HEAD_DIM = 16
SLOW_SECONDS, SLOW_REPEATS = 10.0, 3
INSTRUMENTS = {
    "off": {"hazards": "off", "ledger": False},
    "ledger": {"hazards": "off", "ledger": True},
    "hazards": {"hazards": "raise", "ledger": False},
    "hazards, ledger": {"hazards": "raise", "ledger": True},
    "clock": {"hazards": "off", "ledger": False, "cluster": "h100-nodes"},
    "everything": {"hazards": "raise", "ledger": True, "cluster": "h100-nodes"},
}
Step = Callable[[], torch.Tensor]
"""Runs one step and gives the gradients of all shards of q, k and v, [3, ranks, heads, dim]."""


def shards_of(ranks: int, heads: int) -> torch.Tensor:
    """Query, key and value of every rank's token: [3, ranks, heads, dim]."""
    return torch.randn(3, ranks, heads, HEAD_DIM, generator=torch.Generator().manual_seed(0))


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention of [tokens, heads, dim]."""
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True)[0].transpose(0, 1)


def loop(ranks: int, heads: int) -> Step:
    """For every rank in one thread: pack q, k and v, attend to what the others have packed, pack, unpack."""
    plan, shards = make_plan(ranks=ranks, heads=heads, tokens=ranks), shards_of(ranks, heads)

    def step() -> torch.Tensor:
        leaves = [[x.clone().requires_grad_() for x in kind] for kind in shards]
        sent = torch.stack(
            [torch.stack(qkv, dim=1) for qkv in zip(*leaves, strict=True)]
        )  # [tokens, heads, 3, dim]
        outputs = []
        for rank in range(ranks):
            held = plan.query_heads(rank)
            received = sent[:, held.start : held.stop]
            outputs.append(attend(*(x.contiguous() for x in received.unbind(2))).contiguous())
        returned = torch.cat(outputs, dim=1)
        loss = sum((returned[rank].contiguous() ** 2).sum() for rank in range(ranks))
        gradients = torch.autograd.grad(loss, [x for kind in leaves for x in kind])
        return torch.stack(gradients).view(shards.shape)

    return step


def ours(ranks: int, heads: int, autograd: str, instruments: str) -> Step:
    """DistributedAttention on a VirtualWorld."""
    plan, shards = make_plan(ranks=ranks, heads=heads, tokens=ranks), shards_of(ranks, heads)

    def body(leaves):
        rank = dist.get_rank()
        query, key, value = (x[rank].view(1, 1, heads, HEAD_DIM) for x in leaves)
        result = DistributedAttention(plan=plan)(query, key, value, is_causal=True)
        if autograd == "joint":
            return result
        return torch.autograd.grad((result**2).sum(), [x[rank] for x in leaves])

    def step() -> torch.Tensor:
        leaves = [[x.clone().requires_grad_() for x in kind] for kind in shards]
        world = VirtualWorld(ranks, autograd=autograd, **INSTRUMENTS[instruments])
        results = world.run(body, leaves)
        if autograd == "joint":
            loss = sum((result**2).sum() for result in results)
            gradients = torch.autograd.grad(loss, [x for kind in leaves for x in kind])
            found = torch.stack(gradients).view(shards.shape)
        else:
            found = torch.stack([torch.stack(own) for own in results], dim=1)
        if "cluster" in INSTRUMENTS[instruments]:
            assert world.trace.seconds > 0
        return found

    return step


class Exchange(torch.autograd.Function):
    """all_to_all_single, whose gradient is itself."""

    @staticmethod
    def forward(ctx, tensor):
        received = torch.empty_like(tensor)
        dist.all_to_all_single(received, tensor)
        return received

    @staticmethod
    def backward(ctx, gradient):
        received = torch.empty_like(gradient)
        dist.all_to_all_single(received, gradient.contiguous())
        return received


def plain_step(query, key, value):
    """One token and as many heads as ranks, [ranks, dim] each: q, k and v in one exchange, the result in another."""
    received = Exchange.apply(torch.stack((query, key, value), dim=1))  # [tokens, 3, dim]
    own_head = (x[None, None] for x in received.unbind(1))
    result = Exchange.apply(scaled_dot_product_attention(*own_head, is_causal=True)[0, 0].contiguous())
    return torch.autograd.grad((result**2).sum(), (query, key, value))


def even_ours(ranks: int, instruments: str) -> Step:
    """The plain body on a VirtualWorld."""
    shards = shards_of(ranks, ranks)

    def body():
        rank = dist.get_rank()
        return torch.stack(plain_step(*(x[rank].clone().requires_grad_() for x in shards)))

    return lambda: torch.stack(VirtualWorld(ranks, **INSTRUMENTS[instruments]).run(body), dim=1)


def even_local_tensor(ranks: int) -> Step:
    """The plain body on LocalTensorMode: one program, each of whose tensors stands for all ranks' tensors."""
    from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    shards = shards_of(ranks, ranks)

    def step() -> torch.Tensor:
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        try:
            with LocalTensorMode(ranks):
                own = [
                    LocalTensor({rank: x[rank].clone() for rank in range(ranks)}).requires_grad_()
                    for x in shards
                ]
                gradients = plain_step(*own)
                by_rank = [x._local_tensors for x in gradients]
            return torch.stack([torch.stack([x[rank] for rank in range(ranks)]) for x in by_rank])
        finally:
            dist.destroy_process_group()

    return step


def even_multi_threaded(ranks: int) -> Step:
    """The plain body on multi_threaded_pg: a thread for each rank, as the helpers of its tests start them."""
    from torch.testing._internal.distributed import multi_threaded_pg

    shards = shards_of(ranks, ranks)

    def step() -> torch.Tensor:
        results: list = [None] * ranks
        isolate = torch._C._distributed_c10d._set_thread_isolation_mode
        isolate(True)
        multi_threaded_pg._install_threaded_pg()
        store = dist.HashStore()

        def run(rank):
            dist.init_process_group("threaded", rank=rank, world_size=ranks, store=store)
            try:
                results[rank] = torch.stack(plain_step(*(x[rank].clone().requires_grad_() for x in shards)))
            finally:
                dist.destroy_process_group()

        try:
            threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            multi_threaded_pg._uninstall_threaded_pg()
            isolate(False)
        return torch.stack(results, dim=1)

    return step


def variants(ranks: int, heads: Literal["uneven", "even"]) -> dict[str, Step]:
    """Every variant by name, the loop first."""
    if heads == "uneven":
        found = {"loop, uneven": loop(ranks, ranks + 3)}
        for autograd in ("faithful", "joint"):
            for name in INSTRUMENTS:
                found[f"ours, {autograd}: {name}"] = ours(ranks, ranks + 3, autograd, name)
        return found
    found = {"loop, even": loop(ranks, ranks)}
    for name in ("off", "hazards, ledger"):
        found[f"even: ours, {name}"] = even_ours(ranks, name)
    found["even: LocalTensorMode"] = even_local_tensor(ranks)
    found["even: multi_threaded_pg"] = even_multi_threaded(ranks)
    return found


def timed(step: Step) -> float:
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    finally:
        gc.enable()


def measure(
    ranks: int, heads: Literal["uneven", "even"], repeats: int, chosen: str
) -> dict[str, list[float]]:
    """Seconds of every run, by variant; a variant that fails, or gives another result, is named and left out."""
    torch.set_num_threads(1)
    steps = {
        name: step
        for name, step in variants(ranks, heads).items()
        if chosen in name or name.startswith("loop")
    }
    times: dict[str, list[float]] = {}
    warm: dict[str, float] = {}
    right = steps[f"loop, {heads}"]()
    for name, step in steps.items():
        print(f"{ranks} ranks, warm run: {name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            found = step()
        except Exception as error:
            print(f"{ranks} ranks, {name}: cannot run this ({type(error).__name__}: {error})", flush=True)
            continue
        warm[name] = time.perf_counter() - start
        difference = (found - right).abs().max().item()
        if difference > 1e-5:
            print(
                f"{ranks} ranks, {name}: gives other gradients than the loop ({difference:.1e}); not timed",
                flush=True,
            )
            continue
        times[name] = []
    for repeat in range(repeats):
        print(f"{ranks} ranks, {heads}, run {repeat + 1} of {repeats} ...", file=sys.stderr, flush=True)
        for name, own in times.items():
            if warm[name] < SLOW_SECONDS or repeat < SLOW_REPEATS:
                own.append(timed(steps[name]))
    return times


def in_a_fresh_process(*arguments: Any) -> dict[str, list[float]]:
    """`measure`, where nothing has run before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        return processes.submit(measure, *arguments).result()


def show(ranks: int, times: dict[str, list[float]]) -> None:
    print(f"\n{ranks} ranks{'minimum s':>40} {'median s':>10} {'x loop':>8} {'x off':>8} {'runs':>5}")
    medians = {name: statistics.median(own) for name, own in times.items()}
    for name, own in times.items():
        even = name.startswith("even") or name == "loop, even"
        base = medians["loop, even" if even else "loop, uneven"]
        mode = "joint" if "joint" in name else "faithful"
        off = medians.get("even: ours, off" if even else f"ours, {mode}: off")
        against_off = f"{medians[name] / off:8.2f}" if off and not name.startswith("loop") else " " * 8
        print(
            f"{name:<38} {min(own):10.4f} {medians[name]:10.4f} {medians[name] / base:8.1f} {against_off} {len(own):5d}"
        )


def limits(results: dict[int, dict[str, list[float]]]) -> list[tuple[str, float, float, bool]]:
    """(what, measured, limit, met) for each aim that the measured variants can tell about."""
    found = []

    def add(what: str, measured: float, limit: float, met: bool) -> None:
        found.append((what, measured, limit, met))

    medians = {
        ranks: {x: statistics.median(own) for x, own in times.items()} for ranks, times in results.items()
    }
    at_64, at_256 = medians.get(64, {}), medians.get(256, {})
    for mode in ("faithful", "joint"):
        off = at_64.get(f"ours, {mode}: off")
        if off is None:
            continue
        base = at_64["loop, uneven"]
        add(f"64 ranks, {mode}: off / loop", off / base, 10, off <= 10 * base)
        ledger = at_64[f"ours, {mode}: ledger"]
        add(f"64 ranks, {mode}: ledger / off", ledger / off, 1.2, ledger <= 1.2 * off)
        both = at_64[f"ours, {mode}: hazards, ledger"]
        add(f"64 ranks, {mode}: hazards and ledger / off", both / off, 2.5, both <= max(2.5 * off, 12 * base))
        every = at_64[f"ours, {mode}: everything"]
        add(f"64 ranks, {mode}: everything / off", every / off, 5, every <= max(5 * off, 25 * base))
    for peer, factor in (("LocalTensorMode", 2), ("multi_threaded_pg", 15)):
        theirs = at_256.get(f"even: {peer}")
        if theirs is not None:
            own = at_256["even: ours, off"]
            add(f"256 ranks: {peer} / ours", theirs / own, factor, theirs >= factor * own)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--variants", default="", help="only variants whose name contains this, and the loop")
    parser.add_argument("--json", help="write every run's seconds to this file")
    options = parser.parse_args()
    results: dict[int, dict[str, list[float]]] = {}
    for ranks in options.ranks:
        results[ranks] = {}
        for heads in ("uneven", "even"):
            results[ranks] |= in_a_fresh_process(ranks, heads, options.repeats, options.variants)
        show(ranks, results[ranks])
    if not options.variants:
        print("\nlimits (medians)")
        for what, measured, limit, met in limits(results):
            print(f"{what:<44} {measured:8.2f}   limit {limit:>4}   {'met' if met else 'NOT MET'}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main()
