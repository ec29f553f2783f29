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
2. chunks of one size, from places at equal distances: one strided copy (`blocks.py`);
3. ragged chunks: one copy row by row, to or from positions worked out beforehand (`ragged.py`).

What a rank keeps need not pass through the buffers. With the first two ways, on the first rank and on the last
one, a cut may leave out the chunk of its own rank, and `Route.copy_kept` copies it from tensor to tensor.

Source: this package's own, in the place of four helpers of `deepspeed.sequence.layer` (docs/deepspeed.md, D16).
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from .blocks import Block, block_of
from .parts import Part
from .ragged import RaggedRows


class Received(NamedTuple):
    """The buffer of an exchange under way, and the tensors that it is unpacked to, if they are there already.

    They are from the start where the buffer is their memory, or where what a rank keeps is copied to them. Others
    are made when what was sent is free, so that they can have its memory. The buffer is flat, [elements]; the
    tensors have the shapes of the cut's parts.
    """

    tensors: tuple[Tensor, ...]
    buffer: Shaped[Tensor, " size"]


class Cut:
    """Tensors divided along `dim` into one chunk for each rank, in each of the stages.

    `splits[stage]` are the elements of each rank's chunk, `sizes[stage]` those of all. The chunk of the rank
    `kept` is left out of the buffers: see `may_keep`.
    """

    def __init__(
        self, dim: int, parts: tuple[Part, ...], device: torch.device, kept: int | None = None
    ) -> None:
        self.dim, self.parts, self.kept = dim, parts, kept
        self.stages = parts[0].runs.stages
        pieces = np.stack([part.pieces(dim) for part in parts])  # [part, stage, rank]
        if kept is not None:
            pieces[:, :, kept] = 0
        chunks = pieces.sum(axis=0)
        begins = np.cumsum(chunks).reshape(chunks.shape) - chunks
        self.starts = begins + (np.cumsum(pieces, axis=0) - pieces)
        self.splits: list[list[int]] = chunks.tolist()
        self.sizes: list[int] = chunks.sum(axis=1).tolist()
        self.begins: list[int] = begins[:, 0].tolist()
        self.in_order = self.stages == len(parts) == 1 and parts[0].stays_in_order(dim)
        self.blocks = [self._blocks(stage) for stage in range(self.stages)]
        self.strided = None not in self.blocks and all(part.once for part in parts)
        self._rows = RaggedRows(parts, dim, self.starts, device)

    def may_keep(self, rank: int) -> bool:
        """Whether the chunk of this rank can be left out.

        It can where chunks have one size, and where those of the others are one piece without it: on the first
        rank and on the last one.
        """
        return self.strided and rank in (0, len(self.splits[0]) - 1)

    def pack(self, tensors: tuple[Shaped[Tensor, "_ _ _ _"], ...], stage: int = 0) -> Shaped[Tensor, " size"]:
        """The buffer to send in that stage."""
        if self.in_order:
            return self._without_kept(tensors[0].contiguous())
        buffer = tensors[0].new_empty(self.sizes[stage])
        blocks = self.blocks[stage]
        if blocks is None:
            self._rows.write(buffer, tensors, stage)
            return buffer
        begin = self.begins[stage]
        for block in blocks:
            tensor = self.parts[block.part].narrow(tensors[block.part])
            block.in_buffer(buffer, begin).copy_(block.in_tensor(tensor))
        return buffer

    def new_buffer(self, like: Tensor) -> Received:
        """Memory for what is to come, of the dtype of `like`."""
        if self.in_order:
            tensors = self._new_tensors(like)
            return Received(tensors, self._without_kept(tensors[0]))
        spare = 0 if self.strided else self._rows.row  # the last row must not be read: see `sum_rows`
        buffer = like.new_empty(sum(self.sizes) + spare)
        return Received(() if self.kept is None else self._new_tensors(like), buffer)

    def chunks_of(self, received: Received, stage: int) -> Shaped[Tensor, " size"]:
        """The part of the buffer that receives the chunks of that stage."""
        buffer, size = received.buffer, self.sizes[stage]
        return buffer if buffer.numel() == size else buffer.narrow(0, self.begins[stage], size)

    def unpack(self, received: Received) -> tuple[Shaped[Tensor, "_ _ _ _"], ...]:
        """The tensors whose chunks the buffer received. The copies of one head are summed in rank order."""
        tensors, buffer = received.tensors, received.buffer
        if self.in_order:
            return tensors
        if not self.strided:
            return self._rows.read(buffer)
        tensors = tensors or self._new_tensors(buffer)
        for blocks in self.blocks:
            for block in blocks or ():
                block.in_tensor(tensors[block.part]).copy_(block.in_buffer(buffer))
        return tensors

    def _new_tensors(self, like: Tensor) -> tuple[Shaped[Tensor, "_ _ _ _"], ...]:
        return tuple([like.new_empty(part.shape) for part in self.parts])

    def _without_kept(self, tensor: Shaped[Tensor, "_ _ _ _"]) -> Shaped[Tensor, " size"]:
        """The memory of a tensor that is the buffer as well, without the chunk that stays."""
        (size,) = self.sizes
        begin = tensor.numel() - size if self.kept == 0 else 0
        return tensor.as_strided((size,), (1,), tensor.storage_offset() + begin)

    def _blocks(self, stage: int) -> list[Block] | None:
        """The pieces that travel, of each tensor: all ranks', or those of all but the one that is kept.

        None where pieces have several sizes, or stand at several distances.
        """
        if any(part.runs.by_stage[stage].step is None for part in self.parts):
            return None
        ranks = range(len(self.splits[stage]))
        if self.kept is not None:
            ranks = ranks[1:] if self.kept == 0 else ranks[:-1]
        return [self._block(number, stage, ranks) for number in range(len(self.parts)) if ranks]

    @cached_property
    def own_blocks(self) -> list[list[Block]]:
        """What the rank `kept` keeps, by stage."""
        kept = self.kept or 0
        numbers = range(len(self.parts))
        return [
            [self._block(number, stage, range(kept, kept + 1)) for number in numbers]
            for stage in range(self.stages)
        ]

    def _block(self, number: int, stage: int, ranks: range) -> Block:
        """The pieces of these ranks, of one tensor."""
        part, place = self.parts[number], int(self.starts[number, stage, ranks.start])
        runs, distance = part.runs.by_stage[stage], max(self.splits[stage])
        return block_of(number, part.travelling, self.dim, runs, ranks, place, distance)
