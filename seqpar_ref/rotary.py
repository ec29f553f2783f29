r"""Rotary position embedding by global position.

A rotated vector depends on its own position only, so each rank can rotate its own tokens before the exchange: it needs
their global positions and no more. Pair i of a vector at position p turns by the angle

$$\phi_{p,i} = p \, \theta^{-2i/r}, \quad i = 0 \dots r/2 - 1, \quad r = \text{rotary dim}$$

Two conventions say which two elements are a pair (Su et al., 2021, arXiv:2104.09864):

| convention | pair i | used by |
|---|---|---|
| half-split | elements i and i + r/2 | GPT-NeoX, Llama in transformers |
| interleaved | elements 2i and 2i + 1 | the paper, GPT-J |

Elements from r on are left alone.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .errors import PlanError, RotaryError
from .plan import Plan
from .shapes import Layout, check_tensor, layout_of, no_type_check

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@no_type_check
def apply_rotary(
    x: Float[Tensor, "_ _ _ dim"],
    position_ids: Int[Tensor, "*batch seq"] | None,
    *,
    theta: float = 10000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    layout: str = "b s h d",
    cos: Float[Tensor, "*batch positions angles"] | None = None,
    sin: Float[Tensor, "*batch positions angles"] | None = None,
) -> Float[Tensor, "_ _ _ dim"]:
    r"""Turn each pair of elements by its angle: $(a, b) \to (a \cos\phi - b \sin\phi,\ b \cos\phi + a \sin\phi)$.

    On a shard of the sequence give the global positions of its tokens (`position_ids_of(plan, rank)`, or any others);
    on all tokens, after the exchange, those of all tokens. The results are equal to rounding.

    Angles are computed in float64. The rotation is computed in float32, float64 for a float64 tensor, and the result
    rounded once to the dtype of `x`.

    Args:
        x: query or key, `[batch, seq, heads, dim]` in the order of `layout`.
        position_ids: integers, [seq], [batch, seq] or [1, seq]. None where `cos` and `sin` have a row for each token.
        theta: base of the angles.
        rotary_dim: how many elements turn, an even number; all of `dim` unless given.
        interleaved: which convention, see above.
        layout: "b s h d", "s b h d" or "b h s d".
        cos, sin: precomputed, both or neither. With `position_ids` tables [positions, angles] whose row p belongs to
            position p; without, a row for each token, [seq, angles] or [batch, seq, angles]. `angles` is
            rotary_dim / 2, one for each pair, or rotary_dim, one for each element.

    Raises:
        TensorError, LayoutError, ShapeError, RotaryError: sizes, dtypes and values that do not fit, with the numbers.
    """
    order = layout_of(layout)
    check_tensor("x", x, order)
    rotary_dim = _check_rotary_dim(x.shape[3] if rotary_dim is None else rotary_dim, x.shape[3])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if (cos is None) != (sin is None):
        raise RotaryError("only one of cos and sin is given.", "Give both, or neither.")
    if position_ids is not None:
        _check_position_ids(position_ids, x, order)
        position_ids = position_ids.to(x.device, torch.int64)
    if cos is not None and sin is not None:
        cos, sin = (
            _rows(name, table, position_ids, x, order, rotary_dim)
            for name, table in (("cos", cos), ("sin", sin))
        )
    elif position_ids is not None:
        cos, sin = _angles(position_ids, theta, rotary_dim)
    else:
        raise RotaryError(
            "there are neither position_ids nor cos and sin.", "Give the global positions of the tokens."
        )
    cos, sin = (
        _like(_by_element(table.to(x.device, dtype), rotary_dim, interleaved), order) for table in (cos, sin)
    )
    turned = x[..., :rotary_dim].to(dtype)
    turned = turned * cos + _quarter_turn(turned, interleaved) * sin
    return torch.cat([turned.to(x.dtype), x[..., rotary_dim:]], dim=-1)


@no_type_check
def position_ids_of(plan: Plan, rank: int, device: torch.device | None = None) -> Int[Tensor, "seq_local"]:
    """The global positions of a rank's tokens, for `apply_rotary` and for models that take position ids.

    Raises:
        PlanError: no plan, or no such rank in it.
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"plan is a {type(plan).__name__}.", "Pass what seqpar_ref.make_plan returns.")
    tokens = plan.tokens_of(rank)
    return torch.arange(tokens.start, tokens.stop, device=device)


def _angles(position_ids: Tensor, theta: float, rotary_dim: int) -> tuple[Tensor, Tensor]:
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0:
        raise RotaryError(f"theta is {theta!r}.", "Use a positive number, such as 10000.0.")
    pairs = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=position_ids.device)
    angles = position_ids[..., None] * float(theta) ** (-pairs / rotary_dim)
    return angles.cos(), angles.sin()


def _quarter_turn(
    x: Float[Tensor, "*dims rotary_dim"], interleaved: bool
) -> Float[Tensor, "*dims rotary_dim"]:
    """Each pair (a, b) as (-b, a)."""
    pair_dim, shape = (-1, (-1, 2)) if interleaved else (-2, (2, -1))
    first, second = x.unflatten(-1, shape).unbind(pair_dim)
    return torch.stack([-second, first], dim=pair_dim).flatten(-2)


def _by_element(table: Float[Tensor, "*rows angles"], rotary_dim: int, interleaved: bool) -> Tensor:
    """One column for each element, from one for each pair."""
    if table.shape[-1] == rotary_dim:
        return table
    return table.repeat_interleave(2, dim=-1) if interleaved else torch.cat([table, table], dim=-1)


def _like(table: Float[Tensor, "*batch seq rotary_dim"], layout: Layout) -> Float[Tensor, "_ _ _ rotary_dim"]:
    """Batch and sequence where the layout has them, heads of size 1."""
    if table.ndim == 2:
        table = table[None]
    return table[:, :, None].permute(*(layout_dims(layout)), 3)


def layout_dims(layout: Layout) -> tuple[int, ...]:
    """For each dim of the layout, the dim of "b s h d" that stands there."""
    words = {layout.batch: 0, layout.sequence: 1, layout.heads: 2}
    return tuple(words[position] for position in range(3))


def _rows(
    name: str, table: Tensor, position_ids: Tensor | None, x: Tensor, layout: Layout, rotary_dim: int
) -> Tensor:
    """The rows of cos or sin that belong to the tokens: [seq, angles] or [batch, seq, angles]."""
    if not isinstance(table, Tensor) or not table.is_floating_point():
        raise RotaryError(f"{name} is {_describe(table)}.", "Pass a floating-point tensor.")
    batch, tokens = x.shape[layout.batch], x.shape[layout.sequence]
    widths = (rotary_dim // 2, rotary_dim)
    if table.ndim < 2 or table.shape[-1] not in widths:
        raise RotaryError(
            f"{name} is {tuple(table.shape)}, the rotary dim is {rotary_dim}.",
            f"Give it {widths[0]} columns, one for each pair, or {widths[1]}; or say rotary_dim.",
        )
    if position_ids is None:
        if table.shape[:-1] not in ((tokens,), (batch, tokens), (1, tokens)):
            raise RotaryError(
                f"{name} is {tuple(table.shape)} for {tokens} tokens and batch {batch} ({layout.name}).",
                f"Give one row for each token, [{tokens}, {table.shape[-1]}], or the position_ids that pick rows.",
            )
        return table
    if table.ndim != 2:
        raise RotaryError(
            f"{name} is {tuple(table.shape)}, and position_ids are given.",
            "Give a table [positions, angles], or position_ids=None where each token has its row already.",
        )
    if position_ids.numel() and not 0 <= int(position_ids.min()) <= int(position_ids.max()) < len(table):
        raise RotaryError(
            f"positions {int(position_ids.min())} to {int(position_ids.max())} are not all among the {len(table)} "
            f"rows of {name}.",
            "Give a longer table, or position_ids=None where each token has its row already.",
        )
    return table.to(position_ids.device)[position_ids]


def _check_rotary_dim(rotary_dim: int, dim: int) -> int:
    if (
        isinstance(rotary_dim, bool)
        or not isinstance(rotary_dim, int)
        or rotary_dim % 2
        or not 0 <= rotary_dim <= dim
    ):
        raise RotaryError(
            f"rotary_dim is {rotary_dim!r}, the head dim {dim}.",
            f"Use an even number from 0 to {dim - dim % 2}.",
        )
    return rotary_dim


def _check_position_ids(position_ids: Tensor, x: Tensor, layout: Layout) -> None:
    if not isinstance(position_ids, Tensor) or position_ids.dtype not in INTEGERS:
        raise RotaryError(f"position_ids is {_describe(position_ids)}.", "Pass a tensor of integers.")
    batch, tokens = x.shape[layout.batch], x.shape[layout.sequence]
    if tuple(position_ids.shape) not in ((tokens,), (batch, tokens), (1, tokens)):
        raise RotaryError(
            f"position_ids is {tuple(position_ids.shape)}; x has {tokens} tokens and batch {batch}, "
            f"{tuple(x.shape)} read as {layout.name!r}.",
            f"Give one position for each token, [{tokens}] or [{batch}, {tokens}], or the layout that x has.",
        )


def _describe(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
