r"""Rotary position embedding by global position.

A rotated vector depends on its own position only, so each rank can rotate its own tokens before the exchange:
it needs their global positions and no more. Pair i of a vector at position p turns by the angle

$$\phi_{p,i} = p \, \theta^{-2i/r}, \quad i = 0 \dots r/2 - 1, \quad r = \text{rotary dim}$$

(Su et al., 2021). Two conventions say which two elements are a pair:

| convention | pair i | used by |
|---|---|---|
| half-split | elements i and i + r/2 | GPT-NeoX; Llama in transformers |
| interleaved | elements 2i and 2i + 1 | the paper; GPT-J |

Elements from r on are left as they are.

Source: Su et al., 2021, arXiv:2104.09864.
"""

from reprlib import repr as shortened

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .checks import check_tensor, is_dense, is_finite, is_integer, no_type_check
from .errors import ArgumentError, RotaryError
from .plan import Plan, check_plan
from .shapes import Layout, layout_of

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
    r"""Turn each pair by its angle: $(a, b) \to (a \cos\phi - b \sin\phi,\ b \cos\phi + a \sin\phi)$.

    On a shard of the sequence give the global positions of its tokens: `position_ids_of(plan, rank)`, or any
    others. On all tokens, after the exchange, give those of all tokens. The two ways are equal to rounding.

    Angles are computed in float64, the rotation in float32 (in float64 for a float64 `x`), and the result is
    rounded once to the dtype of `x`.

    Args:
        x: query or key, `[batch, seq, heads, dim]` in the order of `layout`.
        position_ids: any integers, [seq], [batch, seq] or [1, seq]; None where `cos` and `sin` say it all.
        theta: base of the angles.
        rotary_dim: r, how many elements turn, an even number; all of `dim` unless given.
        interleaved: which convention, see above.
        layout: "b s h d", "s b h d" or "b h s d".
        cos, sin: of the angles, both or neither. With `position_ids` they are tables [positions, angles]
            whose row p belongs to position p. Without, they have one row for each token of `x`, in its order:
            [seq, angles] or [batch, seq, angles]. They have r/2 columns, one for each pair, or r, one for
            each element.

    Raises:
        TensorError, LayoutError, ShapeError, RotaryError: what does not fit, with the numbers.
    """
    order = layout_of(layout)
    check_tensor("x", x, order)
    rotary_dim = _rotary_dim(rotary_dim, x.shape[3])
    if not isinstance(interleaved, bool):
        raise RotaryError(f"interleaved is {interleaved!r}.", "Use True or False.")
    if not is_finite(theta) or theta <= 0:
        raise RotaryError(f"theta is {shortened(theta)}.", "Use a positive number, such as 10000.0.")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if position_ids is not None:
        _check_position_ids(position_ids, x, order)
        position_ids = position_ids.to(x.device, torch.int64)
    if cos is not None and sin is not None:
        tables = [
            _rows(name, table, position_ids, x, order, rotary_dim)
            for name, table in (("cos", cos), ("sin", sin))
        ]
        if cos.shape != sin.shape:
            raise RotaryError(
                f"cos is {tuple(cos.shape)} and sin is {tuple(sin.shape)}.", "Give both the same shape."
            )
    elif cos is not None or sin is not None:
        raise RotaryError("only one of cos and sin is given.", "Give both, or neither.")
    elif position_ids is not None:
        tables = _angles(position_ids, theta, rotary_dim)
    else:
        raise RotaryError(
            "neither position_ids nor cos and sin are given.", "Give the tokens' global positions."
        )
    cos, sin = (_spread(table.to(x.device, dtype), rotary_dim, interleaved, order) for table in tables)
    turning = x[..., :rotary_dim].to(dtype)
    turned = turning * cos + _quarter_turn(turning, interleaved) * sin
    return torch.cat([turned.to(x.dtype), x[..., rotary_dim:]], dim=-1)


@no_type_check
def position_ids_of(plan: Plan, rank: int, device: torch.device | None = None) -> Int[Tensor, " seq_local"]:
    """The global positions of a rank's tokens, for `apply_rotary` and for models that take position ids.

    Raises:
        ArgumentError: not a plan, or no device of this machine.
        PlanError: no such rank in it.
    """
    check_plan(plan)
    tokens = plan.tokens_of(rank)
    try:
        return torch.arange(tokens.start, tokens.stop, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:  # PyTorch built without CUDA asserts
        raise ArgumentError(
            f"device {device!r} cannot be used.", 'Pass a device of this machine, such as "cpu", or None.'
        ) from error


@no_type_check
def _angles(position_ids: Int[Tensor, "*batch seq"], theta: float, rotary_dim: int) -> list[Tensor]:
    """Cosine and sine of every pair's angle at every position, [*batch, seq, rotary_dim / 2]."""
    twice_pair = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=position_ids.device)
    angles = position_ids[..., None] * float(theta) ** (-twice_pair / rotary_dim)
    return [angles.cos(), angles.sin()]


def _quarter_turn(x: Float[Tensor, "_ _ _ dim"], interleaved: bool) -> Float[Tensor, "_ _ _ dim"]:
    """Each pair (a, b) as (-b, a)."""
    half = x.shape[3] // 2
    pairs, dim = (x.unflatten(3, (half, 2)), 4) if interleaved else (x.unflatten(3, (2, half)), 3)
    a, b = pairs.unbind(dim)
    return torch.stack([-b, a], dim=dim).flatten(3)


def _spread(
    table: Float[Tensor, "*batch seq angles"], rotary_dim: int, interleaved: bool, layout: Layout
) -> Float[Tensor, "_ _ _ dim"]:
    """One column for each element, and batch, sequence and heads (of size 1) where the layout has them."""
    if table.shape[-1] != rotary_dim:
        table = table.repeat_interleave(2, dim=-1) if interleaved else torch.cat([table, table], dim=-1)
    if table.ndim == 2:
        table = table.unsqueeze(0)
    return table.unsqueeze(2).movedim((0, 1, 2), (layout.batch, layout.sequence, layout.heads))


@no_type_check
def _rows(
    name: str, table: Tensor, position_ids: Tensor | None, x: Tensor, layout: Layout, rotary_dim: int
) -> Tensor:
    """The rows of cos or sin that belong to the tokens of x: [*batch, seq, angles]."""
    if not isinstance(table, Tensor) or not table.is_floating_point() or not is_dense(table):
        raise RotaryError(f"{name} is {_describe(table)}.", "Pass a dense floating-point tensor.")
    if table.ndim < 2 or table.shape[-1] not in (rotary_dim // 2, rotary_dim):
        raise RotaryError(
            f"{name} is {tuple(table.shape)}, the rotary dim {rotary_dim}.",
            f"Give it {rotary_dim // 2} columns, one for each pair, or {rotary_dim}; or say rotary_dim.",
        )
    if position_ids is None:
        batch, tokens = x.shape[layout.batch], x.shape[layout.sequence]
        if table.shape[:-1] not in ((tokens,), (batch, tokens), (1, tokens)):
            raise RotaryError(
                f"{name} is {tuple(table.shape)} for {tokens} tokens and batch {batch} ({layout.name}).",
                f"Give a row for each token, [{tokens}, {table.shape[-1]}], or position_ids that pick rows.",
            )
        return table
    if table.ndim != 2:
        raise RotaryError(
            f"{name} is {tuple(table.shape)}, and there are position_ids.",
            "Give a table [positions, angles], or position_ids=None where each token has its row already.",
        )
    lowest, highest = (int(position_ids.min()), int(position_ids.max())) if position_ids.numel() else (0, -1)
    if lowest < 0 or highest >= len(table):
        raise RotaryError(
            f"{name} has rows 0 to {len(table) - 1}, the positions are {lowest} to {highest}.",
            "Give a longer table, or position_ids=None where each token has its row already.",
        )
    return table.to(position_ids.device)[position_ids]


@no_type_check
def _rotary_dim(rotary_dim: int | None, dim: int) -> int:
    chosen = dim if rotary_dim is None else rotary_dim
    if not is_integer(chosen) or chosen % 2 or not 2 <= chosen <= dim:
        raise RotaryError(
            f"the rotary dim is {chosen!r}, the head dim {dim}.",
            "Use an even rotary_dim from 2 to the head dim." if dim > 1 else "Use a head dim of at least 2.",
        )
    return int(chosen)


@no_type_check
def _check_position_ids(position_ids: Tensor, x: Tensor, layout: Layout) -> None:
    if (
        not isinstance(position_ids, Tensor)
        or position_ids.dtype not in INTEGERS
        or not is_dense(position_ids)
    ):
        raise RotaryError(f"position_ids is {_describe(position_ids)}.", "Pass a dense tensor of integers.")
    batch, tokens = x.shape[layout.batch], x.shape[layout.sequence]
    if tuple(position_ids.shape) not in ((tokens,), (batch, tokens), (1, tokens)):
        raise RotaryError(
            f"position_ids is {tuple(position_ids.shape)}; x has {tokens} tokens and batch {batch}, "
            f"{tuple(x.shape)} read as {layout.name!r}.",
            f"Give one position for each token, [{tokens}] or [{batch}, {tokens}], or the layout that x has.",
        )


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a {value.dtype} tensor" if is_dense(value) else f"a sparse or nested {value.dtype} tensor"
