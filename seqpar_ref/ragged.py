"""Chunks of several sizes, copied row by row: where each row stands in the buffer.

A row is the vector of one token and one head; where the head dims of the tensors differ, their greatest common
divisor. A row that several ranks get has a copy for each of them.

The piece of one rank holds the rank's run along the dim that is cut, in the dim order of the tensor. Let b count
through the dims before that one, i along it, and a through the `behind` rows of those after it. The row (b, i, a)
stands at

    start of the piece + (b * length of the run + i - first index of the run) * behind + a

Source: this package's own; see `wire.py`.
"""

import math
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from .parts import Part
from .rows import sum_rows, write_rows
from .runs import Runs


class RaggedRows:
    """The rows of some tensors and their positions in a buffer, which are worked out when first asked for.

    Args:
        parts: the tensors, in the order in which they stand in a chunk.
        dim: which one is cut.
        starts: where each piece begins among those of all stages, in elements: [part, stage, rank].
        device: of the tensors.
    """

    def __init__(self, parts: tuple[Part, ...], dim: int, starts: np.ndarray, device: torch.device) -> None:
        self.parts, self.dim, self.device = parts, dim, device
        self.row = math.gcd(*(part.shape[3] for part in parts))
        self.starts = starts // self.row

    def write(
        self, buffer: Shaped[Tensor, " size"], tensors: tuple[Shaped[Tensor, "_ _ _ _"], ...], stage: int
    ) -> None:
        """Fill the buffer of a stage, counted from 0: each row and each copy of it."""
        rows = [
            stretch
            for part, tensor in zip(self.parts, tensors, strict=True)
            for stretch in self._in_stretches(
                part.runs.by_stage[stage], part.narrow(tensor).unflatten(-1, (-1, self.row))
            )
        ]
        write_rows(buffer.view(-1, self.row), self._written[stage], rows)

    def read(self, buffer: Shaped[Tensor, " size"]) -> tuple[Shaped[Tensor, "_ _ _ _"], ...]:
        """The tensors, from the buffer of all stages. The copies of a row are summed in rank order."""
        rows = buffer.view(-1, self.row)
        tensors = []
        for part, (positions, bags) in zip(self.parts, self._read, strict=True):
            if bags is None:
                tensor = rows.new_empty(part.shape)
                torch.index_select(rows, 0, positions, out=tensor.view(-1, self.row))
            else:
                tensor = sum_rows(rows, positions, bags).view(part.shape)
            tensors.append(tensor)
        return tuple(tensors)

    @cached_property
    def _written(self) -> list[list[Int[Tensor, "_ _ _ rows_of_vector _"]]]:
        """For write, by stage: a position for each row that travels and each copy of it.

        Every part has a table for each stretch of `Runs.stretches`.
        """
        written = []
        for stage in range(self.starts.shape[1]):
            tables: list[Tensor] = []
            begin = self.starts[0, stage, 0]
            for part, starts in zip(self.parts, self.starts[:, stage], strict=True):
                runs = part.runs.by_stage[stage]
                table = torch.from_numpy(self._positions(part, runs, starts - begin)).to(self.device)
                pieces = self._in_stretches(runs, table)
                for piece, (_, _, copies) in zip(pieces, runs.stretches, strict=True):
                    tables.append(piece[..., :copies])
            written.append(tables)
        return written

    @cached_property
    def _read(self) -> list[tuple[Int[Tensor, " all_copies"], Int[Tensor, " rows"] | None]]:
        """For read, by part: the positions of each row's copies, in rank order, row after row.

        The second tensor says where in the first the copies of each row begin; None where each row has one.
        """
        read = []
        for part, starts in zip(self.parts, self.starts, strict=True):
            positions = self._positions(part, part.runs, starts.T.reshape(-1))
            present = positions >= 0
            copies = np.zeros((*part.shape[:3], part.shape[3] // self.row), dtype=np.int64)
            copies[part.inside] = present.sum(axis=-1)
            bags = None
            if not (copies == 1).all():
                bags = torch.from_numpy(np.cumsum(copies) - copies.reshape(-1)).to(self.device)
            read.append((torch.from_numpy(positions[present]).to(self.device), bags))
        return read

    def _positions(self, part: Part, runs: Runs, starts: np.ndarray) -> np.ndarray:
        """By the formula above, for each row that travels and each copy of it; -1 where there is no such copy.

        All dims of the tensor, its vectors counted in rows, and a last one for the copies in rank order.
        """
        *sizes, dim = part.travelling
        shape = [*sizes, dim // self.row]
        before, behind = (math.prod(some) for some in (shape[: self.dim], shape[self.dim + 1 :]))
        holder = np.maximum(runs.holders, 0)  # [index, copy]
        first = starts[holder] + (np.arange(runs.length)[:, None] - runs.first[holder]) * behind
        step = runs.counts[holder] * behind
        positions = np.arange(before)[:, None, None] * step + first  # [before, index, copy]
        positions = positions[:, :, None] + np.arange(behind)[:, None]  # [before, index, behind, copy]
        positions = np.where(runs.holders[:, None] >= 0, positions, -1)
        return positions.reshape(*shape, holder.shape[1])

    def _in_stretches(self, runs: Runs, tensor: Tensor) -> list[Tensor]:
        """The tensor, or its positions, in the pieces that equally many ranks hold."""
        bounds = [(first, end) for first, end, _ in runs.stretches]
        if bounds == [(0, runs.length)]:
            return [tensor]
        return [tensor.narrow(self.dim, first, end - first) for first, end in bounds]
