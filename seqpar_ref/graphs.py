"""What the graphs of torch.compile and of activation checkpointing have to know of a collective.

Source: docs.pytorch.org/docs/stable/generated/torch.compiler.disable.html and .../checkpoint.html.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

Eager = TypeVar("Eager", bound=Callable[..., Any])


def outside_graphs(function: Eager) -> Eager:
    """Under torch.compile, leave the graph for this call: a collective among ranks stays plain Python."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def recompute_here(ctx: Any) -> None:
    """Ask for the saved tensor of an autograd node that is about to communicate.

    A non-reentrant checkpoint recomputes when a saved tensor is first asked for. Each exchange saves one and
    asks for it before it communicates, so all ranks recompute at the same collective, without heads or with.
    """
    _ = ctx.saved_tensors
