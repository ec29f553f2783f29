"""What every public function asks of its input before it does anything."""

import math
from collections.abc import Callable, Iterable, Mapping, Set
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import ArgumentError, PlanError, ShapeError, TensorError
from .shapes import Layout

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Checked = TypeVar("Checked", bound=Callable[..., Any])


def no_type_check(checked: Checked) -> Checked:
    """Mark what checks its own input: the shape checks that run in pytest leave it alone.

    jaxtyping's import hook knows the decorator by this name. Without it the hook would refuse bad input
    first, and callers would not see the named error. The annotations stay true, and static type checkers use
    them.
    """
    return checked


def is_integer(value: object) -> bool:
    """Whether it is an integer, of Python or numpy; a bool is none."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def is_finite(value: object) -> bool:
    """Whether it is a real number that a float can hold; a bool is none, nor is nan or infinity."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements are in one strided piece of memory: neither sparse nor nested."""
    return tensor.layout is torch.strided and not tensor.is_nested


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd follows what is computed from them."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@no_type_check
def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the choices.

    Raises:
        ArgumentError: with the choices.
    """
    if not isinstance(value, str) or value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise ArgumentError(f"{name} is {value!r}.", f"Use one of {known}.")


@no_type_check
def integers(name: str, values: Iterable[int]) -> tuple[int, ...]:
    """The values as a tuple of Python integers.

    Raises:
        PlanError: one of them is no integer, or is negative.
    """
    unordered = isinstance(values, str | bytes | Mapping | Set)
    if unordered or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        shown = " ".join(repr(values).split())
        raise PlanError(f"{name} is {shown}.", "Use integers: one, or a list of them.")
    values = tuple(values)
    for value in values:
        if not is_integer(value):
            kind = type(value).__name__
            raise PlanError(f"{name} holds {value!r}, a {kind}.", "Use integers, not floats or bools.")
        if value < 0:
            raise PlanError(f"{name} holds {value}.", "Use integers of at least 0.")
    return tuple(int(value) for value in values)


@no_type_check
def check_tensor(name: str, tensor: Tensor, layout: Layout) -> None:
    """Refuse what is no floating-point tensor of four dims.

    Raises:
        TensorError: not a dense tensor, or of another dtype than float64, float32, bfloat16 and float16.
        ShapeError: not four dims, or a head dim of zero.
    """
    if not isinstance(tensor, Tensor):
        kind = type(tensor).__name__
        raise TensorError(f"{name} is a {kind}.", f"Pass a tensor in the layout {layout.name!r}.")
    if tensor.dtype not in DTYPES or not is_dense(tensor):
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        found = tensor.dtype if is_dense(tensor) else "nested" if tensor.is_nested else tensor.layout
        raise TensorError(f"{name} is a {found} tensor.", f"Use a dense tensor of {allowed}.")
    if tensor.ndim != 4:
        raise ShapeError(
            f"{name} is {tuple(tensor.shape)}, {tensor.ndim} dims; the layout {layout.name!r} has 4.",
            "Split merged dims first, for example with tensor.unflatten(-1, (heads, head_dim)).",
        )
    if tensor.shape[3] == 0:
        raise ShapeError(f"{name} is {tuple(tensor.shape)}: head dim 0.", "Use a head dim of at least 1.")
