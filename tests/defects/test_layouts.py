"""D1, D10, D11, D13, D15, D18: the order of dimensions, of positions and of arguments."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from einops import rearrange

from tests.defects.cases import INPUTS, Case, attend, causal_attention, check, compare
from tests.defects.implementations import THETA


def attend_one(implementation, case):
    return attend(implementation.attention(causal_attention(case.layout), case.layout), case)


def attend_with_defaults(implementation, case):
    return attend(implementation.attention_with_defaults(causal_attention("b s h d")), case)


def test_d1_sequence_first(run):
    case = Case(heads=4, tokens=(4, 4), dim=3, layout="s b h d")
    check(case, run(attend_one, 2, case))


@pytest.mark.parametrize("heads", [4, 5])
def test_d10_what_works_with_even_heads_works_with_uneven_heads(run, heads):
    case = Case(heads=heads, tokens=(3, 3))
    check(case, run(attend_with_defaults, 2, case))


@pytest.mark.parametrize("heads", [4, 5])
def test_d11_heads_first(run, heads):
    case = Case(heads=heads, tokens=(3, 3), layout="b h s d")
    check(case, run(attend_one, 2, case))


def try_layout(implementation, layout):
    query, key, value = torch.arange(576.0).reshape(3, 4, 4, 4, 3)
    return implementation.attention(lambda query, key, value: value, layout)(query, key, value)


def test_d11_a_layout_that_is_not_known_is_refused(run):
    with pytest.raises(Exception, match="h s b d"):
        run(try_layout, 2, "h s b d")


def record_rotated(implementation, case):
    """The query and key that the local attention of this rank gets."""
    seen = []

    def local_attention(query, key, value):
        seen.extend([query, key])
        return value

    attention = implementation.attention_with_rotary(local_attention, case.layout, case.tokens)
    shards = (case.shard(case.whole(name), dist.get_rank()) for name in INPUTS)
    try:
        attention(*shards)
    except Exception:
        if not seen:  # what happens after the local attention is the business of D1's test
            raise
    return seen


@pytest.mark.parametrize("layout", ["b s h d", "s b h d"])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_d13_rotary_in_both_layouts(run, layout, batch):
    case = Case(heads=4, tokens=(4, 4), batch=batch, layout=layout)
    for rank, seen in enumerate(run(record_rotated, 2, case)):
        for name, actual in zip(("query", "key"), seen, strict=True):
            expected = rearrange(rotated(case.whole(name)).chunk(2, dim=2)[rank], f"b s h d -> {layout}")
            compare(actual, expected, f"rotated {name} on rank {rank}")


def rotated(x):
    """Half-split rotary as complex numbers: dims (i, i + dim/2) turn by position * THETA^(-2i/dim)."""
    first, second = x.chunk(2, dim=-1)
    dim = x.shape[-1]
    frequency = THETA ** -(torch.arange(0, dim, 2, dtype=x.dtype) / dim)
    angle = torch.outer(torch.arange(x.shape[1], dtype=x.dtype), frequency)[:, None]
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def attend_merged(implementation, case):
    """The local attention returns heads and dim merged, as Megatron's does."""

    def local_attention(query, key, value):
        return causal_attention(case.layout)(query, key, value).flatten(2)

    attention = implementation.attention(local_attention, case.layout)
    return attend(lambda query, key, value: attention(query, key, value).reshape(query.shape), case)


@pytest.mark.parametrize("heads", [4, 5])
def test_d15_local_attention_may_merge_heads_and_dim(run, heads):
    case = Case(heads=heads, tokens=(3, 3))
    check(case, run(attend_merged, 2, case))


def attend_with_mask(implementation, case, mask):
    """The call as it was before batch_dim_idx: the mask is the first argument after q, k and v."""
    seen = []

    def local_attention(query, key, value, attention_mask="nothing"):
        seen.append(attention_mask)
        return causal_attention(case.layout)(query, key, value)

    module = implementation.module(local_attention, case.layout)
    query, key, value = (case.shard(case.whole(name), dist.get_rank()) for name in INPUTS)
    return seen, module(query, key, value, mask)


@pytest.mark.parametrize("mask", [torch.ones(2, 2), torch.zeros(1), None], ids=["mask", "zero", "none"])
def test_d18_an_argument_after_q_k_v_reaches_the_local_attention(run, mask):
    case = Case(heads=4, tokens=(3, 3))
    for rank, (seen, output) in enumerate(run(attend_with_mask, 2, case, mask)):
        as_given = str(seen) == str([mask])
        assert as_given, f"the local attention on rank {rank} got {seen}, expected {[mask]}"
        compare(output, case.shard(case.answer()["output"], rank), f"output on rank {rank}")
