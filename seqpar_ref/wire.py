"""How tensors lie in the flat buffer of one all-to-all.

A `Cut` divides one or more tensors along one dim into a chunk for each rank. In the buffer the chunks stand
in rank order; a chunk holds its piece of every tensor, one after the other, each in the dim order of the
tensor:

    [ q for rank 0 | k for rank 0 | v for rank 0 || q for rank 1 | k for rank 1 | v for rank 1 || ... ]

`pack` writes tensors into a buffer, `unpack` reads them back. Where several ranks need the same head, pack
writes it for each of them and unpack sums what came back. So each is the adjoint of the other, and an
exchange needs one cut by heads (of the tokens a rank owns) and one by tokens (of the heads a rank owns),
whatever its direction.

There are three ways to do it, tried in this order. Each writes the payload at most once:

1. one tensor whose memory already is the buffer: nothing is copied;
2. equal chunks: one strided copy;
3. ragged chunks: one copy row by row, to or from positions worked out beforehand. A row is the vector of one
   token and one head (where the head dims of q and v differ, their greatest common divisor).
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .rows import sum_rows, write_rows
from .runs import Runs


@dataclass(frozen=True)
class Part:
    """One tensor of a cut.

    Args:
        shape: of the tensor on this rank.
        runs: what each rank gets, along the dim of the cut. Runs may overlap.
        window: (dim, first, end) where only that part of another dim travels; None for everything.
    """

    shape: tuple[int, int, int, int]
    runs: Runs
    window: tuple[int, int, int] | None = None

    @property
    def travelling(self) -> list[int]:
        """The shape of what travels, before it is cut."""
        shape = list(self.shape)
        if self.window is not None:
            dim, first, end = self.window
            shape[dim] = end - first
        return shape

    def narrow(self, tensor: Tensor) -> Tensor:
        """The part of the tensor that travels."""
        if self.window is None:
            return tensor
        dim, first, end = self.window
        return tensor.narrow(dim, first, end - first)


@dataclass(frozen=True, eq=False)
class Positions:
    """Row numbers in a buffer, for one tensor.

    Args:
        written: for pack, a position for each row that travels and each copy of it; a table for each stretch of
            `Runs.stretches`.
        read: for unpack, the positions of each row's copies, in rank order, row after row.
        bags: where in `read` the copies of each row begin; None where each row has exactly one.
    """

    written: list[Int[Tensor, "_ _ _ rows_of_vector _"]]
    read: Int[Tensor, " all_copies"]
    bags: Int[Tensor, " rows"] | None


class Cut:
    """Tensors divided along `dim` into one chunk for each rank.

    `splits` are the elements of each rank's chunk, `size` those of all.
    """

    def __init__(self, dim: int, parts: tuple[Part, ...], device: torch.device) -> None:
        self.dim = dim
        self.parts = parts
        self.device = device
        pieces = np.stack([part.runs.counts * self._across(part) for part in parts])
        chunks = pieces.sum(axis=0)
        self.splits: list[int] = chunks.tolist()
        self.size = int(chunks.sum())
        self.ranks = len(self.splits)
        self.starts = (np.cumsum(chunks) - chunks) + (np.cumsum(pieces, axis=0) - pieces)  # by part and rank
        self.row = math.gcd(*(part.shape[3] for part in parts))
        self.in_order = len(parts) == 1 and self._is_in_order(parts[0])
        self.even = all(part.runs.even for part in parts)

    def pack(self, tensors: tuple[Float[Tensor, "_ _ _ _"], ...]) -> Float[Tensor, " size"]:
        """The buffer to send."""
        if self.in_order:
            return tensors[0].contiguous().view(-1)
        buffer = tensors[0].new_empty(self.size)
        travelling = [part.narrow(tensor) for part, tensor in zip(self.parts, tensors, strict=True)]
        if self.even:
            for index, tensor in enumerate(travelling):
                self._pieces(buffer, index).copy_(self._by_rank(tensor))
        else:
            rows = [
                stretch
                for part, tensor in zip(self.parts, travelling, strict=True)
                for stretch in self._in_stretches(part, tensor.unflatten(-1, (-1, self.row)))
            ]
            written = [table for positions in self._positions for table in positions.written]
            write_rows(buffer.view(-1, self.row), written, rows)
        return buffer

    def new_buffer(self, dtype: torch.dtype) -> tuple[Tensor, Float[Tensor, " size"]]:
        """An empty tensor for `unpack`, and the flat view of it that is to receive the chunks."""
        if self.in_order:
            buffer = torch.empty(self.parts[0].shape, dtype=dtype, device=self.device)
            return buffer, buffer.view(-1)
        buffer = torch.empty(self.size + self.row, dtype=dtype, device=self.device)
        return buffer, buffer[: self.size]

    def unpack(self, buffer: Float[Tensor, "..."]) -> tuple[Float[Tensor, "_ _ _ _"], ...]:
        """The tensors whose chunks the buffer received. The copies of one head are summed in rank order."""
        if self.in_order:
            return (buffer,)
        if self.even and all(part.window is None for part in self.parts):
            tensors = tuple(buffer.new_empty(part.shape) for part in self.parts)
            for index, tensor in enumerate(tensors):
                self._by_rank(tensor).copy_(self._pieces(buffer, index))
            return tensors
        rows = buffer.view(-1, self.row)
        return tuple(self._read(rows, index) for index in range(len(self.parts)))

    def _read(self, rows: Float[Tensor, "_ row"], index: int) -> Float[Tensor, "_ _ _ _"]:
        part, positions = self.parts[index], self._positions[index]
        if positions.bags is not None:
            return sum_rows(rows, positions.read, positions.bags).view(part.shape)
        tensor = rows.new_empty(part.shape)
        torch.index_select(rows, 0, positions.read, out=tensor.view(-1, self.row))
        return tensor

    def _across(self, part: Part) -> int:
        """Elements that travel for each index along the dim of the cut."""
        shape = part.travelling
        return math.prod(shape[: self.dim] + shape[self.dim + 1 :])

    def _is_in_order(self, part: Part) -> bool:
        """Whether the cut leaves all elements where they are: one chunk only, or nothing before the dim."""
        alone = self.ranks == 1 or math.prod(part.shape[: self.dim]) == 1
        return alone and part.runs.in_order and part.window is None

    def _by_rank(self, tensor: Float[Tensor, "_ _ _ _"]) -> Float[Tensor, "ranks _ _ _ _"]:
        """For equal chunks: the tensor as a view with one piece for each rank."""
        length = tensor.shape[self.dim] // self.ranks
        return tensor.unflatten(self.dim, (self.ranks, length)).movedim(self.dim, 0)

    def _pieces(self, buffer: Float[Tensor, " buffer"], index: int) -> Float[Tensor, "ranks _ _ _ _"]:
        """For equal chunks: every rank's piece of one tensor, as a view of the buffer."""
        a, b, c, d = (
            size // self.ranks if dim == self.dim else size
            for dim, size in enumerate(self.parts[index].travelling)
        )
        steps = (self.splits[0], b * c * d, c * d, d, 1)
        return buffer.as_strided((self.ranks, a, b, c, d), steps, int(self.starts[index, 0]))

    def _in_stretches(self, part: Part, tensor: Tensor) -> list[Tensor]:
        """The tensor, or its positions, in the pieces that equally many ranks hold."""
        stretches = part.runs.stretches
        if len(stretches) == 1:
            return [tensor]
        return [tensor.narrow(self.dim, first, end - first) for first, end, _ in stretches]

    @cached_property
    def _positions(self) -> list[Positions]:
        """For each tensor: where its pieces begin, plus where in its piece each row stands."""
        places = {part: self._places_in_pieces(part) for part in self.parts}  # k and v are alike
        return [
            self._to_positions(part, starts // self.row, *places[part])
            for part, starts in zip(self.parts, self.starts, strict=True)
        ]

    def _places_in_pieces(self, part: Part) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each row and copy: its rank, its place in that rank's piece, and whether there is such a copy.

        The place follows from Horner's rule over the dims of the tensor. All arrays have these dims, the
        vector counted in rows, and a last one for the copies.
        """
        holders = _along(part.runs.holders, self.dim)
        present = holders >= 0
        rank = np.maximum(holders, 0)
        place = np.zeros(1, dtype=np.int64)
        for dim, size in enumerate((*part.shape[:3], part.shape[3] // self.row)):
            index = _along(np.arange(size)[:, None], dim)
            if dim == self.dim:
                place = place * part.runs.counts[rank] + (index - part.runs.first[rank])
            elif part.window is not None and dim == part.window[0]:
                _, first, end = part.window
                place = place * (end - first) + (index - first)
                present = present & (index >= first) & (index < end)
            else:
                place = place * size + index
        return rank, place, present

    def _to_positions(
        self, part: Part, starts: np.ndarray, rank: np.ndarray, place: np.ndarray, present: np.ndarray
    ) -> Positions:
        address = starts[rank] + place
        table = self._to_tensor(address)
        pieces = self._in_stretches(part, part.narrow(table))
        written = [
            piece[..., :copies] for piece, (_, _, copies) in zip(pieces, part.runs.stretches, strict=True)
        ]
        if address.shape[-1] == 1 and present.all():
            return Positions(written, table.view(-1), None)
        present = np.broadcast_to(present, address.shape)
        copies = present.sum(axis=-1).reshape(-1)
        bags = None if (copies == 1).all() else self._to_tensor(np.cumsum(copies) - copies)
        return Positions(written, self._to_tensor(address[present]), bags)

    def _to_tensor(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self.device)


def _along(numbers: np.ndarray, dim: int) -> np.ndarray:
    """[size, copies] as five dims, size standing at `dim` and copies last."""
    shape = [1, 1, 1, 1, numbers.shape[1]]
    shape[dim] = numbers.shape[0]
    return numbers.reshape(shape)
