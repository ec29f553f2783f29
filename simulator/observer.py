"""Tells the instruments of a run about every operation of every rank.

Operations of PyTorch come through a TorchDispatchMode. It is entered before the rank's program begins, because a mode
that is entered inside of one node of a backward pass is gone at the next. A few methods of tensors read memory without
an operation, and backward passes begin in C++: these are replaced while a world runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type

from . import process_state, streams
from .accesses import Access, accesses_of, results_of
from .buffers import unobserved
from .instruments import Instruments
from .rank_modes import RankMode

_WITH_MEMORY = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
_READING_METHODS = ("tolist", "numpy", "__dlpack__", "__deepcopy__", "__reduce_ex__")


class Observer(RankMode):
    """Watches the operations of one rank."""

    def __init__(self, rank: int, instruments: Instruments) -> None:
        super().__init__()
        self._rank = rank
        self._watching = [x for x in instruments.all if x.watches_operations]

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types and any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # a subclass, such as DTensor, takes itself apart first
        kwargs, rank = kwargs or {}, self._rank
        watching = [x for x in self._watching if x.is_watching(rank)]
        if not watching or any(kind not in _WITH_MEMORY for kind in types):  # as a fake tensor
            return operation(*args, **kwargs)
        accesses = accesses_of(operation, args, kwargs)
        for instrument in watching:
            instrument.before(rank, operation, accesses)
        result = operation(*args, **kwargs)
        accesses += results_of(operation, result)
        for instrument in watching:
            instrument.after(rank, operation, args, kwargs, result, accesses)
        return result


def watching(rank: int, instruments: Instruments) -> contextlib.AbstractContextManager[Any]:
    """Watch a rank, if one of the instruments wants to see its operations."""
    if any(x.watches_operations for x in instruments.all):
        return Observer(rank, instruments)
    return contextlib.nullcontext()


@contextlib.contextmanager
def routed() -> Iterator[None]:
    """While this is open, rank threads report what does not come through an operation, and streams are virtual."""
    if process_state.current() is not None:  # a world inside of a rank
        yield
        return
    with contextlib.ExitStack() as undo:
        for name in _READING_METHODS:
            _replace(undo, Tensor, name, _reading(getattr(Tensor, name), name))
        for owner, name, replacement in streams.replacements():
            _replace(undo, owner, name, replacement)
        _replace(undo, torch.autograd, "_engine_run_backward", _beginning_backward)
        yield


def _replace(undo: contextlib.ExitStack, owner: Any, name: str, replacement: Any) -> None:
    if name in vars(owner):
        undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, replacement)


def _reading(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        state = process_state.current()
        if state is not None:
            with unobserved():
                for instrument in state.run.instruments.all:
                    if instrument.watches_operations and instrument.is_watching(state.rank):
                        instrument.before(state.rank, f"Tensor.{name}", [Access(self, True, False)])
        return method(self, *args, **kwargs)

    return read


_run_backward = torch.autograd._engine_run_backward


def _beginning_backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
    state = process_state.current()
    if state is not None:
        inputs = args[3] if len(args) > 3 and kwargs.get("accumulate_grad") else ()
        state.run.instruments.backward(state.rank, tensors, inputs, kwargs.get("accumulate_grad", False))
    return _run_backward(tensors, *args, **kwargs)
