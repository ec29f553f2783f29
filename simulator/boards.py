"""Who orders what on one rank: the state behind `simulator.streams`, and the instrument that follows it.

A `Board` knows a rank's streams by number, what each has waited for (see `simulator.races`), and the marks that stand
for it in virtual time. `Streams` notes what every operation and every call touches, and reports what races.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from .accesses import Access, allocates, region_of
from .calls import Call
from .clock import COMPUTE, Clock
from .errors import StreamRaceError
from .hazards import Reports
from .instruments import Instrument
from .notes import Mark
from .races import DEFAULT, Timeline, Touch
from .source_lines import Lines, lines_text, program_lines

_READ_BY_HOST = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "Tensor.tolist", "Tensor.numpy")


class Moment(NamedTuple):
    """A place behind all that a stream has been given so far: what had happened, and the mark in virtual time."""

    happened: dict[int, int]
    mark: Mark | None


class Board:
    """One rank's streams, from the first time that its program asks for one. `clock` is there if time is kept."""

    def __init__(self, rank: int, clock: Clock | None) -> None:
        self.rank, self.clock = rank, clock
        self.timeline = Timeline()
        self.names = {DEFAULT: "the default stream"}
        self.of_groups: dict[Any, int] = {}
        self.current = DEFAULT
        self.outside: list[int] = []  # the streams that were current when a `with` began

    def new_stream(self, name: str = "") -> int:
        """The number of a stream that has waited for nothing but what the host has."""
        number = self.timeline.new_stream()
        self.names[number] = name or f"stream {number}"
        return number

    def switch(self, number: int) -> None:
        """Make a stream the current one."""
        self.current = number
        if self.clock is not None:
            self.clock.switch(self.rank, self._lane(number))

    def moment(self, number: int) -> Moment:
        """The place behind all that a stream has been given so far."""
        mark = None
        if self.clock is not None and number not in self.of_groups.values():
            mark = self.clock.mark(self.rank, self._lane(number))
        return Moment(dict(self.timeline.clocks[number]), mark)

    def wait(self, number: int, moment: Moment) -> None:
        """What a stream is given from now on comes after the moment."""
        self.timeline.join(self.timeline.clocks[number], moment.happened)
        if self.clock is not None and moment.mark is not None:
            self.clock.join(self.rank, moment.mark, self._lane(number))

    def host_waits(self, moment: Moment) -> None:
        """What any stream is given from now on comes after the moment."""
        self.timeline.join(self.timeline.host, moment.happened)
        if self.clock is not None and moment.mark is not None:
            self.clock.synchronize(self.rank, moment.mark)

    def _lane(self, number: int) -> str:
        return COMPUTE if number == DEFAULT else self.names[number]


class Streams(Instrument):
    """Follows what each stream touches, on ranks whose programs use streams."""

    watches_operations = True

    def __init__(self, size: int, reports: Reports, clock: Clock | None) -> None:
        self._reports, self._clock = reports, clock
        self._boards: list[Board | None] = [None] * size
        self._pending: list[dict[Call, dict[int, int] | None]] = [{} for _ in range(size)]

    def board(self, rank: int) -> Board:
        """The rank's streams; made, with what is in flight, when they are first asked for."""
        board = self._boards[rank]
        if board is None:
            board = self._boards[rank] = Board(rank, self._clock)
            for call in self._pending[rank]:
                self._communicate(rank, board, call)
        return board

    def is_watching(self, rank: int) -> bool:
        return self._boards[rank] is not None

    def issued(self, rank: int, call: Call) -> None:
        board = self._boards[rank]
        self._pending[rank][call] = None
        if board is not None:
            self._communicate(rank, board, call)

    def _communicate(self, rank: int, board: Board, call: Call) -> None:
        """A group's collectives run on a stream of their own, behind what the current stream has been given."""
        timeline = board.timeline
        number = board.of_groups.get(call.group)
        if number is None:
            number = board.of_groups[call.group] = board.new_stream(
                f"the communication stream of {call.group}"
            )
        timeline.join(timeline.clocks[number], timeline.clocks[board.current])
        operation = timeline.launch(number)
        for tensors, writes in ((call.inputs, False), (call.outputs, True)):
            for tensor in tensors:
                touch = Touch(region_of(tensor), number, operation, writes, str(call), call.where)
                self._touch(rank, board, tensor, touch)
        self._pending[rank][call] = dict(timeline.clocks[number])

    def waited(self, rank: int, call: Call) -> None:
        board, done = self._boards[rank], self._pending[rank].pop(call, None)
        if board is not None and done is not None:
            board.timeline.join(board.timeline.clocks[board.current], done)

    def finish(self) -> None:
        for pending in self._pending:  # calls that nobody waited for hold their tensors
            pending.clear()

    def backward(self, rank: int, tensors: Sequence[Tensor], inputs: Any, accumulates: bool) -> None:
        board = self._boards[rank]
        if board is not None:
            for number in board.names:
                board.wait(board.current, board.moment(number))

    def before(self, rank: int, operation: Any, accesses: Sequence[Access]) -> None:
        if isinstance(operation, str):  # a method that is no operation: `after` is not called
            self.after(rank, operation, (), {}, None, accesses)

    def after(
        self, rank: int, operation: Any, args: Any, kwargs: Any, result: Any, accesses: Sequence[Access]
    ) -> None:
        board = self.board(rank)
        number = board.current
        if allocates(operation):
            for tensor in pytree.tree_leaves(result):
                if isinstance(tensor, Tensor):
                    board.timeline.allocate(tensor)
        if accesses:
            place, where, name = board.timeline.launch(number), program_lines(), str(operation)
            for access in accesses:
                touch = Touch(region_of(access.tensor), number, place, access.writes, name, where)
                self._touch(rank, board, access.tensor, touch)
        if str(operation).removeprefix("aten.").removesuffix(".default") in _READ_BY_HOST:
            board.host_waits(board.moment(number))

    def _touch(self, rank: int, board: Board, tensor: Tensor, touch: Touch) -> None:
        for earlier in list(board.timeline.touch(tensor, touch)):
            self._report(rank, board, earlier, touch)

    def _report(self, rank: int, board: Board, earlier: Touch, later: Touch) -> None:
        names = [board.names[touch.stream] for touch in (earlier, later)]
        advice = f"wait_stream({names[0]}), or wait_event with an event recorded after the earlier access"
        if earlier.stream in board.of_groups.values():
            advice = f"call wait() on the Work while {names[1]} is current"
        error = StreamRaceError(
            f"rank {rank}: {_sentence(later, names[1])} races with {_sentence(earlier, names[0])}.\n"
            f"  Make {names[1]} wait before the later access: {advice}."
        )
        self._reports.add(rank, error, later.where, earlier.where)


def _sentence(touch: Touch, stream: str) -> str:
    where: Lines = touch.where
    line = lines_text(where[:1]) if where else "a line before the first stream was made"
    return f"{touch.what} {'writing' if touch.writes else 'reading'} on {stream} at {line}"
