"""Under torch.compile the module runs between the graphs, and gives what it gives without."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar_ref import DistributedAttention, UlyssesBlock, make_plan, start_sequence_to_heads
from seqpar_ref.local_attention import plain_attention
from tests.launch import on_gloo, on_virtual
from tests.oracle import Case


def compiled_and_not(case: Case, backend: str, planned: bool) -> list[Tensor]:
    """Differences of the output and the gradients between the compiled program and the plain one."""
    import torch.distributed as dist

    plan = make_plan(ranks=len(case.tokens), heads=4, kv_heads=2, tokens=case.tokens) if planned else None
    attention = DistributedAttention(plan=plan)

    def program(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return attention(query * 2, key.sin(), value, is_causal=True).tanh()

    results = []
    for function in (program, torch.compile(program, backend=backend)):
        rank = dist.get_rank()
        inputs = [case.shard(tensor, rank).requires_grad_() for tensor in (case.query, case.key, case.value)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Dynamo's own, about reading .grad
            output = function(*inputs)
        output.sum().backward()
        results.append([output.detach(), *(tensor.grad for tensor in inputs)])
    return [
        (one - other).abs().max() if one.numel() else one.sum() for one, other in zip(*results, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize(("backend", "planned"), [("eager", False), ("aot_eager", True)])
def test_compiled_equals_plain_on_gloo(backend: str, planned: bool) -> None:
    case = Case.make([3, 2], 4, 2)
    for differences in on_gloo(compiled_and_not, 2, case, backend, planned):
        assert len(differences) == 4
        assert not any(difference.item() for difference in differences)


def compiled_block(overlap: str) -> list[list[Tensor]]:
    """Output and gradients of a block, plain and compiled; the two halves of an exchange in compiled code."""
    import torch.distributed as dist

    plan = make_plan(ranks=2, heads=4, kv_heads=2, tokens=(3, 2))
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        block = UlyssesBlock(8, 4, 2, plan=plan, overlap=overlap, chunks=2, dtype=torch.float64)
        torch.manual_seed(dist.get_rank())
        x = torch.randn(2, plan.tokens_by_rank[dist.get_rank()], 8, dtype=torch.float64, requires_grad=True)

        def program(x: Tensor, block: UlyssesBlock = block) -> Tensor:
            exchanged = start_sequence_to_heads(x.unflatten(-1, (4, 2)).sin(), plan)
            y = block(x.sin(), is_causal=True).tanh()
            return y * exchanged.finish().sum()

        output = (torch.compile(program, backend="aot_eager") if compiled else program)(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output.sum().backward()
        results.append([output.detach(), x.grad, *(parameter.grad for parameter in block.parameters())])
    return results


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("overlap", ["projections", "chunks"])
def test_a_compiled_block_equals_the_plain_one(overlap: str) -> None:
    for plain, compiled in on_gloo(compiled_block, 2, overlap):
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(plain, compiled, strict=True))


@pytest.mark.slow
def test_fullgraph_is_refused_by_name() -> None:
    def body() -> str:
        case = Case.make([5], 4, 2)
        module = torch.compile(DistributedAttention(plain_attention), backend="eager", fullgraph=True)
        with warnings.catch_warnings(), pytest.raises(torch._dynamo.exc.Unsupported) as caught:
            warnings.simplefilter("ignore")
            module(case.query, case.key, case.value)
        return str(caught.value)

    assert "disable" in on_virtual(body, 1)[0]
