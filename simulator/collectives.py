r"""Each collective as a pure function of all ranks' tensors.

Every function takes what all ranks put in, as a list by rank, and returns what all ranks get, again by rank. There is
no process group, no buffer and no order of events here: this file says what the words *all-to-all*,
*all-gather* and so
on mean. `VirtualWorld` executes these definitions, plain autograd differentiates them (so they are an oracle for
hand-written backward passes), and the first notebook steps through them.

$P$ is the number of ranks and $x_r$ the tensor of rank $r$; $\Vert$ concatenates along dim 0.

Source: MPI: A Message-Passing Interface Standard 4.0, chapter 6; docs.pytorch.org/docs/stable/distributed.html.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce as fold

import numpy as np
import torch
from torch import Tensor

from .errors import CollectiveMismatchError, UnsupportedOperationError

Splits = Sequence[Sequence[int]] | np.ndarray


def all_to_all(tensors: Sequence[Tensor], splits: Splits | None = None) -> list[Tensor]:
    r"""Every rank sends a chunk of rows to every rank.

    $$y_s = \big\Vert_r \; x_r[\text{chunk } s]$$

    Args:
        tensors: $x_r$ by rank, each `[rows_r, ...]`; the dims after the first are the same on all ranks.
        splits: `splits[r][s]` is the number of rows that rank r sends to rank s; row r sums to `rows_r`. None splits
            the rows of each rank in P equal parts.

    Returns:
        $y_s$ by rank, `[sum_r splits[r][s], ...]`: the chunks in the order of their senders.

    Raises:
        CollectiveMismatchError: a row of `splits` does not sum to the rows of its tensor, or the tensors differ.

    Examples:
        >>> a, b = torch.tensor([0, 1, 2]), torch.tensor([10, 11])
        >>> all_to_all([a, b], splits=[[1, 2], [2, 0]])
        [tensor([ 0, 10, 11]), tensor([1, 2])]
    """
    size = len(tensors)
    tensors = _checked("all_to_all", tensors, rows=True)
    _check_alike("all_to_all", [(x.dtype, tuple(x.shape[1:])) for x in tensors])
    counts = _split_matrix([x.shape[0] for x in tensors], splits)
    rest = tensors[0].shape[1:]
    if (counts == counts[0, 0]).all():
        chunks = torch.stack(tuple(tensors)).unflatten(1, (size, int(counts[0, 0])))
        return list(chunks.transpose(0, 1).reshape(size, len(tensors[0]), *rest).unbind())
    unit, total = int(np.gcd.reduce(counts, axis=None)) or 1, int(counts.sum())
    blocks = torch.cat(tuple(tensors)).reshape(total // unit, unit, *rest)
    order = torch.from_numpy(_receive_order(counts // unit)).to(blocks.device)
    received = blocks.index_select(0, order).reshape(total, *rest)
    return list(received.split(counts.sum(axis=0).tolist()))


def all_gather(tensors: Sequence[Tensor]) -> list[Tensor]:
    r"""Every rank gets the concatenation of all ranks' tensors, $y_s = \Vert_r x_r$, `[sum_r rows_r, ...]`.

    Raises:
        CollectiveMismatchError: the tensors differ in dtype or in a dim after the first.
    """
    tensors = _checked("all_gather", tensors, rows=True)
    _check_alike("all_gather", [(x.dtype, tuple(x.shape[1:])) for x in tensors])
    return [torch.cat(tuple(tensors))] * len(tensors)


def reduce_scatter(tensors: Sequence[Tensor], op: str = "sum") -> list[Tensor]:
    r"""Rank s gets the reduction of everybody's s-th part, $y_s = \bigoplus_r x_r[\text{chunk } s]$.

    Args:
        tensors: $x_r$ by rank, `[P * rows, ...]`, the same shape on all ranks.
        op: "sum", "avg", "product", "min", "max", "band", "bor" or "bxor"; ranks are taken in rank order.

    Raises:
        CollectiveMismatchError: shapes or dtypes differ, or dim 0 is not a multiple of P.
        UnsupportedOperationError: an `op` of another name.
    """
    tensors = _checked("reduce_scatter", tensors, rows=True)
    return list(_equal_parts("reduce_scatter", reduce_tensors(tensors, op), len(tensors)))


def all_reduce(tensors: Sequence[Tensor], op: str = "sum") -> list[Tensor]:
    r"""Every rank gets the reduction of all ranks' tensors, $y_s = \bigoplus_r x_r$.

    Tensors of one shape and dtype, by rank; see `reduce_scatter` for `op`.

    Raises:
        CollectiveMismatchError: shapes or dtypes differ.
        UnsupportedOperationError: an `op` of another name.
    """
    tensors = _checked("all_reduce", tensors)
    return [reduce_tensors(tensors, op)] * len(tensors)


def reduce(tensors: Sequence[Tensor], root: int, op: str = "sum") -> list[Tensor]:
    r"""Rank `root` gets the reduction of all ranks' tensors; every other rank keeps its own.

    Tensors of one shape and dtype, by rank; `root` is a rank from 0; see `reduce_scatter` for `op`.

    Raises:
        CollectiveMismatchError: shapes or dtypes differ, or there is no such root.
        UnsupportedOperationError: an `op` of another name.
    """
    tensors = _checked("reduce", tensors)
    _check_root("reduce", root, len(tensors))
    return [reduce_tensors(tensors, op) if rank == root else x for rank, x in enumerate(tensors)]


def broadcast(tensors: Sequence[Tensor], root: int) -> list[Tensor]:
    r"""Every rank gets the tensor of rank `root`, $y_s = x_{root}$; all ranks pass tensors of one shape and dtype.

    `root` is a rank from 0.

    Raises:
        CollectiveMismatchError: shapes or dtypes differ, or there is no such root.
    """
    tensors = _checked("broadcast", tensors)
    _check_root("broadcast", root, len(tensors))
    _check_alike("broadcast", [(x.dtype, tuple(x.shape)) for x in tensors])
    return [tensors[root]] * len(tensors)


def gather(tensors: Sequence[Tensor], root: int) -> list[list[Tensor]]:
    r"""Rank `root` gets the list of all ranks' tensors; every other rank gets an empty list.

    Tensors of one shape and dtype, by rank; `root` is a rank from 0.

    Raises:
        CollectiveMismatchError: shapes or dtypes differ, or there is no such root.
    """
    tensors = _checked("gather", tensors)
    _check_root("gather", root, len(tensors))
    _check_alike("gather", [(x.dtype, tuple(x.shape)) for x in tensors])
    return [list(tensors) if rank == root else [] for rank in range(len(tensors))]


def scatter(parts: Sequence[Sequence[Tensor]], root: int) -> list[Tensor]:
    r"""Rank s gets the s-th tensor of the list that rank `root` passes; the lists of the other ranks are not read.

    The root's tensors have one shape and dtype; `root` is a rank from 0.

    Raises:
        CollectiveMismatchError: the root passes another number of tensors than there are ranks, shapes or
            dtypes differ, or there is no such root.
    """
    _check_root("scatter", root, len(parts))
    own = _checked("scatter", parts[root])
    if len(own) != len(parts):
        raise CollectiveMismatchError(
            f"scatter: the root, rank {root}, passes {len(own)} tensors for {len(parts)} ranks.\n"
            f"  Pass one tensor for each rank, {len(parts)} in all."
        )
    _check_alike("scatter", [(x.dtype, tuple(x.shape)) for x in own])
    return own


def reduce_tensors(tensors: Sequence[Tensor], op: str = "sum") -> Tensor:
    r"""$\bigoplus_r x_r$ in rank order, in the tensors' own dtype: what `all_reduce` gives to every rank.

    Tensors of one shape and dtype, by rank; see `reduce_scatter` for `op`.

    Raises:
        CollectiveMismatchError: shapes or dtypes differ.
        UnsupportedOperationError: an `op` of another name.
    """
    tensors = _checked("a reduction", tensors)
    _check_alike("a reduction", [(x.dtype, tuple(x.shape)) for x in tensors])
    if not isinstance(op, str) or op not in _REDUCTIONS:
        raise UnsupportedOperationError(
            f"virtual ranks have no reduction {op!r}.\n  Use one of {', '.join(_REDUCTIONS)}."
        )
    if op in ("band", "bor", "bxor") and (tensors[0].is_floating_point() or tensors[0].is_complex()):
        raise UnsupportedOperationError(
            f"{op} works on bits, and the tensors are {tensors[0].dtype}.\n  Use integers or bools."
        )
    total = fold(_REDUCTIONS[op], tensors)
    if op != "avg":
        return total
    exact = total.is_floating_point() or total.is_complex()
    return total / len(tensors) if exact else torch.div(total, len(tensors), rounding_mode="trunc")


_REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}


def _split_matrix(rows: list[int], splits: Splits | None) -> np.ndarray:
    """The split matrix as integers, checked against the rows that each rank holds."""
    size = len(rows)
    if splits is None:
        uneven = [r for r in range(size) if rows[r] % size]
        if uneven:
            raise CollectiveMismatchError(
                f"all_to_all: {rows[uneven[0]]} rows on rank {uneven[0]} do not split in {size} equal parts.\n"
                f"  Pass splits, or a multiple of {size} rows."
            )
        return np.repeat(np.asarray(rows, dtype=np.int64)[:, None] // size, size, axis=1)
    counts = _integers(splits)
    if counts.shape != (size, size) or (counts < 0).any():
        raise CollectiveMismatchError(
            f"all_to_all: splits has shape {counts.shape} and smallest entry {counts.min(initial=0)}.\n"
            f"  Pass {size} rows of {size} counts, none of them negative."
        )
    wrong = np.flatnonzero(counts.sum(axis=1) != rows)
    if len(wrong):
        rank = int(wrong[0])
        raise CollectiveMismatchError(
            f"all_to_all: rank {rank} sends {int(counts[rank].sum())} rows by its splits and holds {rows[rank]}.\n"
            f"  Make splits[{rank}] sum to {rows[rank]}."
        )
    return counts


def _receive_order(counts: np.ndarray) -> np.ndarray:
    """The one permutation that sorts blocks from (sender, receiver) order to (receiver, sender) order."""
    first = np.cumsum(counts.reshape(-1)) - counts.reshape(-1)
    lengths, starts = counts.T.reshape(-1), first.reshape(counts.shape).T.reshape(-1)
    position = np.cumsum(lengths) - lengths
    return np.repeat(starts - position, lengths) + np.arange(lengths.sum())


def _equal_parts(name: str, tensor: Tensor, size: int) -> tuple[Tensor, ...]:
    if tensor.dim() == 0 or len(tensor) % size:
        raise CollectiveMismatchError(
            f"{name}: shape {list(tensor.shape)} does not split along dim 0 in {size} equal parts.\n"
            f"  Pass a multiple of {size} rows."
        )
    return tensor.unflatten(0, (size, len(tensor) // size)).unbind()


def _checked(name: str, tensors: Sequence[Tensor], rows: bool = False) -> list[Tensor]:
    """One dense tensor for each rank, on one device; with dims where rows along dim 0 matter."""
    if not isinstance(tensors, list | tuple) or not tensors:
        found = "no ranks" if isinstance(tensors, list | tuple) else f"a {type(tensors).__name__}"
        raise CollectiveMismatchError(f"{name}: {found}.\n  Pass a list with one tensor for each rank.")
    for rank, tensor in enumerate(tensors):
        if (
            not isinstance(tensor, Tensor)
            or tensor.layout != torch.strided
            or tensor.device != tensors[0].device
        ):
            what = (
                f"{tensor.layout} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
            )
            raise CollectiveMismatchError(
                f"{name}: rank {rank} has {what}.\n  Pass dense tensors, all on one device."
            )
        if rows and tensor.dim() == 0:
            raise CollectiveMismatchError(
                f"{name}: rank {rank} has a tensor without dims.\n  Give it rows along dim 0."
            )
    return list(tensors)


def _integers(splits: Splits) -> np.ndarray:
    try:
        counts = np.asarray(splits)
        if not np.issubdtype(counts.dtype, np.integer) and counts.size:
            raise TypeError(f"its entries are {counts.dtype}")
        return counts.astype(np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise CollectiveMismatchError(
            f"all_to_all: splits is no matrix of integers: {error}.\n  Pass one row of integers for each rank."
        ) from error


def _check_root(name: str, root: int, size: int) -> None:
    if isinstance(root, bool) or not isinstance(root, int | np.integer) or not 0 <= root < size:
        raise CollectiveMismatchError(
            f"{name}: root {root!r} of {size} ranks.\n  Pass a root from 0 to {size - 1}."
        )


def _check_alike(name: str, facts: Sequence[object]) -> None:
    for rank, fact in enumerate(facts):
        if fact != facts[0]:
            raise CollectiveMismatchError(
                f"{name}: rank 0 has {facts[0]}, rank {rank} has {fact} (dtype, dims).\n  Pass the same on all ranks."
            )
