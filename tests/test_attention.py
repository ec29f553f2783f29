"""DistributedAttention gives what one device gives."""

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from seqpar_ref import DistributedAttention, Plan, make_plan
from seqpar_ref.local_attention import fused_attention, plain_attention
from tests.launch import on_gloo, on_virtual
from tests.oracle import AXES, Case, attention, expected, from_layout, to_layout


def plan_of(case: Case) -> Plan:
    return make_plan(
        ranks=len(case.tokens), heads=case.query.shape[2], kv_heads=case.key.shape[2], tokens=case.tokens
    )


def shards(case: Case) -> list[Tensor]:
    """This rank's query, key and value as leaves."""
    rank = dist.get_rank()
    return [case.shard(tensor, rank).requires_grad_() for tensor in (case.query, case.key, case.value)]


def forward_and_backward(case: Case, planned: bool) -> list[Tensor]:
    """Output and the gradients of query, key and value on this rank."""
    module = DistributedAttention(layout=case.layout, plan=plan_of(case) if planned else None)
    inputs = shards(case)
    output = module(*inputs, is_causal=case.causal)
    output.backward(case.shard(case.gradient, dist.get_rank()))
    return [output.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]


def forward(case: Case, planned: bool, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    module = DistributedAttention(layout=case.layout, plan=plan_of(case) if planned else None)
    inputs = (case.shard(tensor, dist.get_rank()) for tensor in (query, key, value))
    output: Tensor = module(*inputs, is_causal=case.causal)
    return output


def error(case: Case, results: list[list[Tensor]], **kwargs: Any) -> float:
    """The largest difference from one device over output and gradients."""
    return largest(
        [case.gather(list(by_rank)) for by_rank in zip(*results, strict=True)], expected(case, **kwargs)
    )


def largest(found: list[Tensor], right: list[Tensor]) -> float:
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in right]
    differences = [
        (one.double() - other).abs().max().item()
        for one, other in zip(found, right, strict=True)
        if one.numel()
    ]
    return max(differences, default=0.0)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    ranks = draw(st.integers(1, 12))
    heads = draw(st.integers(1, 30))
    kv_heads = draw(st.sampled_from([count for count in range(1, heads + 1) if heads % count == 0]))
    return Case.make(
        draw(st.lists(st.integers(0, 9), min_size=ranks, max_size=ranks)),
        heads,
        kv_heads,
        batch=draw(st.integers(1, 3)),
        dim=draw(st.sampled_from([1, 2, 5])),
        value_dim=draw(st.sampled_from([None, 3, 4])),
        causal=draw(st.booleans()),
        layout=draw(st.sampled_from(sorted(AXES))),
    )


@settings(deadline=None, max_examples=60)
@given(cases(), st.booleans(), st.sampled_from(["faithful", "joint"]))
def test_equals_one_device(case: Case, planned: bool, mode: str) -> None:
    ranks = len(case.tokens)
    if mode == "faithful":
        assert error(case, on_virtual(forward_and_backward, ranks, case, planned)) <= 1e-12
        return
    inputs = [tensor.clone().requires_grad_() for tensor in (case.query, case.key, case.value)]
    output = case.gather(on_virtual(forward, ranks, case, planned, *inputs, autograd="joint"))
    gradients = torch.autograd.grad(output, inputs, case.gradient)
    assert largest([output.detach(), *gradients], expected(case)) <= 1e-12


def test_many_ranks() -> None:
    """64 ranks with one token each, and 67 heads."""
    case = Case.make([1] * 64, 67, 67, batch=1, dim=4, causal=True)
    assert error(case, on_virtual(forward_and_backward, 64, case, True)) <= 1e-12


def test_a_swapped_head_is_far_outside_the_tolerance() -> None:
    case = Case.make([3, 2], 4, 2)
    right = expected(case)[0]
    assert (right - right[:, :, [1, 0, 2, 3]]).abs().max() > 0.1


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "layout"),
    [
        ([3, 0, 5, 2], 9, 3, "b s h d"),
        ([2, 2, 2, 2], 8, 4, "s b h d"),
        ([1, 4, 0, 2], 3, 1, "b h s d"),
        ([6, 5], 10, 5, "b h s d"),
    ],
)
@pytest.mark.parametrize("planned", [True, False])
def test_virtual_ranks_and_gloo_agree_to_the_bit(
    tokens: list[int], heads: int, kv_heads: int, layout: str, planned: bool
) -> None:
    case = Case.make(tokens, heads, kv_heads, layout=layout, causal=True, value_dim=6)
    virtual = on_virtual(forward_and_backward, len(tokens), case, planned)
    real = on_gloo(forward_and_backward, len(tokens), case, planned)
    for ours, theirs in zip(virtual, real, strict=True):
        assert len(ours) == 4
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert error(case, real) <= 1e-12


@pytest.mark.parametrize("planned", [True, False])
def test_bytes_sent_are_the_plans(planned: bool) -> None:
    from simulator import VirtualWorld

    case = Case.make([3, 0, 5, 2], 9, 3, value_dim=6)
    plan = plan_of(case)
    records = 0 if planned else 72 * (1 - np.eye(4, dtype=np.int64))
    sizes = (2, 4, torch.float64)
    world = VirtualWorld(4)
    world.run(forward_and_backward, case, planned)
    both = plan.bytes(*sizes, value_dim=6) + plan.bytes(*sizes, backward=True, value_dim=6)
    np.testing.assert_array_equal(world.bytes, both + records)

    def no_gradient() -> None:
        with torch.no_grad():
            forward(case, planned, case.query, case.key, case.value)

    world.run(no_gradient)
    np.testing.assert_array_equal(world.bytes, plan.bytes(*sizes, value_dim=6) + records)


class Recorder(nn.Module):
    """A local attention that keeps the shapes it was given."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
        self.shapes += [tuple(tensor.shape) for tensor in (query, key, value)]
        return plain_attention(query, key, value, is_causal=is_causal, layout=self.layout)


@pytest.mark.parametrize("layout", AXES)
def test_what_the_callable_gets(layout: str) -> None:
    """All tokens, its own heads; kv heads that divide its query heads; nothing on a rank without heads."""
    case = Case.make([1, 2, 0, 3, 1, 0], 8, 2, layout=layout, value_dim=5)
    plan = Plan(tuple(case.tokens), (3, 2, 0, 2, 1, 0), 2)  # kv heads by rank: 0 | 0-1 | - | 1 | 1 | -

    def body() -> list[tuple[int, ...]]:
        recorder = Recorder(layout)
        DistributedAttention(recorder, layout=layout, plan=plan)(*shards(case))
        return recorder.shapes

    def shape(heads: int, dim: int) -> tuple[int, ...]:
        return tuple(to_layout(torch.empty(2, 7, heads, dim), layout).shape)

    heads = [(3, 1), (2, 2), None, (2, 1), (1, 1), None]
    expected_shapes = [
        [shape(pair[0], 4), shape(pair[1], 4), shape(pair[1], 5)] if pair else [] for pair in heads
    ]
    assert on_virtual(body, 6) == expected_shapes


def test_a_share_that_is_not_uniform_is_expanded() -> None:
    """5 query heads over 3 kv heads cannot be grouped: one kv head for each query head."""
    case = Case.make([2, 2], 9, 3)
    plan = make_plan(ranks=2, heads=9, kv_heads=3, tokens=4, policy="balanced")

    def body() -> tuple[list[tuple[int, ...]], list[Tensor]]:
        recorder = Recorder("b s h d")
        inputs = shards(case)
        output = DistributedAttention(recorder, plan=plan)(*inputs)
        output.backward(case.shard(case.gradient, dist.get_rank()))
        return recorder.shapes, [output.detach(), *(tensor.grad for tensor in inputs)]  # type: ignore[list-item]

    results = on_virtual(body, 2)
    assert [shapes[1][2] for shapes, _ in results] == [
        5,
        4,
    ]  # rank 1: heads 5 | 6, 7, 8 use kv heads 1 | 2, 2, 2
    assert error(case, [tensors for _, tensors in results]) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_expanded_share_sums_half_gradients_in_float32(dtype: torch.dtype) -> None:
    """Kv heads 0 | 1 | 2 serve query heads 0-2 | 3-5 | 6-8; rank 0 has 0-4, rank 1 has 5-8."""
    case = Case.make([5, 4], 9, 3, dtype=dtype)
    plan = make_plan(ranks=2, heads=9, kv_heads=3, tokens=case.tokens, policy="balanced")

    def body() -> Tensor | None:
        inputs = shards(case)
        module = DistributedAttention(lambda query, key, value: value.clone(), plan=plan)
        module(*inputs).backward(case.shard(case.gradient, dist.get_rank()))
        return inputs[2].grad

    def rounded_sum(*terms: Tensor) -> Tensor:
        total = terms[0].float()
        for term in terms[1:]:
            total = total + term.float()
        return total.to(dtype)

    by_head = case.gradient.unbind(dim=2)
    right = [
        rounded_sum(*by_head[:3]),
        rounded_sum(rounded_sum(*by_head[3:5]), by_head[5]),
        rounded_sum(*by_head[6:]),
    ]
    assert torch.equal(case.gather(on_virtual(body, 2)), torch.stack(right, dim=2))  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", AXES)
def test_merged_heads_and_dim_are_accepted(layout: str) -> None:
    case = Case.make([3, 0, 2], 4, 2, layout=layout, value_dim=3)

    def merged(*qkv: Tensor) -> Tensor:
        result = plain_attention(*qkv, layout=layout)
        return result.transpose(1, 2).flatten(2) if layout == "b h s d" else result.flatten(2)

    def body() -> list[Tensor]:
        inputs = shards(case)
        output = DistributedAttention(merged, layout=layout, plan=plan_of(case))(*inputs)
        output.backward(case.shard(case.gradient, dist.get_rank()))
        return [output.detach(), *(tensor.grad for tensor in inputs)]  # type: ignore[list-item]

    assert error(case, on_virtual(body, 3)) <= 1e-12


@pytest.mark.parametrize("shape", [(1, 9), (2, 9), (1, 1), (), (9,)], ids=str)
def test_masks(shape: tuple[int, ...]) -> None:
    """A mask with a head dim is given for all query heads; others broadcast."""
    case = Case.make([3, 0, 5, 2], 9, 3)
    mask = torch.rand(*shape, 10, 10) > 0.4
    mask |= torch.eye(10, dtype=torch.bool)
    for either in (mask, torch.randn(*shape, 10, 10, dtype=torch.float64)):
        results = on_virtual(partial(masked, case, either), 4)
        assert error(case, results, mask=either) <= 1e-12


def masked(case: Case, mask: Tensor) -> list[Tensor]:
    inputs = shards(case)
    output = DistributedAttention(layout=case.layout)(*inputs, attn_mask=mask)
    output.backward(case.shard(case.gradient, dist.get_rank()))
    return [output.detach(), *(tensor.grad for tensor in inputs)]  # type: ignore[list-item]


def test_scale_and_positional_arguments() -> None:
    case = Case.make([3, 2], 3, 3)

    def body() -> tuple[Tensor, Tensor]:
        module = DistributedAttention()
        return module(*shards(case), None, 0.0, True, scale=0.5), module(
            *shards(case), is_causal=True, scale=0.5
        )

    outputs = on_virtual(body, 2)
    right = attention(case.query, case.key * (0.5 * 4**0.5), case.value, causal=True)
    for which in (0, 1):
        assert largest([case.gather([output[which] for output in outputs])], [right]) <= 1e-12


def test_packed_documents() -> None:
    """Boundaries of documents are positions in the whole sequence, on every rank."""
    case = Case.make([3, 4, 2], 4, 2)
    boundaries = torch.tensor([0, 2, 7, 9])
    document = torch.bucketize(torch.arange(9), boundaries[1:], right=True)
    mask = document[:, None] == document[None, :]

    def by_document(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor) -> Tensor:
        lengths = cu_seqlens.diff().tolist()
        pieces = zip(*(tensor.split(lengths, dim=1) for tensor in (query, key, value)), strict=True)
        return torch.cat([fused_attention(*piece) for piece in pieces], dim=1)

    def body() -> Tensor:
        return DistributedAttention(by_document)(*shards(case), cu_seqlens=boundaries)

    assert (
        largest([case.gather(on_virtual(body, 3))], [attention(case.query, case.key, case.value, mask=mask)])
        <= 1e-12
    )
    assert error(case, on_virtual(partial(masked, case, mask), 3), mask=mask) <= 1e-12


class Slopes(nn.Module):
    """ALiBi-like: a learned slope for each query head, of which a rank uses its own."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.slopes = nn.Parameter(torch.linspace(0.1, 1.0, plan.heads, dtype=torch.float64))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        own = self.plan.query_heads(dist.get_rank())
        return plain_attention(query, key, value, attn_mask=self.bias(query.shape[1])[own.start : own.stop])

    def bias(self, tokens: int) -> Tensor:
        distance = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs()
        return -self.slopes[:, None, None] * distance


@pytest.mark.parametrize("leaves", [True, False], ids=["q k v need gradients", "only the slopes do"])
def test_parameters_by_head(leaves: bool) -> None:
    """Their gradients add up to one device's over the ranks; a rank without heads contributes zeros."""
    case = Case.make([3, 0, 5, 2], 3, 3)
    plan = plan_of(case)

    def body() -> Tensor:
        local = Slopes(plan)
        inputs = [tensor.requires_grad_(leaves) for tensor in shards(case)]
        DistributedAttention(local, plan=plan)(*inputs).backward(case.shard(case.gradient, dist.get_rank()))
        assert local.slopes.grad is not None
        return local.slopes.grad

    alone = Slopes(plan)
    attention(case.query, case.key, case.value, mask=alone.bias(10)).backward(case.gradient)
    gradients = on_virtual(body, 4)
    assert alone.slopes.grad is not None
    assert torch.equal(gradients[3], torch.zeros(3, dtype=torch.float64))
    assert largest([torch.stack(gradients).sum(0)], [alone.slopes.grad]) <= 1e-12


def test_dropout_is_drawn_by_each_rank_for_its_own_heads() -> None:
    case = Case.make([3, 4], 4, 2)
    plan = plan_of(case)

    def body() -> Tensor:
        torch.manual_seed(dist.get_rank())
        return DistributedAttention(plan=plan)(*shards(case), dropout_p=0.5).detach()

    output = case.gather(on_virtual(body, 2))
    for rank in range(2):
        heads, kv = plan.query_heads(rank), plan.kv_heads_of(rank)
        torch.manual_seed(rank)
        alone = fused_attention(
            case.query[:, :, heads.start : heads.stop],
            case.key[:, :, kv.start : kv.stop],
            case.value[:, :, kv.start : kv.stop],
            dropout_p=0.5,
        )
        assert torch.equal(output[:, :, heads.start : heads.stop], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    case = Case.make([3, 0, 5, 2], 9, 3, dtype=dtype)
    results = on_virtual(forward_and_backward, 4, case, True)
    assert all(tensor.dtype == dtype for result in results for tensor in result)
    assert error(case, results) <= 20 * torch.finfo(dtype).eps


def test_autocast_casts_before_the_exchange() -> None:
    from simulator import VirtualWorld

    case = Case.make([3, 0, 5, 2], 3, 3, dtype=torch.float32)
    plan = plan_of(case)

    def body() -> tuple[Tensor, Tensor | None]:
        inputs = shards(case)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = DistributedAttention(plan=plan)(*inputs)
        output.backward(torch.ones_like(output))
        return output, inputs[0].grad

    world = VirtualWorld(4)
    for output, gradient in world.run(body):
        assert output.dtype == torch.bfloat16
        assert gradient is not None and gradient.dtype == torch.float32
    sizes = (2, 4, torch.bfloat16)
    np.testing.assert_array_equal(world.bytes, plan.bytes(*sizes) + plan.bytes(*sizes, backward=True))


def in_subgroups(case: Case, as_mesh: bool) -> list[Tensor]:
    """Two groups of two ranks, {0, 2} and {1, 3}; each runs the case by itself."""
    if as_mesh:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sequence", "data"))
        group: Any = mesh["sequence"]
    else:
        groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        group = groups[dist.get_rank() % 2]
    rank = dist.get_rank() // 2
    inputs = [case.shard(tensor, rank).requires_grad_() for tensor in (case.query, case.key, case.value)]
    output = DistributedAttention(group=group, layout=case.layout)(*inputs, is_causal=case.causal)
    output.backward(case.shard(case.gradient, rank))
    return [output.detach(), *(tensor.grad for tensor in inputs)]  # type: ignore[list-item]


@pytest.mark.gloo
@pytest.mark.parametrize("as_mesh", [False, True], ids=["new_group", "mesh"])
@pytest.mark.parametrize("launch", [on_virtual, on_gloo])
def test_subgroups_of_the_world(launch: Any, as_mesh: bool) -> None:
    """D17: the rank inside the group counts, not the global one."""
    case = Case.make([3, 1], 5, 1, causal=True)
    results = launch(in_subgroups, 4, case, as_mesh)
    for members in ([0, 2], [1, 3]):
        assert error(case, [results[member] for member in members]) <= 1e-12


def test_modules_side_by_side_and_calls_that_overlap() -> None:
    """D6, D20: two modules with other heads, and micro-batches whose backward passes come in another order."""
    one, other = Case.make([3, 2], 4, 2, seed=1), Case.make([3, 2], 9, 3, seed=2)
    again = Case.make([4, 1], 4, 2, seed=3)

    def body() -> list[list[Tensor]]:
        first, second = DistributedAttention(), DistributedAttention()
        runs = [(first, one), (second, other), (first, again)]
        inputs = [shards(case) for _, case in runs]
        outputs = [module(*leaves) for (module, _), leaves in zip(runs, inputs, strict=True)]
        for index in (1, 0, 2):
            outputs[index].backward(runs[index][1].shard(runs[index][1].gradient, dist.get_rank()))
        return [
            [output.detach(), *(tensor.grad for tensor in leaves)]  # type: ignore[list-item]
            for output, leaves in zip(outputs, inputs, strict=True)
        ]

    results = on_virtual(body, 2)
    for index, case in enumerate((one, other, again)):
        assert error(case, [result[index] for result in results]) <= 1e-12


def test_other_sizes_elsewhere_are_noticed_in_every_call() -> None:
    """Rank 0 keeps its shapes while rank 1's tokens change: nothing may be remembered by local shape."""
    sizes = [[3, 2], [3, 5], [3, 0], [3, 2]]

    def body() -> list[list[Tensor]]:
        module = DistributedAttention()
        out = []
        for tokens in sizes:
            case = Case.make(tokens, 4, 2)
            inputs = shards(case)
            output = module(*inputs)
            output.backward(case.shard(case.gradient, dist.get_rank()))
            out.append([output.detach(), *(tensor.grad for tensor in inputs)])
        return out  # type: ignore[return-value]

    results = on_virtual(body, 2)
    for index, tokens in enumerate(sizes):
        assert error(Case.make(tokens, 4, 2), [result[index] for result in results]) <= 1e-12


def test_retain_graph_and_partial_gradients() -> None:
    """A second backward adds the same again; where only v needs a gradient, only v gets one."""
    case = Case.make([3, 0, 2], 2, 1)

    def body() -> tuple[list[Tensor], Tensor | None, list[bool]]:
        inputs = shards(case)
        output = DistributedAttention(plan=plan_of(case))(*inputs)
        gradient = case.shard(case.gradient, dist.get_rank())
        output.backward(gradient, retain_graph=True)
        once = [tensor.grad.clone() for tensor in inputs if tensor.grad is not None]
        output.backward(gradient)
        assert all(torch.equal(tensor.grad, 2 * first) for tensor, first in zip(inputs, once, strict=True))
        query, key, value = (tensor.detach() for tensor in inputs)
        value.requires_grad_()
        DistributedAttention()(query, key, value).backward(gradient)
        with torch.no_grad():
            still = DistributedAttention()(*inputs).requires_grad
        frozen = DistributedAttention()(query, key, value.detach()).requires_grad
        return [output.detach(), *once], value.grad, [still, frozen]

    results = on_virtual(body, 3)
    assert error(case, [result[0] for result in results]) <= 1e-12
    for (_, _, _, value_gradient), alone, flags in results:
        assert alone is not None and torch.equal(alone, value_gradient)
        assert flags == [False, False]


def test_a_detached_result_leaves_the_ranks_in_step() -> None:
    """Where the callable cuts the graph, ranks with and without heads still run the same backward collectives."""

    def body() -> list[Tensor | None]:
        inputs = shards(Case.make([3, 0, 2], 2, 1))
        module = DistributedAttention(lambda query, key, value: torch.zeros_like(query))
        module(*inputs).sum().backward()
        return [tensor.grad for tensor in inputs]

    for gradients in on_virtual(body, 3):
        assert all(gradient is not None and not gradient.any() for gradient in gradients)


class WithoutQuery(nn.Module):
    """Its result needs a gradient, and query, key and value have no part in that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query.detach() * self.weight**2


def derivatives_without_query(order: int) -> list[Tensor]:
    """Gradients of the inputs and of the parameter; their sum differentiated again for the second order."""
    inputs = shards(Case.make([3, 0, 1, 1], 2, 1))
    module = WithoutQuery()
    leaves = [*inputs, module.weight]
    loss = DistributedAttention(module)(*inputs).sum()
    for _ in range(order - 1):
        gradients = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        loss = sum(gradient.sum() for gradient in gradients)
    return list(torch.autograd.grad(loss, leaves, materialize_grads=True))


@pytest.mark.gloo
@pytest.mark.parametrize("launch", [on_virtual, on_gloo])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_result_that_needs_a_gradient_of_a_parameter_only(launch: Any, order: int) -> None:
    """A rank without heads takes part in the backward of q, k and v; those with heads must as well."""
    case = Case.make([3, 0, 1, 1], 2, 1)
    found = launch(derivatives_without_query, 4, order)
    assert not any(gradient.any() for gradients in found for gradient in gradients[:3])
    weights = torch.stack([gradients[3] for gradients in found])
    assert not weights[2:].any()  # these ranks hold no head
    right = 2 * case.query.sum(dim=(0, 1, 2)) if order < 3 else torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(weights.sum(dim=0), right, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("shapes_unchecked")
def test_second_derivatives_through_plain_attention() -> None:
    case = Case.make([1, 0, 2], 2, 1, batch=1, dim=2, causal=True)
    plan = Plan(tuple(case.tokens), (1, 1, 0), 1)

    def ranks(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        def body(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            inputs = (case.shard(tensor, dist.get_rank()) for tensor in (query, key, value))
            return DistributedAttention(plain_attention, plan=plan)(*inputs, is_causal=True)

        return tuple(on_virtual(body, 3, query, key, value, autograd="joint"))

    inputs = tuple(tensor.requires_grad_() for tensor in (case.query, case.key, case.value))
    assert torch.autograd.gradcheck(ranks, inputs)
    assert torch.autograd.gradgradcheck(ranks, inputs, fast_mode=True)


class Block(nn.Module):
    """Projections around the attention, as in a model."""

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.sizes = (heads, kv_heads, kv_heads)
        self.project = nn.Linear(12, (heads + 2 * kv_heads) * 4, dtype=torch.float64)
        self.attention = DistributedAttention()
        self.back = nn.Linear(heads * 4, 12, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).unflatten(-1, (-1, 4)).split(self.sizes, dim=2)
        return x + self.back(self.attention(query, key, value, is_causal=True).flatten(2))


def checkpointed(tokens: list[int], reentrant: bool | None) -> list[Tensor]:
    """Two blocks; gradients of the shard and of all parameters."""
    blocks = [Block(3, 3), Block(2, 1)]
    x = torch.randn(2, sum(tokens), 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x.split(tokens, dim=1)[dist.get_rank()].clone().requires_grad_()
    y = x
    for block in blocks:
        y = block(y) if reentrant is None else checkpoint(block, y, use_reentrant=reentrant)
    y.square().sum().backward()
    return [tensor.grad for tensor in (x, *(p for block in blocks for p in block.parameters()))]  # type: ignore[misc]


@pytest.mark.gloo
@pytest.mark.parametrize("launch", [on_virtual, on_gloo])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpoint(launch: Any, reentrant: bool) -> None:
    """Ranks without heads and without tokens recompute in step with the others."""
    tokens = [3, 0, 4, 2]
    plain = on_virtual(checkpointed, 4, tokens, None)
    for found, right in zip(launch(checkpointed, 4, tokens, reentrant), plain, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))


def checkpointed_without_saving(tokens: list[int]) -> list[Tensor]:
    """A linear local attention saves nothing for its backward; a rank without heads saves its empty share."""
    case = Case.make(tokens, 2, 2)
    inputs = shards(case)
    module = DistributedAttention(lambda query, key, value: value * 2)
    checkpoint(module, *inputs, use_reentrant=False).backward(case.shard(case.gradient, dist.get_rank()))
    return [tensor.grad for tensor in inputs if tensor.grad is not None]


@pytest.mark.gloo
@pytest.mark.parametrize("launch", [on_virtual, on_gloo])
def test_checkpoint_recomputes_at_the_same_collective(launch: Any) -> None:
    """Each exchange saves a tensor and asks for it before it communicates; else rank 2 recomputes alone."""
    tokens = [3, 1, 2, 0]
    case = Case.make(tokens, 2, 2)
    results = launch(checkpointed_without_saving, 4, tokens)
    assert torch.equal(case.gather([gradients[2] for gradients in results]), 2 * case.gradient)


def test_the_module_holds_no_state() -> None:
    module = DistributedAttention(layout="s b h d")
    before = copy.copy(module.__dict__)

    def body() -> None:
        module(*shards(Case.make([3, 2], 4, 2, layout="s b h d")))

    on_virtual(body, 2)
    assert module.__dict__ == before
    assert "s b h d" in repr(module)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 6])
@pytest.mark.parametrize("layout", AXES)
def test_local_attentions_agree(layout: str, tokens: int, causal: bool) -> None:
    case = Case.make([tokens], 6, 2, layout=layout, value_dim=3)
    inputs = [to_layout(tensor, layout) for tensor in (case.query, case.key, case.value)]
    right = attention(case.query, case.key, case.value, causal=causal)
    for local in (fused_attention, plain_attention):
        result = local(*inputs, is_causal=causal, layout=layout)
        assert largest([from_layout(result, layout)], [right]) <= 1e-12


def test_plain_attention_gives_zeros_where_nothing_may_be_seen() -> None:
    query = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, True], [False, False, False], [True, False, True]])
    result = plain_attention(query, query, query, attn_mask=mask)
    assert not result[:, 1].any() and result[:, 0].all()
    (gradient,) = torch.autograd.grad(result.sum(), query)
    assert gradient.isfinite().all()
