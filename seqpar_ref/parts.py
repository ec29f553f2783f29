"""One of the tensors that are cut apart: what each rank gets of it.

Source: this package's own; see `wire.py`.
"""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .runs import Runs


@dataclass(frozen=True)
class Part:
    """One tensor of a cut.

    Args:
        shape: of the tensor on this rank.
        runs: what each rank gets, along the dim of the cut, in each of the stages. Runs of two ranks may
            overlap.
        window: (dim, first, end) where only that part of another dim travels; None for everything.
    """

    shape: tuple[int, int, int, int]
    runs: Runs
    window: tuple[int, int, int] | None = None

    @property
    def inside(self) -> tuple[slice, ...]:
        """The indices of what travels, dim by dim."""
        inside = [slice(0, size) for size in self.shape]
        if self.window is not None:
            dim, first, end = self.window
            inside[dim] = slice(first, end)
        return tuple(inside)

    @property
    def travelling(self) -> list[int]:
        """The shape of what travels, before it is cut."""
        return [some.stop - some.start for some in self.inside]

    @property
    def once(self) -> bool:
        """Whether each element of the tensor travels, to one rank."""
        return self.runs.in_order and self.window is None

    def narrow(self, tensor: Tensor) -> Tensor:
        """The part of the tensor that travels."""
        if self.window is None:
            return tensor
        dim, first, end = self.window
        return tensor.narrow(dim, first, end - first)

    def pieces(self, dim: int) -> np.ndarray:
        """Elements of each piece where `dim` is cut: [stage, rank]."""
        shape = self.travelling
        across = math.prod(shape[:dim] + shape[dim + 1 :])
        return self.runs.counts.reshape(-1, self.runs.stages).T * across

    def stays_in_order(self, dim: int) -> bool:
        """Whether the pieces, rank after rank, are the tensor's memory: one piece only, or nothing before `dim`."""
        alone = len(self.runs.counts) == 1 or math.prod(self.shape[:dim]) == 1
        return alone and self.once
