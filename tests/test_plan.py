"""Plans: who owns what, what it costs, and which one is chosen."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar_ref import Plan, make_plan


@st.composite
def requests(draw: st.DrawFn) -> dict[str, object]:
    """Any legal request for a plan."""
    ranks = draw(st.integers(1, 12))
    heads = draw(st.integers(1, 30))
    kv_heads = draw(st.sampled_from([count for count in range(1, heads + 1) if heads % count == 0]))
    tokens = draw(st.lists(st.integers(0, 9), min_size=ranks, max_size=ranks))
    return {"ranks": ranks, "heads": heads, "kv_heads": kv_heads, "tokens": tokens}


def plans(request: dict[str, object]) -> list[Plan]:
    return [make_plan(**request, policy=policy) for policy in ("balanced", "groups", "auto")]  # type: ignore[arg-type]


@settings(deadline=None, max_examples=150)
@given(requests())
def test_every_token_and_head_has_its_owners(request: dict[str, object]) -> None:
    ranks, heads, kv_heads, tokens = request.values()
    ratio = heads // kv_heads  # type: ignore[operator]
    for plan in plans(request):
        owned = range(plan.ranks)
        assert plan.ranks == ranks
        assert [token for rank in owned for token in plan.tokens_of(rank)] == list(range(sum(tokens)))  # type: ignore[call-overload]
        assert [len(plan.tokens_of(rank)) for rank in owned] == tokens
        assert [head for rank in owned for head in plan.query_heads(rank)] == list(range(heads))  # type: ignore[call-overload]
        for rank in owned:  # a kv head is where a query head needs it, and nowhere else
            assert set(plan.kv_heads_of(rank)) == {head // ratio for head in plan.query_heads(rank)}


@settings(deadline=None, max_examples=150)
@given(requests(), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
def test_bytes_count_what_each_rank_needs(
    request: dict[str, object], batch: int, head_dim: int, value_dim: int
) -> None:
    """The matrix against a count over every rank, token and head."""
    for plan in plans(request):
        matrix = plan.bytes(batch, head_dim, torch.bfloat16, value_dim=value_dim)
        for sender in range(plan.ranks):
            for receiver in range(plan.ranks):
                tokens, back = len(plan.tokens_of(sender)), len(plan.tokens_of(receiver))
                query, kv = len(plan.query_heads(receiver)), len(plan.kv_heads_of(receiver))
                there = tokens * (query * head_dim + kv * (head_dim + value_dim))
                output = back * len(plan.query_heads(sender)) * value_dim
                expected = 0 if sender == receiver else 2 * batch * (there + output)
                assert matrix[sender, receiver] == expected
        assert matrix.dtype == np.int64 and matrix.shape == (plan.ranks, plan.ranks)
        backward = plan.bytes(batch, head_dim, torch.bfloat16, True, value_dim=value_dim)
        np.testing.assert_array_equal(backward, matrix.T)


@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads"), [(2, 8, 4), (4, 8, 4), (3, 9, 3), (4, 4, 4), (8, 64, 8)]
)
def test_closed_form_where_everything_divides(ranks: int, heads: int, kv_heads: int) -> None:
    """(2 + 2g)(Nh/P)(P-1)/P elements from each rank, in each direction."""
    tokens, head_dim, batch = 6 * ranks, 5, 3
    plan = make_plan(ranks=ranks, heads=heads, kv_heads=kv_heads, tokens=tokens)
    hidden = heads * head_dim
    elements = (2 * heads + 2 * kv_heads) * tokens * hidden * (ranks - 1) // (heads * ranks**2)
    for backward in (False, True):
        sent = plan.bytes(batch, head_dim, torch.float32, backward).sum(axis=1)
        np.testing.assert_array_equal(sent, batch * 4 * elements)


@settings(deadline=None, max_examples=150)
@given(requests())
def test_auto_is_the_better_of_the_two(request: dict[str, object]) -> None:
    balanced, groups, auto = plans(request)

    def cost(plan: Plan) -> tuple[int, int]:
        return max(plan.heads_by_rank), plan.bytes(1, 1, torch.float32).sum(axis=1).max()

    assert auto == (groups if cost(groups) < cost(balanced) else balanced)
    ratio = groups.heads // groups.kv_heads
    assert all(count % ratio == 0 for count in groups.heads_by_rank)
    assert max(balanced.heads_by_rank) - min(balanced.heads_by_rank) <= 1
    assert max(groups.heads_by_rank) - min(groups.heads_by_rank) <= ratio


def test_examples_by_hand() -> None:
    assert make_plan(ranks=4, heads=9, tokens=8).heads_by_rank == (3, 2, 2, 2)
    assert make_plan(ranks=4, heads=2, tokens=8).heads_by_rank == (1, 1, 0, 0)
    assert make_plan(ranks=4, heads=3, tokens=10).tokens_by_rank == (3, 3, 2, 2)
    assert make_plan(ranks=2, heads=59, tokens=2).heads_by_rank == (30, 29)
    assert make_plan(ranks=3, heads=4, tokens=0).tokens_by_rank == (0, 0, 0)
    torn = make_plan(ranks=4, heads=14, kv_heads=2, tokens=4, policy="balanced")
    assert [list(torn.kv_heads_of(rank)) for rank in range(4)] == [[0], [0, 1], [1], [1]]
    whole = make_plan(ranks=4, heads=14, kv_heads=2, tokens=4, policy="groups")
    assert whole.heads_by_rank == (7, 7, 0, 0)
    assert make_plan(ranks=4, heads=14, kv_heads=2, tokens=4) == torn  # 4 heads on the fullest rank, not 7
    smollm = make_plan(ranks=4, heads=9, kv_heads=3, tokens=4)
    assert smollm.heads_by_rank == (
        3,
        3,
        3,
        0,
    )  # 3 heads on the fullest rank either way, and no kv head travels twice


def test_a_plan_is_a_value() -> None:
    plan = make_plan(ranks=2, heads=3, tokens=[1, np.int64(2)])  # type: ignore[list-item]
    assert plan == Plan((1, 2), (2, 1), 3) == eval(repr(plan))
    assert hash(plan) == hash(Plan((1, 2), (2, 1), 3))
    assert all(type(count) is int for count in plan.tokens_by_rank)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.kv_heads = 1  # type: ignore[misc]


def test_a_plan_prints_as_a_table() -> None:
    assert str(make_plan(ranks=3, heads=4, kv_heads=2, tokens=[5, 0, 1], policy="balanced")).splitlines() == [
        "3 ranks, 6 tokens, 4 query heads, 2 kv heads",
        "rank  tokens  query heads  kv heads",
        "   0     0-4          0-1         0",
        "   1       -            2         1",
        "   2       5            3         1",
    ]
    assert len(str(make_plan(ranks=1024, heads=3, tokens=9)).splitlines()) < 20
