"""Which run of indices (tokens or heads) each rank holds, and what follows from that for all ranks."""

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Runs:
    """First index and end of every rank's run, of `length` indices in all. Runs may overlap; all arrays are
    int64.

    Where every rank's run is cut into parts, one for each of several stages, rank 0's parts come first, then
    rank 1's. A plan keeps its runs, so what is derived here is worked out once for all ranks.
    """

    first: np.ndarray
    end: np.ndarray
    length: int
    stages: int = 1

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
    def step(self) -> int | None:
        """How far apart runs of equal length begin; None where lengths or distances differ."""
        steps = np.diff(self.first)
        if len(set(self.counts.tolist())) > 1 or len(set(steps.tolist())) > 1:
            return None
        return int(steps[0]) if len(steps) else self.length

    @cached_property
    def by_stage(self) -> "list[Runs]":
        """All ranks' parts for the first stage, all ranks' parts for the second, ..."""
        if self.stages == 1:
            return [self]
        parts = [slice(stage, None, self.stages) for stage in range(self.stages)]
        return [Runs(self.first[part], self.end[part], self.length) for part in parts]

    @cached_property
    def stretches(self) -> list[tuple[int, int, int]]:
        """(first, end, copies): the indices in stretches that equally many ranks hold, if any does."""
        copies = (self.holders >= 0).sum(axis=1)
        bounds = [0, *(np.flatnonzero(np.diff(copies)) + 1).tolist(), self.length]
        pairs = [(first, end) for first, end in itertools.pairwise(bounds) if first < end]
        return [(first, end, int(copies[first])) for first, end in pairs if copies[first]]

    @cached_property
    def holders(self) -> np.ndarray:
        """The runs that hold each index, in order: [length, copies], -1 where there are no more."""
        holders = np.repeat(np.arange(len(self.counts)), self.counts)
        shift = self.first - (np.cumsum(self.counts) - self.counts)
        held = np.arange(len(holders)) + np.repeat(shift, self.counts)
        order = np.argsort(held, kind="stable")
        holders, held = holders[order], held[order]
        copies = np.bincount(held, minlength=self.length)
        table = np.full((self.length, max(1, copies.max(initial=0))), -1, dtype=np.int64)
        table[held, np.arange(len(holders)) - (np.cumsum(copies) - copies)[held]] = holders
        return table
