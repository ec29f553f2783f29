"""The random generators that a process has once: torch's, numpy's and Python's.

They are exchanged at each hand-over between ranks, so that must be cheap. torch's state is copied, in 1 us. numpy lets
its generator be replaced by another. The state of Python's is copied as memory, 1 us where `getstate` and `setstate`
take 50; should a Python lay it out in another way, those two are used.
"""

from __future__ import annotations

import ctypes
import random
from typing import Any

import numpy as np
import torch

_HEADER = object.__basicsize__
_STATE = 4 + 624 * 4  # of a Mersenne twister in CPython: the index, and 624 words
_numpy: Any = np.random
_python: Any = random._inst  # type: ignore[attr-defined]


def _memory_is_the_state() -> bool:
    """Whether copying that memory copies the state, tried with two generators of our own."""
    one, other = random.Random(1), random.Random(2)
    one.random()
    if random.Random.__basicsize__ < _HEADER + _STATE:
        return False
    ctypes.memmove(id(other) + _HEADER, id(one) + _HEADER, _STATE)
    return one.getstate() == other.getstate() and one.random() == other.random()


_COPIES_MEMORY = _memory_is_the_state()


class Generators:
    """One rank's generators. They begin in the state in which the process's are when this is made."""

    def __init__(self) -> None:
        self._numpy = _copy_of(_numpy.get_bit_generator())
        self._memory = ctypes.create_string_buffer(_STATE)
        self._gaussian: dict[str, Any] | None = None
        self._drawn = _counters(self._numpy)
        self._drawn_before: list[int] | None = None
        self._save_numpy(used=True)
        self._save()

    def enter(self) -> None:
        """Make them the process's."""
        torch.default_generator.set_state(self._torch)
        _numpy.set_bit_generator(self._numpy)
        if self._gaussian is not None:
            np.random.set_state(self._gaussian)
        self._drawn_before = [counter.value for counter in self._drawn]
        if _COPIES_MEMORY:
            ctypes.memmove(id(_python) + _HEADER, self._memory, _STATE)
            _python.gauss_next = self._python
        else:
            _python.setstate(self._python)

    def leave(self) -> None:
        """Note how far they have come."""
        now = [counter.value for counter in self._drawn]
        self._save_numpy(used=not now or now != self._drawn_before)
        self._save()

    def _save(self) -> None:
        self._torch = torch.default_generator.get_state()
        if _COPIES_MEMORY:
            ctypes.memmove(self._memory, id(_python) + _HEADER, _STATE)
            self._python: Any = _python.gauss_next
        else:
            self._python = _python.getstate()

    def _save_numpy(self, used: bool) -> None:
        """numpy's normal numbers come in pairs, and it forgets the second one when the generator is replaced."""
        if used:
            state: Any = np.random.get_state(legacy=False)
            self._gaussian = state if state["has_gauss"] else None


def _copy_of(generator: Any) -> Any:
    copied = type(generator)()
    copied.state = generator.state
    return copied


def _counters(generator: Any) -> list[Any]:
    """What changes whenever a number is drawn: of a Mersenne twister a word of its state, and its index."""
    if not isinstance(generator, np.random.MT19937):
        return []
    address = generator.ctypes.state_address
    return [ctypes.c_uint32.from_address(address), ctypes.c_int.from_address(address + 624 * 4)]
