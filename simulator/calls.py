"""What one rank passes to a collective, a send or a receive, and why a rank waits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .source_lines import Lines, lines_text

if TYPE_CHECKING:
    from .matching import Channel


@dataclass(eq=False)
class Call:
    """One rank's part in a collective.

    Attributes:
        kind: name of the collective.
        group: the channel of its process group.
        rank: rank within the group.
        agree: what all ranks must pass alike, by name: dtype, shape, root, reduction.
        inputs: tensors that are read.
        outputs: tensors that `Meeting.results` are copied into, in the same order.
        where: the program's source lines, innermost first.
        splits: for all_to_all, the rows along dim 0 sent to each rank and received from each rank, int64.
        is_async: the outputs are filled when the rank waits, and not before; else as soon as the collective executes.
        is_functional: called by a functional collective, which waits when its result is first used.
        landed: the outputs are filled.
    """

    kind: str
    group: Channel
    rank: int
    agree: dict[str, Any]
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    where: Lines
    splits: tuple[np.ndarray, np.ndarray] | None = None
    is_async: bool = True
    is_functional: bool = False
    landed: bool = False

    def land(self, received: Sequence[Tensor]) -> None:
        """Fill the outputs, inside of `unobserved`; a rank that is not the root of a reduce has none."""
        for output, tensor in zip(self.outputs, received, strict=False):
            with torch.inference_mode() if output.is_inference() else nullcontext():
                output.copy_(tensor.view(output.shape))
        self.landed = True

    def __str__(self) -> str:
        facts = ", ".join(f"{name} {_readable(value)}" for name, value in self.agree.items())
        return f"{self.kind}({facts})"


@dataclass(frozen=True)
class Waiting:
    """Why a rank is blocked: its call, and the meeting or partner that it waits for."""

    call: Call
    place: object

    def __str__(self) -> str:
        return f"waits in {self.call}, {self.place}, at {lines_text(self.call.where)}"


def _readable(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")
