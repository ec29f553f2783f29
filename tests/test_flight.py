"""An exchange in two halves moves what one in one piece moves, forward and backward, whatever stands between."""

import gc
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seqpar_ref import (
    Plan,
    heads_to_sequence,
    make_plan,
    qkv_to_heads,
    sequence_to_heads,
    start_heads_to_sequence,
    start_sequence_to_heads,
)
from seqpar_ref.direct import exchange
from seqpar_ref.errors import OrderError, ShapeError
from seqpar_ref.flight import Flight
from seqpar_ref.group import group_of
from seqpar_ref.routes import Load, qkv_loads, routes_to_heads
from seqpar_ref.shapes import LAYOUTS
from simulator.errors import HazardError
from tests.launch import on_gloo, on_virtual
from tests.oracle import AXES, to_layout
from tests.recording import Record
from tests.test_exchange import PLANS, addresses, tokens_of

BOTH = [on_virtual, pytest.param(on_gloo, marks=pytest.mark.gloo)]


def halves(plan: Plan, layout: str, kind: str, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """What comes of both directions and of their gradients: in one piece, and in two."""
    rank = dist.get_rank()
    whole = addresses(plan, kind, dtype=dtype)
    pieces = []
    for there, back in (
        (sequence_to_heads, heads_to_sequence),
        (
            lambda *args, **options: start_sequence_to_heads(*args, **options).finish(),
            lambda *args, **options: start_heads_to_sequence(*args, **options).finish(),
        ),
    ):
        shard = tokens_of(whole, plan, rank, layout).requires_grad_()
        moved = there(shard, plan, layout=layout, heads=kind)
        moved.retain_grad()
        returned = back(moved.sin(), plan, layout=layout, heads=kind)
        returned.backward(torch.arange(returned.numel()).view_as(returned).to(dtype).cos())
        pieces.append([moved.detach(), moved.grad, returned.detach(), shard.grad])
    return list(zip(*pieces, strict=True))


@pytest.mark.parametrize("kind, layout", [("query", "b s h d"), *itertools.product(["kv"], AXES)])
@pytest.mark.parametrize("launch", BOTH)
@pytest.mark.parametrize("name", PLANS)
def test_two_halves_equal_one_piece(launch: Any, name: str, kind: str, layout: str) -> None:
    dtype = torch.bfloat16 if layout == "s b h d" else torch.float64
    for pairs in launch(halves, PLANS[name].ranks, PLANS[name], layout, kind, dtype):
        assert all(torch.equal(one, other) for one, other in pairs)


def through_wires(plan: Plan, layout: str, value_dim: int) -> list[list[Tensor]]:
    """Results and gradients of qkv_to_heads on each wire."""
    rank, results = dist.get_rank(), []
    for wire in ("fused", "separate", "pipelined", "auto"):
        shards = [
            tokens_of(addresses(plan, heads, dim=dim) + 1000 * place, plan, rank, layout).requires_grad_()
            for place, (heads, dim) in enumerate((("query", 4), ("kv", 4), ("kv", value_dim)))
        ]
        moved = qkv_to_heads(*shards, plan, layout=layout, wire=wire)
        torch.autograd.backward(moved, [tensor.detach().sin() for tensor in moved])
        results.append([*(tensor.detach() for tensor in moved), *(shard.grad for shard in shards)])
    return results


@pytest.mark.parametrize("launch", BOTH)
@pytest.mark.parametrize("layout", ["b s h d", "b h s d"])
@pytest.mark.parametrize("name", PLANS)
def test_the_wire_changes_no_bit(launch: Any, name: str, layout: str) -> None:
    for fused, *others in launch(through_wires, PLANS[name].ranks, PLANS[name], layout, 6):
        for other in others:
            assert all(torch.equal(one, two) for one, two in zip(fused, other, strict=True))


def wires_recorded() -> dict[str, list[str]]:
    plan, rank = PLANS["even"], dist.get_rank()
    events = {}
    for wire in ("fused", "separate", "pipelined"):
        shards = [
            tokens_of(addresses(plan, kind), plan, rank, "b s h d").requires_grad_()
            for kind in ("query", "kv", "kv")
        ]
        record = Record()
        moved = qkv_to_heads(*shards, plan, record.group(), wire=wire)
        sum(tensor.sum() for tensor in moved).backward()
        events[wire] = record.events
    return events


def test_what_each_wire_issues() -> None:
    """One after the other: what a rank keeps, the first and the last one do, is copied while the others' travels."""
    issued = [f"issue {number}" for number in range(6)]
    waited = [f"wait {number}" for number in range(6)]
    exchanged = [[f"exchange {number}"] for number in range(6)]
    for rank, events in enumerate(on_gloo(wires_recorded, 4)):
        one_by_one = zip(issued, waited, strict=True) if rank in (0, 3) else exchanged
        separate = list(itertools.chain(*one_by_one))
        assert events["separate"] == separate
        assert events["fused"] == separate[: len(separate) // 3]
        assert events["pipelined"] == issued[:3] + waited[:3] + issued[3:] + waited[3:]


class Projected(nn.Module):
    """Two linear maps around an exchange each, with an operation between projection and exchange."""

    def __init__(self, plan: Plan, halves: bool) -> None:
        super().__init__()
        self.plan, self.halves = plan, halves
        torch.manual_seed(3)
        self.both = nn.Linear(
            5, plan.heads * 2 + plan.kv_heads * 2, dtype=torch.float64
        )  # a fused projection

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.both(x).unflatten(-1, (-1, 2)).split([self.plan.heads, self.plan.kv_heads], dim=2)
        key = key.sin()
        if self.halves:
            first = start_sequence_to_heads(query, self.plan)
            second = start_sequence_to_heads(key, self.plan, heads="kv")
            query, key = first.finish(), second.finish()
        else:
            query = sequence_to_heads(query, self.plan)
            key = sequence_to_heads(key, self.plan, heads="kv")
        weight = key.mean(dim=2, keepdim=True)
        if not query.shape[2]:
            weight = key.sum()
        return heads_to_sequence(query * weight, self.plan)


def twice(module: Projected, x: Tensor) -> Tensor:
    return module(module(x).flatten(2)[..., :5])


def interleaved(module: Projected, x: Tensor) -> Tensor:
    """Two micro-batches under way at a time, finished in the other order."""
    results = [module(x), module(x.cos())]
    return results[1] - 2 * results[0]


def reentrant(module: Projected, x: Tensor) -> Tensor:
    return checkpoint(module, x, use_reentrant=True)


def non_reentrant(module: Projected, x: Tensor) -> Tensor:
    return checkpoint(module, x, use_reentrant=False)


USES = {f.__name__: f for f in (Projected.__call__, twice, interleaved, reentrant, non_reentrant)}


def used(plan: Plan, halves: bool, use: Callable[..., Tensor], passes: int) -> list[Tensor]:
    rank = dist.get_rank()
    torch.manual_seed(rank)
    x = torch.randn(2, plan.tokens_by_rank[rank], 5, dtype=torch.float64, requires_grad=True)  # a leaf
    module = Projected(plan, halves)
    result = use(module, x)
    for number in range(passes):
        result.backward(result.detach() + number, retain_graph=number + 1 < passes)
    return [result.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize(
    "launch, name",
    [
        (on_virtual, "even"),
        (on_virtual, "grouped"),
        (on_virtual, "few"),
        pytest.param(on_gloo, "grouped", marks=pytest.mark.gloo),
    ],
)
@pytest.mark.parametrize("use", USES)
def test_uses(launch: Any, use: str, name: str) -> None:
    plan, passes = PLANS[name], 1 if use == "reentrant" else 2  # a reentrant checkpoint has one backward pass
    one, two = (launch(used, plan.ranks, plan, halves, USES[use], passes) for halves in (False, True))
    for rank in range(plan.ranks):
        assert all(torch.equal(a, b) for a, b in zip(one[rank], two[rank], strict=True))


def without_gradients(plan: Plan) -> list[Tensor]:
    rank, results = dist.get_rank(), []
    shard = tokens_of(addresses(plan, "query"), plan, rank, "b s h d").requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            results.append(start_sequence_to_heads(shard, plan).finish())
    return results


def test_without_gradients() -> None:
    plan = PLANS["grouped"]
    for rank, results in enumerate(on_virtual(without_gradients, 4, plan)):
        run = plan.query_heads(rank)
        for result in results:
            assert torch.equal(result, addresses(plan, "query")[:, :, run.start : run.stop])
            assert not result.requires_grad


def test_the_gradient_travels_between_the_same_places() -> None:
    """What stands between start and finish stands there in the backward pass as well, in reverse order."""

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, record: Record, name: str) -> Tensor:
            record.note(name)
            ctx.note = record, name
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
            record, name = ctx.note
            record.note(name)
            return gradient.clone(), None, None

    def body() -> list[str]:
        plan, rank = PLANS["even"], dist.get_rank()
        x = tokens_of(addresses(plan, "query"), plan, rank, "b s h d").requires_grad_()
        record = Record()
        pending = start_sequence_to_heads(Noted.apply(x, record, "before"), plan, record.group())
        between = Noted.apply(x, record, "between")
        result = Noted.apply(pending.finish(), record, "behind")
        (result.sum() + between.sum()).backward()
        return record.events

    forward = ["before", "issue 0", "between", "wait 0", "behind"]
    backward = ["behind", "issue 1", "between", "wait 1", "before"]
    assert on_virtual(body, 4) == [forward + backward] * 4


@pytest.mark.parametrize("left_out", [0, 1, 2, 3])
def test_each_wait_is_needed(left_out: int) -> None:
    def body() -> None:
        plan, rank = PLANS["grouped"], dist.get_rank()
        group = Record(left_out if rank == 2 else None).group()
        x = tokens_of(addresses(plan, "query"), plan, rank, "b s h d").requires_grad_()
        moved = start_sequence_to_heads(x, plan, group).finish()
        start_heads_to_sequence(moved * 2, plan, group).finish().sum().backward()

    with pytest.raises(HazardError, match="rank 2"):
        on_virtual(body, 4)


def test_second_derivatives_through_the_joint_world() -> None:
    plan = Plan(tokens_by_rank=(2, 0, 1), heads_by_rank=(1, 2, 1), kv_heads=2)
    everything = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)

    def ranks(tensor: Tensor) -> tuple[Tensor, ...]:
        def body(tensor: Tensor) -> Tensor:
            run = plan.tokens_of(dist.get_rank())
            moved = start_sequence_to_heads(tensor[:, run.start : run.stop], plan, heads="kv").finish()
            return start_heads_to_sequence(moved**2, plan, heads="kv").finish()

        return tuple(on_virtual(body, 3, tensor, autograd="joint"))

    assert torch.autograd.gradcheck(ranks, everything)
    assert torch.autograd.gradgradcheck(ranks, everything)


def in_stages(plan: Plan, layout: str, chunks: int) -> list[tuple[Tensor, Tensor]]:
    """Heads in chunks to the ranks and back, beside all at once: values, gradients, second derivatives."""
    rank, order, group = dist.get_rank(), LAYOUTS[layout], group_of(None)
    x = tokens_of(addresses(plan, "kv"), plan, rank, layout)
    (route,) = routes_to_heads(plan, rank, order, (Load(("kv",), (3,)),), x, chunks)
    gradient = torch.arange(x.numel()).view_as(x).to(x.dtype).cos()
    results = []
    for stages in (1, chunks):
        shard = x.clone().requires_grad_()
        if stages == 1:
            moved = [sequence_to_heads(shard, plan, layout=layout, heads="kv")]
        else:
            flight = Flight(group, route)
            flight.start(shard)
            moved = [flight.finish(stage)[0] for stage in range(chunks)]
        loss = sum((part**3).sum() for part in moved)
        (first,) = torch.autograd.grad(loss, shard, create_graph=True)
        (second,) = torch.autograd.grad(first, shard, gradient)
        together = torch.cat([part.detach() for part in moved], dim=order.heads)
        results.append([together, first.detach(), second])
    return list(zip(*results, strict=True))


@pytest.mark.parametrize("launch", BOTH)
@pytest.mark.parametrize("layout, chunks", [("b s h d", 2), ("s b h d", 3), ("b h s d", 3)])
@pytest.mark.parametrize("name", PLANS)
def test_chunks_of_heads_equal_all_at_once(launch: Any, name: str, layout: str, chunks: int) -> None:
    plan = PLANS[name]
    for pairs in launch(in_stages, plan.ranks, plan, layout, chunks):
        assert all(torch.equal(one, other) for one, other in pairs)


def test_stages_leave_and_arrive_in_order() -> None:
    """Each leaves when the one before it has come."""

    def body() -> list[str]:
        plan, rank = make_plan(ranks=2, heads=6, tokens=4), dist.get_rank()
        x = tokens_of(addresses(plan, "query"), plan, rank, "b s h d").requires_grad_()
        load = (Load(("query",), (3,)),)
        (route,) = routes_to_heads(plan, rank, LAYOUTS["b s h d"], load, x, 3)
        record = Record()
        there, back = Flight(record.group(), route), Flight(record.group(), route.reverse())
        there.start(x)
        for stage in range(3):
            (moved,) = there.finish(stage)
            record.note(f"compute {stage}")
            back.start(moved * 2, stage=stage)
        back.finish()[0].sum().backward()
        return record.events

    # 0, 1, 3 come, 2, 4, 5 return; of the gradients 6, 7, 9 come, the last stage first, and 8, 10, 11 return
    forward = [
        "issue 0",
        "wait 0",
        "issue 1",
        "compute 0",
        "issue 2",
        "wait 1",
        "issue 3",
        "compute 1",
        "issue 4",
    ]
    forward += ["wait 3", "compute 2", "issue 5", "wait 2", "wait 4", "wait 5"]
    backward = [
        "issue 6",
        "wait 6",
        "issue 7",
        "issue 8",
        "wait 7",
        "issue 9",
        "issue 10",
        "wait 9",
        "issue 11",
    ]
    backward += ["wait 11", "wait 10", "wait 8"]
    assert on_virtual(body, 2) == [forward + backward] * 2


def test_each_half_once() -> None:
    def body() -> None:
        plan, rank = PLANS["even"], dist.get_rank()
        x = tokens_of(addresses(plan, "query"), plan, rank, "b s h d").requires_grad_()
        (route,) = routes_to_heads(plan, rank, LAYOUTS["b s h d"], (Load(("query",), (3,)),), x)
        flight = Flight(group_of(None), route)
        with pytest.raises(OrderError, match="not started yet"):
            flight.finish()
        flight.start(x)
        with pytest.raises(OrderError, match="started a second time"):
            flight.start(x)
        flight.finish()
        with pytest.raises(OrderError, match="finished already"):
            flight.finish()
        with pytest.raises(ShapeError, match="the plan says"):
            start_sequence_to_heads(x[:, :1], plan)

    on_virtual(body, 4)


def test_chunks_without_a_gradient_are_named() -> None:
    def body() -> None:
        plan, rank = make_plan(ranks=2, heads=4, tokens=4), dist.get_rank()
        x = tokens_of(addresses(plan, "query"), plan, rank, "b s h d").requires_grad_()
        (route,) = routes_to_heads(plan, rank, LAYOUTS["b s h d"], (Load(("query",), (3,)),), x, 2)
        flight = Flight(group_of(None), route)
        flight.start(x)
        used, _ = flight.finish(0)[0], flight.finish(1)[0]
        used.sum().backward()

    with pytest.raises(OrderError, match="some chunks of an exchange got a gradient and others did not"):
        on_virtual(body, 2)


def test_a_finished_exchange_keeps_no_tensor() -> None:
    def body() -> bool:
        plan, rank = PLANS["even"], dist.get_rank()
        x = to_layout(addresses(plan, "query")[:, : plan.tokens_by_rank[rank]], "b s h d").requires_grad_()
        projected = x * 2
        known = weakref.ref(projected)
        result = start_sequence_to_heads(projected, plan).finish()
        del projected
        return known() is None and result.requires_grad

    gc.disable()
    try:
        assert on_virtual(body, 4) == [True] * 4
    finally:
        gc.enable()


def most_memory(exchange: Callable[[], object]) -> int:
    """The most bytes that are allocated at a time while it runs."""
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        exchange()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    return max(itertools.accumulate(event.self_cpu_memory_usage for event in events))


# The first rank keeps its quarter, so it needs 3 results and 3 buffers of 3/4 each. The second one sends itself what
# it keeps: 3 buffers and 3 results there; back, each result takes the place of a buffer. In a batch of two no tensor is
# a buffer: 3 are sent and 3 received, and each result takes the place of what was sent.
@pytest.mark.parametrize("rank, batch, there, back", [(0, 1, 5.25, 5.25), (1, 1, 6, 4), (1, 2, 6, 6)])
def test_memory_of_pipelined_exchanges(rank: int, batch: int, there: float, back: float) -> None:
    """In tensors of one size. What was sent and what is unpacked leave their memory to what comes next."""

    @dataclass(frozen=True)
    class KeepsBuffers:
        given: tuple[Any, ...]

        def wait(self) -> bool:
            return True

    @dataclass(frozen=True)
    class NothingTravels:
        rank: int
        size: int = 4

        def all_to_all_single(self, *given: Any) -> Any:
            """Sends nothing, at once. Like gloo's, what it returns has the buffers too."""
            return KeepsBuffers(given)

        def all_gather_integers(self, record: list[int], device: torch.device) -> list[list[int]]:
            """As if all had the same."""
            return [record] * self.size

    plan = make_plan(ranks=4, heads=4, tokens=1024)
    by_tokens, by_heads = torch.ones(batch, 256, 4, 64), torch.ones(batch, 1024, 1, 64)
    loads = qkv_loads("pipelined", (64, 64, 64))
    routes = routes_to_heads(plan, rank, LAYOUTS["b s h d"], loads, by_tokens)
    for tensor, directions, tensors in (
        (by_tokens, routes, there),
        (by_heads, [route.reverse() for route in routes], back),
    ):
        pipelined = partial(exchange, NothingTravels(rank), tuple(directions), True, *(tensor,) * 3)
        assert most_memory(pipelined) == tensors * tensor.nbytes
