"""The exchange moves every element to where the plan says, and its gradient moves it back."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from seqpar_ref import Plan, heads_to_sequence, make_plan, qkv_to_heads, sequence_to_heads
from seqpar_ref.group import TorchGroup, group_of
from tests.launch import on_gloo, on_virtual
from tests.oracle import AXES, from_layout, to_layout
from tests.written import BytesWritten, CountingGroup

EVEN = make_plan(ranks=4, heads=8, kv_heads=4, tokens=20)
GROUPED = make_plan(ranks=4, heads=9, kv_heads=3, tokens=[3, 0, 5, 2], policy="balanced")
MQA = make_plan(ranks=4, heads=6, kv_heads=1, tokens=[2, 2, 2, 2])
FEW = make_plan(ranks=4, heads=3, tokens=[1, 4, 2, 0])
GAP = Plan(
    tokens_by_rank=(2, 3, 0, 1), heads_by_rank=(1, 0, 4, 1), kv_heads=3
)  # kv head 0 on ranks 0 and 2 only
PLANS = {"even": EVEN, "grouped": GROUPED, "mqa": MQA, "few": FEW, "gap": GAP}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def addresses(
    plan: Plan, heads: str, batch: int = 2, dim: int = 3, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The global tensor [batch, seq, heads, dim], each value its own address."""
    count = plan.heads if heads == "query" else plan.kv_heads
    shape = (batch, plan.tokens, count, dim)
    return torch.arange(float(np.prod(shape)), dtype=dtype).view(shape)


def tokens_of(tensor: Tensor, plan: Plan, rank: int, layout: str) -> Tensor:
    run = plan.tokens_of(rank)
    return to_layout(tensor[:, run.start : run.stop], layout)


def heads_of(tensor: Tensor, plan: Plan, rank: int, layout: str, heads: str) -> Tensor:
    run = plan.query_heads(rank) if heads == "query" else plan.kv_heads_of(rank)
    return to_layout(tensor[:, :, run.start : run.stop], layout)


def there_and_back(plan: Plan, layout: str, heads: str) -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    shard = tokens_of(addresses(plan, heads), plan, rank, layout)
    moved = sequence_to_heads(shard, plan, layout=layout, heads=heads)
    return moved, heads_to_sequence(moved, plan, layout=layout, heads=heads)


@pytest.mark.parametrize("layout", AXES)
@pytest.mark.parametrize("heads", ["query", "kv"])
@pytest.mark.parametrize("name", PLANS)
def test_each_element_arrives_and_returns(name: str, heads: str, layout: str) -> None:
    plan = PLANS[name]
    everything = addresses(plan, heads)
    for rank, (moved, returned) in enumerate(on_virtual(there_and_back, plan.ranks, plan, layout, heads)):
        torch.testing.assert_close(moved, heads_of(everything, plan, rank, layout, heads), rtol=0, atol=0)
        torch.testing.assert_close(returned, tokens_of(everything, plan, rank, layout), rtol=0, atol=0)
        assert moved.is_contiguous() and returned.is_contiguous()
        assert not moved._is_view() and not returned._is_view()  # so that callers may write in place


def gradients(
    plan: Plan, layout: str, heads: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What comes back along each direction for a gradient of random numbers, and that gradient."""
    rank = dist.get_rank()
    everything = addresses(plan, heads, dtype=dtype)
    generator = torch.Generator().manual_seed(rank)

    def back(function: Any, shard: Tensor) -> tuple[Tensor, Tensor]:
        shard.requires_grad_()
        result = function(shard, plan, layout=layout, heads=heads)
        gradient = torch.randn(result.shape, generator=generator).to(dtype)
        result.backward(gradient)
        assert shard.grad is not None
        return shard.grad, gradient

    return (
        *back(sequence_to_heads, tokens_of(everything, plan, rank, layout)),
        *back(heads_to_sequence, heads_of(everything, plan, rank, layout, heads)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", ["query", "kv"])
@pytest.mark.parametrize("name", PLANS)
def test_gradients_are_the_adjoint_to_the_bit(name: str, heads: str, dtype: torch.dtype) -> None:
    """Copies of one head are summed by rank, half types in float32 and rounded once."""
    plan, layout = PLANS[name], "b s h d"
    results = on_virtual(gradients, plan.ranks, plan, layout, heads, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    total = torch.zeros(addresses(plan, heads).shape, dtype=wide)
    gathered = torch.cat([from_layout(result[3], layout) for result in results], dim=1)
    held_below: set[int] = set()
    for rank, (_, sent_back, scattered, _) in enumerate(results):
        run = plan.query_heads(rank) if heads == "query" else plan.kv_heads_of(rank)
        total[:, :, run.start : run.stop] += from_layout(sent_back, layout).to(wide)
        expected = gathered[:, :, run.start : run.stop].clone()
        for position, head in enumerate(run):
            if (
                head in held_below
            ):  # a lower rank returned this head, so this rank's copy has no part in the result
                expected[:, :, position] = 0
        held_below |= set(run)
        assert torch.equal(from_layout(scattered, layout), expected)
    for rank, (summed, *_) in enumerate(results):
        assert torch.equal(summed, tokens_of(total.to(dtype), plan, rank, layout))


def fused_and_not(plan: Plan, layout: str, value_dim: int) -> list[tuple[Tensor, Tensor]]:
    """Results and gradients of qkv_to_heads beside those of three exchanges."""
    rank = dist.get_rank()
    shards = [
        tokens_of(addresses(plan, heads, dim=dim) + 1000 * place, plan, rank, layout)
        for place, (heads, dim) in enumerate((("query", 4), ("kv", 4), ("kv", value_dim)))
    ]
    together = [shard.clone().requires_grad_() for shard in shards]
    alone = [shard.clone().requires_grad_() for shard in shards]
    fused = qkv_to_heads(*together, plan, layout=layout)
    single = [
        sequence_to_heads(shard, plan, layout=layout, heads=heads)
        for shard, heads in zip(alone, ("query", "kv", "kv"), strict=True)
    ]
    torch.autograd.backward(fused, [result.detach().sin() for result in fused])
    torch.autograd.backward(single, [result.detach().sin() for result in single])
    pairs = [*zip(fused, single, strict=True)]
    pairs += [(one.grad, other.grad) for one, other in zip(together, alone, strict=True)]  # type: ignore[misc]
    return [(one.detach(), other.detach()) for one, other in pairs]


@pytest.mark.parametrize(("layout", "value_dim"), [("b s h d", 6), ("s b h d", 3), ("b h s d", 4)])
@pytest.mark.parametrize("name", PLANS)
def test_fused_exchange_equals_three(name: str, layout: str, value_dim: int) -> None:
    plan = PLANS[name]
    for pairs in on_virtual(fused_and_not, plan.ranks, plan, layout, value_dim):
        assert all(torch.equal(one, other) for one, other in pairs)


def everything_once(plan: Plan, layout: str, dtype: torch.dtype) -> list[Tensor]:
    """Results and gradients of every exchange there is."""
    rank = dist.get_rank()
    out: list[Tensor] = []
    for heads in ("query", "kv"):
        out += gradients(plan, layout, heads, dtype)
    shards = [
        tokens_of(addresses(plan, kind, dtype=dtype), plan, rank, layout) for kind in ("query", "kv", "kv")
    ]
    for shard in shards:
        shard.requires_grad_()
    moved = qkv_to_heads(*shards, plan, layout=layout)
    torch.autograd.backward(moved, [result.detach().cos() for result in moved])
    out += [result.detach() for result in moved]
    out += [shard.grad for shard in shards if shard.grad is not None]
    return out


@pytest.mark.gloo
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PLANS)
def test_virtual_ranks_and_gloo_agree_to_the_bit(name: str, dtype: torch.dtype) -> None:
    plan, layout = PLANS[name], list(AXES)[len(name) % 3]
    virtual = on_virtual(everything_once, plan.ranks, plan, layout, dtype)
    real = on_gloo(everything_once, plan.ranks, plan, layout, dtype)
    for ours, theirs in zip(virtual, real, strict=True):
        assert len(ours) == 14
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def written(plan: Plan, layout: str, heads: str, dtype: torch.dtype, strided: bool) -> list[tuple[int, ...]]:
    """For each direction: bytes written before and after the collective, forward and backward, and the limits."""
    rank = dist.get_rank()
    world = group_of(None)
    results = []
    for fused, function in ((False, sequence_to_heads), (False, heads_to_sequence), (True, qkv_to_heads)):
        group = CountingGroup(world.process_group, world.rank, world.size)
        counter = BytesWritten()
        object.__setattr__(group, "written", counter)
        if function is heads_to_sequence:
            shards = [heads_of(addresses(plan, heads, dtype=dtype), plan, rank, layout, heads)]
        else:
            kinds = ("query", "kv", "kv") if fused else (heads,)
            shards = [tokens_of(addresses(plan, kind, dtype=dtype), plan, rank, layout) for kind in kinds]
        if strided:
            shards = [torch.stack([shard, shard], dim=-1)[..., 0] for shard in shards]
        shards = [shard.requires_grad_() for shard in shards]
        options = {} if fused else {"heads": heads}
        with counter:
            moved = function(*shards, plan, group, layout=layout, **options)
        moved = moved if fused else (moved,)
        loose = [torch.ones((), dtype=dtype).expand(result.shape) for result in moved]  # strides of zero
        counter.phases.append(0)
        with counter:
            torch.autograd.grad(moved, shards, loose)
        sequence_side = sum(shard.numel() for shard in shards) * dtype.itemsize
        heads_side = sum(result.numel() for result in moved) * dtype.itemsize
        results.append((*counter.phases, sequence_side, heads_side))
    return results


@pytest.mark.parametrize(
    ("heads", "dtype", "strided"),
    [("query", torch.float64, False), ("kv", torch.bfloat16, True)],
    ids=["query, float64", "kv, bfloat16 from strided memory"],
)
@pytest.mark.parametrize("layout", AXES)
@pytest.mark.parametrize("name", PLANS)
def test_the_payload_is_written_once(
    name: str, layout: str, heads: str, dtype: torch.dtype, strided: bool
) -> None:
    """Before a collective no more than is sent, after it no more than the result; also on the first call."""
    plan = PLANS[name]
    world_results = on_virtual(written, plan.ranks, plan, layout, heads, dtype, strided)
    kv_copies = sum(len(plan.kv_heads_of(rank)) for rank in range(plan.ranks))
    for rank, (there, back, fused) in enumerate(world_results):
        tokens = len(plan.tokens_of(rank)) * 2 * 3 * dtype.itemsize  # batch 2, dim 3
        query, kv = plan.heads * tokens, kv_copies * tokens
        sent = query if heads == "query" else kv
        for counts, limit in ((there, sent), (fused, query + 2 * kv)):
            before, after, before_back, after_back, sequence_side, heads_side = counts
            assert before <= limit and after <= heads_side
            assert before_back <= heads_side and after_back <= sequence_side
        before, after, before_back, after_back, heads_side, sequence_side = back
        assert before <= heads_side and after <= sequence_side
        assert before_back <= sequence_side and after_back <= heads_side


def test_nothing_is_written_where_the_layout_is_the_wire_format() -> None:
    """Sequence first, the rows that arrive stand in order; heads first and batch 1, those that leave do."""
    plan = PLANS["few"]
    for there, back, _ in on_virtual(written, plan.ranks, plan, "s b h d", "query", torch.float64, False):
        assert there[1] == 0 and back[0] == 0  # unpack by tokens, pack by tokens
        assert there[2] <= there[5]  # the gradient had strides of zero: one copy


def own_splits(layout: str, batch: int) -> list[tuple[list[int], list[int]]]:
    """What this rank gives to each of its all-to-alls for each rank, there and back."""
    rank, world, found = dist.get_rank(), group_of(None), []

    class Splits(TorchGroup):
        def all_to_all_single(self, output: Any, input: Any, *splits: Any) -> Any:
            assert (len(output), len(input)) == (sum(splits[0]), sum(splits[1]))
            found.append(splits[:2])
            return super().all_to_all_single(output, input, *splits)

    group = Splits(world.process_group, world.rank, world.size)
    shard = tokens_of(addresses(EVEN, "query", batch), EVEN, rank, layout)
    moved = sequence_to_heads(shard, EVEN, group, layout=layout)
    assert torch.equal(moved, heads_of(addresses(EVEN, "query", batch), EVEN, rank, layout, "query"))
    assert torch.equal(heads_to_sequence(moved, EVEN, group, layout=layout), shard)
    return found


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", AXES)
def test_what_a_rank_keeps_passes_through_no_buffer(layout: str, batch: int) -> None:
    """On the first rank and on the last one: there the others' chunks are one piece."""
    chunk = batch * 5 * 2 * 3  # 5 tokens, 2 heads, dim 3
    for rank, found in enumerate(on_virtual(own_splits, 4, layout, batch)):
        expected = [chunk] * 4
        if rank in (0, 3):
            expected[rank] = 0
        assert found == [(expected, expected)] * 2


def bytes_of_each(plan: Plan, layout: str, heads: str, which: str) -> None:
    rank = dist.get_rank()
    everything = addresses(plan, heads)
    with torch.no_grad():
        if which == "there":
            sequence_to_heads(tokens_of(everything, plan, rank, layout), plan, layout=layout, heads=heads)
        else:
            heads_to_sequence(
                heads_of(everything, plan, rank, layout, heads), plan, layout=layout, heads=heads
            )


@pytest.mark.parametrize("heads", ["query", "kv"])
@pytest.mark.parametrize("name", PLANS)
def test_bytes_sent_are_the_plans(name: str, heads: str) -> None:
    from simulator import VirtualWorld

    plan = PLANS[name]
    world = VirtualWorld(plan.ranks)
    size = 2 * 3 * 8
    world.run(bytes_of_each, plan, "s b h d", heads, "there")
    np.testing.assert_array_equal(world.bytes, size * plan.vectors(heads))
    world.run(bytes_of_each, plan, "s b h d", heads, "back")
    np.testing.assert_array_equal(world.bytes, size * plan.vectors("kv once" if heads == "kv" else "query").T)


def odd_memory(plan: Plan, layout: str) -> list[tuple[Tensor, Tensor]]:
    """The same values in other memory: transposed, sliced, expanded over the batch."""
    rank = dist.get_rank()
    shard = tokens_of(addresses(plan, "query"), plan, rank, layout)
    transposed = shard.transpose(0, 2).contiguous().transpose(0, 2)
    sliced = torch.cat([shard, shard + 1], dim=3)[..., : shard.shape[3]]
    spaced = torch.stack([shard, shard + 1], dim=1).flatten(0, 1)[::2] if shard.numel() else shard
    expected = sequence_to_heads(shard, plan, layout=layout)
    tests = [
        (sequence_to_heads(other, plan, layout=layout), expected) for other in (transposed, sliced, spaced)
    ]
    batch = layout.split().index("b")
    one = shard.narrow(batch, 0, 1)
    tests.append(
        (
            sequence_to_heads(one.expand(shard.shape), plan, layout=layout),
            sequence_to_heads(one.expand(shard.shape).contiguous(), plan, layout=layout),
        )
    )
    return tests


@pytest.mark.parametrize("layout", AXES)
@pytest.mark.parametrize("name", ["even", "grouped"])
def test_strides_do_not_matter(name: str, layout: str) -> None:
    for pairs in on_virtual(odd_memory, PLANS[name].ranks, PLANS[name], layout):
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("layout", AXES)
def test_any_batch(layout: str, batch: int) -> None:
    plan = PLANS["grouped"]
    everything = addresses(plan, "kv", batch=batch)

    def body() -> Tensor:
        shard = tokens_of(everything, plan, dist.get_rank(), layout).requires_grad_()
        moved = sequence_to_heads(shard, plan, layout=layout, heads="kv")
        moved.sum().backward()
        return moved.detach()

    for rank, moved in enumerate(on_virtual(body, plan.ranks)):
        assert torch.equal(moved, heads_of(everything, plan, rank, layout, "kv"))


def test_second_derivatives_through_the_joint_world() -> None:
    plan = Plan(tokens_by_rank=(2, 0, 1), heads_by_rank=(1, 2, 1), kv_heads=2)
    everything = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)

    def ranks(tensor: Tensor) -> tuple[Tensor, ...]:
        def body(tensor: Tensor) -> Tensor:
            run = plan.tokens_of(dist.get_rank())
            shard = tensor[:, run.start : run.stop]
            moved = sequence_to_heads(shard, plan, heads="kv")
            return heads_to_sequence(moved**2, plan, heads="kv")

        return tuple(on_virtual(body, 3, tensor, autograd="joint"))

    assert torch.autograd.gradcheck(ranks, everything)
    assert torch.autograd.gradgradcheck(ranks, everything)


def test_in_place_on_a_result() -> None:
    def body() -> Tensor:
        plan = make_plan(ranks=2, heads=2, tokens=4)
        shard = torch.ones(1, 2, 2, 3, requires_grad=True)
        for layout in ("b s h d", "b h s d"):
            moved = sequence_to_heads(shard, plan, layout=layout)
            moved.mul_(2)
            moved.sum().backward()
        assert shard.grad is not None
        return shard.grad

    for gradient in on_virtual(body, 2):
        assert torch.equal(gradient, torch.full((1, 2, 2, 3), 4.0))
