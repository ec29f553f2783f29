"""What a rank does in which order, and what happens when one of its waits is left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from seqpar_ref.group import TorchGroup, group_of


@dataclass
class Record:
    """The events of one rank. Its all-to-alls are numbered in the order of their issue.

    Args:
        left_out: the number of the all-to-all that is not waited for.
    """

    left_out: int | None = None
    events: list[str] = field(default_factory=list)
    issued: int = 0

    def note(self, event: str) -> None:
        """Write an event of the test's own."""
        self.events.append(event)

    def group(self, group: Any = None) -> RecordingGroup:
        """The process group, whose all-to-alls are recorded."""
        member = group_of(group)
        return RecordingGroup(member.process_group, member.rank, member.size, self)


@dataclass(frozen=True, eq=False)
class RecordingGroup(TorchGroup):
    """A group that writes down what is issued and waited for."""

    record: Record

    def all_to_all_single(self, *buffers: Any, async_op: bool = False) -> Any:
        *buffers, async_op = buffers if len(buffers) == 5 else (*buffers, async_op)
        number, self.record.issued = self.record.issued, self.record.issued + 1
        self.record.note(f"issue {number}" if async_op else f"exchange {number}")
        work = super().all_to_all_single(*buffers, async_op)
        return RecordedWork(work, number, self.record) if async_op else work


@dataclass(frozen=True)
class RecordedWork:
    """A Work that writes its wait down, or leaves it out."""

    work: Any
    number: int
    record: Record

    def wait(self) -> bool:
        self.record.note(f"wait {self.number}")
        if self.number == self.record.left_out:
            return True
        return self.work.wait()
