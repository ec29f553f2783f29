"""How tensors lie in the flat buffer of one all-to-all.

A `Cut` divides one or more tensors along one dim into a chunk for each rank. In the buffer the chunks stand
in rank order; a chunk holds its piece of every tensor, one after the other, each in the dim order of the
tensor:

    [ q for rank 0 | k for rank 0 | v for rank 0 || q for rank 1 | k for rank 1 | v for rank 1 || ... ]

`pack` writes tensors into a buffer, `unpack` reads them back. Where several ranks need the same head, pack
writes it for each of them and unpack sums what came back. So each is the adjoint of the other, and an
exchange needs one cut by heads (of the tokens a rank owns) and one by tokens (of the heads a rank owns),
whatever its direction.

A cut may have several stages, each of which travels in an all-to-all of its own: first some heads of every
rank, then the next ones. Each stage is packed by itself, into a buffer as above. What comes back lies in one
buffer, stage after stage, and is unpacked at once, so that copies of one head are summed in rank order
whichever stage they came with.

There are three ways to do it, tried in this order. Each writes the payload at most once:

1. one tensor whose memory already is the buffer: nothing is copied;
2. chunks of one size, from places at equal distances: one strided copy;
3. ragged chunks: one copy row by row, to or from positions worked out beforehand. A row is the vector of one
   token and one head (where the head dims of q and v differ, their greatest common divisor).

What a rank keeps need not pass through the buffers. With the first two ways a cut may leave out the chunk of
its own rank; `keep` copies it from tensor to tensor, while the others' chunks travel.

Source: this package's own, in the place of four helpers of `deepspeed.sequence.layer` (docs/deepspeed.md, D16).
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from .rows import sum_rows, write_rows
from .runs import Runs


@dataclass(frozen=True)
class Part:
    """One tensor of a cut.

    Args:
        shape: of the tensor on this rank.
        runs: what each rank gets, along the dim of the cut; where there are stages, what it gets in the
            first, the second, ... of them, rank after rank. Runs of two ranks may overlap.
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


@dataclass(frozen=True)
class Block:
    """Pieces of one size that stand at equal distances, in a tensor and in a buffer.

    Args:
        part: which tensor.
        shape: [pieces, one piece].
        dim, first, step: where the pieces begin in the tensor, along the dim of the cut.
        dense, begin: strides and begin of the view of a contiguous tensor, worked out beforehand.
        strides, place: those of the view of the buffer.
    """

    part: int
    shape: tuple[int, ...]
    dim: int
    first: int
    step: int
    dense: tuple[int, ...]
    begin: int
    strides: tuple[int, ...]
    place: int

    def in_tensor(self, tensor: Shaped[Tensor, "_ _ _ _"]) -> Shaped[Tensor, "pieces _ _ _ _"]:
        """The pieces as a view of the tensor."""
        offset = tensor.storage_offset()
        if tensor.is_contiguous():
            return tensor.as_strided(self.shape, self.dense, offset + self.begin)
        strides = tensor.stride()
        stride = strides[self.dim]
        return tensor.as_strided(self.shape, (self.step * stride, *strides), offset + self.first * stride)

    def in_buffer(self, buffer: Shaped[Tensor, " size"], begin: int = 0) -> Shaped[Tensor, "pieces _ _ _ _"]:
        """The pieces as a view of the buffer, of which everything before `begin` is missing."""
        return buffer.as_strided(self.shape, self.strides, self.place - begin)


@dataclass(frozen=True, eq=False)
class Places:
    """Where each row of a tensor, and each copy of it, stands in the pieces of a buffer.

    All arrays have the dims of the tensor, its vectors counted in rows, and a last one for the copies in rank
    order; their shapes broadcast to each other.

    Args:
        holder: which run the copy belongs to.
        place: its place in that run's piece, in rows.
        present: whether there is such a copy.
    """

    holder: np.ndarray
    place: np.ndarray
    present: np.ndarray

    def addresses(self, starts: np.ndarray) -> np.ndarray:
        """Row numbers in a buffer in which the piece of run r begins at row `starts[r]`."""
        return starts[self.holder] + self.place


class Cut:
    """Tensors divided along `dim` into one chunk for each rank, in each of the stages.

    `splits[stage]` are the elements of each rank's chunk, `sizes[stage]` those of all. The chunk of the rank
    `kept` is left out of the buffers: see `may_keep`.
    """

    def __init__(
        self,
        dim: int,
        parts: tuple[Part, ...],
        device: torch.device,
        stages: int = 1,
        kept: int | None = None,
    ) -> None:
        self.dim = dim
        self.parts = parts
        self.device = device
        self.stages = stages
        self.kept = kept
        pieces = np.stack(
            [part.runs.counts.reshape(-1, stages).T * self._across(part) for part in parts]
        )  # [part, stage, rank]
        if kept is not None:
            pieces[:, :, kept] = 0
        chunks = pieces.sum(axis=0)
        begins = np.cumsum(chunks).reshape(chunks.shape) - chunks
        self.starts = begins + (np.cumsum(pieces, axis=0) - pieces)
        self.splits: list[list[int]] = chunks.tolist()
        self.sizes: list[int] = chunks.sum(axis=1).tolist()
        self.begins: list[int] = begins[:, 0].tolist()
        self.row = math.gcd(*(part.shape[3] for part in parts))
        self.in_order = stages == len(parts) == 1 and self._is_in_order(parts[0])
        by_stage = {part.runs: part.runs.every(stages) for part in parts}
        self.runs = [by_stage[part.runs] for part in parts]
        self.blocks = [self._blocks(stage) for stage in range(stages)]
        once = all(part.runs.in_order and part.window is None for part in parts)
        self.strided = once and None not in self.blocks
        self._known_places: dict[Any, Places] = {}

    def may_keep(self, rank: int) -> bool:
        """Whether the chunk of this rank can be left out.

        It can where chunks have one size. Where memory and buffer are the same, the others' chunks have to be
        one piece of it, so the rank must be the first or the last one.
        """
        ends = (0, len(self.splits[0]) - 1)
        return self.strided and (rank in ends or not self.in_order)

    def pack(self, tensors: tuple[Shaped[Tensor, "_ _ _ _"], ...], stage: int = 0) -> Shaped[Tensor, " size"]:
        """The buffer to send in that stage."""
        if self.in_order:
            return self._without_kept(tensors[0].contiguous())
        buffer = tensors[0].new_empty(self.sizes[stage])
        begin = self.begins[stage]
        blocks = self.blocks[stage]
        if blocks is not None:
            for block in blocks:
                tensor = self.parts[block.part].narrow(tensors[block.part])
                block.in_buffer(buffer, begin).copy_(block.in_tensor(tensor))
        else:
            rows = [
                stretch
                for part, runs, tensor in zip(self.parts, self.runs, tensors, strict=True)
                for stretch in self._in_stretches(
                    runs[stage], part.narrow(tensor).unflatten(-1, (-1, self.row))
                )
            ]
            write_rows(buffer.view(-1, self.row), self._written[stage], rows)
        return buffer

    def new_buffer(self, like: Tensor) -> "Received":
        """Memory for what is to come, of the dtype of `like`."""
        if not self.in_order and not self.strided:
            return Received((), like.new_empty(sum(self.sizes) + self.row))
        tensors = tuple([like.new_empty(part.shape) for part in self.parts])
        buffer = self._without_kept(tensors[0]) if self.in_order else like.new_empty(sum(self.sizes))
        return Received(tensors, buffer)

    def chunks_of(self, received: "Received", stage: int) -> Shaped[Tensor, " size"]:
        """The part of the buffer that receives the chunks of that stage."""
        if self.stages == 1 and received.tensors:
            return received.buffer
        return received.buffer.narrow(0, self.begins[stage], self.sizes[stage])

    def own_pieces(self, tensors: tuple[Shaped[Tensor, "_ _ _ _"], ...], stage: int) -> list[Tensor]:
        """What of each tensor stays on the rank `kept` in that stage, as views."""
        return [block.in_tensor(tensors[block.part]) for block in self._own_blocks[stage]]

    def unpack(self, received: "Received") -> tuple[Shaped[Tensor, "_ _ _ _"], ...]:
        """The tensors whose chunks the buffer received. The copies of one head are summed in rank order."""
        tensors, buffer = received.tensors, received.buffer
        if self.in_order:
            return tensors
        if self.strided:
            for blocks in self.blocks:
                for block in blocks or ():
                    block.in_tensor(tensors[block.part]).copy_(block.in_buffer(buffer))
            return tensors
        rows = buffer.view(-1, self.row)
        return tuple(self._read_rows(rows, *read) for read in zip(self.parts, self._read, strict=True))

    def _read_rows(
        self, rows: Shaped[Tensor, "_ row"], part: Part, read: tuple[Tensor, Tensor | None]
    ) -> Shaped[Tensor, "_ _ _ _"]:
        positions, bags = read
        if bags is not None:
            return sum_rows(rows, positions, bags).view(part.shape)
        tensor = rows.new_empty(part.shape)
        torch.index_select(rows, 0, positions, out=tensor.view(-1, self.row))
        return tensor

    def _across(self, part: Part) -> int:
        """Elements that travel for each index along the dim of the cut."""
        shape = part.travelling
        return math.prod(shape[: self.dim] + shape[self.dim + 1 :])

    def _is_in_order(self, part: Part) -> bool:
        """Whether the cut leaves all elements where they are: one chunk only, or nothing before the dim."""
        alone = len(part.runs.counts) == 1 or math.prod(part.shape[: self.dim]) == 1
        return alone and part.runs.in_order and part.window is None

    def _without_kept(self, tensor: Shaped[Tensor, "_ _ _ _"]) -> Shaped[Tensor, " size"]:
        """The memory of a tensor that is the buffer as well, without the chunk that stays."""
        (size,) = self.sizes
        begin = tensor.numel() - size if self.kept == 0 else 0
        return tensor.as_strided((size,), (1,), tensor.storage_offset() + begin)

    @cached_property
    def _own_blocks(self) -> list[list[Block]]:
        """What the rank `kept` keeps, by stage."""
        kept = self.kept or 0
        parts = range(len(self.parts))
        return [[self._block(part, stage, kept, kept + 1) for part in parts] for stage in range(self.stages)]

    def _blocks(self, stage: int) -> list[Block] | None:
        """The pieces that travel: all ranks', or those before and those behind the one that is kept.

        None where pieces have several sizes, or stand at several distances.
        """
        if any(runs[stage].step is None for runs in self.runs):
            return None
        ranks = len(self.splits[stage])
        stretches = [(0, ranks)] if self.kept is None else [(0, self.kept), (self.kept + 1, ranks)]
        return [
            self._block(part, stage, first, end)
            for part in range(len(self.parts))
            for first, end in stretches
            if first < end
        ]

    def _block(self, part: int, stage: int, first: int, end: int) -> Block:
        """The pieces of these ranks."""
        runs, whole = self.runs[part][stage], self.parts[part].travelling
        piece = [*whole]
        piece[self.dim] = int(runs.counts[first])
        start, step = int(runs.first[first]), runs.step or 0
        dense = _strides(whole)
        return Block(
            part,
            (end - first, *piece),
            self.dim,
            start,
            step,
            (step * dense[self.dim], *dense),
            start * dense[self.dim],
            (max(self.splits[stage]), *_strides(piece)),
            int(self.starts[part, stage, first]),
        )

    def _in_stretches(self, runs: Runs, tensor: Tensor) -> list[Tensor]:
        """The tensor, or its positions, in the pieces that equally many ranks hold."""
        if [(0, runs.length)] == [stretch[:2] for stretch in runs.stretches]:
            return [tensor]
        return [tensor.narrow(self.dim, first, end - first) for first, end, _ in runs.stretches]

    @cached_property
    def _written(self) -> list[list[Int[Tensor, "_ _ _ rows_of_vector _"]]]:
        """For pack, by stage: a position for each row that travels and each copy of it.

        Every part has a table for each stretch of `Runs.stretches`.
        """
        written: list[list[Tensor]] = [[] for _ in range(self.stages)]
        for stage, index in itertools.product(range(self.stages), range(len(self.parts))):
            runs = self.runs[index][stage]
            starts = self.starts[index, stage] - self.begins[stage]
            table = torch.from_numpy(self._places(index, runs).addresses(starts // self.row)).to(self.device)
            pieces = self._in_stretches(runs, self.parts[index].narrow(table))
            for piece, (_, _, copies) in zip(pieces, runs.stretches, strict=True):
                written[stage].append(piece[..., :copies])
        return written

    @cached_property
    def _read(self) -> list[tuple[Int[Tensor, " all_copies"], Int[Tensor, " rows"] | None]]:
        """For unpack, by part: the positions of each row's copies, in rank order, row after row.

        The second tensor says where in the first the copies of each row begin; None where each row has one.
        """
        read = []
        for index, part in enumerate(self.parts):
            places = self._places(index, part.runs)
            address = places.addresses(self.starts[index].T.reshape(-1) // self.row)
            present = np.broadcast_to(places.present, address.shape)
            copies = present.sum(axis=-1).reshape(-1)
            bags = None
            if not (copies == 1).all():
                bags = torch.from_numpy(np.cumsum(copies) - copies).to(self.device)
            read.append((torch.from_numpy(address[present]).to(self.device), bags))
        return read

    def _places(self, index: int, runs: Runs) -> Places:
        """Where the rows of a tensor stand. Parts that are alike, as k and v, share what is worked out."""
        part = self.parts[index]
        key = (part.shape, part.window, runs)
        if key not in self._known_places:
            self._known_places[key] = _places_of(part, runs, self.dim, self.row)
        return self._known_places[key]


@dataclass(frozen=True, eq=False)
class Received:
    """The buffer of an exchange under way, and the tensors that it is unpacked to, where they can be made at once.

    The buffer is flat, [elements]; the tensors have the shapes of the cut's parts.
    """

    tensors: tuple[Tensor, ...]
    buffer: Shaped[Tensor, " size"]


def _places_of(part: Part, runs: Runs, dim: int, row: int) -> Places:
    """The place in a piece follows from Horner's rule over the dims of the tensor."""
    holders = _along(runs.holders, dim)
    present = holders >= 0
    holder = np.maximum(holders, 0)
    place = np.zeros(1, dtype=np.int64)
    for own_dim, size in enumerate((*part.shape[:3], part.shape[3] // row)):
        index = _along(np.arange(size)[:, None], own_dim)
        if own_dim == dim:
            place = place * runs.counts[holder] + (index - runs.first[holder])
        elif part.window is not None and own_dim == part.window[0]:
            _, first, end = part.window
            place = place * (end - first) + (index - first)
            present = present & (index >= first) & (index < end)
        else:
            place = place * size + index
    return Places(holder, place, present)


def _strides(shape: list[int]) -> tuple[int, int, int, int]:
    """Strides of what lies in one stretch of memory."""
    _, b, c, d = shape
    return b * c * d, c * d, d, 1


def _along(numbers: np.ndarray, dim: int) -> np.ndarray:
    """[size, copies] as five dims, size standing at `dim` and copies last."""
    shape = [1, 1, 1, 1, numbers.shape[1]]
    shape[dim] = numbers.shape[0]
    return numbers.reshape(shape)
