"""Communication behind computation: the same bits, the same bytes, no hazard, and in the order that is claimed."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from seqpar_ref import ChunkedAttention, DistributedAttention, Plan, UlyssesBlock, make_plan, routes
from seqpar_ref.errors import (
    ArgumentError,
    LocalAttentionError,
    MaskError,
    PlanError,
    ShapeError,
    TensorError,
    UnsupportedError,
)
from seqpar_ref.late_weight import LateLinear
from seqpar_ref.local_attention import fused_attention, plain_attention
from seqpar_ref.wire import Cut
from simulator import VirtualWorld
from simulator.errors import HazardError
from tests.launch import RankFailed, on_gloo, on_virtual
from tests.oracle import Case, expected
from tests.recording import Record

BOTH = [on_virtual, pytest.param(on_gloo, marks=pytest.mark.gloo)]
PLANS = {
    "even": make_plan(ranks=4, heads=16, kv_heads=8, tokens=20),
    "uneven": make_plan(ranks=4, heads=9, kv_heads=9, tokens=[3, 0, 5, 2]),
    "groups torn": make_plan(ranks=4, heads=18, kv_heads=6, tokens=[2, 2, 3, 1], policy="balanced"),
    "copies": make_plan(ranks=4, heads=12, kv_heads=2, tokens=[3, 3, 2, 2]),
    "one kv head": make_plan(ranks=4, heads=6, kv_heads=1, tokens=8),
    "ranks without heads": Plan((2, 3, 0, 1), (3, 0, 4, 1), kv_heads=8),
}
LAYOUTS = ("b s h d", "s b h d", "b h s d")
KINDS = [("projections", 1), ("chunks", 1), ("chunks", 2), ("chunks", 8)]
SIZES = [(name, "b s h d", torch.float64) for name in PLANS]
SIZES += [("groups torn", "s b h d", torch.float64), ("ranks without heads", "b h s d", torch.float64)]
SIZES += [("groups torn", "b s h d", torch.bfloat16)]


@dataclass(frozen=True)
class Setting:
    """One block and its input; the same on every rank."""

    plan: Plan
    layout: str = "b s h d"
    dtype: torch.dtype = torch.float64
    planned: bool = True
    around: str = "nothing"
    left_out: tuple[int, int] = (-1, -1)


def block_of(setting: Setting, overlap: str, chunks: int, **options: Any) -> UlyssesBlock:
    torch.manual_seed(0)
    plan = setting.plan
    return UlyssesBlock(
        10,
        plan.heads,
        plan.kv_heads,
        4,
        bias=True,
        layout=setting.layout,
        plan=plan if setting.planned else None,
        overlap=overlap,
        chunks=chunks,
        dtype=setting.dtype,
        **options,
    )


def tokens_of_rank(setting: Setting) -> Tensor:
    rank = dist.get_rank()
    torch.manual_seed(rank + 1)
    tokens = setting.plan.tokens_by_rank[rank]
    shape = (tokens, 2, 10) if setting.layout == "s b h d" else (2, tokens, 10)
    return torch.randn(shape, dtype=setting.dtype, requires_grad=True)


def step(setting: Setting, overlap: str, chunks: int) -> list[Tensor]:
    """Output and all gradients of one block on one rank."""
    rank, left_out = setting.left_out
    record = Record(left_out if rank == dist.get_rank() else None)
    block, x = block_of(setting, overlap, chunks, group=record.group()), tokens_of_rank(setting)

    def call(x: Tensor) -> Tensor:
        return block(x, is_causal=True)

    if setting.around == "nothing":
        output = call(x)
    elif setting.around == "two micro-batches":
        first, second = call(x), call(x.cos())
        output = first - 2 * second
    else:
        output = checkpoint(call, x, use_reentrant=setting.around == "reentrant checkpoint")
    output.backward(output.detach().cos())
    return [output.detach(), x.grad, *(parameter.grad for parameter in block.parameters())]


def same(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    pairs = [pair for rank in zip(one, other, strict=True) for pair in zip(*rank, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name, layout, dtype", SIZES, ids=str)
def test_the_same_bits_and_bytes(name: str, layout: str, dtype: torch.dtype) -> None:
    setting = Setting(PLANS[name], layout, dtype)
    world = VirtualWorld(4)
    plain, sent = world.run(step, setting, "none", 1), world.bytes
    for overlap, chunks in KINDS:
        assert same(plain, world.run(step, setting, overlap, chunks)), (overlap, chunks)
        assert (world.bytes == sent).all()


@pytest.mark.parametrize("name", PLANS)
def test_large_chunks_travel_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v of a chunk in three collectives instead of one."""
    setting = Setting(PLANS[name])
    plain = on_virtual(step, 4, setting, "none", 1)
    monkeypatch.setattr(routes, "FUSED_UP_TO", -1)  # bytes of a chunk up to which they share a collective
    assert same(plain, on_virtual(step, 4, setting, "chunks", 3))


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("name", ["groups torn", "one kv head"])
def test_each_wait_of_large_chunks_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(PLANS[name])
    monkeypatch.setattr(routes, "FUSED_UP_TO", -1)
    chunks = min(3, setting.plan.most_chunks)
    for left_out in range(4 * 2 * chunks):
        with pytest.raises(HazardError, match="rank 1"):
            on_virtual(step, 4, replace(setting, left_out=(1, left_out)), "chunks", 3)


@pytest.mark.parametrize("around", ["two micro-batches", "reentrant checkpoint", "non-reentrant checkpoint"])
@pytest.mark.parametrize("name", ["groups torn", "ranks without heads"])
def test_the_same_bits_whatever_is_around(name: str, around: str) -> None:
    setting = Setting(PLANS[name], around=around)
    plain = on_virtual(step, 4, setting, "none", 1)
    for overlap, chunks in KINDS:
        assert same(plain, on_virtual(step, 4, setting, overlap, chunks))


@pytest.mark.parametrize("overlap, chunks", [("projections", 1), ("chunks", 3)])
def test_a_plan_made_in_the_call_changes_no_bit(overlap: str, chunks: int) -> None:
    plan = make_plan(ranks=4, heads=18, kv_heads=6, tokens=[2, 2, 3, 1])
    assert same(
        on_virtual(step, 4, Setting(plan), overlap, chunks),
        on_virtual(step, 4, Setting(plan, planned=False), overlap, chunks),
    )


def steps(settings: list[Setting]) -> list[list[list[Tensor]]]:
    kinds = [("none", 1), *KINDS]
    return [[step(setting, overlap, chunks) for overlap, chunks in kinds] for setting in settings]


@pytest.mark.gloo
def test_virtual_ranks_and_gloo_agree_to_the_bit() -> None:
    settings = [Setting(PLANS[name], "b s h d", torch.float32) for name in PLANS]
    settings += [Setting(PLANS["groups torn"], "s b h d", torch.bfloat16)]
    settings += [Setting(PLANS["copies"], around="non-reentrant checkpoint", planned=False)]
    real, virtual = on_gloo(steps, 4, settings), on_virtual(steps, 4, settings)
    for rank in range(4):
        for by_kind, expected_by_kind in zip(real[rank], virtual[rank], strict=True):
            assert same(by_kind, expected_by_kind)
            assert same(by_kind[1:], [by_kind[0]] * len(KINDS))


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("overlap, chunks", [("projections", 1), ("chunks", 2)])
def test_a_hundred_schedules(overlap: str, chunks: int) -> None:
    """No order of the ranks changes a bit, and in none a hazard is found: the world would raise."""
    setting = Setting(make_plan(ranks=3, heads=8, kv_heads=4, tokens=[2, 0, 1], policy="balanced"))
    plain = on_virtual(step, 3, setting, "none", 1)
    for seed in range(100):
        assert same(plain, on_virtual(step, 3, setting, overlap, chunks, seed=seed))


ISSUED = {"projections": 8, "chunks": 2 * 3 + 2 * 3}


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    "overlap, left_out", [(kind, i) for kind, count in ISSUED.items() for i in range(count)]
)
def test_each_wait_is_needed(overlap: str, left_out: int) -> None:
    setting = Setting(PLANS["uneven"], left_out=(3, left_out))
    with pytest.raises(HazardError, match="rank 3"):
        on_virtual(step, 4, setting, overlap, 3)


def events_of(setting: Setting, overlap: str, chunks: int) -> tuple[list[str], list[str]]:
    """What one rank does in which order, forward and backward."""
    record = Record()

    class Attention(nn.Module):
        """Notes when it is called, and when its gradient is."""

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            record.note("attention")
            result = fused_attention(query, key, value, layout=setting.layout)
            result.register_hook(lambda gradient: record.note("attention"))
            return result

    block = block_of(setting, overlap, chunks, group=record.group(), local_attention=Attention())
    for name in ("query", "key", "value", "output"):
        projection = getattr(block, name)
        if name != "output":  # the block calls the output projection's weight, not the module
            projection.register_forward_hook(lambda *_, name=name: record.note(f"project {name}"))
        projection.weight.register_post_accumulate_grad_hook(lambda _, name=name: record.note(f"dW {name}"))
    output = block(tokens_of_rank(setting))
    forward, record.events = record.events, []
    output.sum().backward()
    return forward, record.events


def test_the_order_of_projections() -> None:
    """Of the 8 exchanges 0, 1 travel behind projections, 4 behind dWo, 6 and 7 behind dWv and dWk."""
    forward = ["project query", "issue 0", "project key", "issue 1", "project value", "issue 2"]
    forward += ["wait 0", "wait 1", "wait 2", "attention", "issue 3", "wait 3"]
    backward = ["issue 4", "dW output", "wait 4", "attention", "issue 5", "issue 6", "issue 7"]
    backward += ["wait 5", "dW value", "wait 6", "dW key", "wait 7", "dW query"]
    for name in ("even", "uneven", "copies"):
        found = on_virtual(events_of, 4, Setting(PLANS[name]), "projections", 1)
        assert found == [(forward, backward)] * 4
    assert on_gloo(events_of, 4, Setting(PLANS["even"]), "projections", 1)[0] == (forward, backward)


def test_the_order_of_chunks() -> None:
    """A chunk is attended with while the next one travels and the one before returns."""
    forward = ["project query", "project key", "project value", "issue 0", "wait 0", "issue 1", "attention"]
    forward += ["wait 1", "issue 2", "attention", "issue 3", "wait 2", "wait 3"]
    backward = ["issue 4", "dW output", "wait 4", "issue 5", "attention"]
    backward += ["wait 5", "issue 6", "attention", "issue 7", "wait 7", "wait 6"]
    backward += ["dW value", "dW key", "dW query"]
    found = on_virtual(events_of, 4, Setting(PLANS["even"]), "chunks", 2)
    assert found == [(forward, backward)] * 4
    assert on_gloo(events_of, 4, Setting(PLANS["even"]), "chunks", 2)[0] == (forward, backward)


def test_what_travels_together_is_packed_before_it_is_issued(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second chunk on, the next one and the result that returns; the next one while another still travels."""
    records = [Record() for _ in range(2)]
    pack = Cut.pack

    def noted_pack(self: Cut, *args: Any) -> Tensor:
        records[dist.get_rank()].note("pack")
        return pack(self, *args)

    monkeypatch.setattr(Cut, "pack", noted_pack)

    def body() -> list[str]:
        record = records[dist.get_rank()]

        def local(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            record.note("attention")
            return query + key + value

        shards = [torch.ones(1, 2, 6, 4, requires_grad=True) for _ in range(3)]
        output = ChunkedAttention(local, record.group(), chunks=3)(*shards)
        record.note("backward")
        output.sum().backward()
        return record.events

    forward = ["pack", "issue 0", "pack", "wait 0", "issue 1", "attention"]
    forward += ["pack", "wait 1", "pack", "issue 2", "issue 3", "attention"]
    forward += ["wait 2", "pack", "issue 4", "attention", "pack", "issue 5", "wait 3", "wait 4", "wait 5"]
    backward = ["pack", "issue 6", "pack", "wait 6", "issue 7"]
    backward += ["pack", "wait 7", "pack", "issue 8", "issue 9"]
    backward += ["wait 8", "pack", "issue 10", "pack", "issue 11", "wait 11", "wait 10", "wait 9"]
    assert on_virtual(body, 2) == [[*forward, "backward", *backward]] * 2


def attended(case: Case, chunks: int, mask: Tensor | None, local: Any = None) -> list[Tensor]:
    """Output and gradients of ChunkedAttention, or of DistributedAttention with no chunks."""
    rank = dist.get_rank()
    shards = [case.shard(x, rank).requires_grad_() for x in (case.query, case.key, case.value)]
    options = {} if mask is None else {"attn_mask": mask}
    if local is None and mask is None:
        options = {"is_causal": case.causal}
    module = (
        ChunkedAttention(local, chunks=chunks, layout=case.layout)
        if chunks
        else DistributedAttention(local, layout=case.layout)
    )
    output = module(*shards, **options)
    output.backward(case.shard(case.gradient, rank))
    return [output.detach(), *(shard.grad for shard in shards)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunked_attention_equals_one_device(layout: str) -> None:
    case = Case.make([3, 0, 2, 4], heads=12, kv_heads=6, value_dim=6, causal=True, layout=layout)
    results = on_virtual(attended, 4, case, 2, None)
    for position, right in enumerate(expected(case)):
        found = case.gather([result[position] for result in results])
        assert (found - right).abs().max() <= 1e-12


def test_a_mask_by_head_is_cut_by_chunk() -> None:
    case = Case.make([3, 2, 2], heads=9, kv_heads=9)
    mask = torch.randn(1, 9, 7, 7, dtype=torch.float64)
    results = on_virtual(attended, 3, case, 3, mask)
    for position, right in enumerate(expected(case, mask)):
        found = case.gather([result[position] for result in results])
        assert (found - right).abs().max() <= 1e-12
    with pytest.raises(MaskError, match="on all ranks together"):
        on_virtual(attended, 3, case, 3, mask[..., :6])


class ValuesOnly(nn.Module):
    """A local attention that ignores query and key, and has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ratio = query.shape[2] // value.shape[2]
        return value.repeat_interleave(ratio, dim=2) * self.factor


def values_only(case: Case, chunks: int) -> list[Tensor]:
    local = ValuesOnly()
    return [*attended(case, chunks, None, local), local.factor.grad]


@pytest.mark.parametrize("launch", BOTH)
def test_a_local_attention_that_ignores_what_it_gets(launch: Any) -> None:
    """Every rank runs every backward collective all the same, ranks without a chunk included."""
    case = Case.make([3, 0, 2, 4], heads=5, kv_heads=5)
    assert same(launch(values_only, 4, case, 0), launch(values_only, 4, case, 2))


def attend_in_one_memory(layout: str, apart: int, only_on: int | None = None) -> None:
    """Each result in memory that begins `apart` elements behind the one before."""
    torch.manual_seed(dist.get_rank())
    shape = {"b": 1, "s": 6, "h": 4 * dist.get_world_size(), "d": 4}
    qkv = torch.randn(3, *(shape[name] for name in layout.split()))
    array = np.empty(10_000, dtype=np.float32)  # a storage of its own for each result, and the same memory
    calls = itertools.count()

    def local(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = fused_attention(query, key, value, layout=layout)
        if only_on not in (None, dist.get_rank()):
            return result
        own = torch.from_numpy(array)[next(calls) * apart :][: result.numel()]
        return own.view(result.shape).copy_(result)

    with torch.no_grad():
        chunked = ChunkedAttention(local, chunks=2, layout=layout)(*qkv)
        assert torch.equal(chunked, DistributedAttention(layout=layout)(*qkv))


class KeepsItsGradients(torch.autograd.Function):
    """The value, and gradients that are written into the same memory in each call."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, memory: list[Tensor]) -> Tensor:
        ctx.memory = memory
        return value * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(memory.view(gradient.shape).copy_(gradient) for memory in ctx.memory), None


def gradients_in_one_memory() -> None:
    inputs = torch.randn(3, 1, 3000, 16, 64).unbind()
    memory = [torch.empty(2 * 3000 * 2 * 64) for _ in inputs]
    module = ChunkedAttention(lambda *qkv: KeepsItsGradients.apply(*qkv, memory), chunks=4)
    module(*(x.requires_grad_() for x in inputs)).sum().backward()


@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("layout", ["b s h d", "s b h d", "b h s d"])
def test_a_local_attention_that_keeps_its_results_memory(layout: str, ranks: int) -> None:
    """Where a result is copied before it travels, or has its own part of the memory, nothing is wrong."""
    a_result = 6 * ranks * 2 * 4
    for launch in (on_virtual, on_gloo):
        launch(attend_in_one_memory, ranks, layout, a_result)
    for apart in (0, 4, 20):
        # Chunks of heads-first results are copied, and one rank sends nothing.
        if layout == "b h s d" or ranks == 1:
            on_gloo(attend_in_one_memory, ranks, layout, apart)
            continue
        words = "LocalAttentionError: the local attention returned a chunk's result"
        with pytest.raises(RankFailed, match=words) as error:
            on_gloo(attend_in_one_memory, ranks, layout, apart)
        assert str(error.value).count(words) == ranks
        with pytest.raises(HazardError):
            on_virtual(attend_in_one_memory, ranks, layout, apart)
        for rank in range(ranks):
            with pytest.raises(LocalAttentionError, match="returned a chunk's result"):
                on_virtual(attend_in_one_memory, ranks, layout, apart, rank, hazards="off")


def test_a_local_attention_that_keeps_the_memory_of_its_gradients() -> None:
    with pytest.raises(LocalAttentionError, match="or its gradients"):
        on_virtual(gradients_in_one_memory, 2, hazards="off")


def test_second_derivatives_in_chunks_through_the_joint_world() -> None:
    """The backward pass is judged by finite differences, and so is the backward pass of the backward pass."""
    plan = Plan(tokens_by_rank=(2, 0, 1), heads_by_rank=(3, 0, 1), kv_heads=4)
    inputs = [torch.randn(1, 3, 4, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def ranks(*inputs: Tensor) -> tuple[Tensor, ...]:
        def body(*inputs: Tensor) -> Tensor:
            run = plan.tokens_of(dist.get_rank())
            shards = (x[:, run.start : run.stop] for x in inputs)
            return ChunkedAttention(plain_attention, chunks=2, plan=plan)(*shards, is_causal=True)

        return tuple(on_virtual(body, 3, *inputs, autograd="joint"))

    assert torch.autograd.gradcheck(ranks, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(ranks, inputs, fast_mode=True)


def behind_frozen(overlap: str) -> list[Tensor | None]:
    setting = Setting(PLANS["uneven"])
    block, x = block_of(setting, overlap, 2), tokens_of_rank(setting)
    block.query.requires_grad_(False)
    output = block(x.detach(), is_causal=True)  # neither x nor the query's projection needs a gradient
    output.backward(output.detach())
    return [parameter.grad for name, parameter in block.named_parameters() if "query" not in name]


@pytest.mark.parametrize("overlap", ["projections", "chunks"])
def test_a_frozen_projection(overlap: str) -> None:
    assert same(on_virtual(behind_frozen, 4, "none"), on_virtual(behind_frozen, 4, overlap))


def made(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def needed_by_rank(overlap: str, planned: bool) -> list[Tensor]:
    setting = Setting(PLANS["uneven"], planned=planned)
    block, x = block_of(setting, overlap, 2), tokens_of_rank(setting)
    block.query.requires_grad_(False)
    x = x.detach().requires_grad_(dist.get_rank() == 2)  # the query needs a gradient on that rank alone
    for _ in range(2):  # what was left over from a first step would come in the second one
        output = block(x, is_causal=True)
        output.backward(output.detach())
    return made(output.detach(), x.grad, *(parameter.grad for parameter in block.parameters()))


@pytest.mark.parametrize("launch", BOTH)
@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("overlap", ["projections", "chunks"])
def test_ranks_that_need_the_gradients_of_different_shares(overlap: str, planned: bool, launch: Any) -> None:
    assert same(launch(needed_by_rank, 4, "none", planned), launch(needed_by_rank, 4, overlap, planned))


class Adapter(nn.Module):
    """A linear layer and something beside it, with the layer's attributes, as adapters have them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.beside = layer, nn.Linear(layer.in_features, layer.out_features, dtype=torch.float64)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.beside(x)


def changed_output(overlap: str, change: str) -> list[Tensor]:
    setting = Setting(PLANS["uneven"])
    block, x = block_of(setting, overlap, 2), tokens_of_rank(setting)
    seen: list[Tensor] = []
    if change == "adapter":
        block.output = Adapter(block.output)
    if change == "hook":
        block.output.register_forward_hook(lambda module, inputs, output: 2 * output)
    if change == "hook before":
        block.output.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    if change == "hook behind":
        block.output.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    if change == "hook before backward":
        block.output.register_full_backward_pre_hook(lambda module, outputs: (2 * outputs[0],))
    if change == "forward":
        block.output.forward = lambda x: 2 * nn.functional.linear(x, block.output.weight)  # type: ignore[method-assign]
    if change == "pruned":
        prune.l1_unstructured(block.output, "weight", 0.5)
    for _ in range(2):
        output = block(x, is_causal=True)
        output.backward(output.detach())
        with torch.no_grad():
            for parameter in block.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    return made(output.detach(), x.grad, *seen, *(parameter.grad for parameter in block.parameters()))


CHANGES = ["adapter", "hook", "hook before", "hook behind", "hook before backward", "forward", "pruned"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("overlap", ["projections", "chunks"])
def test_an_output_projection_that_is_more_than_a_linear_layer(overlap: str, change: str) -> None:
    assert same(on_virtual(changed_output, 4, "none", change), on_virtual(changed_output, 4, overlap, change))


def autocast(overlap: str) -> list[Tensor]:
    setting = Setting(PLANS["even"], dtype=torch.float32)
    block, x = block_of(setting, overlap, 2), tokens_of_rank(setting)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = block(x, is_causal=True)
    assert output.dtype == torch.bfloat16
    output.backward(output.detach())
    return [output.detach(), x.grad, *(parameter.grad for parameter in block.parameters())]


@pytest.mark.parametrize("overlap", ["projections", "chunks"])
def test_autocast(overlap: str) -> None:
    assert same(on_virtual(autocast, 4, "none"), on_virtual(autocast, 4, overlap))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 24), (7, 24), (0, 24), (300, 24)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_late_weight_gradient_has_the_same_bits(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    x, weight = (torch.randn(size, dtype=dtype, requires_grad=True) for size in (shape, (48, 24)))
    inputs = [x, weight, *([torch.randn(48, dtype=dtype, requires_grad=True)] if bias else [])]
    plain = nn.functional.linear(*inputs)
    late = LateLinear(*inputs[1:])(x)
    assert torch.equal(plain, late)
    gradient = torch.randn_like(plain)
    for _ in range(2):
        found, right = (
            torch.autograd.grad(result, inputs, gradient, retain_graph=True) for result in (late, plain)
        )
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    weight_only = torch.autograd.grad(late, weight, gradient, retain_graph=True)
    assert torch.equal(weight_only[0], torch.autograd.grad(plain, weight, gradient)[0])
    with pytest.raises(UnsupportedError, match="second derivative"):
        torch.autograd.grad(late, inputs, gradient, create_graph=True)


def test_what_the_block_refuses() -> None:
    for options, error, words in (
        ({"width": 10, "heads": 3}, PlanError, "width 10 has no equal parts for 3 heads"),
        ({"width": 12, "heads": 3, "kv_heads": 2}, PlanError, "2 kv heads cannot serve 3 query heads"),
        ({"width": 12, "heads": 3.0}, PlanError, "float"),
        ({"width": 12, "heads": 3, "overlap": "all"}, ArgumentError, "overlap is 'all'"),
        ({"width": 12, "heads": 3, "overlap": None}, ArgumentError, "overlap is None"),
        ({"width": 12, "heads": 3, "chunks": 0}, PlanError, "0 chunks"),
        ({"width": 12, "heads": 4, "plan": PLANS["even"]}, PlanError, "16 and 8 heads"),
        ({"width": 12, "heads": 4, "plan": "even"}, ArgumentError, "plan is a str"),
    ):
        with pytest.raises(error, match=words):
            UlyssesBlock(**options)

    def body() -> None:
        setting = Setting(PLANS["even"])
        for overlap in ("none", "projections", "chunks"):
            block, x = block_of(setting, overlap, 2), tokens_of_rank(setting)
            with pytest.raises(ShapeError, match="the plan says"):
                block(x[:, :1])
            with pytest.raises(ShapeError, match="the block has width 10"):
                block(x[..., :9])
            with pytest.raises(ShapeError, match="the block has width 10"):
                block(x[0])
            with pytest.raises(TensorError, match="x is a list"):
                block([1.0])
            with pytest.raises(ArgumentError, match="default local attention"):
                block(x, causal=True)
            if overlap != "projections":
                block.value.register_forward_hook(lambda module, given, made: made.float())
                with pytest.raises(TensorError, match=r"value is torch\.float32"):
                    block(x)

    on_virtual(body, 4)


@pytest.mark.parametrize("chunks, error", [(0, "0 chunks"), (2.0, "float"), (True, "bool"), (-1, "-1")])
def test_chunks_are_a_positive_integer(chunks: Any, error: str) -> None:
    with pytest.raises(PlanError, match=error):
        ChunkedAttention(chunks=chunks)
    with pytest.raises(PlanError, match=error):
        PLANS["even"].chunk_runs(chunks)


def test_chunks_are_whole_groups_of_every_rank() -> None:
    plan = make_plan(ranks=4, heads=9, kv_heads=3, tokens=10, policy="balanced")
    runs = plan.chunk_runs(2)
    assert [list(runs["query"][entry]) for entry in range(8)] == [
        [0, 1, 2],
        [],
        [3, 4],
        [],
        [5],
        [6],
        [7, 8],
        [],
    ]
    assert [list(runs["kv"][entry]) for entry in range(8)] == [[0], [], [1], [], [1], [2], [2], []]
    assert plan.most_chunks == 2
    assert make_plan(ranks=4, heads=6, kv_heads=1, tokens=8).most_chunks == 1
