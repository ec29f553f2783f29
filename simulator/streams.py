"""Virtual streams and events, with the semantics of CUDA's.

A stream is an order of operations. Operations of different streams have no order, unless an event, a
`wait_stream`, a `synchronize` or the end of a collective gives them one. Virtual ranks execute every operation at once,
so a program's results do not show a missing synchronisation; what shows it is `StreamRaceError`, with both accesses.

On virtual ranks torch.Stream, torch.Event, torch.accelerator's and torch.cuda's functions on streams are those of this
file, so that stream code runs as it is.

As on a GPU: a new stream waits for nothing, not even for the default stream. A collective begins after what the current
stream has been given so far, and `wait()` makes the *current* stream wait for it. What reads numbers on the host
(`item`, `tolist`, `nonzero`) waits for the current stream. `backward` runs on the stream that is current when it is
called, after all others of the rank: autograd's own synchronisation between streams is taken to be right.

Not modelled: memory that is freed while another stream uses it (`record_stream` is accepted and does nothing), graphs,
priorities, and streams of several devices in one rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import process_state
from .accesses import Access, allocates, region_of
from .clock import COMPUTE, Clock, Mark
from .errors import StreamError, StreamRaceError
from .hazards import Reports
from .instruments import Instrument
from .matching import Call
from .races import DEFAULT, Timeline, Touch
from .source_lines import Lines, lines_text, program_lines

_READ_BY_HOST = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "Tensor.tolist", "Tensor.numpy")


class Stream:
    """A stream of the rank that makes it.

    Args:
        device, priority: accepted as torch.Stream does, and ignored: a rank has one device.

    Raises:
        StreamError: made outside of a virtual rank.
    """

    def __init__(self, device: Any = None, *, priority: int = 0, **options: Any) -> None:
        board = _board()
        self._join_board(board, board.new_stream())

    def _join_board(self, board: _Board, number: int) -> None:
        self._board, self.stream_id = board, number
        self.device = torch.device("cpu")
        self._outside: list[Stream] = []

    def wait_stream(self, stream: Stream) -> None:
        """What comes next on this stream comes after all that `stream` has been given so far."""
        self.wait_event(stream.record_event())

    def wait_event(self, event: Event) -> None:
        """What comes next on this stream comes after the event; an event never recorded is no wait, as on CUDA."""
        board = self._checked()
        if event._moment is not None:
            board.wait(self.stream_id, event._moment_of(board))

    def record_event(self, event: Event | None = None) -> Event:
        """An event that happens when all that this stream has been given so far is done."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        """The host waits: what comes next on any stream comes after all that this one has been given."""
        board = self._checked()
        board.host_waits(board.moment(self.stream_id))

    def query(self) -> bool:
        """True: all is done, and the host knows it."""
        self.synchronize()
        return True

    def __enter__(self) -> Stream:
        board = self._checked()
        self._outside.append(board.current)
        board.switch(self)
        return self

    def __exit__(self, *error: Any) -> None:
        self._checked().switch(self._outside.pop())

    def _checked(self) -> _Board:
        board = _board()
        if board is not self._board:
            raise StreamError(f"{self!r} is used on another rank, or in another run.\n  Make one there.")
        return board

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and (self._board, self.stream_id) == (other._board, other.stream_id)

    def __hash__(self) -> int:
        return hash((id(self._board), self.stream_id))

    def __repr__(self) -> str:
        return f"Stream({self.stream_id})" if self.stream_id != DEFAULT else "Stream(0, the default stream)"


class Event:
    """A place in the order of a stream.

    Args:
        device, enable_timing, blocking, interprocess: accepted as torch.Event does, and ignored.
    """

    def __init__(self, device: Any = None, enable_timing: bool = False, **options: Any) -> None:
        self._moment: Moment | None = None
        self._recorded_on: _Board | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Stand behind all that the stream, else the current one, has been given so far."""
        stream = current_stream() if stream is None else stream
        board = stream._checked()
        self._moment, self._recorded_on = board.moment(stream.stream_id), board

    def wait(self, stream: Stream | None = None) -> None:
        """The stream, else the current one, waits for this event."""
        (current_stream() if stream is None else stream).wait_event(self)

    def synchronize(self) -> None:
        """The host waits for this event."""
        board = _board()
        if self._moment is not None:
            board.host_waits(self._moment_of(board))

    def query(self) -> bool:
        """True: what stands before it is done, and the host knows it."""
        self.synchronize()
        return True

    def elapsed_time(self, end: Event) -> float:
        """Refused: virtual streams keep an order, no time."""
        raise StreamError(
            "a virtual event has no time.\n  Pass cluster= to VirtualWorld and look at `world.trace`."
        )

    def _moment_of(self, board: _Board) -> Moment:
        if self._moment is None or board is not self._recorded_on:
            raise StreamError(
                "an event of another rank, or of another run, is waited for.\n  Record one there."
            )
        return self._moment


def current_stream(device: Any = None) -> Stream:
    """The stream that the rank's next operation goes to."""
    return _board().current


def default_stream(device: Any = None) -> Stream:
    """The stream on which a rank begins."""
    return _board().default


def set_stream(stream: Stream) -> None:
    """Make a stream the current one."""
    stream._checked().switch(stream)


@contextlib.contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    """Make a stream the current one for a block; None changes nothing."""
    with contextlib.nullcontext() if stream is None else stream:
        yield


def synchronize(device: Any = None) -> None:
    """The host waits for all streams of the rank."""
    board = _board()
    for number in board.names:
        board.host_waits(board.moment(number))


class Moment(NamedTuple):
    """A place behind all that a stream has been given so far: what had happened, and the mark in virtual time."""

    happened: dict[int, int]
    mark: Mark | None


class _Board:
    """One rank's streams, from the first time that its program asks for one. `clock` is there if time is kept."""

    def __init__(self, rank: int, clock: Clock | None) -> None:
        self.rank, self.clock = rank, clock
        self.timeline = Timeline()
        self.names = {DEFAULT: "the default stream"}
        self.of_groups: dict[Any, int] = {}
        self.default = self.current = Stream.__new__(Stream)
        self.default._join_board(self, DEFAULT)

    def new_stream(self, name: str = "") -> int:
        number = self.timeline.new_stream()
        self.names[number] = name or f"stream {number}"
        return number

    def switch(self, stream: Stream) -> None:
        self.current = stream
        if self.clock is not None:
            self.clock.switch(self.rank, self._lane(stream.stream_id))

    def moment(self, number: int) -> Moment:
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
        self._boards: list[_Board | None] = [None] * size
        self._pending: list[dict[Call, dict[int, int] | None]] = [{} for _ in range(size)]

    def board(self, rank: int) -> _Board:
        """The rank's streams; made, with what is in flight, when they are first asked for."""
        board = self._boards[rank]
        if board is None:
            board = self._boards[rank] = _Board(rank, self._clock)
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

    def _communicate(self, rank: int, board: _Board, call: Call) -> None:
        """A group's collectives run on a stream of their own, behind what the current stream has been given."""
        timeline = board.timeline
        number = board.of_groups.get(call.group)
        if number is None:
            number = board.of_groups[call.group] = board.new_stream(
                f"the communication stream of {call.group}"
            )
        timeline.join(timeline.clocks[number], timeline.clocks[board.current.stream_id])
        operation = timeline.launch(number)
        for tensors, writes in ((call.inputs, False), (call.outputs, True)):
            for tensor in tensors:
                touch = Touch(region_of(tensor), number, operation, writes, str(call), call.where)
                self._touch(rank, board, tensor, touch)
        self._pending[rank][call] = dict(timeline.clocks[number])

    def waited(self, rank: int, call: Call) -> None:
        board, done = self._boards[rank], self._pending[rank].pop(call, None)
        if board is not None and done is not None:
            board.timeline.join(board.timeline.clocks[board.current.stream_id], done)

    def finish(self) -> None:
        for pending in self._pending:  # calls that nobody waited for hold their tensors
            pending.clear()

    def backward(self, rank: int, tensors: Sequence[Tensor], inputs: Any, accumulates: bool) -> None:
        board = self._boards[rank]
        if board is not None:
            for number in board.names:
                board.wait(board.current.stream_id, board.moment(number))

    def before(self, rank: int, operation: Any, accesses: Sequence[Access]) -> None:
        if isinstance(operation, str):  # a method that is no operation: `after` is not called
            self.after(rank, operation, (), {}, None, accesses)

    def after(
        self, rank: int, operation: Any, args: Any, kwargs: Any, result: Any, accesses: Sequence[Access]
    ) -> None:
        board = self.board(rank)
        number = board.current.stream_id
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

    def _touch(self, rank: int, board: _Board, tensor: Tensor, touch: Touch) -> None:
        for earlier in list(board.timeline.touch(tensor, touch)):
            self._report(rank, board, earlier, touch)

    def _report(self, rank: int, board: _Board, earlier: Touch, later: Touch) -> None:
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


def _board() -> _Board:
    state = process_state.current()
    if state is None:
        raise StreamError(
            "virtual streams belong to virtual ranks.\n  Use them in the function that VirtualWorld.run() calls."
        )
    board: _Board = state.run.streams.board(state.rank)
    return board


class _RoutedClass(type):
    """Stands where torch keeps a class: rank threads make the virtual one, every other thread the real one."""

    real: type
    virtual: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return (cls.real if process_state.current() is None else cls.virtual)(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, (cls.real, cls.virtual))

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.real, name)


def _routed_function(real: Callable[..., Any], virtual: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: (real if process_state.current() is None else virtual)(*args, **kwargs)


def replacements() -> list[tuple[Any, str, Any]]:
    """(owner, name, what stands there while a world runs) for all that torch has of streams."""
    found: list[tuple[Any, str, Any]] = []
    for owner in (torch, torch.cuda):
        for virtual in (Stream, Event):
            real = getattr(owner, virtual.__name__)
            members = {"real": real, "virtual": virtual}
            found.append((owner, virtual.__name__, _RoutedClass(virtual.__name__, (), members)))
    for owner in (torch.accelerator, torch.cuda):
        for function in (current_stream, default_stream, set_stream, stream, synchronize):
            if hasattr(owner, function.__name__):
                real = getattr(owner, function.__name__)
                found.append((owner, function.__name__, _routed_function(real, function)))
    found.append(
        (Tensor, "record_stream", _routed_function(Tensor.record_stream, lambda tensor, stream: None))
    )
    return found
