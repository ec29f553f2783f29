"""How each kind of collective is executed: the pure functions of `collectives`, and who sends how many bytes to whom.

Bytes are those of the direct algorithm, in which each pair of ranks exchanges what one has and the other needs: an
all-gather sends every shard to every other rank, a reduce-scatter every part to its owner, and an all-reduce
is the one
after the other. A ring or a tree moves the same total over other pairs. What a rank keeps for itself is not counted.

Source: docs.pytorch.org/docs/stable/distributed.html; what is counted is this package's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from . import collectives
from .buffers import nbytes
from .calls import Call
from .errors import CollectiveMismatchError
from .matching import Collective


def _row_elements(tensor: Tensor) -> int:
    """Elements of one row along dim 0."""
    return math.prod(tensor.shape[1:])


def _everyone_sends(sizes: Sequence[int]) -> np.ndarray:
    """Each sender sends the same number of bytes to every other rank."""
    return _others(np.repeat(np.asarray(sizes, dtype=np.int64)[:, None], len(sizes), axis=1))


def _others(matrix: np.ndarray) -> np.ndarray:
    """The same without what ranks send to themselves."""
    np.fill_diagonal(matrix, 0)
    return matrix


def _parts(elements: int, size: int) -> np.ndarray:
    """The elements of each rank when a tensor is cut in parts that differ by one at most."""
    return elements // size + (np.arange(size) < elements % size)


def _columns(calls: list[Call]) -> list[list[Tensor]]:
    """The i-th input of every rank, for each i: a coalesced call carries several tensors."""
    return [list(column) for column in zip(*(call.inputs for call in calls), strict=True)]


def _by_rank(columns: list[list[Tensor]], size: int) -> list[Sequence[Tensor]]:
    return [[column[rank] for column in columns] for rank in range(size)]


def _all_to_all_single(calls: list[Call]) -> list[Sequence[Tensor]]:
    width = _width(calls)
    rows = [call.inputs[0].reshape(call.inputs[0].shape[0], width) for call in calls]
    splits = np.array([call.splits[0] for call in calls])  # type: ignore[index]
    return [[received] for received in collectives.all_to_all(rows, splits)]


def _width(calls: list[Call]) -> int:
    """Elements of a row; a rank without rows does not matter."""
    return next((_row_elements(call.inputs[0]) for call in calls if call.inputs[0].shape[0]), 0)


def _sent_all_to_all(calls: list[Call]) -> np.ndarray:
    """The splits say it; refused where what a rank sends is not what the other expects."""
    sent = np.array([call.splits[0] for call in calls], dtype=np.int64)  # type: ignore[index]
    received = np.array([call.splits[1] for call in calls], dtype=np.int64)  # type: ignore[index]
    wrong = np.argwhere(sent != received.T)
    if len(wrong):
        sender, receiver = (int(rank) for rank in wrong[0])
        raise CollectiveMismatchError(
            f"the split matrix is torn in {len(wrong)} of {sent.size} entries: group rank {sender} sends "
            f"{sent[sender, receiver]} rows to group rank {receiver}, which expects {received[receiver, sender]}.\n"
            f"  Make output_split_sizes[{sender}] on group rank {receiver} equal to input_split_sizes[{receiver}] on "
            f"group rank {sender}."
        )
    shapes = {x.shape for call in calls for x in (*call.inputs, *call.outputs)}
    widths = {math.prod(shape[1:]) for shape in shapes if shape[0]}
    if len(widths) > 1:
        raise CollectiveMismatchError(
            f"rows have {sorted(widths)} elements on different ranks, or in input and output.\n"
            "  Give all tensors the same dims after the first."
        )
    return _others(sent * _width(calls) * calls[0].inputs[0].element_size())


def _all_to_all_list(calls: list[Call]) -> list[Sequence[Tensor]]:
    return [[call.inputs[rank] for call in calls] for rank in range(len(calls))]


def _sent_lists(calls: list[Call]) -> np.ndarray:
    return _others(np.array([[nbytes(x) for x in call.inputs] for call in calls], dtype=np.int64))


def _fitting(
    sent: Callable[[list[Call]], np.ndarray],
    tensor_for: Callable[[Call, int], Tensor],
    buffer_from: Callable[[Call, int], Tensor],
) -> Callable[[list[Call]], np.ndarray]:
    """For list forms: `sent`, refused where what rank r has for rank s does not fit the buffer that s keeps for r."""

    def checked(calls: list[Call]) -> np.ndarray:
        for receiver, call in enumerate(calls):
            expected = [tensor_for(other, receiver).shape for other in calls]
            found = [buffer_from(call, sender).shape for sender in range(len(calls))]
            if found != expected:
                sender = next(rank for rank in range(len(calls)) if found[rank] != expected[rank])
                raise CollectiveMismatchError(
                    f"group rank {sender} has {list(expected[sender])} for group rank {receiver}, "
                    f"whose buffer for it is {list(found[sender])}.\n  Make both the same shape."
                )
        return sent(calls)

    return checked


def _all_gather_list(calls: list[Call]) -> list[Sequence[Tensor]]:
    return [[call.inputs[0] for call in calls]] * len(calls)


def _all_gather_single(calls: list[Call]) -> list[Sequence[Tensor]]:
    columns = [collectives.all_gather([x.reshape(-1) for x in column]) for column in _columns(calls)]
    return _by_rank(columns, len(calls))


def _sent_all_gather(calls: list[Call]) -> np.ndarray:
    return _everyone_sends([sum(nbytes(x) for x in call.inputs) for call in calls])


def _all_reduce(calls: list[Call]) -> list[Sequence[Tensor]]:
    op = calls[0].agree["reduction"]
    return _by_rank([collectives.all_reduce(column, op) for column in _columns(calls)], len(calls))


def _sent_all_reduce(calls: list[Call]) -> np.ndarray:
    size, total = len(calls), np.zeros((len(calls), len(calls)), dtype=np.int64)
    for tensor in calls[0].inputs:
        parts = _parts(tensor.numel(), size) * tensor.element_size()
        total += parts[None, :] + parts[:, None]
    return _others(total)


def _reduce_scatter_list(calls: list[Call]) -> list[Sequence[Tensor]]:
    op = calls[0].agree["reduction"]
    return [
        [collectives.reduce_tensors([call.inputs[rank] for call in calls], op)] for rank in range(len(calls))
    ]


def _reduce_scatter_single(calls: list[Call]) -> list[Sequence[Tensor]]:
    op = calls[0].agree["reduction"]
    columns = [collectives.reduce_scatter([x.reshape(-1) for x in column], op) for column in _columns(calls)]
    return _by_rank(columns, len(calls))


def _sent_reduce_scatter_single(calls: list[Call]) -> np.ndarray:
    return _everyone_sends([sum(nbytes(x) for x in call.inputs) // len(calls) for call in calls])


def _reduce(calls: list[Call]) -> list[Sequence[Tensor]]:
    op, root = calls[0].agree["reduction"], calls[0].agree["root"]
    return _by_rank([collectives.reduce(column, root, op) for column in _columns(calls)], len(calls))


def _broadcast(calls: list[Call]) -> list[Sequence[Tensor]]:
    return _by_rank(
        [collectives.broadcast(column, calls[0].agree["root"]) for column in _columns(calls)], len(calls)
    )


def _to_root(calls: list[Call]) -> np.ndarray:
    matrix = np.zeros((len(calls), len(calls)), dtype=np.int64)
    matrix[:, calls[0].agree["root"]] = [sum(nbytes(x) for x in call.inputs) for call in calls]
    return _others(matrix)


def _from_root(calls: list[Call]) -> np.ndarray:
    matrix = np.zeros((len(calls), len(calls)), dtype=np.int64)
    matrix[calls[0].agree["root"], :] = [sum(nbytes(x) for x in call.outputs) for call in calls]
    return _others(matrix)


def _gather(calls: list[Call]) -> list[Sequence[Tensor]]:
    return collectives.gather([call.inputs[0] for call in calls], calls[0].agree["root"])  # type: ignore[return-value]


def _scatter(calls: list[Call]) -> list[Sequence[Tensor]]:
    return [[x] for x in collectives.scatter([call.inputs for call in calls], calls[0].agree["root"])]


def _nothing(calls: list[Call]) -> list[Sequence[Tensor]]:
    return [()] * len(calls)


def _no_bytes(calls: list[Call]) -> np.ndarray:
    return np.zeros((len(calls), len(calls)), dtype=np.int64)


COLLECTIVES = {
    "all_to_all_single": Collective(_all_to_all_single, _sent_all_to_all),
    "all_to_all": Collective(
        _all_to_all_list,
        _fitting(_sent_lists, lambda call, to: call.inputs[to], lambda call, of: call.outputs[of]),
    ),
    "all_gather": Collective(
        _all_gather_list,
        _fitting(_sent_all_gather, lambda call, to: call.inputs[0], lambda call, of: call.outputs[of]),
    ),
    "all_gather_single": Collective(_all_gather_single, _sent_all_gather),
    "all_reduce": Collective(_all_reduce, _sent_all_reduce),
    "reduce_scatter": Collective(
        _reduce_scatter_list,
        _fitting(_sent_lists, lambda call, to: call.inputs[to], lambda call, of: call.outputs[0]),
    ),
    "reduce_scatter_single": Collective(_reduce_scatter_single, _sent_reduce_scatter_single),
    "reduce": Collective(_reduce, _to_root),
    "broadcast": Collective(_broadcast, _from_root),
    "gather": Collective(_gather, _to_root),
    "scatter": Collective(_scatter, _from_root),
    "barrier": Collective(_nothing, _no_bytes),
}
"""Every kind of collective that virtual ranks have."""
