"""Rotary embedding by global position, on a shard and on the whole sequence."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from seqpar_ref import apply_rotary, heads_to_sequence, make_plan, position_ids_of, sequence_to_heads
from tests.launch import on_virtual
from tests.oracle import AXES, from_layout, to_layout


def turned(x: Tensor, positions: list[list[int]], theta: float, rotary_dim: int, interleaved: bool) -> Tensor:
    """[batch, seq, heads, dim], pair by pair, with Python's own sine and cosine."""
    result = x.clone()
    for row in range(x.shape[0]):
        for token, position in enumerate(positions[row]):
            for pair in range(rotary_dim // 2):
                angle = position * theta ** (-2 * pair / rotary_dim)
                first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + rotary_dim // 2)
                a, b = x[row, token, :, first], x[row, token, :, second]
                result[row, token, :, first] = a * math.cos(angle) - b * math.sin(angle)
                result[row, token, :, second] = b * math.cos(angle) + a * math.sin(angle)
    return result


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [None, 8, 6, 2])
@pytest.mark.parametrize("layout", AXES)
def test_each_pair_turns_by_its_angle(layout: str, rotary_dim: int | None, interleaved: bool) -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    positions = [[0, 7, 100_000, 3, 3], [4, 1, 2, 9, -5]]
    expected = turned(x, positions, 500.0, rotary_dim or 8, interleaved)
    result = apply_rotary(
        to_layout(x, layout),
        torch.tensor(positions, dtype=torch.int32),
        theta=500.0,
        rotary_dim=rotary_dim,
        interleaved=interleaved,
        layout=layout,
    )
    torch.testing.assert_close(
        from_layout(result, layout), expected, rtol=0, atol=1e-9
    )  # float64 at position 1e5


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("layout", AXES)
def test_given_cos_and_sin(layout: str, interleaved: bool) -> None:
    """Tables by position, rows by token, one column a pair or one an element: the same."""
    x = to_layout(torch.randn(2, 5, 3, 8, dtype=torch.float64), layout)
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    angles = torch.arange(10)[:, None] * 10000.0 ** -(torch.arange(0, 6, 2, dtype=torch.float64) / 6)
    wide = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    options = {"rotary_dim": 6, "interleaved": interleaved, "layout": layout}
    expected = apply_rotary(x, ids, **options)  # type: ignore[arg-type]
    for table in (angles, wide):
        cos, sin = table.cos(), table.sin()
        by_position = apply_rotary(x, ids, cos=cos, sin=sin, **options)  # type: ignore[arg-type]
        by_token = apply_rotary(x, None, cos=cos[ids], sin=sin[ids], **options)  # type: ignore[arg-type]
        torch.testing.assert_close(by_position, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(by_token, expected, rtol=0, atol=1e-12)
    one_row = apply_rotary(x, ids[0], **options)  # type: ignore[arg-type]
    assert torch.equal(one_row, apply_rotary(x, ids[:1], **options))  # type: ignore[arg-type]


def test_sequence_first_with_batch_one_keeps_its_shape() -> None:
    """D13: batch-first angles broadcast a sequence-first tensor silently to another shape."""
    x = torch.randn(8, 1, 2, 4)
    result = apply_rotary(x, torch.arange(8), layout="s b h d")
    assert result.shape == x.shape
    torch.testing.assert_close(result, apply_rotary(x.transpose(0, 1), torch.arange(8)).transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_types_are_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(1, 64, 2, 16).to(dtype)
    ids = torch.arange(64) + 30_000
    result = apply_rotary(x, ids)
    assert result.dtype == dtype
    exact = apply_rotary(x.double(), ids)
    if dtype == torch.float32:
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=1e-6)
    else:
        spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=2**-6)
        assert ((result.double() - exact).abs() <= spacing / 2 + 1e-6).all()


def both_ways(x: Tensor, layout: str, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Rotate the shard and exchange, or exchange and rotate the whole with full-length cos and sin."""
    rank = dist.get_rank()
    plan = make_plan(ranks=len(tokens), heads=x.shape[2], tokens=tokens)
    run = plan.tokens_of(rank)
    shard = to_layout(x[:, run.start : run.stop], layout)
    before = sequence_to_heads(
        apply_rotary(shard, position_ids_of(plan, rank), layout=layout), plan, layout=layout
    )
    angles = torch.arange(plan.tokens)[:, None] * 10000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    after = apply_rotary(
        sequence_to_heads(shard, plan, layout=layout), None, cos=angles.cos(), sin=angles.sin(), layout=layout
    )
    return before, heads_to_sequence(after - before, plan, layout=layout)


@pytest.mark.parametrize("layout", AXES)
def test_before_the_exchange_equals_after_it(layout: str) -> None:
    x = torch.randn(2, 9, 5, 8, dtype=torch.float64)
    whole = apply_rotary(to_layout(x, layout), torch.arange(9), layout=layout)
    results = on_virtual(both_ways, 3, x, layout, [4, 0, 5])
    heads = torch.cat([from_layout(before, layout) for before, _ in results], dim=2)
    torch.testing.assert_close(heads, from_layout(whole, layout), rtol=0, atol=1e-13)
    assert all(difference.abs().max() < 1e-12 for _, difference in results if difference.numel())


def test_gradients() -> None:
    x = torch.randn(1, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, torch.tensor([5, 0, 2]), rotary_dim=4), x)
    empty = torch.randn(2, 0, 3, 4, requires_grad=True)
    apply_rotary(empty, torch.arange(0)).sum().backward()
    assert empty.grad is not None and empty.grad.shape == empty.shape
