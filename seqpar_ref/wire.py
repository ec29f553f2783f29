"""How tensors lie in the flat buffer of one all-to-all.

A `Cut` divides one or more tensors along one dim into a chunk for each rank. In the buffer the chunks stand in rank
order; a chunk holds its piece of every tensor, one after the other, each in the dim order of the tensor:

    buffer = [ piece of q for rank 0 | of k | of v || piece of q for rank 1 | of k | of v || ... ]

`pack` writes tensors into a buffer and `unpack` reads them back. Where several ranks need the same head, pack writes
it for each of them and unpack sums what came back. So each is the adjoint of the other, and an exchange needs one cut
by heads (of the tokens a rank owns) and one by tokens (of the heads a rank owns), whatever its direction.

Three ways to do it, in this order, each of which writes the payload at most once:

1. one tensor whose memory already is the buffer: nothing is copied;
2. equal chunks: one strided copy;
3. ragged chunks: one copy by row, to or from positions worked out beforehand. A row is the vector of one token and
   one head (where the head dims of q and v differ, the greatest common divisor of the two).
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

Runs = tuple[np.ndarray, np.ndarray]
"""First index and end of what each rank gets, two vectors by rank. Runs may overlap."""


@dataclass(frozen=True, eq=False)
class Part:
    """One tensor of a cut.

    Args:
        shape: of the tensor on this rank.
        runs: what each rank gets, along the dim of the cut.
        window: along the dim of the heads, first index and end of what travels; None for everything.
    """

    shape: tuple[int, ...]
    runs: Runs
    window: tuple[int, int, int] | None = None

    @property
    def travelling(self) -> tuple[int, ...]:
        """The shape of what travels, before it is cut."""
        if self.window is None:
            return self.shape
        dim, start, stop = self.window
        return (*self.shape[:dim], stop - start, *self.shape[dim + 1 :])

    def narrow(self, tensor: Tensor) -> Tensor:
        """The part of the tensor that travels."""
        if self.window is None:
            return tensor
        dim, start, stop = self.window
        return tensor.narrow(dim, start, stop - start)


class Cut:
    """Tensors divided along `dim` into one chunk for each rank."""

    def __init__(self, dim: int, parts: tuple[Part, ...], device: torch.device) -> None:
        self.dim = dim
        self.parts = parts
        self.device = device
        lengths = np.stack([stop - start for start, stop in (part.runs for part in parts)])
        across = [math.prod(part.travelling[:dim] + part.travelling[dim + 1 :]) for part in parts]
        pieces = lengths * np.asarray(across, dtype=np.int64)[:, None]
        chunks = pieces.sum(axis=0)
        self.splits: list[int] = chunks.tolist()
        self.size = sum(self.splits)
        self.ranks = len(self.splits)
        # where each part's piece begins in the buffer, by part and rank
        self.offsets = (np.cumsum(chunks) - chunks) + (np.cumsum(pieces, axis=0) - pieces)
        self.row = math.gcd(*(part.shape[3] for part in parts))
        self.in_place = len(parts) == 1 and parts[0].window is None and self._stands_in_order(parts[0])
        self.even = all(self._is_even(part) for part in parts)

    def _stands_in_order(self, part: Part) -> bool:
        """Whether cutting leaves the elements where they are: nothing comes before the dim, and no two runs overlap."""
        start, stop = part.runs
        whole = int((stop - start).sum()) == part.shape[self.dim]
        return whole and (self.ranks == 1 or math.prod(part.shape[: self.dim]) == 1)

    def _is_even(self, part: Part) -> bool:
        start, stop = part.runs
        length, left_over = divmod(part.shape[self.dim], self.ranks)
        steps = np.arange(self.ranks, dtype=np.int64) * length
        return not left_over and np.array_equal(start, steps) and np.array_equal(stop, steps + length)

    def pack(self, tensors: tuple[Float[Tensor, "_ _ _ _"], ...]) -> Float[Tensor, "size"]:
        """The buffer to send, chunks in rank order."""
        if self.in_place:
            return tensors[0].reshape(-1)
        buffer = tensors[0].new_empty(self.size)
        for index, (part, tensor) in enumerate(zip(self.parts, tensors, strict=True)):
            if self.even:
                pieces = self._pieces(buffer, index)
                pieces.copy_(_by_rank(part.narrow(tensor), self.dim, self.ranks))
            else:
                rows = part.narrow(tensor).unflatten(-1, (-1, self.row))
                buffer.view(-1, self.row).index_put_((self._positions[index].written,), rows.unsqueeze(-2))
        return buffer

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """An empty tensor whose first `size` elements receive the chunks; `unpack` wants it back whole."""
        if self.in_place:
            return torch.empty(self.parts[0].shape, dtype=dtype, device=self.device)
        return torch.empty(self.size + self.row, dtype=dtype, device=self.device)

    def unpack(self, buffer: Float[Tensor, "..."]) -> tuple[Float[Tensor, "_ _ _ _"], ...]:
        """The tensors whose chunks the buffer holds. Copies of one head are summed in rank order."""
        if self.in_place:
            return (buffer,)
        return tuple(self._read(buffer, index) for index in range(len(self.parts)))

    def _read(self, buffer: Tensor, index: int) -> Tensor:
        part = self.parts[index]
        if self.even and part.window is None:
            tensor = buffer.new_empty(part.shape)
            _by_rank(tensor, self.dim, self.ranks).copy_(self._pieces(buffer, index))
            return tensor
        positions = self._positions[index]
        rows = buffer.view(-1, self.row)
        if positions.bag_starts is not None:
            return _sum_rows(rows, positions.read, positions.bag_starts).view(part.shape)
        tensor = buffer.new_empty(part.shape)
        torch.index_select(rows, 0, positions.read, out=tensor.view(-1, self.row))
        return tensor

    def _pieces(self, buffer: Tensor, index: int) -> Tensor:
        """Every rank's piece of one tensor as a view of the buffer, for equal chunks: [ranks, ...piece]."""
        part, dim = self.parts[index], self.dim
        shape = list(part.travelling)
        shape[dim] //= self.ranks
        start = int(self.offsets[index, 0])
        chunks = buffer[: self.size].view(self.ranks, self.splits[0])
        return chunks[:, start : start + math.prod(shape)].unflatten(1, shape)

    @cached_property
    def _positions(self) -> list["Positions"]:
        return [self._positions_of(index) for index in range(len(self.parts))]

    def _positions_of(self, index: int) -> "Positions":
        """Where the rows of one tensor stand in the buffer.

        A row's address is its index inside its piece, read in the dim order of the tensor (Horner's rule), behind
        the beginning of the piece. All sizes are those of the piece, which differ by rank along the dim of the cut.
        """
        part = self.parts[index]
        start, stop = part.runs
        holders = _holders(start, stop, part.shape[self.dim])
        rank = _along(np.maximum(holders, 0), self.dim)
        address = np.zeros((1, 1, 1, 1, 1), dtype=np.int64)
        present = _along(holders >= 0, self.dim)
        for dim, size in enumerate((*part.shape[:3], part.shape[3] // self.row)):
            place = _along(np.arange(size, dtype=np.int64)[:, None], dim)
            if dim == self.dim:
                address = address * (stop - start)[rank] + (place - start[rank])
            elif part.window is not None and dim == part.window[0]:
                first, end = part.window[1:]
                address = address * (end - first) + (place - first)
                present = present & (place >= first) & (place < end)
            else:
                address = address * size + place
        address = address + self.offsets[index][rank] // self.row
        return Positions.of(address, np.broadcast_to(present, address.shape), part, self.device)


@dataclass(frozen=True, eq=False)
class Positions:
    """Row numbers in a buffer.

    Args:
        written: for pack, by row of the tensor and copy. A row with fewer copies than others repeats its first.
        read: for unpack, by row of the tensor, the copies of a row in rank order.
        bag_starts: where each row's copies begin in `read`; None where each row has exactly one.
    """

    written: Int[Tensor, "_ _ _ parts_of_dim copies"]
    read: Int[Tensor, "rows"]
    bag_starts: Int[Tensor, "rows"] | None

    @classmethod
    def of(cls, address: np.ndarray, present: np.ndarray, part: Part, device: torch.device) -> "Positions":
        """From an address for each row and copy, and whether there is such a copy."""
        if present.all() and address.shape[-1] == 1:
            written = _indices(address, device)
            return cls(written, written.view(-1), None)
        copies = present.sum(axis=-1).reshape(-1)
        first_or_own = np.where(present, address, address[..., :1])
        written = _indices(part.narrow(torch.from_numpy(first_or_own)).numpy(), device)
        bag_starts = None if (copies == 1).all() else _indices(np.cumsum(copies) - copies, device)
        return cls(written, _indices(address[present], device), bag_starts)


def _by_rank(tensor: Tensor, dim: int, ranks: int) -> Tensor:
    """View with the dim split into equal runs by rank: [ranks, ...run]."""
    return tensor.unflatten(dim, (ranks, tensor.shape[dim] // ranks)).movedim(dim, 0)


def _sum_rows(
    rows: Float[Tensor, "received row"], read: Int[Tensor, "copies"], bag_starts: Int[Tensor, "sums"]
) -> Float[Tensor, "sums row"]:
    """For each bag the sum of its rows, in order, half types in float32 and rounded once; zero for an empty bag.

    On a CPU the fast kernel for bfloat16 rounds ties up instead of to even. It is left out where a row is excluded
    from the sums; the last row of the buffer, which nothing reads, serves as that row.
    """
    ties_up = rows.dtype == torch.bfloat16 and rows.device.type == "cpu"
    excluded = len(rows) - 1 if ties_up else -1
    return torch.embedding_bag(rows, read, bag_starts, False, 0, False, None, False, excluded)[0]


def _holders(start: np.ndarray, stop: np.ndarray, length: int) -> np.ndarray:
    """The ranks whose run holds each index, in rank order: [length, copies], -1 where there are no more."""
    counts = stop - start
    ranks = np.repeat(np.arange(len(counts)), counts)
    indices = np.arange(len(ranks)) + np.repeat(start - (np.cumsum(counts) - counts), counts)
    order = np.argsort(indices, kind="stable")
    ranks, indices = ranks[order], indices[order]
    copies = np.bincount(indices, minlength=length)
    table = np.full((length, max(1, copies.max(initial=0))), -1, dtype=np.int64)
    table[indices, np.arange(len(ranks)) - (np.cumsum(copies) - copies)[indices]] = ranks
    return table


def _along(values: np.ndarray, dim: int) -> np.ndarray:
    """[size, copies] as five dims, size standing at `dim` and copies last."""
    shape = [1, 1, 1, 1, values.shape[1]]
    shape[dim] = values.shape[0]
    return values.reshape(shape)


def _indices(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)
