"""The names of `deepspeed.sequence.layer` here: what its own tests expect, what they leave out, and its side stream.

tests/foreign/test_deepspeed_names.py compares with the package itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import seqpar_ref.deepspeed as names
from seqpar_ref import Plan, errors, make_plan
from seqpar_ref.deepspeed import DistributedAttention, _DimZeroAllToAll, _SeqAllToAll
from simulator.errors import HazardError, StreamRaceError
from tests.defects.cases import INPUTS, Case, attend, causal_attention, check
from tests.launch import on_gloo, on_virtual
from tests.recording import Record

INDICES = {"b s h d": (2, 1, 0), "s b h d": (2, 0, 1), "b h s d": (1, 2, 0)}


def pairs_of_ranks() -> dist.ProcessGroup:
    """The group of this rank when 4 ranks are 2 pairs, as with a data-parallel size of 2."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return groups[dist.get_rank() // 2]


def whole_tensor(d0: int, d1: int, heads: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d0, d1, heads, dim, generator=generator)


# What the original's own unit tests try: 4 ranks in pairs, there and back. Of these the ones with even heads compare
# nothing, and those with odd ones compare values that depend on one index at a time to a tolerance.


def all_sizes_there_and_back(indices: tuple[int, int, int]) -> None:
    group = pairs_of_ranks()
    for (d0, d1, dim), heads in itertools.product([(2, 4, 16), (4, 8, 32)], (3, 4, 7, 8)):
        there_and_back(d0, d1, heads, dim, indices, group)


def there_and_back(
    d0: int,
    d1: int,
    heads: int,
    dim: int,
    indices: tuple[int, int, int],
    group: dist.ProcessGroup | None = None,
) -> None:
    scatter, gather, batch_dim = indices
    group, sequence = group or pairs_of_ranks(), 1 - batch_dim
    rank = dist.get_rank(group)
    whole = whole_tensor(*((d0, 2 * d1) if sequence == 1 else (2 * d0, d1)), heads, dim, dist.get_rank() // 2)
    mine = whole.chunk(2, dim=sequence)[rank].contiguous().requires_grad_()
    first = (heads + 1) // 2
    own_heads = whole[:, :, :first] if rank == 0 else whole[:, :, first:]

    there = _SeqAllToAll.apply(group, mine, scatter, gather, batch_dim)
    assert there.is_contiguous() and torch.equal(there, own_heads)
    back = _SeqAllToAll.apply(group, there, gather, scatter, batch_dim)
    assert back.is_contiguous() and torch.equal(back, mine)
    back.backward(2 * mine.detach())
    assert torch.equal(mine.grad, 2 * mine.detach())

    for function in (names.single_all_to_all, names.uneven_heads_all2all):
        assert torch.equal(function(mine, scatter, gather, batch_dim, group), own_heads)
        assert torch.equal(function(there, gather, scatter, batch_dim, group), mine)


@pytest.mark.parametrize("indices", [(2, 1, 0), (2, 0, 0), (2, 0, 1), (2, 1, 1)], ids=str)
def test_what_the_originals_own_tests_expect(indices: tuple[int, int, int]) -> None:
    on_virtual(all_sizes_there_and_back, 4, indices)


@pytest.mark.gloo
def test_the_same_on_processes() -> None:
    for heads, indices in ((4, (2, 0, 0)), (7, (2, 0, 1))):
        on_gloo(there_and_back, 4, 2, 4, heads, 16, indices)


def misuse(*indices: Any) -> None:
    _SeqAllToAll.apply(None, torch.zeros(2, 2, 2, 2), *indices)


@pytest.mark.parametrize(
    "indices",
    [
        (2, 2, 0),
        (0, 1, 0),
        (1, 0, 1),
        (3, 1, 0),
        (-2, 1, 0),
        (2, -1, 0),
        (True, 2, 0),
        (2.0, 1, 0),
        (2, 3, 1),
    ],
)
def test_indices_without_a_meaning_are_refused_with_their_numbers(indices: tuple[Any, ...]) -> None:
    with pytest.raises(
        errors.ArgumentError, match=rf"scatter_idx is {indices[0]} and gather_idx {indices[1]}"
    ):
        on_virtual(misuse, 2, *indices)
    with pytest.raises(
        errors.ArgumentError, match=rf"scatter_idx is {indices[0]} and gather_idx {indices[1]}"
    ):
        DistributedAttention(len, None, *indices[:2])


@pytest.mark.parametrize("batch_dim", [2, -1, None, True, 0.0, torch.zeros(1), torch.ones(2, 2)], ids=str)
def test_what_is_no_batch_dim_is_refused_and_told_where_masks_go(batch_dim: Any) -> None:
    found = r"a tensor \(" if isinstance(batch_dim, Tensor) else str(batch_dim)
    with pytest.raises(
        errors.ArgumentError, match=rf"(?s)batch_dim_idx is {found}.*mask, comes behind rotary_pos_emb"
    ):
        on_virtual(misuse, 2, 2, 1, batch_dim)
    with pytest.raises(
        errors.ArgumentError, match=rf"(?s)batch_dim_idx is {found}.*mask, comes behind rotary_pos_emb"
    ):
        DistributedAttention(len, None)(*torch.zeros(3, 2, 2, 2, 2), batch_dim)


def exchange_of(shapes: list[tuple[int, ...]], **changes: Any) -> Tensor:
    settings = {"dtype": torch.float32, "requires_grad": False, **changes}
    shape = shapes[dist.get_rank()]
    return _SeqAllToAll.apply(None, torch.zeros(shape, **settings), 2, 1, 0)


@pytest.mark.parametrize(
    "shapes, error, words",
    [
        ([(2, 3, 4, 5), (2, 3, 6, 5)], errors.RankMismatchError, "size to scatter: 4 on rank 0; 6 on rank 1"),
        ([(2, 3, 4, 5), (1, 3, 4, 5)], errors.RankMismatchError, "batch: 2 on rank 0; 1 on rank 1"),
        ([(2, 3, 4, 5), (2, 3, 4, 6)], errors.RankMismatchError, "head dim: 5 on rank 0; 6 on rank 1"),
        ([(2, 3)] * 2, errors.ShapeError, r"input is \(2, 3\)"),
        ([(2, 3, 4, 0)] * 2, errors.ShapeError, r"input is \(2, 3, 4, 0\)"),
        ([(2, 3, 0, 5)] * 2, errors.ShapeError, "dim 2 is 0"),
    ],
)
def test_sizes_that_do_not_belong_together_are_named_on_all_ranks(
    shapes: list[tuple[int, ...]], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        on_virtual(exchange_of, 2, shapes)


def exchange_of_kind(name: str, kinds: list[tuple[torch.dtype, tuple[int, ...]]]) -> None:
    dtype, shape = kinds[dist.get_rank()]
    given = torch.zeros(shape, dtype=dtype)
    if name == "_DimZeroAllToAll":
        _DimZeroAllToAll.apply(None, given)
    else:
        getattr(names, name)(given, 2, 1, 0, None)


FOUR, FIVE = (2, 3, 4, 6), (2, 3, 4, 2, 3)


@pytest.mark.gloo
@pytest.mark.parametrize("name", ["single_all_to_all", "uneven_heads_all2all", "_DimZeroAllToAll"])
@pytest.mark.parametrize(
    "kinds, words",
    [
        ([(torch.bfloat16, FOUR), (torch.float16, FOUR)], "dtype: bfloat16 on rank 0; float16 on rank 1"),
        ([(torch.float32, FOUR), (torch.int32, FOUR)], "dtype: float32 on rank 0; int32 on rank 1"),
        ([(torch.float32, FIVE), (torch.float32, (2, 3, 4, 3, 2))], "dim -2: 2 on rank 0; 3 on rank 1"),
        ([(torch.float32, FOUR), (torch.float32, FIVE)], "tensor's dims: "),
    ],
    ids=["half types", "integers", "head dims", "dims"],
)
def test_tensors_of_different_kinds_are_named_on_all_ranks(
    name: str, kinds: list[tuple[torch.dtype, tuple[int, ...]]], words: str
) -> None:
    for run in (on_virtual, on_gloo):
        first, second = run(raised, 2, exchange_of_kind, name, kinds)
        assert first == second and f"RankMismatchError: the ranks differ in {words}" in first


def dim_zero() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = torch.arange(size * size * 6.0).view(size, size, 2, 3)  # [sender, receiver, ...]
    mine = whole[rank].clone().requires_grad_()
    got = _DimZeroAllToAll.apply(None, mine)
    assert torch.equal(got, whole[:, rank])
    got.backward(-whole[:, rank])
    assert torch.equal(mine.grad, -whole[rank])


def test_the_exchange_along_dim_zero() -> None:
    on_virtual(dim_zero, 3)
    with pytest.raises(errors.ShapeError, match="dim 0 is 3, and the group has 2 ranks"):
        on_virtual(lambda: _DimZeroAllToAll.apply(None, torch.zeros(3, 2)), 2)
    with pytest.raises(errors.ShapeError, match=r"input is \(2, 0\)"):
        on_virtual(lambda: _DimZeroAllToAll.apply(None, torch.zeros(2, 0)), 2)


def asynchronous(heads: int) -> None:
    """The result is not there before wait(): reading it is a hazard."""
    mine = whole_tensor(2, 3, heads, 4, seed=dist.get_rank())
    right = names.single_all_to_all(mine, 2, 1, 0, None)
    handle: dict[str, Any] = {}
    result = names.single_all_to_all(mine, 2, 1, 0, None, True, handle, "dk")
    assert sorted(handle) == ["dk_grad", "dk_post_all2all_func", "dk_work"] and result.shape == right.shape
    for _ in range(2):
        assert handle["dk_work"].wait()
        assert torch.equal(result, right)
        assert torch.equal(handle["dk_post_all2all_func"](handle["dk_grad"]), right)


@pytest.mark.parametrize("heads", [4, 5])
def test_an_asynchronous_exchange_with_even_and_uneven_heads(heads: int) -> None:
    on_virtual(asynchronous, 2, heads)


@pytest.mark.parametrize("handle, kind", [(None, "dq"), ({}, None), (None, None)])
def test_an_asynchronous_exchange_that_nobody_could_wait_for(handle: Any, kind: Any) -> None:
    with pytest.raises(errors.ArgumentError, match="nobody could wait"):
        on_virtual(
            lambda: names.single_all_to_all(torch.zeros(2, 2, 2, 2), 2, 1, 0, None, True, handle, kind), 2
        )


def one_is_asynchronous(complete: bool) -> None:
    given = torch.ones(2, 3, 4, 5, requires_grad=True)
    handle: Any = {} if complete else None
    names.single_all_to_all(given, 2, 1, 0, None, dist.get_rank() == 0, handle, "dq")


@pytest.mark.gloo
def test_an_asynchronous_exchange_has_no_gradient_for_the_others() -> None:
    for run in (on_virtual, on_gloo):
        first, second = run(raised, 2, one_is_asynchronous, True)
        assert first == second and "requires grad: not needed on rank 0; needed on rank 1" in first


def test_a_handle_that_is_missing_is_missed_before_any_communication() -> None:
    """Nobody else has to be there."""

    def alone() -> str | None:
        return raised(one_is_asynchronous, False) if dist.get_rank() == 0 else None

    assert "nobody could wait" in on_virtual(alone, 2)[0]


def lazily_conjugated() -> None:
    rank = dist.get_rank()
    whole = torch.randn(1, 2, 4, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    given = whole.conj() if rank == 0 else whole.conj().resolve_conj()
    got = names.single_all_to_all(given, 1, 2, 0, None)
    assert torch.equal(got, whole.conj()[:, rank : rank + 1].repeat(1, 1, 2, 1))


@pytest.mark.gloo
def test_a_tensor_that_is_conjugated_when_it_is_read() -> None:
    for run in (on_virtual, on_gloo):
        run(lazily_conjugated, 2)


def with_handle(kind: str) -> None:
    """The gradient is complete whether a caller waits as the original's hooks do, or reads it at once."""
    leaf, handle = whole_tensor(2, 3, 5, 4, seed=dist.get_rank()).requires_grad_(), {}
    there = _SeqAllToAll.apply(None, leaf * 2, 2, 1, 0, None, handle, kind)
    assert not handle
    there.backward(there.detach())
    assert torch.equal(leaf.grad, 4 * leaf.detach())
    if kind in ("q", "k"):
        handle[f"d{kind}_work"].wait()
        gradient = handle[f"d{kind}_post_all2all_func"](handle[f"d{kind}_grad"])
        assert torch.equal(gradient, 2 * leaf.detach())
    assert len(handle) == (3 if kind in ("q", "k") else 0)
    handle.clear()
    direct = _SeqAllToAll.apply(None, there.detach(), 1, 2, 0, None, handle, kind, False)
    assert torch.equal(direct, 2 * leaf.detach()) and len(handle) == (3 if kind in ("q", "k") else 0)


@pytest.mark.parametrize("kind", ["q", "k", "v", "o"])
def test_a_handle_gets_what_the_original_leaves_in_it_already_waited_for(kind: str) -> None:
    on_virtual(with_handle, 2, kind)


# The module.


def module_of(
    case: Case, side_stream: bool = False, local: Callable[..., Tensor] | None = None, **options: Any
) -> Any:
    scatter, gather, batch_dim = INDICES[case.layout]
    stream = torch.Stream() if side_stream else None
    module = DistributedAttention(
        local or causal_attention(case.layout), None, scatter, gather, stream, **options
    )
    return lambda query, key, value, *rest, **more: module(query, key, value, batch_dim, *rest, **more)


def attend_case(case: Case, side_stream: bool = False, planned: bool = False) -> dict[str, Tensor]:
    plan = make_plan(
        ranks=len(case.tokens), heads=case.heads, kv_heads=case.kv_heads or case.heads, tokens=case.tokens
    )
    return attend(module_of(case, side_stream, plan=plan if planned else None), case)


CASES = {
    "even": Case(heads=4, tokens=(3, 3)),
    "uneven": Case(heads=5, tokens=(3, 4)),
    "grouped": Case(heads=15, kv_heads=5, tokens=(3, 2, 3, 0)),
    "copies": Case(heads=6, kv_heads=1, tokens=(2, 1, 2, 2)),
    "ranks without heads": Case(heads=3, tokens=(1, 2, 2, 2)),
    "one rank": Case(heads=5, tokens=(4,)),
}


@pytest.mark.parametrize("side_stream", [False, True])
@pytest.mark.parametrize("layout", INDICES)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_one_device(name: str, layout: str, side_stream: bool) -> None:
    case = Case(**{**vars(CASES[name]), "layout": layout})
    made, given = (on_virtual(attend_case, len(case.tokens), case, side_stream, x) for x in (False, True))
    check(case, made)
    for one, other in zip(made, given, strict=True):
        assert all(torch.equal(one[what], other[what]) for what in one)


def attend_each(cases: list[Case]) -> list[dict[str, Tensor]]:
    return [attend_case(case) for case in cases]


@pytest.mark.gloo
def test_virtual_ranks_and_gloo_agree_to_the_bit() -> None:
    for size in (2, 4):
        cases = [case for case in CASES.values() if len(case.tokens) == size]
        real, virtual = on_gloo(attend_each, size, cases), on_virtual(attend_each, size, cases)
        for rank in range(size):
            for one, other in zip(real[rank], virtual[rank], strict=True):
                assert all(torch.equal(one[what], other[what]) for what in one)


def attend_merged(case: Case) -> dict[str, Tensor]:
    def local(*inputs: Tensor) -> Tensor:
        return causal_attention(case.layout)(*inputs).flatten(2)

    def call(*inputs: Tensor) -> Tensor:
        output = module_of(case, local=local)(*inputs)
        assert output.shape == inputs[0].flatten(2).shape
        return output.reshape(inputs[0].shape)

    return attend(call, case)


@pytest.mark.parametrize("name", ["even", "uneven", "ranks without heads"])
def test_a_result_with_heads_and_dim_merged_comes_back_merged(name: str) -> None:
    check(CASES[name], on_virtual(attend_merged, len(CASES[name].tokens), CASES[name]))


def beside_the_value(case: Case, dtype: torch.dtype, merged: bool) -> None:
    """The local attention returns another dtype, and one dim less."""
    shards = [case.shard(case.whole(name), dist.get_rank()).requires_grad_() for name in INPUTS]

    def local(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = value[..., 1:].to(dtype)
        return result.flatten(2) if merged else result

    output = module_of(case, local=local)(*shards)
    expected = shards[2].detach()[..., 1:].to(dtype)
    assert output.dtype == dtype and torch.equal(output, expected.flatten(2) if merged else expected)
    output.backward(output.detach())
    assert torch.equal(shards[2].grad, F.pad(expected, (1, 0)).to(shards[2].dtype))
    assert not any(shard.grad.any() for shard in shards[:2])


@pytest.mark.gloo
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", ["uneven", "ranks without heads"])
def test_the_result_may_have_another_dim_and_dtype(name: str, merged: bool) -> None:
    case = CASES[name]
    for run in (on_virtual, on_gloo):
        run(beside_the_value, len(case.tokens), case, torch.bfloat16, merged)


def fails_on_some_ranks(kind: str) -> None:
    """3 heads on 4 ranks."""
    rank = dist.get_rank()

    def local(query: Tensor, key: Tensor, value: Tensor) -> Any:
        if kind == "raises" and rank == 1:
            raise errors.TensorError("no.", "Yes.")
        if kind == "no tensor":
            return 5
        return value[..., rank:] if kind == "dims" else value.bfloat16() if rank == 2 else value

    DistributedAttention(local, None, 2, 1)(*torch.zeros(3, 2, 3, 3, 4), 0)


@pytest.mark.gloo
@pytest.mark.parametrize(
    "kind, told, own",
    [
        ("raises", "LocalAttentionError: the local attention raised on 1 of the 3 ranks", "TensorError"),
        (
            "no tensor",
            "LocalAttentionError: the local attention raised on 3 of the 3 ranks",
            "returned a int",
        ),
        (
            "dims",
            "RankMismatchError: the local attention returned float32 with a head dim of 4 on",
            "dim of 3 on",
        ),
        (
            "dtypes",
            "RankMismatchError: the local attention returned float32 with a head dim of 4 on",
            "bfloat16",
        ),
    ],
)
def test_where_the_local_attention_fails_a_rank_without_heads_does_not_wait(
    kind: str, told: str, own: str
) -> None:
    for run in (on_virtual, on_gloo):
        by_rank = run(raised, 4, fails_on_some_ranks, kind)
        assert by_rank[3].startswith(told) and own in by_rank[1]


def differs_on_a_rank(kind: str) -> None:
    """4 heads on 2 ranks: every rank has some."""
    rank = dist.get_rank()

    def local(query: Tensor, key: Tensor, value: Tensor) -> Any:
        if kind == "raises" and rank == 0:
            raise ValueError("no")
        if kind == "integers":
            return query.long()
        if kind == "same bytes" and rank == 1:
            return value.double()[..., ::2]
        if kind == "half types":
            return value.half() if rank else value.bfloat16()
        return value.flatten(2) if kind == "merged" and rank else value

    try:
        DistributedAttention(local, None, 2, 1)(*torch.ones(3, 1, 3, 4, 4), 0)
    except ValueError as error:
        if not isinstance(error, errors.SeqparError):
            raise errors.ArgumentError("ValueError.", "") from error
        raise


@pytest.mark.gloo
@pytest.mark.parametrize(
    "kind, first, second",
    [
        (
            "raises",
            "ArgumentError: ValueError",
            "LocalAttentionError: the local attention raised on 1 of the 2",
        ),
        (
            "same bytes",
            "RankMismatchError",
            "RankMismatchError: the local attention returned float32 with a head",
        ),
        (
            "half types",
            "RankMismatchError",
            "RankMismatchError: the local attention returned bfloat16 with a head",
        ),
        (
            "merged",
            "RankMismatchError",
            "RankMismatchError: the local attention returned float32 with a head dim",
        ),
    ],
)
def test_without_a_plan_no_rank_takes_a_result_for_what_it_is_not(kind: str, first: str, second: str) -> None:
    for run in (on_virtual, on_gloo):
        by_rank = run(raised, 2, differs_on_a_rank, kind)
        assert by_rank[0].startswith(first) and by_rank[1].startswith(second)


def frozen_inputs(heads: int, source: str) -> list[Tensor]:
    """Of query, key and value none needs a gradient, but something that the module cannot see, or the tables."""
    torch.manual_seed(0)
    whole = torch.randn(3, 1, 6, heads, 4, dtype=torch.float64)
    mine = whole[:, :, 3 * dist.get_rank() : 3 * dist.get_rank() + 3]
    unseen = torch.randn(4, dtype=torch.float64, requires_grad=source == "closure")
    cos, sin = (table.requires_grad_(source == "tables") for table in tables(6, 4))

    def local(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return causal_attention("b s h d")(query, key, value * unseen)

    given = (cos, sin) if source == "tables" and dist.get_rank() == 0 else (cos.detach(), sin.detach())
    output = DistributedAttention(local, None, 2, 1)(*mine, 0, given)
    output.sum().backward()
    turned = [names.apply_rotary_pos_emb(x, cos.movedim(0, 1), sin.movedim(0, 1)) for x in whole[:2]]
    right = local(*turned, whole[2])
    own = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    torch.testing.assert_close(output, right[:, own], rtol=0, atol=1e-14)
    return [] if unseen.grad is None else [unseen.grad]


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("heads", [1, 4])
def test_a_result_that_is_no_floating_point_tensor_is_refused_on_all_ranks(heads: int) -> None:
    def program() -> None:
        DistributedAttention(lambda query, key, value: query.long(), None, 2, 1)(
            *torch.ones(3, 1, 3, heads, 4), 0
        )

    words = "TensorError: the local attention's output is a torch.int64 tensor"
    first, second = on_virtual(raised, 2, program)
    assert words in first
    assert words in second if heads == 4 else "LocalAttentionError: the local attention raised on 1" in second


@pytest.mark.gloo
@pytest.mark.parametrize("heads", [1, 4])
def test_gradients_of_what_the_local_attention_has_by_itself(heads: int) -> None:
    """With one head the second rank attends with none, and its backward pass exchanges all the same."""
    for run in (on_virtual, on_gloo):
        first, *rest = run(frozen_inputs, 2, heads, "closure")
        total = first[0] + sum(gradients[0] for gradients in rest if gradients)
        torch.manual_seed(0)
        query, key, value = torch.randn(3, 1, 6, heads, 4, dtype=torch.float64)
        unseen = torch.randn(4, dtype=torch.float64, requires_grad=True)
        cos, sin = (table.movedim(0, 1) for table in tables(6, 4))
        query, key = (names.apply_rotary_pos_emb(x, cos, sin) for x in (query, key))
        causal_attention("b s h d")(query, key, value * unseen).sum().backward()
        torch.testing.assert_close(total, unseen.grad, rtol=0, atol=1e-13)


@pytest.mark.gloo
def test_tables_that_need_gradients_on_some_ranks_are_refused_on_all() -> None:
    for run in (on_virtual, on_gloo):
        first, second = run(raised, 2, frozen_inputs, 4, "tables")
        assert first == second and "the ranks differ in requires grad: needed on rank 0" in first


def autocast_on_one_rank() -> Tensor:
    """The rotation is not the local attention's: it comes before, and is not cast."""
    shards = torch.ones(3, 2, 3, 4, 4, dtype=torch.float16)
    pair = tuple(table.half() for table in tables(6, 4))
    with torch.autocast("cpu", enabled=dist.get_rank() == 0):
        return DistributedAttention(lambda query, key, value: query, None, 2, 1)(*shards, 0, pair)


def test_autocast_does_not_reach_the_rotation() -> None:
    assert [output.dtype for output in on_virtual(autocast_on_one_rank, 2)] == [torch.float16] * 2


def under_autocast() -> None:
    """Nothing is cast before it travels, as in the original: what the local attention casts is its own affair."""
    case, seen = CASES["even"], []

    def local(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.extend(x.dtype for x in (query, key, value))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        shards = [case.shard(case.whole(name), dist.get_rank()).float() for name in INPUTS]
        output = module_of(case, local=local)(*shards)
    assert seen == [torch.float32] * 3 and output.dtype == torch.bfloat16


def test_under_autocast_the_local_attention_gets_what_the_caller_gave() -> None:
    on_virtual(under_autocast, 2)


def mixed_dtypes() -> None:
    case = CASES["uneven"]
    query, key, value = (case.shard(case.whole(name), dist.get_rank()) for name in INPUTS)
    seen = []

    def local(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.extend(x.dtype for x in (query, key, value))
        return query

    output = module_of(case, local=local)(query, key.float(), value.bfloat16())
    assert torch.equal(output, query) and seen == [torch.float64, torch.float32, torch.bfloat16]


def test_query_key_and_value_may_have_dtypes_of_their_own() -> None:
    on_virtual(mixed_dtypes, 2)


def cross(
    query_tokens: tuple[int, ...], kv_tokens: tuple[int, ...], kv_heads: int, frozen: tuple[int, ...] = ()
) -> None:
    """Cross attention: other tokens of key and value than of the query, on some ranks equally many."""
    rank = dist.get_rank()
    whole = [
        torch.randn(2, sum(tokens), heads, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        for i, (tokens, heads) in enumerate([(query_tokens, 6), (kv_tokens, kv_heads), (kv_tokens, kv_heads)])
    ]

    def local(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2)

    expected = [x.clone().requires_grad_() for x in whole]
    output = local(*expected)
    output.backward(output.detach().cos())
    splits = (query_tokens, kv_tokens, kv_tokens)
    mine = [x.split(t, dim=1)[rank].clone().requires_grad_() for x, t in zip(whole, splits, strict=True)]
    mine[0].requires_grad_(rank not in frozen)
    result = DistributedAttention(local, None, 2, 1)(*mine, 0)
    torch.testing.assert_close(result, output.split(query_tokens, dim=1)[rank], rtol=0, atol=1e-12)
    result.backward(result.detach().cos())
    assert (mine[0].grad is None) == (rank in frozen)
    for got, right, tokens in zip(mine, expected, splits, strict=True):
        if got.requires_grad:
            torch.testing.assert_close(got.grad, right.grad.split(tokens, dim=1)[rank], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [6, 3, 2])
def test_cross_attention(kv_heads: int) -> None:
    on_virtual(cross, 4, (2, 3, 1, 2), (4, 3, 0, 5), kv_heads)


def test_cross_attention_where_some_ranks_need_no_gradient_of_the_query() -> None:
    on_virtual(cross, 4, (2, 3, 1, 2), (4, 3, 0, 5), 6, (1, 2))


def cross_with_rotary() -> None:
    query, key = torch.ones(2, 1, 4, 4), torch.ones(2, 3, 4, 4)  # one token would broadcast over all keys
    tables = torch.ones(2, 1, 1, 4), torch.zeros(2, 1, 1, 4)
    with pytest.raises(errors.RotaryError, match="one table of angles cannot turn both"):
        DistributedAttention(lambda query, key, value: query, None, 2, 1)(query, key, key, 0, tables)


def test_one_rotary_table_for_other_tokens_of_the_key_is_refused_on_all_ranks() -> None:
    on_virtual(cross_with_rotary, 2)


# Rotary.


def tables(tokens: int, dim: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    angle = torch.randn(
        tokens, batch, 1, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    return angle.cos(), angle.sin()


def rotary(case: Case, dim: int, batch: int, own: bool) -> list[Tensor]:
    """The query that the local attention gets; tables of all tokens, or of this rank's."""
    rank, seen = dist.get_rank(), []
    cos, sin = tables(sum(case.tokens), dim, batch)
    if own:
        cos, sin = (x.split(case.tokens)[rank] for x in (cos, sin))

    def local(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.extend([query, key])
        return value

    module_of(case, local=local)(*(case.shard(case.whole(name), rank) for name in INPUTS), (cos, sin))
    return seen


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dim, batch", [(4, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize("layout", INDICES)
def test_rotary_in_every_layout(layout: str, dim: int, batch: int, own: bool) -> None:
    case = Case(heads=5, tokens=(2, 3), layout=layout)
    cos, sin = (table.transpose(0, 1) for table in tables(5, dim, batch))  # [batch, sequence, 1, dim]
    for rank, seen in enumerate(on_virtual(rotary, 2, case, dim, batch, own)):
        for name, got in zip(("query", "key"), seen, strict=True):
            x = case.whole(name)
            first, second = x[..., : dim // 2], x[..., dim // 2 : dim]
            right = x.clone()
            right[..., : dim // 2] = first * cos[..., : dim // 2] - second * sin[..., : dim // 2]
            right[..., dim // 2 : dim] = second * cos[..., dim // 2 :] + first * sin[..., dim // 2 :]
            mine = right[:, :, :3] if rank == 0 else right[:, :, 3:]
            torch.testing.assert_close(got, mine.permute(*_axes(layout)), rtol=0, atol=1e-15)


def _axes(layout: str) -> tuple[int, ...]:
    return {"b s h d": (0, 1, 2, 3), "s b h d": (1, 0, 2, 3), "b h s d": (0, 2, 1, 3)}[layout]


TABLE = torch.ones(6, 1, 1, 4)


@pytest.mark.parametrize(
    "given, words",
    [
        (torch.ones(2, 2), "rotary_pos_emb|cosines"),
        (TABLE, r"rotary_pos_emb is \(6, 1, 1, 4\)"),
        ((TABLE,), "rotary_pos_emb"),
        ((TABLE, None), "sines is NoneType"),
        ((TABLE, TABLE[:3]), r"sines \(3, 1, 1, 4\)"),
        ((TABLE[:, 0], TABLE[:, 0]), "head dim 4"),
        ((TABLE[..., :3], TABLE[..., :3]), "head dim 4"),
        ((TABLE.expand(6, 3, 1, 4),) * 2, "batch 2"),
        ((TABLE.int(), TABLE.int()), "int32"),
        (torch.tensor(1.0), r"rotary_pos_emb is \(\)"),
        ((TABLE, TABLE.to("meta")), "sines on meta, the query on cpu"),
        ((TABLE.to(torch.float8_e4m3fn),) * 2, "float8_e4m3fn"),
        ((TABLE[:5], TABLE[:5]), "are for 5 tokens; there are 6, 3 of them"),
    ],
)
def test_tables_that_do_not_fit_are_refused(given: Any, words: str) -> None:
    def program() -> None:
        module_of(CASES["even"], local=len)(*torch.zeros(3, 2, 3, 4, 4), given)

    with pytest.raises(errors.RotaryError, match=words):
        on_virtual(program, 2)


def test_cosines_and_sines_may_be_stacked() -> None:
    def program() -> None:
        shards, pair = torch.ones(3, 2, 3, 4, 4, dtype=torch.float64), tables(6, 4)
        outputs = [module_of(CASES["even"])(*shards, given) for given in (pair, torch.stack(pair))]
        assert torch.equal(*outputs)

    on_virtual(program, 2)


def raised(body: Callable[..., Any], *args: Any) -> str:
    """What each rank raises, in words."""
    try:
        body(*args)
    except errors.SeqparError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def with_tables(given: list[Any]) -> None:
    """4 tokens on rank 0, 3 on rank 1."""
    shards = torch.zeros(3, 2, 4 - dist.get_rank(), 4, 4)
    module_of(CASES["even"], local=lambda query, key, value: query)(*shards, given[dist.get_rank()])


@pytest.mark.parametrize(
    "given, words",
    [
        (
            [(TABLE[:4],) * 2] * 2,
            "RotaryError: cosines and sines of rank 1 are for 4 tokens; there are 7, 3 of them",
        ),
        (
            [(TABLE[:4],) * 2, None],
            "RankMismatchError: the ranks differ in rotary dim: 4 on rank 0; 0 on rank 1",
        ),
        (
            [(TABLE[:4],) * 2, (TABLE[:3, ..., :2],) * 2],
            "RankMismatchError: the ranks differ in rotary dim: 4 on",
        ),
        (
            [(TABLE[:4], TABLE[:4].double()), (TABLE[:3],) * 2],
            "RankMismatchError: the ranks differ in rotary dtype: float64 on rank 0; float32 on rank 1",
        ),
    ],
    ids=["tokens", "none", "dim", "dtype"],
)
@pytest.mark.gloo
def test_tables_that_fit_some_ranks_only_are_refused_on_all(given: list[Any], words: str) -> None:
    for run in (on_virtual, on_gloo):
        first, second = run(raised, 2, with_tables, given)
        assert first == second and first.startswith(words)


def test_the_rotary_function_does_not_broadcast_its_tensor() -> None:
    for shape in ((8, 8, 1, 4), (1, 8, 1, 1, 4)):
        with pytest.raises(errors.RotaryError, match=r"t is \(8, 1, 2, 4\)"):
            names.apply_rotary_pos_emb(torch.zeros(8, 1, 2, 4), torch.zeros(shape), torch.zeros(shape))
    for columns in (3, 6, 0):
        with pytest.raises(errors.RotaryError, match="even number of columns"):
            names.apply_rotary_pos_emb(torch.zeros(8, 4), torch.zeros(8, columns), torch.zeros(8, columns))


# What the module refuses.


@pytest.mark.parametrize(
    "arguments, options, error, words",
    [
        ((None, None), {}, errors.ArgumentError, "local_attention is a NoneType"),
        ((len, 5), {}, errors.GroupError, "group is a int"),
        ((len, None, 2, 1, 5), {}, errors.ArgumentError, "sp_stream is a int"),
        ((len, None), {"plan": 5}, errors.ArgumentError, "plan is a int"),
    ],
)
def test_what_the_module_cannot_be_made_of(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        DistributedAttention(*arguments, **options)


def give(
    shapes: tuple[tuple[int, ...], ...], indices: tuple[int, int, int], plan: Plan | None = None
) -> None:
    module = DistributedAttention(lambda query, key, value: query, None, *indices[:2], plan=plan)
    module(*(torch.zeros(shape) for shape in shapes), indices[2])


ONE = (2, 3, 4, 5)


@pytest.mark.parametrize(
    "shapes, error, words",
    [
        ((ONE[:3],) * 3, errors.ShapeError, r"query is \(2, 3, 4\)"),
        ((ONE, ONE, (1, 3, 4, 5)), errors.ShapeError, "batch differs"),
        ((ONE, ONE, (2, 3, 2, 5)), errors.ShapeError, "sizes differ"),
        ((ONE, (2, 3, 4, 6), ONE), errors.ShapeError, "sizes differ"),
        ((ONE, (2, 3, 3, 5), (2, 3, 3, 5)), errors.ShapeError, "3 kv heads cannot serve 4 query heads"),
    ],
)
def test_tensors_that_do_not_belong_together(
    shapes: tuple[tuple[int, ...], ...], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        on_virtual(give, 2, shapes, (2, 1, 0))


def test_heads_and_batch_cannot_be_the_same_dim() -> None:
    with pytest.raises(errors.ArgumentError, match="scatter_idx is 1, gather_idx 2, batch_dim_idx 1"):
        on_virtual(give, 2, (ONE,) * 3, (1, 2, 1))


def test_a_plan_for_other_sizes_is_refused() -> None:
    plan = make_plan(ranks=2, heads=8, kv_heads=4, tokens=6)
    with pytest.raises(errors.ShapeError, match=r"has 3 tokens.*4 query heads.*the plan says 3, 3, 8, 4"):
        on_virtual(give, 2, (ONE,) * 3, (2, 1, 0), plan)
    with pytest.raises(errors.GroupError, match="3 ranks, the plan 2"):
        on_virtual(give, 3, (ONE,) * 3, (2, 1, 0), plan)


def disagree() -> None:
    shape = (2, 3, 4 + dist.get_rank(), 5)
    give((shape,) * 3, (2, 1, 0))


def test_ranks_that_disagree_are_told_so() -> None:
    with pytest.raises(errors.RankMismatchError, match="query heads: 4 on rank 0; 5 on rank 1"):
        on_virtual(disagree, 2)


# The side stream.


@dataclass(frozen=True)
class Training:
    """One step: projections on a side stream, the module, and an output projection whose dW is on that stream."""

    heads: int = 5
    kv_heads: int = 5
    tokens: tuple[int, ...] = (3, 3, 2)
    events: tuple[bool, ...] = (True, True, True)  # which of q, k, v carry a done_event
    without: str = ""  # the synchronisation that is left out on rank 1
    left_out: int | None = None  # the all-to-all that rank 1 does not wait for


class OutputProjection(torch.autograd.Function):
    """y = x W. Its dW is computed on a side stream and kept aside, as fused gradient accumulation does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stream: Any, kept: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stream, ctx.kept = stream, kept
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        ctx.stream.wait_stream(torch.accelerator.current_stream())
        with ctx.stream:
            ctx.kept.append(x.flatten(0, 1).T @ gradient.flatten(0, 1))
        return gradient @ weight.T, None, None, None


def train(setting: Training) -> list[Tensor]:
    rank, heads, dim, width = dist.get_rank(), setting.heads, 4, 7
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sizes = (heads * dim, setting.kv_heads * dim, setting.kv_heads * dim)
    weights = [draw(width, size).requires_grad_() for size in sizes]
    out_weight = draw(heads * dim, width)
    x = draw(2, sum(setting.tokens), width).split(setting.tokens, dim=1)[rank].contiguous().requires_grad_()
    record = Record(setting.left_out if rank == 1 else None)
    side = torch.Stream()
    module = DistributedAttention(causal_attention("b s h d"), record.group(), 2, 1, side)
    side.wait_stream(torch.accelerator.current_stream())
    projected = []
    with side:
        for weight, carries in zip(weights, setting.events, strict=True):
            projected.append((x @ weight).unflatten(-1, (-1, dim)))
            if carries:
                projected[-1].done_event = side.record_event()
    kept: list[Tensor] = []
    output = OutputProjection.apply(module(*projected, 0).flatten(2), out_weight, side, kept)
    output.backward(output.detach().cos())
    return [output.detach(), x.grad, *(weight.grad for weight in weights), *(x + 0 for x in kept)]


def train_without_streams(setting: Training) -> list[list[Tensor]]:
    """The same on one device: by rank the output and dx, and the weights' gradients of all."""
    heads, dim, width = setting.heads, 4, 7
    generator = torch.Generator().manual_seed(0)
    sizes = [(width, heads * dim), *[(width, setting.kv_heads * dim)] * 2, (heads * dim, width)]
    weights = [
        torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes
    ]
    x = torch.randn(2, sum(setting.tokens), width, generator=generator, dtype=torch.float64).requires_grad_()
    context = causal_attention("b s h d")(*((x @ weight).unflatten(-1, (-1, dim)) for weight in weights[:3]))
    output = context.flatten(2) @ weights[3]
    output.backward(output.detach().cos())
    by_rank = zip(*(tensor.split(setting.tokens, dim=1) for tensor in (output.detach(), x.grad)), strict=True)
    return [list(pair) for pair in by_rank] + [[weight.grad for weight in weights]]


SETTINGS = [
    Training(),
    Training(events=(False, False, False)),
    Training(events=(True, False, True), heads=6, kv_heads=2, tokens=(2, 0, 3)),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_step_with_a_side_stream_is_that_of_one_device(setting: Training) -> None:
    results = on_virtual(train, 3, setting)
    *by_rank, weights = train_without_streams(setting)
    for (output, dx, *_), expected in zip(results, by_rank, strict=True):
        torch.testing.assert_close([output, dx], expected, rtol=0, atol=1e-11)
    for index, expected in enumerate(weights):
        total = sum(result[2 + index] for result in results)
        torch.testing.assert_close(total, expected, rtol=0, atol=1e-11)


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("setting", SETTINGS[::2], ids=str)
def test_a_hundred_schedules_without_a_race_or_a_hazard(setting: Training) -> None:
    expected = on_virtual(train, 3, setting)
    for seed in range(100):
        for one, other in zip(on_virtual(train, 3, setting, seed=seed), expected, strict=True):
            assert all(map(torch.equal, one, other))


class LeavingOut:
    """A synchronisation that on rank 1 is left out when it is called for the n-th time."""

    def __init__(self, real: Callable[[Any], None], number: int | None) -> None:
        self.real, self.number, self.called = real, number, 0

    def __call__(self, what: Any) -> None:
        if dist.get_rank() == 1:
            self.called += 1
            if self.called - 1 == self.number:
                return
        self.real(what)


@pytest.mark.parametrize(
    "setting, kind, count",
    [
        (SETTINGS[0], "wait_for_event", 3),
        (SETTINGS[0], "wait_for_stream", 1),
        (SETTINGS[1], "wait_for_stream", 2),
    ],
    ids=["events", "output", "stream"],
)
def test_each_synchronisation_is_needed(
    monkeypatch: pytest.MonkeyPatch, setting: Training, kind: str, count: int
) -> None:
    """Without events the query's wait for the stream covers key and value too: the others are for what comes later."""
    counter = LeavingOut(getattr(names, kind), None)
    monkeypatch.setattr(names, kind, counter)
    on_virtual(train, 3, setting)
    called = counter.called
    assert called == (4 if setting.events == (False, False, False) else count)
    for number in (0, 3) if called == 4 else range(count):
        monkeypatch.setattr(names, kind, LeavingOut(counter.real, number))
        with pytest.raises(StreamRaceError, match="rank 1"):
            on_virtual(train, 3, setting)


@pytest.mark.parametrize("left_out", [0, 1, 2, 5, 6, 7])
def test_each_wait_for_an_exchange_is_needed(left_out: int) -> None:
    with pytest.raises(HazardError, match="rank 1"):
        on_virtual(train, 3, Training(left_out=left_out))


def events_of(side_stream: bool) -> list[str]:
    record, case = Record(), CASES["uneven"]
    module = DistributedAttention(
        causal_attention("b s h d"), record.group(), 2, 1, torch.Stream() if side_stream else None
    )
    attend(lambda *inputs: module(*inputs, 0), case)
    return record.events


def test_query_key_and_value_and_their_gradients_travel_at_the_same_time() -> None:
    forward = ["issue 0", "issue 1", "issue 2", "wait 0", "wait 1", "wait 2", "exchange 3"]
    backward = ["exchange 4", "issue 5", "issue 6", "issue 7", "wait 5", "wait 6", "wait 7"]
    assert on_virtual(events_of, 2, True) == [forward + backward] * 2
    assert (
        on_virtual(events_of, 2, False) == [[f"exchange {n}" for n in range(4)]] * 2
    )  # small: q, k, v in one


def between(case: Case, around: str) -> dict[str, Tensor]:
    """What D3, D4 and D20 are about: operations between projection and module, fused q, k, v, micro-batches."""
    module = module_of(case, side_stream=True)
    if around == "an operation":
        return attend(lambda q, k, v: module(q.neg().neg(), k.mul(2).div(2), v), case)
    if around == "fused":
        return attend(lambda *inputs: module(*torch.cat(inputs, dim=-1).chunk(3, dim=-1)), case)
    if around == "two micro-batches":
        return attend(lambda q, k, v: module(q, k, v) + 2 * module(k, q, v) - 2 * module(k, q, v), case)
    return attend(lambda *inputs: checkpoint(module, *inputs, use_reentrant=around == "reentrant"), case)


AROUND = ["an operation", "fused", "two micro-batches", "reentrant", "non-reentrant"]


@pytest.mark.parametrize("around", AROUND)
def test_whatever_is_around_the_module(around: str) -> None:
    check(CASES["uneven"], on_virtual(between, 2, CASES["uneven"], around))


def another_current_stream() -> None:
    """Made while one stream is current, used on another one: the wait is that of the stream in use."""
    side = torch.Stream()
    module = DistributedAttention(lambda query, key, value: value, None, 2, 1, side)
    side.wait_stream(torch.accelerator.current_stream())
    with side:
        inputs = [torch.zeros(2, 3, 4, 5) for _ in range(3)]
    other = torch.Stream()
    with other:
        module(*inputs, 0).add_(1)


def test_the_stream_that_waits_is_the_current_one() -> None:
    on_virtual(another_current_stream, 2)


def sync_alone(carries: bool) -> Tensor:
    """layer_sync by itself, of any object."""
    side = torch.Stream()
    module = DistributedAttention(len, None, sp_stream=side)
    side.wait_stream(torch.accelerator.current_stream())
    with side:
        tensor = torch.ones(3) * 2
        layer = torch.nn.Identity()
        if carries:
            layer.done_event = side.record_event()
    module.layer_sync(layer)
    return tensor + 1


@pytest.mark.parametrize("carries", [False, True])
def test_layer_sync_waits_for_the_event_or_else_for_the_stream(carries: bool) -> None:
    assert [x.tolist() for x in on_virtual(sync_alone, 2, carries)] == [[3.0] * 3] * 2


def output_stream() -> Tensor:
    """_SeqAllToAll of type "o": after its backward pass, what the stream did meanwhile may be used."""
    side, kept = torch.Stream(), []
    leaf = torch.ones(2, 3, 4, 5).requires_grad_()

    def on_side(gradient: Tensor) -> None:
        side.wait_stream(torch.accelerator.current_stream())
        with side:
            kept.append(gradient * 2)

    exchanged = _SeqAllToAll.apply(None, leaf * 1, 1, 2, 0, side, {}, "o")
    exchanged.register_hook(on_side)
    exchanged.sum().backward()
    return kept[0] + 1


def test_the_output_exchange_joins_its_stream() -> None:
    assert all((x == 3).all() for x in on_virtual(output_stream, 3))


def differentiable(kind: str, *inputs: Tensor) -> tuple[Tensor, ...]:
    """On a rank: its own rows of each input through the module or through one exchange."""
    mine = [x[dist.get_rank()] for x in inputs]
    if kind == "exchange":
        return (_SeqAllToAll.apply(None, mine[0] * mine[1], 2, 1, 0, None, {}, "q") * mine[2].sum(),)
    return (DistributedAttention(causal_attention("b s h d"), None, 2, 1, torch.Stream())(*mine, 0),)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("kind", ["exchange", "module"])
def test_second_derivatives(kind: str) -> None:
    """Judged by finite differences, over all ranks at once."""
    shape = (2, 1, 1, 2, 1) if kind == "exchange" else (2, 1, 1, 1, 2)  # one head: a rank has none
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def ranks(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x for (x,) in on_virtual(differentiable, 2, kind, *inputs, autograd="joint"))

    assert torch.autograd.gradcheck(ranks, inputs)
    assert torch.autograd.gradgradcheck(ranks, inputs, fast_mode=True)
