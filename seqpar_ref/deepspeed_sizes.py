"""What each rank brings to a call of `deepspeed.DistributedAttention`, and the plans that all make of it.

In the original the number of heads is a global that the first call sets (D6), and nobody compares tokens (D14).

Source: `deepspeed/sequence/layer.py` of deepspeed 0.19.0, and D6, D7, D14 in docs/defects.md.
"""

from dataclasses import asdict, replace
from functools import lru_cache

from torch import Tensor

from .agreement import EVERY_DTYPE, Record, gather
from .checks import check_tensor, no_type_check
from .deepspeed_rotary import check_table_tokens, table_sizes
from .errors import ShapeError, TensorError
from .group import TorchGroup, check_size
from .plan import Plan, make_plan
from .shapes import Layout

RECORD_BYTES = 120  # what each rank sends to each other one where no plan was made


@no_type_check
def check_shards(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> None:
    """Refuse query, key and value that do not belong together. The query may have other tokens than the others.

    Args:
        query: `[batch, tokens, heads, dim]` in the order of `layout`.
        key, value: `[batch, kv tokens, kv_heads, dim]` in that order.

    Raises:
        TensorError, ShapeError: with the sizes.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor, layout)
        if tensor.device != query.device:
            raise TensorError(
                f"query is on {query.device}, {name} on {tensor.device}.",
                f"Move {name} to the device of query.",
            )
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)} ({layout.name})"
    if not query.shape[layout.batch] == key.shape[layout.batch] == value.shape[layout.batch]:
        raise ShapeError(f"batch differs: {shapes}.", "Give query, key and value the same batch.")
    if key.shape[:3] != value.shape[:3] or key.shape[3] != query.shape[3]:
        raise ShapeError(
            f"sizes differ: {shapes}.",
            "Give key and value the same tokens and heads, and query and key the same head dim.",
        )
    heads, kv_heads = query.shape[layout.heads], key.shape[layout.heads]
    if not heads or not kv_heads or heads % kv_heads:
        raise ShapeError(
            f"{kv_heads} kv heads cannot serve {heads} query heads in equal groups: {shapes}.",
            "Give a number of kv heads that divides the query heads, or the indices that the tensors have.",
        )


def plans_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    layout: Layout,
    group: TorchGroup,
    plan: Plan | None,
    requires_grad: int,
) -> tuple[Plan, Plan]:
    """Who owns what of the query, and of key and value. They differ in tokens where attention is cross attention.

    Without a plan the ranks exchange a record of 15 integers, 120 bytes to each other rank.

    Args:
        query, key, value: `[batch, tokens, heads, dim]` in the order of `layout`.
        tables: cosines and sines, see `checked_tables`.
        group: the ranks that share the sequence.
        plan: one made beforehand, for both; None to make them here.
        requires_grad: whose gradients travel, see `agreement.gradients`.

    Raises:
        RankMismatchError: the ranks differ in anything but their tokens. The same error on every rank.
        RotaryError: tables do not fit the tokens. Without a plan the same error on every rank.
        GroupError, ShapeError: the plan is for another number of ranks, or for other sizes.
        PlanError: more tokens and heads than can be counted.
    """
    own = Record.of(query, layout, key.shape[layout.heads], value.shape[3], requires_grad)
    kv_tokens = key.shape[layout.sequence]
    if plan is not None:
        _check_given(plan, own, kv_tokens, tables, group, layout)
        return plan, plan
    record = asdict(own) | {
        "kv_tokens": kv_tokens,
        "key_dtype": EVERY_DTYPE.index(key.dtype),
        "value_dtype": EVERY_DTYPE.index(value.dtype),
        **table_sizes(tables),
    }
    sizes = gather(group, record, ("tokens", "kv_tokens", "rotary_tokens"), query.device)
    plan, kv_plan = _plans(own.query_heads, own.kv_heads, sizes["tokens"], sizes["kv_tokens"])
    if tables is not None:
        check_table_tokens(dict(enumerate(sizes["rotary_tokens"])), plan, kv_plan)
    return plan, kv_plan


def _check_given(
    plan: Plan,
    own: Record,
    kv_tokens: int,
    tables: tuple[Tensor, Tensor] | None,
    group: TorchGroup,
    layout: Layout,
) -> None:
    """Refuse what a rank has where a plan, made beforehand, says something else."""
    check_size(group, plan.ranks)
    tokens = len(plan.tokens_of(group.rank))
    planned = (tokens, tokens, plan.heads, plan.kv_heads)
    found = (own.tokens, kv_tokens, own.query_heads, own.kv_heads)
    if found != planned:
        raise ShapeError(
            f"rank {group.rank} has {found[0]} tokens of the query, {found[1]} of the key, {found[2]} query heads "
            f"and {found[3]} kv heads ({layout.name}); the plan says {', '.join(map(str, planned))}.",
            "Pass tensors of those sizes, a plan made for them, or no plan.",
        )
    if tables is not None:
        check_table_tokens({group.rank: len(tables[0])}, plan, plan)


@lru_cache(maxsize=64)
def _plans(
    heads: int, kv_heads: int, tokens: tuple[int, ...], kv_tokens: tuple[int, ...]
) -> tuple[Plan, Plan]:
    plan = make_plan(ranks=len(tokens), heads=heads, kv_heads=kv_heads, tokens=tokens)
    return plan, replace(plan, tokens_by_rank=kv_tokens)
