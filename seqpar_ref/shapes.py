"""The axis words and the layouts.

| word | is |
|---|---|
| `b`, batch | rows of the batch, whole on every rank |
| `s`, sequence | tokens: `seq_local` of them on a rank, `seq` on all ranks together |
| `h`, heads | query heads or kv heads: `heads` in all, `heads_local` on a rank |
| `d`, dim | the vector of one token and one head |

A layout is the order of these words in a tensor. `dim` always comes last.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import LayoutError, ShapeError, TensorError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Function = TypeVar("Function", bound=Callable[..., Any])


def no_type_check(function: Function) -> Function:
    """Mark a function that checks its own input: the shape checks that run in pytest leave it alone.

    jaxtyping's import hook knows the decorator by this name. Without it the hook would refuse bad input before the
    function can do so with its own error. The annotations stay true, and static type checkers use them.
    """
    return function


@dataclass(frozen=True)
class Layout:
    """Where each axis word stands: `name` and the tensor dims of batch, sequence and heads."""

    name: str
    batch: int
    sequence: int
    heads: int

    def shape(self, batch: int, tokens: int, heads: int, dim: int) -> tuple[int, ...]:
        """The shape of a tensor of these sizes in this layout."""
        sizes = {self.batch: batch, self.sequence: tokens, self.heads: heads, 3: dim}
        return tuple(sizes[position] for position in range(4))


LAYOUTS = {
    name: Layout(name, *(name.split().index(word) for word in "bsh"))
    for name in ("b s h d", "s b h d", "b h s d")
}


@no_type_check
def layout_of(name: str) -> Layout:
    """The layout of that name.

    Raises:
        LayoutError: there is none of that name.
    """
    if not isinstance(name, str) or name not in LAYOUTS:
        known = ", ".join(repr(known) for known in LAYOUTS)
        raise LayoutError(f"{name!r} is no layout.", f"Use one of {known}.")
    return LAYOUTS[name]


@no_type_check
def check_tensor(name: str, tensor: Tensor, layout: Layout) -> None:
    """Refuse what is no floating-point tensor of four dims.

    Raises:
        TensorError: not a dense tensor, or of another dtype than float64, float32, bfloat16 and float16.
        ShapeError: not four dims, or a head dim of zero.
    """
    if not isinstance(tensor, Tensor):
        raise TensorError(
            f"{name} is a {type(tensor).__name__}, not a tensor.",
            f"Pass a tensor in the layout {layout.name!r}.",
        )
    if tensor.dtype not in DTYPES or tensor.layout is not torch.strided:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TensorError(f"{name} is {tensor.layout} {tensor.dtype}.", f"Use a dense tensor of {allowed}.")
    if tensor.ndim != 4:
        raise ShapeError(
            f"{name} has {tensor.ndim} dims, {tuple(tensor.shape)}, where {layout.name!r} has 4.",
            "Split merged dims first, for example with tensor.unflatten(-1, (heads, head_dim)).",
        )
    if tensor.shape[3] == 0:
        raise ShapeError(f"{name} has head dim 0, {tuple(tensor.shape)}.", "Use a head dim of at least 1.")
