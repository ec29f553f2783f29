"""What is asked of a shard before it travels: that it is one, and fits the plan, the group and its fellows.

Each check is one that a rank can make alone, so a bad shard is refused on its rank before it communicates.

Source: this package's own.
"""

from torch import Tensor

from .checks import check_choice, check_tensor, no_type_check
from .errors import ShapeError, TensorError
from .group import Group, GroupLike, check_size, group_of
from .plan import Heads, Plan, check_plan
from .shapes import Layout, layout_of


@no_type_check
def check_call(plan: Plan, group: GroupLike, layout: str, heads: Heads) -> tuple[Heads, Group, Layout]:
    """What every exchange checks first.

    Returns:
        `heads`, the group as a `Group`, and the `Layout` of that name.

    Raises:
        ArgumentError, LayoutError, GroupError: something that is no plan, an unknown layout or choice of heads, a
            group of another size than the plan's.
    """
    check_plan(plan)
    check_choice("heads", heads, ("query", "kv"))
    order = layout_of(layout)
    member = group_of(group)
    check_size(member, plan.ranks)
    return heads, member, order


@no_type_check
def check_shares(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, group: GroupLike, layout: str
) -> tuple[Group, Layout]:
    """Refuse query, key and value that do not belong together, or not to this rank of the plan.

    Args:
        query, key, value: `[batch, seq_local, heads, dim]` in the order of `layout`.

    Returns:
        The group as a `Group`, and the `Layout` of that name.

    Raises:
        GroupError, LayoutError, TensorError, ShapeError, ArgumentError: with the sizes.
    """
    _, member, order = check_call(plan, group, layout, "query")
    check_qkv(query, key, value, order)
    tokens = len(plan.tokens_of(member.rank))
    check_sizes("query", query, order, member.rank, tokens, plan.heads)
    check_sizes("key", key, order, member.rank, tokens, plan.kv_heads)
    return member, order


@no_type_check
def check_qkv(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> None:
    """Refuse query, key and value that do not belong together.

    Args:
        query, key, value: four dims in the order of `layout`, of any shape.

    Raises:
        TensorError, ShapeError: with the sizes.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor, layout)
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise TensorError(
                f"query is {query.dtype} on {query.device}, {name} is {tensor.dtype} on {tensor.device}.",
                f"Convert {name} to the dtype and device of query.",
            )
    for word, dim in (("batch", layout.batch), ("tokens", layout.sequence)):
        if not query.shape[dim] == key.shape[dim] == value.shape[dim]:
            shapes = _shapes(query, key, value, layout)
            raise ShapeError(f"{word} differ: {shapes}.", f"Give query, key and value the same {word}.")
    if key.shape[layout.heads] != value.shape[layout.heads]:
        shapes = _shapes(query, key, value, layout)
        raise ShapeError(f"kv heads differ: {shapes}.", "Give key and value the same heads.")
    if query.shape[3] != key.shape[3]:
        shapes = _shapes(query, key, value, layout)
        raise ShapeError(f"head dims differ: {shapes}.", "Give query and key the same head dim.")


def _shapes(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> str:
    return f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)} ({layout.name})"


@no_type_check
def check_sizes(name: str, tensor: Tensor, layout: Layout, rank: int, tokens: int, heads: int) -> None:
    """Refuse a tensor, four dims in the order of `layout`, that has not these tokens and heads.

    Raises:
        ShapeError: with both numbers.
    """
    found = (tensor.shape[layout.sequence], tensor.shape[layout.heads])
    if found != (tokens, heads):
        raise ShapeError(
            f"{name} is {tuple(tensor.shape)}, in {layout.name!r} {found[0]} tokens and {found[1]} heads; "
            f"the plan says {tokens} tokens and {heads} heads on rank {rank}.",
            "Pass a tensor of those sizes, the layout that it has, or a plan made for it.",
        )
