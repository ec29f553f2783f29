"""Virtual ranks: ordinary torch.distributed code in one process, every byte counted, every hang and race explained."""

from . import collectives, streams
from .clusters import Cluster
from .errors import (
    BufferError,
    ClusterError,
    CollectiveMismatchError,
    DeadlockError,
    EarlyAccessError,
    HazardError,
    InFlightWriteError,
    LedgerError,
    OverlappingCallsError,
    ScriptError,
    SharedModuleError,
    SimulatorError,
    StaleGroupError,
    StreamError,
    StreamRaceError,
    UnsupportedOperationError,
    UnsupportedTransformError,
    UnwaitedWorkError,
    WorldError,
)
from .ledger import Ledger
from .trace import Trace
from .world import VirtualWorld

__all__ = [
    "BufferError",
    "Cluster",
    "ClusterError",
    "CollectiveMismatchError",
    "DeadlockError",
    "EarlyAccessError",
    "HazardError",
    "InFlightWriteError",
    "Ledger",
    "LedgerError",
    "OverlappingCallsError",
    "ScriptError",
    "SharedModuleError",
    "SimulatorError",
    "StaleGroupError",
    "StreamError",
    "StreamRaceError",
    "Trace",
    "UnsupportedOperationError",
    "UnsupportedTransformError",
    "UnwaitedWorkError",
    "VirtualWorld",
    "WorldError",
    "collectives",
    "streams",
]
