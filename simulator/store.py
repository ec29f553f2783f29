"""The key-value store of virtual ranks: a rank that waits for a key lets the others run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from . import process_state
from .source_lines import lines_text, program_lines

if TYPE_CHECKING:
    from .run import Run


class VirtualStore(dist.Store):
    """`torch.distributed.Store` for the ranks of one run."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run
        self._values: dict[str, bytes] = {}
        self._waiting: list[int] = []

    def set(self, key: str, value: Any) -> None:
        self._values[key] = _as_bytes(value)
        for rank in self._waiting:
            self._run.scheduler.ready(rank)
        self._waiting.clear()

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def add(self, key: str, amount: int) -> int:
        total = int(self._values.get(key, b"0")) + amount
        self.set(key, str(total))
        return total

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        if self._values.get(key, b"") == _as_bytes(expected):
            self.set(key, desired)
        return self._values.get(key, _as_bytes(expected))

    def check(self, keys: Sequence[str]) -> bool:
        return all(key in self._values for key in keys)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        while not self.check(keys):
            state = process_state.current()
            if state is None:
                raise KeyError(f"no rank has set {list(keys)}")
            self._waiting.append(state.rank)
            self._run.scheduler.block(state.rank, _WaitingForKeys(tuple(keys), lines_text(program_lines())))

    def delete_key(self, key: str) -> bool:
        return self._values.pop(key, None) is not None

    def num_keys(self) -> int:
        return len(self._values)

    def set_timeout(self, timeout: timedelta) -> None:
        """A world in which no rank can go on ends at once: there is nothing to time."""


@dataclass(frozen=True)
class _WaitingForKeys:
    keys: tuple[str, ...]
    where: str

    def __str__(self) -> str:
        return f"waits for {list(self.keys)} in the store at {self.where}"


def _as_bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
