"""Who owns which tokens, which query heads and which kv heads.

A plan is made once, from sizes that every rank knows, and passed to whatever exchanges. It holds integers
only.

Between the exchanges a rank owns a run of tokens and all heads; inside attention it owns all tokens and a run
of query heads. With Hq query heads and Hkv kv heads, query head i uses kv head i // (Hq // Hkv), so the kv
heads that a rank needs are a run as well. Where two ranks need the same kv head, it travels to both.

Source: the even division is that of DeepSpeed-Ulysses (Jacobs et al., 2023, arXiv:2309.14509), kv heads that are
shared those of Ainslie et al., 2023, arXiv:2305.13245. Any number of heads is asked for in DeepSpeed's issues #6774
and #8291, any number of tokens in #5177 and #7384; how they are divided is this package's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import torch

from .checks import integers, is_integer, no_type_check
from .errors import ArgumentError, PlanError
from .runs import Runs

Policy = Literal["auto", "balanced", "groups"]
Heads = Literal["query", "kv", "kv once"]

MOST_RANKS = 2**20  # a plan has an entry for each; more are a mistake, or would fill the memory


@dataclass(frozen=True)
@no_type_check
class Plan:
    """A division of tokens and heads over ranks. `make_plan` chooses one; any other can be written down
    directly.

    Args:
        tokens_by_rank: tokens that each rank owns outside attention, in global order.
        heads_by_rank: query heads that each rank owns inside attention, in global order.
        kv_heads: kv heads in all; they divide the query heads.

    Raises:
        PlanError: sizes that are no integers, are negative, or do not belong together.
    """

    tokens_by_rank: tuple[int, ...]
    heads_by_rank: tuple[int, ...]
    kv_heads: int

    def __post_init__(self) -> None:
        tokens = integers("tokens_by_rank", self.tokens_by_rank)
        heads = integers("heads_by_rank", self.heads_by_rank)
        object.__setattr__(self, "tokens_by_rank", tokens)
        object.__setattr__(self, "heads_by_rank", heads)
        if len(tokens) != len(heads) or not tokens:
            raise PlanError(
                f"tokens_by_rank has {len(tokens)} entries, heads_by_rank has {len(heads)}.",
                "Give both one entry for each rank, and at least one rank.",
            )
        object.__setattr__(self, "kv_heads", _kv_heads(sum(heads), self.kv_heads))
        if sum(tokens) * sum(heads) * len(heads) >= 2**48:
            raise PlanError(
                f"{sum(tokens)} tokens of {sum(heads)} heads on {len(heads)} ranks are too many to count.",
                "Keep tokens times heads times ranks below 2**48.",
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
        """Global positions of the tokens that the rank owns outside attention.

        Raises:
            PlanError: there is no such `rank`.
        """
        return self._run(rank, self.token_runs)

    def query_heads(self, rank: int) -> range:
        """Query heads that the rank owns inside attention.

        Raises:
            PlanError: there is no such `rank`.
        """
        return self._run(rank, self.head_runs["query"])

    def kv_heads_of(self, rank: int) -> range:
        """Kv heads that the rank's query heads use; other ranks may hold copies of the same ones.

        Raises:
            PlanError: there is no such `rank`.
        """
        return self._run(rank, self.head_runs["kv"])

    @cached_property
    def token_runs(self) -> Runs:
        """Every rank's tokens."""
        return Runs.of(self.tokens_by_rank)

    @cached_property
    def head_runs(self) -> dict[Heads, Runs]:
        """Every rank's heads: "query"; "kv", copies included; "kv once", those that no lower rank holds."""
        query = Runs.of(self.heads_by_rank)
        ratio = self.heads // self.kv_heads
        first = query.first // ratio
        end = np.where(query.counts > 0, -(-query.end // ratio), first)
        held_below = np.maximum.accumulate(np.concatenate([[0], end[:-1]]))
        once_first = np.maximum(first, held_below)
        once = Runs(once_first, np.maximum(end, once_first), self.kv_heads)
        return {"query": query, "kv": Runs(first, end, self.kv_heads), "kv once": once}

    @cached_property
    def most_chunks(self) -> int:
        """Head chunks that are not empty on every rank: kv heads on the rank that has most of them."""
        return max(1, int(self.head_runs["kv"].counts.max()))

    def chunk_runs(self, chunks: int) -> dict[Heads, Runs]:
        """Every rank's heads, "query" and "kv", in `chunks` parts: rank 0's, then rank 1's, ...

        A part is some kv heads of the rank and its query heads that use them. A rank's kv heads are divided
        as evenly as can be, the larger parts first; where there are fewer than parts, the last are empty.

        Raises:
            PlanError: `chunks` is no integer of at least 1.
        """
        return _chunk_runs(self, check_chunks(chunks))

    def vectors(self, heads: Heads = "query") -> np.ndarray:
        """Vectors, of one head and one token, that `sequence_to_heads` sends for each row of the batch.

        `heads_to_sequence` sends the transpose: of "query" for query heads, of "kv once" for kv heads. A
        backward pass sends the transpose of its forward pass.

        Returns:
            Matrix [sender, receiver] of int64, own chunk zero.

        Raises:
            PlanError: `heads` is none of "query", "kv" and "kv once".
        """
        if not isinstance(heads, str) or heads not in self.head_runs:
            raise PlanError(f"heads is {heads!r}.", 'Use "query", "kv" or "kv once".')
        matrix = np.outer(self.token_runs.counts, self.head_runs[heads].counts)
        np.fill_diagonal(matrix, 0)
        return matrix

    def bytes(
        self,
        batch: int,
        head_dim: int,
        dtype: torch.dtype,
        backward: bool = False,
        *,
        value_dim: int | None = None,
    ) -> np.ndarray:
        r"""Bytes that one attention sends in one pass: q, k and v to the heads, the output back.

        With equal tokens and P dividing Hq and Hkv each rank sends

        $$(2 + 2g) \frac{N h}{P} \frac{P-1}{P}, \quad h = H_q D, \quad g = H_{kv} / H_q$$

        elements for each row of the batch. The backward pass sends the gradients of the same tensors the
        other way, those of all copies of a kv head included, so its matrix is the transpose. What attention
        without a plan sends beside it is in `agreement.py`.

        Args:
            batch: rows of the batch.
            head_dim: elements of one query or key vector.
            dtype: what travels.
            backward: the backward pass instead of the forward pass.
            value_dim: elements of one value vector; `head_dim` unless given.

        Returns:
            Matrix [sender, receiver] of int64, own chunk zero.

        Raises:
            PlanError: sizes that are no integers, something else than a torch.dtype, or than a bool.
        """
        sizes = (batch, head_dim, head_dim if value_dim is None else value_dim)
        batch, head_dim, value_dim = integers("batch, head_dim, value_dim", sizes)
        if not isinstance(backward, bool):
            raise PlanError(f"backward is {backward!r}.", "Use True or False.")
        if not isinstance(dtype, torch.dtype):
            raise PlanError(f"dtype is {dtype!r}.", "Pass a torch.dtype, such as torch.bfloat16.")
        if 4 * max(sizes) * batch * self.tokens * self.heads * dtype.itemsize >= 2**63:
            raise PlanError(
                f"batch {batch}, head dim {head_dim} are more than can be counted.", "Use smaller ones."
            )
        query, kv = self.vectors("query"), self.vectors("kv")
        elements = head_dim * (query + kv) + value_dim * (kv + query.T)
        matrix = batch * dtype.itemsize * elements
        return matrix.T.copy() if backward else matrix

    def _run(self, rank: int, runs: Runs) -> range:
        if not is_integer(rank) or not 0 <= rank < self.ranks:
            raise PlanError(f"there is no rank {rank!r} among {self.ranks}.", f"Use 0 to {self.ranks - 1}.")
        return runs[rank]

    def __str__(self) -> str:
        shown = list(range(self.ranks))
        if self.ranks > 16:
            shown = [*shown[:8], *shown[-4:]]
        rows = [["rank", "tokens", "query heads", "kv heads"]]
        for rank in shown:
            owned = (self.tokens_of(rank), self.query_heads(rank), self.kv_heads_of(rank))
            rows.append([str(rank), *map(_describe, owned)])
        if self.ranks > 16:
            rows.insert(9, ["..."] * 4)
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
        ]
        sizes = f"{self.tokens} tokens, {self.heads} query heads, {self.kv_heads} kv heads"
        return "\n".join([f"{self.ranks} ranks, {sizes}", *lines])


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
    >>> print(make_plan(ranks=4, heads=9, kv_heads=3, tokens=4096, policy="balanced"))
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
        policy: how query heads are divided. "balanced": as evenly as can be. "groups": whole groups of query
            heads that share a kv head, so that no kv head travels twice. "auto": of these two the one with
            the smaller maximum of query heads on a rank; then the one whose busiest rank sends fewer bytes in
            a forward pass; then "balanced".

    Raises:
        PlanError: no such plan exists.
    """
    ranks, heads = integers("ranks, heads", (ranks, heads))
    if ranks < 1:
        raise PlanError("a plan for 0 ranks divides nothing.", "Use at least 1 rank.")
    if ranks > MOST_RANKS:
        raise PlanError(f"a plan for {ranks} ranks is too large.", f"Use at most {MOST_RANKS} ranks.")
    kv_heads = _kv_heads(heads, heads if kv_heads is None else kv_heads)
    if not isinstance(policy, str) or policy not in ("auto", "balanced", "groups"):
        raise PlanError(f"{policy!r} is no policy.", 'Use "auto", "balanced" or "groups".')
    by_rank = _tokens_by_rank(tokens, ranks)
    ratio = heads // kv_heads
    balanced = Plan(by_rank, divide(heads, ranks), kv_heads)
    groups = Plan(by_rank, tuple(ratio * share for share in divide(kv_heads, ranks)), kv_heads)
    if policy == "auto":
        return min(balanced, groups, key=_cost)
    return balanced if policy == "balanced" else groups


@lru_cache(maxsize=64)
def _chunk_runs(plan: Plan, chunks: int) -> dict[Heads, Runs]:
    query, kv = plan.head_runs["query"], plan.head_runs["kv"]
    share, left_over = np.divmod(kv.counts[:, None], chunks)
    bound = np.arange(chunks + 1)
    bounds = kv.first[:, None] + bound * share + np.minimum(bound, left_over)  # [rank, chunk]
    ratio = plan.heads // plan.kv_heads
    own = np.clip(bounds * ratio, query.first[:, None], query.end[:, None])

    def runs(bounds: np.ndarray, heads: int) -> Runs:
        return Runs(bounds[:, :-1].reshape(-1), bounds[:, 1:].reshape(-1), heads, chunks)

    return {"query": runs(own, plan.heads), "kv": runs(bounds, plan.kv_heads)}


@no_type_check
def check_plan(plan: Plan) -> None:
    """Refuse what is no plan.

    Raises:
        ArgumentError: with what it is.
    """
    if not isinstance(plan, Plan):
        raise ArgumentError(f"plan is a {type(plan).__name__}.", "Pass what seqpar_ref.make_plan returns.")


@no_type_check
def check_chunks(chunks: int) -> int:
    """`chunks`, a number of chunks, as it is.

    Raises:
        PlanError: it is no integer of at least 1.
    """
    (chunks,) = integers("chunks", (chunks,))
    if chunks < 1:
        raise PlanError(f"{chunks} chunks hold no heads.", "Use at least 1 chunk.")
    return chunks


def divide(count: int, ranks: int) -> tuple[int, ...]:
    """`count` things over `ranks` as evenly as can be, the larger shares first: 9 over 4 is 3, 2, 2, 2."""
    share, left_over = divmod(count, ranks)
    return (share + 1,) * left_over + (share,) * (ranks - left_over)


def _cost(plan: Plan) -> tuple[int, int]:
    """What "auto" makes small: query heads on the fullest rank, then what the busiest rank sends."""
    tokens = plan.token_runs.counts
    query, kv = plan.head_runs["query"].counts, plan.head_runs["kv"].counts
    sent = tokens * (query.sum() - query + 2 * (kv.sum() - kv)) + query * (tokens.sum() - tokens)
    return max(plan.heads_by_rank), int(sent.max())


@no_type_check
def _tokens_by_rank(tokens: Any, ranks: int) -> tuple[int, ...]:
    if is_integer(tokens):
        return divide(integers("tokens", [tokens])[0], ranks)
    by_rank = integers("tokens", tokens)
    if len(by_rank) != ranks:
        raise PlanError(
            f"tokens has {len(by_rank)} entries for {ranks} ranks.",
            f"Give one count for each of the {ranks} ranks, zeros included, or the total.",
        )
    return by_rank


@no_type_check
def _kv_heads(heads: int, kv_heads: int) -> int:
    (kv_heads,) = integers("kv_heads", (kv_heads,))
    if heads < 1:
        raise PlanError("0 query heads attend to nothing.", "Use at least 1 query head.")
    if kv_heads < 1 or heads % kv_heads:
        legal = [str(divisor) for divisor in range(1, min(heads, 4096) + 1) if heads % divisor == 0]
        raise PlanError(
            f"{kv_heads} kv heads cannot serve {heads} query heads in equal groups.",
            f"Use a number of kv heads that divides {heads}: {', '.join(legal)}.",
        )
    return kv_heads


def _describe(run: range) -> str:
    if not run:
        return "-"
    return str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
