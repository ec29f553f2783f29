"""What an operating-system process would have of its own, kept for each virtual rank.

torch.distributed's registry of groups; the environment variables, the random generators of torch, numpy and Python,
torch's default dtype, and singletons that the caller names; and the thread's grad and autocast modes. The first is
found through a thread-local; the next ones are exchanged whenever a rank gets or gives the baton; the last belong to
the thread anyway.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from .errors import WorldError
from .generators import Beginning, Generators
from .singletons import Singleton

_INIT_PROCESS_GROUP = inspect.unwrap(dist.init_process_group).__code__

_thread = threading.local()


def current() -> ProcessState | None:
    """The state of the virtual rank that the calling thread is, None outside of virtual ranks."""
    return getattr(_thread, "state", None)


@cache
def _shared_environment(size: int) -> dict[bytes, bytes]:
    """What torchrun would tell all ranks alike."""
    sizes = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return _encoded({**sizes, "GROUP_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500})


def _encoded(variables: dict[str, object]) -> dict[bytes, bytes]:
    """As `os.environ` keeps them."""
    return {os.fsencode(name): os.fsencode(str(value)) for name, value in variables.items()}


class ProcessState:
    """One rank's share of everything that torch and Python keep once per process."""

    def __init__(
        self, run: Any, rank: int, size: int, beginning: Beginning, singletons: Sequence[Singleton] = ()
    ) -> None:
        self.run, self.rank = run, rank
        self.groups = GroupRegistry(run.make_default_group)
        own = _encoded({"RANK": rank, "LOCAL_RANK": rank, "ROLE_RANK": rank})
        self.environment = {**os.environ._data, **_shared_environment(size), **own}  # type: ignore[attr-defined]
        self._generators = Generators(beginning)
        self._dtype = torch.get_default_dtype()
        self._singletons = [(singleton, singleton.start()) for singleton in singletons]
        self._graph_nodes = 0

    def enter(self) -> None:
        """The rank gets the baton."""
        os.environ._data = self.environment  # type: ignore[attr-defined]
        self._generators.enter()
        if torch.get_default_dtype() != self._dtype:
            torch.set_default_dtype(self._dtype)
        for singleton, value in self._singletons:
            singleton.put(value)

    def leave(self) -> None:
        """The rank gives the baton away."""
        self._generators.leave()
        self._dtype = torch.get_default_dtype()
        if self._singletons:
            self._singletons = [(singleton, singleton.get()) for singleton, _ in self._singletons]

    def adopt_thread(self) -> None:
        """Make the calling thread this rank: its groups, and one intra-op thread."""
        _thread.state = self
        torch.autograd.set_multithreading_enabled(False)
        torch.set_num_threads(1)
        for group, name in self.groups.pg_names.items():
            torch._C._distributed_c10d._register_process_group(name, group)
        if self._graph_nodes:
            one = torch.ones((), requires_grad=True)
            while torch.autograd._get_sequence_nr() < self._graph_nodes:
                one.view_as(one)

    def leave_thread(self) -> None:
        """Note how many autograd nodes the rank has made: backward takes the newest first, also after a re-entry."""
        self._graph_nodes = torch.autograd._get_sequence_nr()


class GroupRegistry:
    """What `torch.distributed` knows in one process: the default group, the others, and their names.

    The default group comes into being when it is first asked for, so that ordinary functions need no
    init_process_group. A program that does call init_process_group, as under torchrun, finds nothing there yet and
    starts it itself; after destroy_process_group it is gone, as on hardware.
    """

    pg_config_info = c10d._World.pg_config_info

    def __init__(self, make_default_group: Callable[[], None]) -> None:
        self._make_default_group = make_default_group
        self._default: dist.ProcessGroup | None = None
        self._started_by_program = False
        self._making = False
        self.clear()

    def clear(self) -> None:
        """Forget all groups, as a process that has just begun."""
        self._default, self.group_count = None, 0
        self.comms: list[Any] = []
        self.pg_map: dict[Any, Any] = {}
        self.pg_names: dict[Any, Any] = {}
        self.pg_group_ranks: dict[Any, Any] = {}
        self.pg_backend_config: dict[Any, Any] = {}
        self.tags_to_pg: dict[Any, Any] = {}
        self.pg_to_tag: dict[Any, Any] = {}
        self.pg_coalesce_state: dict[Any, Any] = {}

    def reopen(self) -> None:
        """Let the default group come into being again, for a backward pass that runs after the program's end."""
        self._started_by_program = self._default is not None and self._started_by_program

    @property
    def default_pg(self) -> dist.ProcessGroup | None:
        if self._started_by_program or self._making:
            return self._default
        if _asked_by_init_process_group():
            self.clear()
            torch._C._distributed_c10d._unregister_all_process_groups()
            self._started_by_program = True
        elif self._default is None:
            self._making = True
            try:
                self._make_default_group()
            finally:
                self._making = False
        return self._default

    @default_pg.setter
    def default_pg(self, group: dist.ProcessGroup | None) -> None:
        self._default = group
        self._started_by_program |= group is None


def _asked_by_init_process_group() -> bool:
    """Whether the reader of `group.WORLD` is init_process_group's test for a group that exists already.

    Between it and here stand torch's property `WORLD`, the routed registry and `GroupRegistry.default_pg`.
    """
    return sys._getframe(4).f_code is _INIT_PROCESS_GROUP


class _RoutedRegistry:
    """Stands where torch keeps its registry: rank threads find their own, every other thread the real one."""

    def __init__(self, real: Any) -> None:
        object.__setattr__(self, "_real", real)

    def __getattr__(self, name: str) -> Any:
        state = current()
        return getattr(self._real if state is None else state.groups, name)

    def __setattr__(self, name: str, value: Any) -> None:
        state = current()
        setattr(self._real if state is None else state.groups, name, value)


TURN_SECONDS = 60.0
"""How long a world waits for one of another thread."""

_turn = threading.Lock()
"""Held by the world that runs. Environment and random numbers are the process's, so worlds take turns."""


@contextlib.contextmanager
def virtual_processes(
    states: Sequence[ProcessState],
    new_group: Callable[..., Any],
    rendezvous: Callable[..., Any],
    singletons: Sequence[Singleton] = (),
) -> Iterator[None]:
    """While this is open, rank threads have groups, environment and random numbers of their own.

    Threads that are no ranks, and a real process group that they use, see no difference. A world may run inside of a
    rank of another one; worlds in two threads run one after the other.
    """
    inside = current() is not None
    if not inside and not _turn.acquire(timeout=TURN_SECONDS):
        raise WorldError(
            f"another thread's world has been running for {TURN_SECONDS:.0f} s, and worlds take turns.\n"
            "  Run one after the other; a rank runs an inner world in its own thread, not in one that it starts."
        )
    with contextlib.ExitStack() as undo:
        if not inside:
            undo.callback(_turn.release)
        undo.callback(setattr, sys, "excepthook", sys.excepthook)
        undo.callback(torch.set_num_threads, torch.get_num_threads())
        undo.callback(Generators.of_process().enter)
        undo.callback(torch.set_default_dtype, torch.get_default_dtype())
        for singleton in singletons:
            undo.callback(singleton.put, singleton.get())
        undo.callback(_restore_environment, os.environ._data, states)  # type: ignore[attr-defined]
        if not inside:
            _route(undo, new_group, rendezvous)
        if (
            not gc.get_freeze_count()
        ):  # what was there before is no garbage: saves 8 % of a run of 1,024 ranks
            gc.freeze()
            undo.callback(gc.unfreeze)
        yield


def _restore_environment(environment: dict[bytes, bytes], states: Sequence[ProcessState]) -> None:
    """Undo what ranks have set, also where C code reads it."""
    os.environ._data = environment  # type: ignore[attr-defined]
    for name in {name for state in states for name, _ in environment.items() ^ state.environment.items()}:
        if name in environment:
            os.putenv(name, environment[name])
        else:
            os.unsetenv(name)


def _route(undo: contextlib.ExitStack, new_group: Callable[..., Any], rendezvous: Callable[..., Any]) -> None:
    """Let torch find a rank's own groups from its thread, and make them there."""
    isolate = torch._C._distributed_c10d._set_thread_isolation_mode  # type: ignore[attr-defined]
    isolate(True)
    undo.callback(isolate, False)
    replacements = {
        "_world": _RoutedRegistry(c10d._world),
        "_new_process_group_helper": _routed(c10d._new_process_group_helper, new_group),
        "rendezvous": _routed(c10d.rendezvous, rendezvous),
    }
    for name, replacement in replacements.items():
        undo.callback(setattr, c10d, name, getattr(c10d, name))
        setattr(c10d, name, replacement)


def _routed(real: Callable[..., Any], virtual: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: (real if current() is None else virtual)(*args, **kwargs)
