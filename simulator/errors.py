"""What can be wrong with a distributed program, one class per mistake.

Every message has the facts in its first lines and, in its last, what to change.

Source: this package's own. docs/errors.md lists causes and mends.
"""

from __future__ import annotations


class SimulatorError(RuntimeError):
    """Base class of every error that the simulator raises by itself."""


class WorldError(SimulatorError, ValueError):
    """A `VirtualWorld` cannot be: a size, a mode or a seed that does not exist, or more ranks than threads."""


class CollectiveMismatchError(SimulatorError):
    """The ranks of a group do not agree on their k-th collective.

    They differ in the operation, the dtype, the shape, the root, the reduction or in one entry of the split matrix.
    """


class DeadlockError(SimulatorError):
    """No rank can go on: each one waits for a rank that will never arrive."""


class BufferError(SimulatorError, ValueError):
    """A tensor cannot be the buffer of a collective: strided, overlapping, of the wrong size, dtype or device."""


class UnsupportedTransformError(SimulatorError, NotImplementedError):
    """Forward-mode AD or a functorch transform reached a collective, where its derivative would silently be zero."""


class UnsupportedOperationError(SimulatorError, NotImplementedError):
    """A collective, or an option of one, that virtual ranks do not have."""


class StaleGroupError(SimulatorError):
    """A process group is used outside of the run, or of the rank, that made it."""


class HazardError(SimulatorError):
    """Base class of what a program does to memory that is not its own at that moment."""


class EarlyAccessError(HazardError):
    """What an asynchronous call receives is read or written before `wait()`."""


class InFlightWriteError(HazardError):
    """The input of an asynchronous call is written before `wait()`."""


class OverlappingCallsError(HazardError, BufferError):
    """A call uses a buffer that another call, in flight, receives into or, if it receives itself, sends from."""


class UnwaitedWorkError(HazardError):
    """Nobody called `wait()` on the Work of an asynchronous call."""


class StreamRaceError(HazardError):
    """Two streams touch the same bytes, one of them writing, and nothing orders them."""


class SharedModuleError(HazardError):
    """Several ranks train one and the same parameter, which on hardware each has a copy of."""


class StreamError(SimulatorError):
    """A virtual stream or event is used where there is none: outside of a rank, on another rank, or for its time."""


class ClusterError(SimulatorError, ValueError):
    """A cluster model that cannot be: an unknown name, a number that is no number, or more ranks than devices."""


class LedgerError(SimulatorError, AssertionError):
    """A ledger does not say what was expected of it, or was asked for a kind, rank, line or group that is not there."""


class ScriptError(SimulatorError):
    """A script cannot be read, is no Python, or a rank has left it with an exit code other than 0."""
