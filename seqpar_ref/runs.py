"""Which run of indices (tokens or heads) each rank holds, and what follows from that for all ranks."""

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Runs:
    """First index and end of every rank's run, of `length` indices in all. Runs may overlap; all arrays are
    int64.

    A plan keeps its runs, so what is derived here is worked out once for all ranks.
    """

    first: np.ndarray
    end: np.ndarray
    length: int

    @classmethod
    def of(cls, counts: tuple[int, ...]) -> "Runs":
        """Runs of these lengths, one behind the other."""
        ends = np.cumsum(np.asarray(counts, dtype=np.int64))
        return cls(ends - np.asarray(counts, dtype=np.int64), ends, int(ends[-1]))

    def __getitem__(self, rank: int) -> range:
        return range(int(self.first[rank]), int(self.end[rank]))

    @cached_property
    def counts(self) -> np.ndarray:
        """Length of each run."""
        return self.end - self.first

    @cached_property
    def in_order(self) -> bool:
        """Whether the runs, one behind the other, are all indices, each once."""
        return int(self.counts.sum()) == self.length

    @cached_property
    def even(self) -> bool:
        """Whether they are that, and of equal length."""
        return self.in_order and len(set(self.counts.tolist())) == 1

    @cached_property
    def stretches(self) -> list[tuple[int, int, int]]:
        """(first, end, copies): the indices in stretches that equally many ranks hold."""
        copies = (self.holders >= 0).sum(axis=1)
        bounds = [0, *(np.flatnonzero(np.diff(copies)) + 1).tolist(), self.length]
        return [(first, end, int(copies[first])) for first, end in itertools.pairwise(bounds) if first < end]

    @cached_property
    def holders(self) -> np.ndarray:
        """The ranks that hold each index, in rank order: [length, copies], -1 where there are no more."""
        ranks = np.repeat(np.arange(len(self.counts)), self.counts)
        shift = self.first - (np.cumsum(self.counts) - self.counts)
        held = np.arange(len(ranks)) + np.repeat(shift, self.counts)
        order = np.argsort(held, kind="stable")
        ranks, held = ranks[order], held[order]
        copies = np.bincount(held, minlength=self.length)
        table = np.full((self.length, max(1, copies.max(initial=0))), -1, dtype=np.int64)
        table[held, np.arange(len(ranks)) - (np.cumsum(copies) - copies)[held]] = ranks
        return table
