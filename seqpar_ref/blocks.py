"""Chunks of one size, copied at once: the same pieces as views of a tensor and of a buffer.

Where the pieces of several ranks have one size and stand at equal distances, in the tensor and in the buffer,
they are a view of either, [pieces, one piece], and one copy moves all of them.

Source: this package's own; see `wire.py`.
"""

from dataclasses import dataclass

from jaxtyping import Shaped
from torch import Tensor

from .runs import Runs


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


def block_of(
    part: int, shape: list[int], dim: int, runs: Runs, ranks: range, place: int, distance: int
) -> Block:
    """The pieces of these ranks.

    Args:
        part, shape: which tensor, and the shape of what travels of it.
        dim, runs: what each rank gets along the dim of the cut.
        place, distance: where the first piece begins in the buffer, and how far behind it the next one does.
    """
    piece = [*shape]
    piece[dim] = int(runs.counts[ranks.start])
    first, step = int(runs.first[ranks.start]), runs.step or 0
    dense = _strides(shape)
    return Block(
        part=part,
        shape=(len(ranks), *piece),
        dim=dim,
        first=first,
        step=step,
        dense=(step * dense[dim], *dense),
        begin=first * dense[dim],
        strides=(distance, *_strides(piece)),
        place=place,
    )


def _strides(shape: list[int]) -> tuple[int, int, int, int]:
    """Strides of what lies in one stretch of memory."""
    _, b, c, d = shape
    return b * c * d, c * d, d, 1
