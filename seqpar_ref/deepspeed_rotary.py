"""Rotary embedding by given cosines and sines, under the name that `deepspeed.sequence.layer` has for it.

`rotary.py` has more to say: positions instead of tables, and the interleaved convention.

Source: `apply_rotary_pos_emb` in `deepspeed/sequence/layer.py` of deepspeed 0.19.0.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .agreement import EVERY_DTYPE
from .checks import DTYPES, is_dense, no_type_check
from .device import without_autocast
from .errors import RotaryError
from .plan import Plan
from .shapes import Layout


@no_type_check
def apply_rotary_pos_emb(
    t: Float[Tensor, "... dim"],
    freqs_cos: Float[Tensor, "... rotary_dim"],
    freqs_sin: Float[Tensor, "... rotary_dim"],
) -> Float[Tensor, "... dim"]:
    r"""Turn pairs in the half-split convention: elements i and i + r/2 are a pair, r the rotary dim.

    $$(a, b) \to (a \cos\phi_a - b \sin\phi_a,\ b \cos\phi_b + a \sin\phi_b)$$

    The original's docstring speaks of the interleaved convention, its code is this one (D13). Elements from r on
    are left as they are. The result has the dtype that PyTorch promotes `t` and the tables to.

    Args:
        t: query or key.
        freqs_cos, freqs_sin: one column for each element, r of them; they broadcast to `t`.

    Raises:
        RotaryError: tables that do not fit. Broadcasting `t` to the shape of the tables is one of these (D13).
    """
    _check_table("t", t)
    _check_table("freqs_cos", freqs_cos)
    _check_table("freqs_sin", freqs_sin)
    rotary_dim = freqs_cos.shape[-1]
    turning, rest = t[..., :rotary_dim], t[..., rotary_dim:]
    shapes = f"t is {tuple(t.shape)}, cos {tuple(freqs_cos.shape)} and sin {tuple(freqs_sin.shape)}"
    if rotary_dim % 2 or not rotary_dim or {rotary_dim, freqs_sin.shape[-1]} != {turning.shape[-1]}:
        raise RotaryError(
            f"{shapes}.", "Give cos and sin the same even number of columns, at most the dim of t."
        )
    for table in (freqs_cos, freqs_sin):
        if not _broadcasts(table.shape, turning.shape):
            raise RotaryError(f"{shapes}.", "Give them the dims of t, each of its size or of size 1.")
    first, second = turning.chunk(2, dim=-1)
    with without_autocast(t.device):  # which refuses to join tensors of another half type than its own
        turned = (turning * freqs_cos) + (torch.cat((-second, first), dim=-1) * freqs_sin)
        return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


@no_type_check
def checked_tables(
    rotary_pos_emb: Sequence[Tensor] | None, query: Tensor, layout: Layout
) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines as a pair. What is none for these tensors, such as a mask in its place, is refused.

    Args:
        rotary_pos_emb: cosines and sines, each [sequence, 1 or batch, 1, rotary dim]; None for no rotary.
        query: four dims in the order of the layout.

    Raises:
        RotaryError: what does not fit, with the numbers.
    """
    if rotary_pos_emb is None:
        return None
    pair, kind = rotary_pos_emb, type(rotary_pos_emb).__name__
    is_tensor = isinstance(pair, Tensor) and pair.ndim > 0  # cosines and sines may be stacked
    if not (is_tensor or isinstance(pair, Sequence)) or len(pair) != 2:
        found = tuple(pair.shape) if isinstance(pair, Tensor) else f"a {kind}"
        raise RotaryError(
            f"rotary_pos_emb is {found}.",
            "Pass (cos, sin), or None; what goes to the local attention comes behind it, or by keyword.",
        )
    cos, sin = pair
    _check_table("the cosines", cos)
    _check_table("the sines", sin)
    batch, dim = query.shape[layout.batch], query.shape[3]
    fits = cos.ndim == 4 and cos.shape[1] in (1, batch) and cos.shape[2] == 1 and 0 < cos.shape[3] <= dim
    if not fits or cos.shape != sin.shape or cos.shape[3] % 2:
        raise RotaryError(
            f"the cosines are {tuple(cos.shape)}, the sines {tuple(sin.shape)}; batch {batch}, head dim {dim}.",
            f"Give both [sequence, 1 or {batch}, 1, rotary dim], an even rotary dim of at most {dim}.",
        )
    if {cos.device, sin.device} != {query.device}:
        raise RotaryError(
            f"the cosines are on {cos.device}, the sines on {sin.device}, the query on {query.device}.",
            f"Move both tables to {query.device}.",
        )
    return cos, sin


def table_sizes(tables: tuple[Tensor, Tensor] | None) -> dict[str, int]:
    """What the ranks tell each other of their tables: their tokens, rotary dim and dtype, all 0 for no tables.

    Args:
        tables: cosines and sines, each [tokens, 1 or batch, 1, rotary dim], or None.
    """
    tokens, dim, dtype = 0, 0, 0
    if tables is not None:
        cos, sin = tables
        tokens, dim = cos.shape[0], cos.shape[3]
        dtype = EVERY_DTYPE.index(torch.promote_types(cos.dtype, sin.dtype))
    return {"rotary_tokens": tokens, "rotary_dim": dim, "rotary_dtype": dtype}


@no_type_check
def check_table_tokens(table_tokens: Mapping[int, int], plan: Plan, kv_plan: Plan) -> None:
    """Refuse tables that do not fit the tokens.

    Args:
        table_tokens: the number of tokens that the tables are for, by the rank that has them.
        plan, kv_plan: who owns what of the query, and of the key.

    Raises:
        RotaryError: tables are neither for all tokens nor for the rank's, or the key has other tokens than the
            query.
    """
    if kv_plan != plan:
        raise RotaryError(
            f"the query has {plan.tokens_by_rank} tokens by rank, the key {kv_plan.tokens_by_rank}: one table of "
            "angles cannot turn both.",
            "Rotate query and key before the call, and pass no rotary_pos_emb.",
        )
    for rank, tokens in table_tokens.items():
        own = plan.tokens_by_rank[rank]
        if tokens not in (own, plan.tokens):
            raise RotaryError(
                f"cosines and sines of rank {rank} are for {tokens} tokens; there are {plan.tokens}, {own} of them on "
                "that rank.",
                f"Give them for all {plan.tokens} tokens, or for these {own}.",
            )


def own_tables(
    tables: tuple[Tensor, Tensor] | None, plan: Plan, rank: int, layout: Layout
) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines of the rank's own tokens, in the layout of its query.

    Args:
        tables: cosines and sines, each [tokens, 1 or batch, 1, rotary dim], checked by `check_table_tokens`.
        plan, layout: who owns what; where each dim stands.
        rank: this rank in the group, from 0.
    """
    if tables is None:
        return None
    cos, sin = tables
    own = plan.tokens_of(rank)
    if len(cos) == plan.tokens:
        cos, sin = cos[own.start : own.stop], sin[own.start : own.stop]
    places = layout.sequence, layout.batch, layout.heads
    return cos.movedim((0, 1, 2), places), sin.movedim((0, 1, 2), places)


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of that shape broadcasts to the other one, and not the other way."""
    own = to[len(to) - len(shape) :] if len(shape) <= len(to) else ()
    return len(own) == len(shape) and all(size in (1, other) for size, other in zip(shape, own, strict=True))


def _check_table(name: str, table: object) -> None:
    if not isinstance(table, Tensor) or table.dtype not in DTYPES or not is_dense(table) or not table.ndim:
        found = (
            f"a {table.dtype} tensor {tuple(table.shape)}"
            if isinstance(table, Tensor)
            else type(table).__name__
        )
        raise RotaryError(f"{name} is {found}.", "Pass a dense floating-point tensor.")
