"""A TorchDispatchMode that is on throughout the program of one rank, which is a thread among others."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode


class RankMode(TorchDispatchMode):
    """Base class of such modes.

    It is put on the thread's stack of modes by hand: a mode's own `__enter__` also sets flags of the whole process,
    which threads that leave in another order than they came would leave behind. torch.compile compiles as it would
    without it.
    """

    supports_higher_order_operators = True

    def __init_subclass__(cls) -> None:
        """torch.compile is to leave `__torch_dispatch__` alone, and what it calls."""
        super().__init_subclass__()
        dynamo = torch._C._dynamo.eval_frame
        skip = dynamo._FrameAction.SKIP
        dynamo.set_code_exec_strategy(cls.__torch_dispatch__.__code__, dynamo._FrameExecStrategy(skip, skip))

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch would wrap `__torch_dispatch__`, and import its compiler, 1.5 s, for the first operation."""
        return False

    def __enter__(self) -> Self:
        _push_mode(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _pop_mode()
