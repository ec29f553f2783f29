"""Who owns which tokens, which query heads and which kv heads.

A plan is made once, from sizes that every rank knows, and passed to whatever exchanges. It holds integers only.

Between the exchanges a rank owns a run of tokens and all heads; inside attention it owns all tokens and a run of
query heads. With Hq query heads and Hkv kv heads, query head i uses kv head i // (Hq // Hkv), so the kv heads that a
rank needs are a run as well. Where two ranks need the same kv head, it travels to both.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Literal

import numpy as np
import torch

from .errors import PlanError
from .shapes import no_type_check

Policy = Literal["auto", "balanced", "groups"]
Heads = Literal["query", "kv", "kv once"]


@dataclass(frozen=True)
@no_type_check
class Plan:
    """A division of tokens and heads over ranks. `make_plan` chooses one; any other can be written down directly.

    Args:
        tokens_by_rank: tokens that each rank owns outside attention, in global order.
        heads_by_rank: query heads that each rank owns inside attention, in global order.
        kv_heads: kv heads in all; they divide the query heads.

    Raises:
        PlanError: sizes that are no integers, negative, or do not belong together.
    """

    tokens_by_rank: tuple[int, ...]
    heads_by_rank: tuple[int, ...]
    kv_heads: int

    def __post_init__(self) -> None:
        tokens = _integers("tokens_by_rank", self.tokens_by_rank)
        heads = _integers("heads_by_rank", self.heads_by_rank)
        object.__setattr__(self, "tokens_by_rank", tokens)
        object.__setattr__(self, "heads_by_rank", heads)
        if len(tokens) != len(heads) or not tokens:
            raise PlanError(
                f"tokens_by_rank has {len(tokens)} entries, heads_by_rank has {len(heads)}.",
                "Give both one entry for each rank, and at least one rank.",
            )
        object.__setattr__(self, "kv_heads", _kv_heads(sum(heads), self.kv_heads))
        if sum(tokens) * sum(heads) * len(heads) >= 2**62:
            raise PlanError(
                f"{sum(tokens)} tokens of {sum(heads)} heads are more than 64-bit integers can count.",
                "Use fewer tokens or heads.",
            )

    @property
    def ranks(self) -> int:
        """Ranks that share the sequence."""
        return len(self.tokens_by_rank)

    @cached_property
    def tokens(self) -> int:
        """Tokens of all ranks together."""
        return sum(self.tokens_by_rank)

    @cached_property
    def heads(self) -> int:
        """Query heads of all ranks together."""
        return sum(self.heads_by_rank)

    def tokens_of(self, rank: int) -> range:
        """Global positions of the tokens that the rank owns outside attention."""
        starts, stops = self.token_runs
        return self._run(rank, starts, stops)

    def query_heads(self, rank: int) -> range:
        """Query heads that the rank owns inside attention."""
        return self._run(rank, *self.head_runs("query"))

    def kv_heads_of(self, rank: int) -> range:
        """Kv heads that the rank's query heads use; other ranks may hold copies of the same ones."""
        return self._run(rank, *self.head_runs("kv"))

    def kv_heads_returned_by(self, rank: int) -> range:
        """The part of `kv_heads_of(rank)` that no lower rank holds: what the rank sends in `heads_to_sequence`."""
        return self._run(rank, *self.head_runs("kv once"))

    @cached_property
    def token_runs(self) -> tuple[np.ndarray, np.ndarray]:
        """First token and end of every rank's tokens, two vectors by rank."""
        return _runs(self.tokens_by_rank)

    def head_runs(self, heads: Heads) -> tuple[np.ndarray, np.ndarray]:
        """First head and end of every rank's heads, two vectors by rank."""
        return self._head_runs[heads]

    @cached_property
    def _head_runs(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        first, end = _runs(self.heads_by_rank)
        ratio = self.heads // self.kv_heads
        kv_first = first // ratio
        kv_end = np.where(end > first, -(-end // ratio), kv_first)
        seen_before = np.maximum.accumulate(np.concatenate([[0], kv_end[:-1]]))
        once_first = np.maximum(kv_first, seen_before)
        once_end = np.maximum(kv_end, once_first)
        return {"query": (first, end), "kv": (kv_first, kv_end), "kv once": (once_first, once_end)}

    @no_type_check
    def vectors(self, heads: Heads = "query") -> np.ndarray:
        """Vectors of one head and one token that `sequence_to_heads` sends for each row of the batch.

        Matrix [sender, receiver] of int64, own chunk zero. `heads_to_sequence` sends the transpose: of "query" for
        query heads, of "kv once" for kv heads. A backward pass sends the transpose of its forward pass.

        Raises:
            PlanError: `heads` is none of "query", "kv" and "kv once".
        """
        if heads not in self._head_runs:
            raise PlanError(f"heads is {heads!r}.", 'Use "query", "kv" or "kv once".')
        first, end = self.head_runs(heads)
        matrix = np.outer(np.asarray(self.tokens_by_rank, dtype=np.int64), end - first)
        np.fill_diagonal(matrix, 0)
        return matrix

    @no_type_check
    def bytes(
        self,
        batch: int,
        head_dim: int,
        dtype: torch.dtype,
        backward: bool = False,
        value_dim: int | None = None,
    ) -> np.ndarray:
        r"""Bytes that one attention sends, in one direction: q, k and v to the heads, the output back.

        With equal tokens and P dividing Hq and Hkv each rank sends

        $$(2 + 2g) \frac{N h}{P} \frac{P-1}{P}, \quad h = H_q D, \quad g = H_{kv} / H_q$$

        elements for each row of the batch. The backward pass sends the gradients of the same tensors the other way,
        the copies of a kv head included, so its matrix is the transpose.

        Args:
            batch: rows of the batch.
            head_dim: elements of one query or key vector.
            dtype: what travels.
            backward: the backward pass instead of the forward pass.
            value_dim: elements of one value vector; `head_dim` unless given.

        Returns:
            Matrix [sender, receiver] of int64, own chunk zero.

        Raises:
            PlanError: sizes that are no integers, or something else than a torch.dtype.
        """
        value_dim = head_dim if value_dim is None else value_dim
        batch, head_dim, value_dim = _integers("batch, head_dim and value_dim", (batch, head_dim, value_dim))
        if not isinstance(dtype, torch.dtype):
            raise PlanError(f"dtype is {dtype!r}.", "Pass a torch.dtype, such as torch.bfloat16.")
        query, kv = self.vectors("query"), self.vectors("kv")
        elements = head_dim * (query + kv) + value_dim * (kv + query.T)
        matrix = batch * dtype.itemsize * elements
        return matrix.T.copy() if backward else matrix

    def _run(self, rank: int, starts: np.ndarray, stops: np.ndarray) -> range:
        if not _is_integer(rank) or not 0 <= rank < self.ranks:
            raise PlanError(
                f"there is no rank {rank!r} in a plan of {self.ranks}.", f"Use 0 to {self.ranks - 1}."
            )
        return range(int(starts[rank]), int(stops[rank]))

    def __str__(self) -> str:
        title = (
            f"{self.ranks} ranks, {self.tokens} tokens, {self.heads} query heads, {self.kv_heads} kv heads"
        )
        rows = [["rank", "tokens", "query heads", "kv heads"]]
        for rank in range(self.ranks):
            if self.ranks > 16 and 8 <= rank < self.ranks - 4:
                if rank == 8:
                    rows.append(["..."] * 4)
                continue
            owned = (self.tokens_of(rank), self.query_heads(rank), self.kv_heads_of(rank))
            rows.append([str(rank), *map(_describe_run, owned)])
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
        ]
        return "\n".join([title, *lines])


@no_type_check
def make_plan(
    *,
    ranks: int,
    heads: int,
    kv_heads: int | None = None,
    tokens: int | Sequence[int],
    policy: Policy = "auto",
) -> Plan:
    """Divide tokens and heads over ranks.

    ```
    >>> print(make_plan(ranks=4, heads=9, kv_heads=3, tokens=4096))
    4 ranks, 4096 tokens, 9 query heads, 3 kv heads
    rank     tokens  query heads  kv heads
       0     0-1023          0-2         0
       1  1024-2047          3-4         1
       2  2048-3071          5-6       1-2
       3  3072-4095          7-8         2
    ```

    Args:
        ranks: ranks in the group.
        heads: query heads in all. They need not divide by the ranks, and may be fewer.
        kv_heads: kv heads in all, a divisor of `heads`; as many as query heads unless given.
        tokens: tokens in all, divided as evenly as can be with the longer runs first, or a list by rank.
        policy: how query heads are divided. "balanced": as evenly as can be. "groups": whole groups of query heads
            that share a kv head, so that no kv head travels twice. "auto": of these two the one with the smaller
            maximum of query heads on a rank, then the one whose busiest rank sends fewer bytes in a forward pass,
            then "balanced".

    Raises:
        PlanError: no such plan exists.
    """
    (ranks,) = _integers("ranks", (ranks,))
    (heads,) = _integers("heads", (heads,))
    if ranks < 1:
        raise PlanError(f"a plan for {ranks} ranks divides nothing.", "Use at least 1 rank.")
    kv_heads = _kv_heads(heads, heads if kv_heads is None else kv_heads)
    tokens_by_rank = _tokens_by_rank(tokens, ranks)
    if not isinstance(policy, str) or policy not in ("auto", "balanced", "groups"):
        raise PlanError(f"{policy!r} is no policy.", 'Use "auto", "balanced" or "groups".')
    balanced = Plan(tokens_by_rank, divide(heads, ranks), kv_heads)
    ratio = heads // kv_heads
    groups = Plan(tokens_by_rank, tuple(ratio * count for count in divide(kv_heads, ranks)), kv_heads)
    if policy == "auto":
        return min(balanced, groups, key=_cost)
    return balanced if policy == "balanced" else groups


def divide(count: int, ranks: int) -> tuple[int, ...]:
    """`count` things over `ranks` as evenly as can be, the larger shares first: 9 over 4 is 3, 2, 2, 2."""
    share, left_over = divmod(count, ranks)
    return (share + 1,) * left_over + (share,) * (ranks - left_over)


def _cost(plan: Plan) -> tuple[int, int]:
    """What "auto" makes small: query heads on the fullest rank, then vectors that the busiest rank sends."""
    sent = plan.bytes(1, 1, torch.uint8).sum(axis=1)
    return max(plan.heads_by_rank), int(sent.max())


def _tokens_by_rank(tokens: int | Sequence[int], ranks: int) -> tuple[int, ...]:
    if _is_integer(tokens):
        (total,) = _integers("tokens", (tokens,))
        return divide(total, ranks)
    by_rank = _integers("tokens", tokens)
    if len(by_rank) != ranks:
        raise PlanError(
            f"tokens has {len(by_rank)} entries for {ranks} ranks.",
            f"Give one count for each of the {ranks} ranks, zeros included, or the total.",
        )
    return by_rank


def _kv_heads(heads: int, kv_heads: int) -> int:
    (kv_heads,) = _integers("kv_heads", (kv_heads,))
    if heads < 1:
        raise PlanError(f"{heads} query heads attend to nothing.", "Use at least 1 query head.")
    if kv_heads < 1 or heads % kv_heads:
        legal = ", ".join(str(divisor) for divisor in range(1, min(heads, 4096) + 1) if heads % divisor == 0)
        raise PlanError(
            f"{kv_heads} kv heads cannot serve {heads} query heads in equal groups.",
            f"Use a number of kv heads that divides {heads}: {legal}.",
        )
    return kv_heads


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _integers(name: str, values: Iterable[int]) -> tuple[int, ...]:
    """The values as a tuple of Python integers, none of them negative."""
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        raise PlanError(f"{name} is {values!r}.", "Use integers.")
    values = tuple(values)
    for value in values:
        if not _is_integer(value):
            raise PlanError(
                f"{name} holds {value!r}, a {type(value).__name__}.", "Use integers, not floats or bools."
            )
        if value < 0:
            raise PlanError(f"{name} holds {value}.", "Use integers of at least 0.")
    return tuple(int(value) for value in values)


def _runs(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    ends = np.cumsum(np.asarray(counts, dtype=np.int64))
    return ends - counts, ends


def _describe_run(run: range) -> str:
    if not run:
        return "-"
    return str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
