"""Objects that a package keeps once per process, made to exist once per rank.

    VirtualWorld(4, singletons=[yunchang.globals.PROCESS_GROUP, (megatron.parallel_state, "_GROUP")])

Each rank begins with what is there when the run begins: Python's own containers (dict, list, set, deque, ...) are
copied, everything in them is the same object, also a container in a container. What a rank sets or deletes is
its own,
and gone after the run.

Source: this package's own.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .errors import WorldError

_CONTAINERS = (dict, list, set, bytearray, defaultdict, OrderedDict, Counter, deque)
_ABSENT = object()
"""In place of the value of an attribute that a rank has deleted."""


@dataclass(frozen=True)
class Singleton:
    """Something that is to be each rank's own: one attribute of an object, or, without a name, all of them."""

    owner: Any
    name: str | None

    def get(self) -> Any:
        return vars(self.owner) if self.name is None else getattr(self.owner, self.name, _ABSENT)

    def put(self, value: Any) -> None:
        if self.name is None:
            self.owner.__dict__ = value
        elif value is _ABSENT:
            if hasattr(self.owner, self.name):
                delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, value)

    def start(self) -> Any:
        """What a rank begins with."""
        value = self.get()
        if self.name is None:
            return {name: _own(x) for name, x in value.items()}
        return _own(value)


def _own(value: Any) -> Any:
    return copy.copy(value) if type(value) in _CONTAINERS else value


def singletons_of(entries: Sequence[Any]) -> tuple[Singleton, ...]:
    """The entries of `VirtualWorld(singletons=...)`: objects, and pairs of an owner and an attribute's name.

    Raises:
        WorldError: an entry is neither, has no such attribute, or cannot be exchanged.
    """
    if isinstance(entries, str) or not isinstance(entries, Sequence):
        raise WorldError(f"singletons={entries!r} is no list.\n  Pass objects, or pairs (module, 'NAME').")
    return tuple(_singleton(entry) for entry in entries)


def _singleton(entry: Any) -> Singleton:
    if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], str):
        singleton = Singleton(*entry)
        if not hasattr(entry[0], entry[1]):
            raise WorldError(f"{entry[0]!r} has no attribute {entry[1]!r}.\n  Name one that it has.")
    elif isinstance(entry, ModuleType | type) or not hasattr(entry, "__dict__"):
        raise WorldError(
            f"the attributes of {entry!r} cannot be exchanged as a whole.\n  Pass pairs (owner, 'NAME') instead."
        )
    else:
        singleton = Singleton(entry, None)
    try:
        singleton.put(singleton.get())
    except (AttributeError, TypeError) as error:
        raise WorldError(f"{entry!r} cannot be exchanged: {error}.\n  Pass what can be set.") from error
    return singleton
