"""The pure definitions: values that encode their address, and gradients as adjoints."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator import CollectiveMismatchError, UnsupportedOperationError, collectives

RANKS = 3


def addresses(rows: list[int], width: int = 2) -> list[torch.Tensor]:
    """One tensor a rank; entry [i, j] of rank r is 100 r + 10 i + j."""
    return [
        100.0 * r + 10.0 * torch.arange(n)[:, None] + torch.arange(width)[None, :] for r, n in enumerate(rows)
    ]


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 5), st.integers(0, 3))
def test_all_to_all_moves_each_chunk_to_its_receiver(data, size, width):
    splits = [[data.draw(st.integers(0, 4)) for _ in range(size)] for _ in range(size)]
    tensors = addresses([sum(row) for row in splits], width)
    received = collectives.all_to_all(tensors, splits)
    for receiver in range(size):
        chunks = [tensors[s].split(splits[s])[receiver] for s in range(size)]
        assert torch.equal(received[receiver], torch.cat(chunks))


def test_all_to_all_without_splits_cuts_equal_parts():
    tensors = addresses([6, 6, 6])
    equal = collectives.all_to_all(tensors)
    explicit = collectives.all_to_all(tensors, [[2] * RANKS] * RANKS)
    different = collectives.all_to_all(addresses([3, 6, 0]))
    assert all(torch.equal(a, b) for a, b in zip(equal, explicit, strict=True))
    assert [len(x) for x in different] == [3, 3, 3]
    assert different[1][:, 0].tolist() == [10.0, 120.0, 130.0]


def test_the_gradient_of_all_to_all_is_the_way_back():
    splits = [[1, 2, 0], [0, 1, 3], [2, 1, 1]]
    tensors = [x.double().requires_grad_() for x in addresses([3, 4, 4])]
    received = collectives.all_to_all(tensors, splits)
    upstream = [torch.randn_like(x) for x in received]
    gradients = torch.autograd.grad(received, tensors, upstream)
    back = collectives.all_to_all(upstream, [list(column) for column in zip(*splits, strict=True)])
    assert all(torch.equal(a, b) for a, b in zip(gradients, back, strict=True))


def test_gather_scatter_broadcast_and_reduce():
    tensors = addresses([2, 2, 2])
    whole = torch.cat(tensors)
    assert all(torch.equal(x, whole) for x in collectives.all_gather(tensors))
    assert [len(x) for x in collectives.all_gather(addresses([1, 0, 2]))] == [3, 3, 3]
    assert all(torch.equal(x, tensors[2]) for x in collectives.broadcast(tensors, 2))
    assert [len(x) for x in collectives.gather(tensors, 1)] == [0, RANKS, 0]
    assert torch.equal(collectives.scatter([[], tensors, []], 1)[2], tensors[2])
    reduced = collectives.reduce(tensors, 0, "max")
    assert torch.equal(reduced[0], tensors[2]) and torch.equal(reduced[1], tensors[1])


@pytest.mark.parametrize(
    ("op", "expected"),
    [("sum", 14), ("avg", 14 / 3), ("product", 40), ("min", 2), ("max", 10)],
)
def test_reductions(op, expected):
    tensors = [torch.tensor([float(x)]) for x in (10, 2, 2)]
    assert all(x.item() == pytest.approx(expected) for x in collectives.all_reduce(tensors, op))


def test_integer_reductions_stay_integers():
    tensors = [torch.tensor([x]) for x in (6, 3, 2)]
    values = {op: collectives.all_reduce(tensors, op)[0].item() for op in ("avg", "band", "bor", "bxor")}
    assert values == {"avg": 3, "band": 2, "bor": 7, "bxor": 7}
    assert collectives.reduce_scatter([torch.arange(6)] * RANKS)[1].tolist() == [6, 9]


BAD = [
    (lambda: collectives.all_to_all(addresses([3, 3, 3]), [[1, 1, 1]] * 2), "(2, 3)"),
    (
        lambda: collectives.all_to_all(addresses([3, 3, 3]), [[1, 1, 1], [1, 1, 1], [1, 1, 2]]),
        "rank 2 sends 4",
    ),
    (lambda: collectives.all_to_all(addresses([3, 4, 3])), "4 rows on rank 1"),
    (lambda: collectives.all_to_all([torch.ones(3), torch.ones(3).double(), torch.ones(3)]), "rank 1 has"),
    (lambda: collectives.all_gather([]), "no ranks"),
    (lambda: collectives.reduce_scatter(addresses([4, 4, 4])), "3 equal parts"),
    (lambda: collectives.all_reduce(addresses([1, 2, 1])), "rank 1 has"),
    (lambda: collectives.broadcast(addresses([1, 1, 1]), 3), "root 3 of 3"),
    (lambda: collectives.scatter([[], [torch.ones(1)], []], 1), "1 tensors for 3 ranks"),
]


ONES = [torch.ones(2), torch.ones(2), torch.ones(2)]
BAD += [
    (lambda: collectives.all_to_all(ONES, [[0.5, 0.5, 1], [1, 1, 0], [1, 1, 0]]), "float64"),
    (lambda: collectives.all_to_all(ONES, [[1, 1], [1]]), "no matrix of integers"),
    (lambda: collectives.all_to_all(ONES, "abc"), "no matrix of integers"),
    (lambda: collectives.all_to_all([torch.tensor(1.0)] * 2), "without dims"),
    (lambda: collectives.all_gather([torch.tensor(1.0)] * 2), "without dims"),
    (lambda: collectives.all_gather(x for x in ONES), "a generator"),
    (lambda: collectives.all_reduce([torch.ones(1), 2]), "rank 1 has int"),
    (lambda: collectives.all_reduce([torch.ones(1), torch.ones(1, device="meta")]), "on meta"),
    (lambda: collectives.reduce(ONES, None), "root None of 3"),
    (lambda: collectives.broadcast(ONES, True), "root True of 3"),
    (lambda: collectives.gather([torch.ones(1), torch.ones(2)], 0), "rank 1 has"),
    (lambda: collectives.scatter([[1, 2], []], 0), "rank 0 has int"),
]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_input_is_refused_with_the_numbers(call, words):
    with pytest.raises(CollectiveMismatchError) as error:
        call()
    assert words in str(error.value)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(UnsupportedOperationError, match="no reduction 'mean'"):
        collectives.all_reduce(addresses([1, 1, 1]), "mean")
    with pytest.raises(UnsupportedOperationError, match="works on bits"):
        collectives.all_reduce(addresses([1, 1, 1]), "band")
