"""Which memory an operation of PyTorch reads and writes.

An operation's schema says which arguments it writes and which results are views. What is left is read. Views, and
operations that look at shapes only, touch no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
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


def allocates(operation: Any) -> bool:
    """Whether an operation's results are memory of their own, filled or not."""
    return _makes_memory(operation) or "empty" in _name(operation) or _name(operation) == "lift_fresh"


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes of the process's memory: from `start`, `width` bytes for each index of `dims`.

    Attributes:
        dims: (stride in bytes, size) of each dim, the largest stride first; none for bytes without a gap.
    """

    start: int
    dims: tuple[tuple[int, int], ...]
    width: int

    @property
    def first(self) -> int:
        """The first byte."""
        return self.start

    @property
    def end(self) -> int:
        """Behind the last byte."""
        return self.start + self.width + sum(stride * (size - 1) for stride, size in self.dims)

    def meets(self, other: Region) -> bool:
        """Whether a byte belongs to both."""
        if self.first >= other.end or other.first >= self.end:
            return False
        if not self.dims:
            return _touches(other.start, other.dims, other.width, self.first, self.end)
        if not other.dims:
            return _touches(self.start, self.dims, self.width, other.first, other.end)
        return bool(np.isin(self._bytes(), other._bytes()).any())

    def covers(self, other: Region) -> bool:
        """Whether all bytes of the other belong to this one, which must be without a gap."""
        return self == other or (not self.dims and self.first <= other.first and other.end <= self.end)

    def _bytes(self) -> np.ndarray:
        places = np.arange(self.start, self.start + self.width)
        for stride, size in self.dims:
            places = (places[:, None] + stride * np.arange(size)).reshape(-1)
        return places


def region_of(tensor: Tensor) -> Region:
    """The bytes of a tensor's elements."""
    width, start = tensor.element_size(), tensor.data_ptr()
    if not start:  # no memory, as on the device "meta"
        return Region(0, (), 0)
    if tensor.is_contiguous():
        return Region(start, (), width * tensor.numel())
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    return Region(
        start, tuple(sorted(((x * width, size) for x, size in dims if size > 1), reverse=True)), width
    )


def _touches(start: int, dims: Sequence[tuple[int, int]], width: int, first: int, end: int) -> bool:
    """Whether one of these bytes lies in [first, end)."""
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
    schema, name = operation._schema, _name(operation)
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
    """Whether it fills memory that it has allocated: its results are neither views nor arguments, nor left unfilled."""
    if not hasattr(operation, "_schema"):
        return not isinstance(operation, str)
    name = _name(operation)
    if operation.namespace in _COMMUNICATION or name in ("_unsafe_view", "record_stream") or "empty" in name:
        return False
    return not name.startswith("unsafe_") and all(x.alias_info is None for x in operation._schema.returns)


def _name(operation: Any) -> str:
    return operation._schema.name.split("::")[-1] if hasattr(operation, "_schema") else str(operation)
