"""Virtual streams and events, with the semantics of CUDA's.

A stream is an order of operations. Operations of different streams have no order, unless an event, a
`wait_stream`, a `synchronize` or the end of a collective gives them one. Virtual ranks execute every
operation at once,
so a program's results do not show a missing synchronisation; what shows it is `StreamRaceError`, with both accesses.

On virtual ranks torch.Stream, torch.Event, torch.accelerator's and torch.cuda's functions on streams are
those of this
file, so that stream code runs as it is.

As on a GPU: a new stream waits for nothing, not even for the default stream. A collective begins after what
the current
stream has been given so far, and `wait()` makes the *current* stream wait for it. What reads numbers on the host
(`item`, `tolist`, `nonzero`) waits for the current stream. `backward` runs on the stream that is current when it is
called, after all others of the rank: autograd's own synchronisation between streams is taken to be right.

Not modelled: memory that is freed while another stream uses it (`record_stream` is accepted and does
nothing), graphs,
priorities, and streams of several devices in one rank.

Source: docs.pytorch.org/docs/stable/notes/cuda.html; the order of accesses by vector clocks, see `simulator.races`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import process_state
from .boards import Board, Moment
from .errors import StreamError
from .races import DEFAULT


class Stream:
    """A stream of the rank that makes it.

    Args:
        device, priority: accepted as torch.Stream does, and ignored: a rank has one device.

    Raises:
        StreamError: made outside of a virtual rank.
    """

    def __init__(self, device: Any = None, *, priority: int = 0, **options: Any) -> None:
        board = _board()
        self._board, self.stream_id = board, board.new_stream()

    device = torch.device("cpu")

    def wait_stream(self, stream: Stream) -> None:
        """What comes next on this stream comes after all that `stream` has been given so far.

        Raises:
            StreamError: used on another rank, in another run, or outside of a virtual rank.
        """
        self.wait_event(stream.record_event())

    def wait_event(self, event: Event) -> None:
        """What comes next on this stream comes after the event; an event never recorded is no wait, as on CUDA.

        Raises:
            StreamError: used on another rank, in another run, or outside of a virtual rank.
        """
        board = self._checked()
        if event._moment is not None:
            board.wait(self.stream_id, event._moment_of(board))

    def record_event(self, event: Event | None = None) -> Event:
        """An event that happens when all that this stream has been given so far is done."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        """The host waits: what comes next on any stream comes after all that this one has been given.

        Raises:
            StreamError: used on another rank, in another run, or outside of a virtual rank.
        """
        board = self._checked()
        board.host_waits(board.moment(self.stream_id))

    def query(self) -> bool:
        """True: all is done, and the host knows it.

        Raises:
            StreamError: used on another rank, in another run, or outside of a virtual rank.
        """
        self.synchronize()
        return True

    def __enter__(self) -> Stream:
        board = self._checked()
        board.outside.append(board.current)
        board.switch(self.stream_id)
        return self

    def __exit__(self, *error: Any) -> None:
        board = self._checked()
        board.switch(board.outside.pop())

    def _checked(self) -> Board:
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
        self._recorded_on: Board | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Stand behind all that the stream, else the current one, has been given so far.

        Raises:
            StreamError: the event or the stream belongs to another rank or run, or this is no virtual rank.
        """
        stream = current_stream() if stream is None else stream
        board = stream._checked()
        self._moment, self._recorded_on = board.moment(stream.stream_id), board

    def wait(self, stream: Stream | None = None) -> None:
        """The stream, else the current one, waits for this event.

        Raises:
            StreamError: the event or the stream belongs to another rank or run, or this is no virtual rank.
        """
        (current_stream() if stream is None else stream).wait_event(self)

    def synchronize(self) -> None:
        """The host waits for this event.

        Raises:
            StreamError: the event or the stream belongs to another rank or run, or this is no virtual rank.
        """
        board = _board()
        if self._moment is not None:
            board.host_waits(self._moment_of(board))

    def query(self) -> bool:
        """True: what stands before it is done, and the host knows it.

        Raises:
            StreamError: the event or the stream belongs to another rank or run, or this is no virtual rank.
        """
        self.synchronize()
        return True

    def elapsed_time(self, end: Event) -> float:
        """Refused: virtual streams keep an order, no time.

        Raises:
            StreamError: always; it would be in milliseconds.
        """
        raise StreamError(
            "a virtual event has no time.\n  Pass cluster= to VirtualWorld and look at `world.trace`."
        )

    def _moment_of(self, board: Board) -> Moment:
        if self._moment is None or board is not self._recorded_on:
            raise StreamError(
                "an event of another rank, or of another run, is waited for.\n  Record one there."
            )
        return self._moment


def current_stream(device: Any = None) -> Stream:
    """The stream that the rank's next operation goes to.

    Raises:
        StreamError: called outside of a virtual rank.
    """
    board = _board()
    return _stream_of(board, board.current)


def default_stream(device: Any = None) -> Stream:
    """The stream on which a rank begins.

    Raises:
        StreamError: called outside of a virtual rank.
    """
    return _stream_of(_board(), DEFAULT)


def _stream_of(board: Board, number: int) -> Stream:
    stream = Stream.__new__(Stream)
    stream._board, stream.stream_id = board, number
    return stream


def set_stream(stream: Stream) -> None:
    """Make a stream the current one."""
    stream._checked().switch(stream.stream_id)


@contextlib.contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    """Make a stream the current one for a block; None changes nothing."""
    with contextlib.nullcontext() if stream is None else stream:
        yield


def synchronize(device: Any = None) -> None:
    """The host waits for all streams of the rank.

    Raises:
        StreamError: called outside of a virtual rank.
    """
    board = _board()
    for number in board.names:
        board.host_waits(board.moment(number))


def _board() -> Board:
    state = process_state.current()
    if state is None:
        raise StreamError(
            "virtual streams belong to virtual ranks.\n  Use them in the function that VirtualWorld.run() calls."
        )
    board: Board = state.run.streams.board(state.rank)
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
