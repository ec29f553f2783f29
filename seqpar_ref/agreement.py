"""What the ranks tell each other when no plan was made beforehand.

In each call every rank sends one record of nine integers, 72 bytes, to every other rank. From the gathered
records all ranks make the same plan, or raise the same error. Nothing is remembered by local shape: a rank
whose own sizes did not change still learns that another's did.

Source: this package's own; DeepSpeed's issues #7384 and #7842 show what happens without (D14).
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .checks import needs_gradient
from .errors import RankMismatchError
from .group import Group
from .plan import Plan, make_plan
from .shapes import LAYOUTS, Layout

EVERY_DTYPE = tuple(
    sorted({found for found in vars(torch).values() if isinstance(found, torch.dtype)}, key=str)
)


@dataclass(frozen=True)
class Record:
    """What one rank brings to a call.

    Args:
        tokens: of this rank.
        query_heads, kv_heads: heads in all.
        head_dim, value_dim: elements of one query or key vector, and of one value vector.
        batch: rows of the batch.
        dtype, layout: positions in EVERY_DTYPE and LAYOUTS.
        requires_grad: whose gradients travel, see `gradients`.
    """

    tokens: int
    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    batch: int
    dtype: int
    layout: int
    requires_grad: int

    @classmethod
    def of(cls, query: Tensor, layout: Layout, kv_heads: int, value_dim: int, requires_grad: int) -> "Record":
        """The record of a rank whose query is `[batch, seq_local, heads, dim]` in the order of `layout`."""
        return cls(
            tokens=query.shape[layout.sequence],
            query_heads=query.shape[layout.heads],
            kv_heads=kv_heads,
            head_dim=query.shape[3],
            value_dim=value_dim,
            batch=query.shape[layout.batch],
            dtype=EVERY_DTYPE.index(query.dtype),
            layout=list(LAYOUTS).index(layout.name),
            requires_grad=requires_grad,
        )


def gradients(shares: Iterable[Tensor], others: Iterable[Tensor]) -> int:
    """Whose gradients travel.

    Args:
        shares: query, key and value, of any shape, or what they are computed from.
        others: what the local attention is given beside.

    Returns:
        The number of exchanges that gradients take: 2, the output's and that of query, key and value; 1, the
        output's alone; or 0.
    """
    return 2 if needs_gradient(*shares) else int(needs_gradient(*others))


def agree(group: Group, record: Record, device: torch.device) -> Plan:
    """Exchange the records and make a plan from them, with the policy "auto".

    Raises:
        RankMismatchError: the ranks differ in anything but their tokens. The same error on every rank.
        PlanError: more tokens and heads than can be counted.
    """
    tokens = gather(group, asdict(record), ("tokens",), device)["tokens"]
    return _plan(group.size, record.query_heads, record.kv_heads, tokens)


def gather(
    group: Group, record: Mapping[str, int], may_differ: tuple[str, ...], device: torch.device
) -> dict[str, tuple[int, ...]]:
    """Exchange named integers; each name's values by rank.

    Raises:
        RankMismatchError: the ranks differ in one that may not. The same error on every rank.
    """
    records = group.all_gather_integers(list(record.values()), device)
    by_rank = dict(zip(record, zip(*records, strict=True), strict=True))
    for name, values in by_rank.items():
        if name not in may_differ and len(set(values)) > 1:
            word, free = name.replace("_", " "), " and ".join(may_differ).replace("_", " ")
            only = f"; only the {free} may differ" if free else ""
            raise RankMismatchError(
                f"the ranks differ in {word}: {_by_value(name, values)}.",
                f"Call with the same {word} on every rank of the group{only}.",
            )
    return by_rank


@lru_cache(maxsize=64)
def _plan(ranks: int, heads: int, kv_heads: int, tokens: tuple[int, ...]) -> Plan:
    return make_plan(ranks=ranks, heads=heads, kv_heads=kv_heads, tokens=tokens)


def _by_value(name: str, by_rank: tuple[int, ...]) -> str:
    """For example: 8 on ranks 0, 1, 3; 4 on rank 2."""
    words = []
    for value in dict.fromkeys(by_rank):
        ranks = [str(rank) for rank, other in enumerate(by_rank) if other == value]
        more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
        plural = "s" if len(ranks) > 1 else ""
        words.append(f"{_readable(name, value)} on rank{plural} {', '.join(ranks[:8])}{more}")
    return "; ".join(words)


def _readable(name: str, value: int) -> str:
    if name.endswith("dtype"):
        return str(EVERY_DTYPE[value]).removeprefix("torch.")
    if name == "layout":
        return repr(list(LAYOUTS)[value])
    if name == "requires_grad":
        return ("not needed", "needed by the local attention alone", "needed")[value]
    return str(value)
