"""Which memory an operation of PyTorch reads and writes.

An operation's schema says which arguments it writes and which results are views. What is left is read. Views, and
operations that look at shapes only, touch no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_SHAPES_ONLY = """
    _unsafe_view unsafe_split unsafe_split_with_sizes unsafe_chunk empty_like zeros_like ones_like full_like rand_like
    randn_like randint_like new_empty new_empty_strided new_zeros new_ones new_full is_same_size set_ resize_
    resize_as_ record_stream _has_compatible_shallow_copy_type _version requires_grad_ sym_size sym_stride sym_numel
    sym_storage_offset size stride storage_offset dim numel is_contiguous
"""
_OVERWRITES = """
    copy_ fill_ zero_ uniform_ normal_ random_ bernoulli_ exponential_ geometric_ cauchy_ log_normal_ index_put_
    write_rows _foreach_copy_ _foreach_zero_
"""
_COMMUNICATION = frozenset(("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "symm_mem"))


Role = tuple[bool, bool] | None
"""Whether an argument is read and written; None for one that is not touched."""


@dataclass(frozen=True, slots=True)
class Access:
    """A tensor whose elements an operation reads, or writes, or both."""

    tensor: Tensor
    reads: bool
    writes: bool

    def __str__(self) -> str:
        return "reads and writes" if self.reads and self.writes else "writes" if self.writes else "reads"


def accesses_of(operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Access]:
    """What an operation does with the memory of its arguments."""
    positional, named = _roles(operation)
    if positional is None:  # without a schema: a higher-order operator
        return [Access(x, True, False) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    found: list[Access] = []
    for value, role in zip(args, positional, strict=False):
        found += _with_role(value, role)
    for name, value in kwargs.items():
        found += _with_role(value, named.get(name))
    return found


def results_of(operation: Any, result: Any) -> list[Access]:
    """What an operation writes to memory that it has allocated."""
    if not _makes_memory(operation):
        return []
    values = (result,) if isinstance(result, Tensor) else pytree.tree_leaves(result)
    return [Access(x, False, True) for x in values if isinstance(x, Tensor)]


def touches(tensor: Tensor, first: int, end: int) -> bool:
    """Whether an element of the tensor lies among the bytes [first, end) of the process's memory."""
    start = tensor.data_ptr()
    if not start or start >= end or not tensor.numel():
        return False
    width = tensor.element_size()
    dims = sorted(
        (
            (stride * width, size)
            for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
            if size > 1
        ),
        reverse=True,
    )
    return _touches(start, dims, width, first, end)


def _touches(start: int, dims: list[tuple[int, int]], width: int, first: int, end: int) -> bool:
    """The same for dims as (stride, size) in bytes, the largest stride first."""
    if not dims:
        return start < end and first < start + width
    (stride, size), inner = dims[0], dims[1:]
    span = sum(step * (count - 1) for step, count in inner) + width
    if start + stride * (size - 1) + span <= first or start >= end:
        return False
    if stride < span:  # elements that overlap, as those of unfold: all between the first and the last count
        return True
    nearest = max(
        0, -(-(first - start - span + 1) // stride)
    )  # the first index whose span ends behind `first`
    farthest = min(size - 1, (end - start - 1) // stride)  # the last index that begins before `end`
    return farthest > nearest or (
        farthest == nearest and _touches(start + stride * nearest, inner, width, first, end)
    )


def _with_role(value: Any, role: Role) -> Iterator[Access]:
    if role is None or value is None:
        return
    if isinstance(value, Tensor):
        yield Access(value, *role)
    elif isinstance(value, list | tuple):
        for x in value:
            if isinstance(x, Tensor):
                yield Access(x, *role)


@cache
def _roles(operation: Any) -> tuple[list[Role] | None, dict[str, Role]]:
    """The roles of all arguments, by position and by name."""
    if not hasattr(operation, "_schema"):
        return None, {}
    schema, name = operation._schema, operation._schema.name.split("::")[-1]
    untouched = (
        name in _SHAPES_ONLY.split()
        or operation.namespace in _COMMUNICATION
        or torch.Tag.inplace_view in operation.tags
    )
    roles: dict[str, Role] = {}
    for argument in schema.arguments:
        alias = argument.alias_info
        if untouched or "Tensor" not in str(argument.type) or (alias is not None and not alias.is_write):
            roles[argument.name] = None  # an alias that is not written: the base of a view
        elif alias is not None:
            roles[argument.name] = (not argument.is_out and name not in _OVERWRITES.split(), True)
        else:
            roles[argument.name] = (True, False)
    return list(roles.values()), roles


@cache
def _makes_memory(operation: Any) -> bool:
    """Whether its results are neither views nor arguments; `empty` and its like write nothing."""
    if not hasattr(operation, "_schema"):
        return True
    schema = operation._schema
    name = schema.name.split("::")[-1]
    if operation.namespace in _COMMUNICATION or name in ("_unsafe_view", "record_stream") or "empty" in name:
        return False
    return not name.startswith("unsafe_") and all(x.alias_info is None for x in schema.returns)
