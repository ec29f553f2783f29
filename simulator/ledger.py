"""Who sent how many bytes to whom, in which collective, from which source line.

    world = VirtualWorld(4)
    world.run(program)
    print(world.ledger)
    world.ledger.expect(4096, kind="all_to_all_single", calls=1)

The bytes are those of the direct algorithm, as `simulator.executions` describes it; what a rank keeps is not counted.

Source: this package's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from .errors import LedgerError
from .executions import COLLECTIVES
from .instruments import Exchange, Instrument
from .source_lines import Lines, lines_text

if TYPE_CHECKING:
    from .pictures import Picture

KINDS = (*COLLECTIVES, "send")
"""What a record can be; a send together with its receive is one record."""

_SHOWN_LINES = 12
_SHOWN_RANKS = 16


@dataclass(frozen=True, eq=False)
class Record:
    """One collective, or one message.

    Attributes:
        kind: one of `KINDS`.
        group: name of the process group.
        number: which collective of its group it is, from 0; for a message, which message of the run.
        ranks: global ranks of the members in the group's order; of a message sender and receiver.
        dtype: of the input; None if there is none, as in a barrier, or several.
        bytes: int64 [sender, receiver], both as places in `ranks`.
        lines: each member's source lines, innermost first; `where(rank)` is the same in words.
        is_async: for each member, whether it waits later.
    """

    kind: str
    group: str
    number: int
    ranks: tuple[int, ...]
    dtype: torch.dtype | None
    bytes: np.ndarray
    lines: tuple[Lines, ...]
    is_async: tuple[bool, ...]

    def where(self, rank: int) -> str:
        """`file.py:12 in function`: where a member, given by its global rank, called."""
        return lines_text(self.lines[self.ranks.index(rank)][:1])

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.kind} {self.number} of group {self.group!r}, {len(self.ranks)} ranks, {dtype}, "
            f"{int(self.bytes.sum()):,} bytes, at {self.where(self.ranks[0])}"
        )


class Total(NamedTuple):
    """How often something was called, counted once for a collective, and the bytes that were sent.

    Attributes:
        calls: how often.
        bytes: sent, what a rank keeps not counted.
    """

    calls: int
    bytes: int


class Ledger(Instrument):
    """The record of a run. A joint backward adds to the ledger of the run that it belongs to.

    Attributes:
        size: number of ranks.
        records: every collective and message, in the order in which they were executed.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.records: list[Record] = []
        self._matrices: dict[bytes, np.ndarray] = {}

    def executed(self, exchange: Exchange) -> None:
        calls = exchange.calls
        dtype = calls[0].agree.get("dtype")
        self.records.append(
            Record(
                exchange.kind,
                exchange.channel.name,
                exchange.number,
                exchange.ranks,
                dtype if isinstance(dtype, torch.dtype) else None,
                self._kept(exchange.matrix),
                tuple(call.where for call in calls),
                tuple(call.is_async for call in calls),
            )
        )

    def _kept(self, matrix: np.ndarray) -> np.ndarray:
        """One copy of equal matrices: a training loop has the same ones in every step."""
        key = hashlib.blake2b(matrix.tobytes(), digest_size=16).digest()
        if key not in self._matrices:
            matrix.flags.writeable = False
            self._matrices[key] = matrix
        return self._matrices[key]

    def by_pair(self) -> np.ndarray:
        """Bytes, int64 [sender, receiver]: equal to `world.bytes`."""
        return self._matrix(self.records)

    def by_rank(self) -> np.ndarray:
        """Bytes, int64 [rank, 2]: sent and received."""
        pairs = self.by_pair()
        return np.stack([pairs.sum(axis=1), pairs.sum(axis=0)], axis=1)

    def by_kind(self) -> dict[str, Total]:
        """For each kind that was called: how often, and bytes. The largest first."""
        return _totals((record.kind, int(record.bytes.sum())) for record in self.records)

    def by_line(self) -> dict[str, Total]:
        """For each source line: how often a rank called there, and the bytes that it sent. The largest first."""
        found: dict[Lines, list[int]] = {}
        for record in self.records:
            for lines, sent in zip(record.lines, record.bytes.sum(axis=1).tolist(), strict=True):
                total = found.setdefault(lines[:1], [0, 0])
                total[0] += 1
                total[1] += sent
        totals = {lines_text(lines): Total(*total) for lines, total in found.items()}
        return dict(sorted(totals.items(), key=lambda item: -item[1].bytes))

    def expect(
        self,
        bytes: int,
        *,
        kind: str | None = None,
        rank: int | None = None,
        to: int | None = None,
        line: str | None = None,
        group: str | None = None,
        calls: int | None = None,
    ) -> None:
        """Assert how many bytes were sent.

        Args:
            bytes: that were sent in all.
            kind: count only this kind of collective, such as "all_to_all_single".
            rank, to: count only what this global rank sent; what was sent to that one.
            line: count only what ranks sent from source lines that contain this, such as "train.py:12" or "in step".
            group: count only this process group, by name.
            calls: the number of collectives and messages that are counted, too.

        Raises:
            LedgerError: other numbers were counted; or there is no such kind, rank, line or group, so that a misspelt
                name does not pass as 0 bytes.

        Examples:
            >>> world.ledger.expect(3 * 4096, kind="all_to_all_single", rank=0)
            >>> world.ledger.expect(0, rank=3)
        """
        self._check_names(kind, rank, to, line, group)
        counted, found = 0, 0
        for record in self.records:
            if kind not in (None, record.kind) or group not in (None, record.group):
                continue
            senders = [
                place
                for place, (member, lines) in enumerate(zip(record.ranks, record.lines, strict=True))
                if rank in (None, member) and (line is None or line in lines_text(lines[:1]))
            ]
            receivers = [place for place, member in enumerate(record.ranks) if to in (None, member)]
            counted += bool(senders and receivers)
            found += int(record.bytes[np.ix_(senders, receivers)].sum())
        if found != bytes or calls not in (None, counted):
            what = {"kind": kind, "rank": rank, "to": to, "line": line, "group": group}
            chosen = ", ".join(f"{name} {value!r}" for name, value in what.items() if value is not None)
            wanted = f"{bytes:,} bytes" + ("" if calls is None else f" in {calls} calls")
            raise LedgerError(
                f"expected {wanted} for {chosen or 'the whole run'}, counted {found:,} bytes in {counted} calls.\n"
                f"{self}\n"
                "  Compare the lines above with what the program should send."
            )

    def _check_names(
        self, kind: str | None, rank: int | None, to: int | None, line: str | None, group: str | None
    ) -> None:
        if kind is not None and kind not in KINDS:
            raise LedgerError(f"there is no collective {kind!r}.\n  Use one of {', '.join(KINDS)}.")
        for number in (rank, to):
            if number is not None and number not in range(self.size):
                raise LedgerError(
                    f"there is no rank {number!r} among {self.size}.\n  Use 0 to {self.size - 1}."
                )
        groups = {record.group for record in self.records}
        if group is not None and group not in groups:
            raise LedgerError(f"group {group!r} called nothing.\n  Groups that did: {sorted(groups)}.")
        lines = self.by_line() if line is not None else {}
        if line is not None and not any(line in known for known in lines):
            raise LedgerError(
                f"nothing was called at {line!r}.\n  Lines that called: {', '.join(lines) or 'none'}."
            )

    def _matrix(self, records: Iterable[Record]) -> np.ndarray:
        total = np.zeros((self.size, self.size), dtype=np.int64)
        for record in records:
            total[np.ix_(record.ranks, record.ranks)] += record.bytes
        return total

    def __str__(self) -> str:
        sent = int(self.by_pair().sum())
        kinds, lines, ranks = self.by_kind(), self.by_line(), self.by_rank().tolist()
        rows = [(name, *total) for name, total in kinds.items()]
        text = [f"{len(self.records):,} collectives and messages of {self.size:,} ranks, {sent:,} bytes sent"]
        text += _table(("kind", "calls", "bytes"), rows)
        rows = [(name, *total) for name, total in list(lines.items())[:_SHOWN_LINES]]
        text += _table(("source line", "calls of a rank", "bytes"), rows)
        if len(lines) > _SHOWN_LINES:
            text.append(f"... and {len(lines) - _SHOWN_LINES} more lines")
        shown = list(range(self.size))
        if self.size > _SHOWN_RANKS:
            shown = [*shown[: _SHOWN_RANKS // 2], *shown[-4:]]
        text += _table(("rank", "bytes sent", "bytes received"), [(str(r), *ranks[r]) for r in shown])
        if self.size > _SHOWN_RANKS:
            text.append(f"... {self.size - len(shown)} ranks between them are not shown")
        return "\n".join(text)

    def draw(self) -> Picture:
        """The bytes from each rank to each other, and how many each kind and each source line sent."""
        from .draw_runs import draw_ledger

        return draw_ledger(self.by_pair(), self.by_kind(), self.by_line())

    def _repr_svg_(self) -> str:
        return self.draw()._repr_svg_()


def _totals(pairs: Iterable[tuple[str, int]]) -> dict[str, Total]:
    found: dict[str, Total] = {}
    for name, sent in pairs:
        before = found.get(name, Total(0, 0))
        found[name] = Total(before.calls + 1, before.bytes + sent)
    return dict(sorted(found.items(), key=lambda item: -item[1].bytes))


def _table(titles: Sequence[str], rows: Sequence[tuple[str, int, int]]) -> list[str]:
    """Lines of columns: the first to the left, numbers to the right."""
    cells = [(name, f"{first:,}", f"{second:,}") for name, first, second in rows]
    widths = [max(len(row[column]) for row in [titles, *cells]) for column in range(3)]
    return [""] + [
        "  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2])])
        for row in [tuple(titles), *cells]
    ]
