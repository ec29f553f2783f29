"""Virtual ranks: ordinary torch.distributed code in one process, with every byte counted and every hang explained."""

from . import collectives
from .errors import (
    BufferError,
    CollectiveMismatchError,
    DeadlockError,
    SimulatorError,
    StaleGroupError,
    UnsupportedOperationError,
    UnsupportedTransformError,
    WorldError,
)
from .world import VirtualWorld

__all__ = [
    "BufferError",
    "CollectiveMismatchError",
    "DeadlockError",
    "SimulatorError",
    "StaleGroupError",
    "UnsupportedOperationError",
    "UnsupportedTransformError",
    "VirtualWorld",
    "WorldError",
    "collectives",
]
