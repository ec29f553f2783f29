"""D16, D20: how often the payload is copied and sent, and two micro-batches in flight through one module."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.defects.cases import INPUTS, Case, causal_attention, compare


class Traffic(TorchDispatchMode):
    """Counts all-to-alls, and the elements that other operations write into memory, call by call."""

    def __init__(self):
        super().__init__()
        self.exchanges = 0
        self.written = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.name()
        if "alltoall" in name:
            self.exchanges += 1
        elif isinstance(result, torch.Tensor) and result.is_floating_point() and "empty" not in name:
            self.written += _elements_written(function, args, result)
        return result


def _elements_written(function, args, result):
    if "index_put" in function.name():  # writes the rows that the index names, and returns the whole buffer
        return args[1][0].numel() * result[0].numel()
    schema = function._schema
    is_view = schema.returns[0].alias_info is not None and not schema.is_mutable
    return 0 if is_view else result.numel()


def count_traffic(implementation, case):
    """Forward of q, k and v that are cut from one fused projection; the local attention returns the value."""
    rank = dist.get_rank()
    fused = torch.cat([case.shard(case.whole(name), rank) for name in INPUTS], dim=-1)
    query, key, value = fused.chunk(3, dim=-1)
    attention = implementation.attention(lambda query, key, value: value, case.layout)
    with torch.no_grad(), Traffic() as traffic:
        output = attention(query, key, value)
    compare(output, value, f"output on rank {rank}")
    return traffic.exchanges, traffic.written


@pytest.mark.gloo  # virtual ranks exchange in Python, where a dispatch mode does not see the collective
@pytest.mark.parametrize("heads", [4, 5])
def test_d16_query_key_and_value_travel_together(run, heads):
    case = Case(heads=heads, tokens=(3, 3))
    for rank, (exchanges, _) in enumerate(run(count_traffic, 2, case)):
        assert exchanges <= 2, f"rank {rank} issued {exchanges} all-to-alls, 2 are enough"


@pytest.mark.gloo
@pytest.mark.parametrize("heads", [4, 5])
def test_d16_the_payload_is_copied_once_before_and_once_after(run, heads):
    case = Case(heads=heads, tokens=(3, 3))
    for rank, (_, written) in enumerate(run(count_traffic, 2, case)):
        shard = case.batch * case.tokens[rank] * heads * case.dim
        share = case.batch * sum(case.tokens) * len(range(rank, heads, 2)) * case.dim
        limit = 3 * (shard + share) + share + shard
        assert written <= limit, f"rank {rank} wrote {written} elements, {limit} are enough"


def micro_batches(implementation, cases):
    """Forward of every case through one module, then one backward through all."""
    rank = dist.get_rank()
    attention, remark, _ = implementation.attention_with_overlap(causal_attention("b s h d"))
    leaves = [[case.shard(case.whole(name), rank).requires_grad_() for name in INPUTS] for case in cases]
    inputs = [[leaf.view_as(leaf) for leaf in triple] for triple in leaves]
    outputs = [attention(*triple) for triple in inputs]
    torch.autograd.backward(outputs, [case.shard(case.whole("upstream"), rank) for case in cases])
    return [[leaf.grad for leaf in triple] for triple in leaves], remark()


MICRO_BATCHES = [Case(heads=4, tokens=(3, 3)), Case(heads=4, tokens=(3, 3), shift=7)]


@pytest.mark.parametrize("cases", [MICRO_BATCHES[:1], MICRO_BATCHES], ids=["one", "two"])
def test_d20_one_module_serves_micro_batches_in_flight_together(run, cases):
    for rank, (gradients, remark) in enumerate(run(micro_batches, 2, cases)):
        for index, (case, triple) in enumerate(zip(cases, gradients, strict=True)):
            answer = case.answer()
            for name, gradient in zip(INPUTS, triple, strict=True):
                what = f"gradient of the {name} of micro-batch {index} on rank {rank}{remark}"
                compare(gradient, case.shard(answer[name], rank), what)
