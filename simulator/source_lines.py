"""Which line of the program a rank stands at: neither torch's nor the simulator's."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import torch

Lines = tuple[tuple[CodeType, int], ...]

_SHOWN_CALLERS = 3
_NOT_THE_PROGRAM = (
    *(f"{Path(package).parent}{os.sep}" for package in (__file__, torch.__file__)),
    threading.__file__,
    contextlib.__file__,
)


def program_lines() -> Lines:
    """The innermost source lines of the calling thread that belong neither to torch nor to the simulator."""
    return lines_of(sys._getframe(1))


def lines_of(frame: Any) -> Lines:
    """The same for a frame."""
    lines: list[tuple[CodeType, int]] = []
    while frame is not None and len(lines) <= _SHOWN_CALLERS:
        if is_program(frame.f_code.co_filename):
            lines.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return tuple(lines)


@cache
def is_program(filename: str) -> bool:
    """Whether a source file belongs neither to torch nor to the simulator."""
    return not filename.startswith(_NOT_THE_PROGRAM)


def lines_text(lines: Lines) -> str:
    """`file.py:12 in inner < file.py:30 in outer`."""
    shown = [f"{code.co_filename}:{line} in {code.co_name}" for code, line in lines]
    return " < ".join(shown) or "an unknown line"
