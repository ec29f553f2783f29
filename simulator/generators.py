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
_Memory = ctypes.c_char * _STATE
_numpy: Any = np.random
_python: Any = random._inst  # type: ignore[attr-defined]
_python_memory = _Memory.from_address(id(_python) + _HEADER)


def _memory_is_the_state() -> bool:
    """Whether copying that memory copies the state, tried with two generators of our own."""
    one, other = random.Random(1), random.Random(2)
    one.random()
    if random.Random.__basicsize__ < _HEADER + _STATE:
        return False
    _Memory.from_address(id(other) + _HEADER).raw = _Memory.from_address(id(one) + _HEADER).raw
    return one.getstate() == other.getstate() and one.random() == other.random()


_COPIES_MEMORY = _memory_is_the_state()


class Beginning:
    """The state in which the process's generators are when this is made, and a run's ranks begin.

    Making a generator of numpy takes 0.15 ms, so ranks share one until they draw from it.
    """

    def __init__(self) -> None:
        generator = _numpy.get_bit_generator()
        self._type, self._state = type(generator), generator.state
        self.torch = torch.default_generator.get_state()
        self.python, self.memory = _python_state()
        self.gaussian = _pending_gaussian()
        self.numpy = self._copy()

    def take(self) -> None:
        """The generator of numpy that ranks share has become one rank's own: the others get a new one."""
        self.numpy = self._copy()

    def _copy(self) -> Any:
        generator = self._type()
        generator.state = self._state
        return generator


class Generators:
    """One rank's generators."""

    def __init__(self, beginning: Beginning) -> None:
        self._beginning = beginning
        self._torch, self._python, self._memory = beginning.torch, beginning.python, beginning.memory
        self._gaussian = beginning.gaussian
        self._numpy: Any = None
        self._entered: Any = None
        self._before: Any = None

    @classmethod
    def of_process(cls) -> Generators:
        """Those of the process as they are now: `enter` puts the same objects back."""
        generators = cls(Beginning())
        generators._numpy = _numpy.get_bit_generator()
        return generators

    def enter(self) -> None:
        """Make them the process's."""
        torch.default_generator.set_state(self._torch)
        generator = self._beginning.numpy if self._numpy is None else self._numpy
        _numpy.set_bit_generator(generator)
        if self._gaussian is not None:
            np.random.set_state(self._gaussian)
        if generator is not self._entered:
            self._entered, self._before = generator, _numpy_memory(generator)
        if self._memory is not None:
            _python_memory.raw = self._memory
            _python.gauss_next = self._python
        else:
            _python.setstate(self._python)

    def leave(self) -> None:
        """Note how far they have come."""
        self._torch = torch.default_generator.get_state()
        self._python, self._memory = _python_state()
        generator = _numpy.get_bit_generator()
        used = self._gaussian is not None or _numpy_memory(self._entered) != self._before
        if used or generator is not self._entered:
            if self._numpy is None:
                self._beginning.take()
            self._numpy, self._gaussian, self._entered = generator, _pending_gaussian(), None


def _python_state() -> tuple[Any, bytes | None]:
    """What `getstate` gives, and None; or the pending normal number, and the memory of the rest."""
    if _COPIES_MEMORY:
        return _python.gauss_next, _python_memory.raw
    return _python.getstate(), None


def _pending_gaussian() -> dict[str, Any] | None:
    """numpy's normal numbers come in pairs: its state while the second one is pending, which a replacement forgets."""
    state: Any = np.random.get_state(legacy=False)
    return state if state["has_gauss"] else None


def _numpy_memory(generator: Any) -> object:
    """What is equal as long as nothing was drawn: the state of a Mersenne twister, 624 words and the index.

    Of another generator, which is never equal: getting its state takes longer than to take it as used.
    """
    if not isinstance(generator, np.random.MT19937):
        return object()
    return _Memory.from_address(generator.ctypes.state_address).raw
