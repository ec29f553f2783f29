"""A script that was written for torchrun, on virtual ranks: every rank runs it as its own `__main__`.

    script = Script("train.py", ["--steps", "3"])
    world = VirtualWorld(8, singletons=script.singletons)
    script.run(world)

Under torchrun each process has its own `sys.argv`, `sys.path`, `__main__` and modules. These are exchanged with the
other things of a process when another rank goes on: the `singletons` of the script say which. Of the modules, those
that the script finds in its own folder exist once for each rank. Packages that are installed are shared by all ranks.

Source: docs.pytorch.org/docs/stable/elastic/run.html.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import process_state
from .cores import allow_cores, allowed_cores
from .devices import BackwardOnCpu, OnCpu, cuda_on_cpu
from .errors import ScriptError, SimulatorError
from .source_lines import is_program

if TYPE_CHECKING:
    from .world import VirtualWorld


class Script:
    """A Python file and its arguments.

    Args:
        path: the file.
        arguments: what follows it on the command line.

    Raises:
        ScriptError: there is no such file, or it is no Python.
    """

    def __init__(self, path: str | Path, arguments: Sequence[str] = ()) -> None:
        self.path, self.arguments = Path(path), list(arguments)
        self.folder = str(self.path.absolute().parent)
        self._source = _source_of(self.path)
        self._names = {"__main__"}

    @property
    def singletons(self) -> list[tuple[Any, str]]:
        """What each rank is to have for itself, for `VirtualWorld(singletons=...)`."""
        own = [(self, "modules"), (sys, "argv"), (sys, "path"), (sys, "meta_path")]
        # A rank that waits for others while it imports must not keep them from importing a module of the same name.
        return [*own, (importlib._bootstrap, "_module_locks")]  # type: ignore[attr-defined]

    @property
    def modules(self) -> dict[str, ModuleType]:
        """Of `sys.modules`, those that belong to the rank that runs: `__main__` and what it found in its folder."""
        return {name: sys.modules[name] for name in self._names if name in sys.modules}

    @modules.setter
    def modules(self, own: dict[str, ModuleType]) -> None:
        for name in self._names:
            sys.modules.pop(name, None)
        sys.modules.update(own)

    def run(self, world: VirtualWorld, has_cuda: bool = False) -> None:
        """Run the script on every rank. Where it asks for cuda, it gets the CPU.

        Args:
            world: made with the `singletons` of this script.
            has_cuda: what torch.cuda.is_available() says to it.

        Raises:
            ScriptError: a rank has called sys.exit with something else than 0.
            Exception: as `VirtualWorld.run`.
        """
        handle = signal.signal
        signal.signal = _ignored_on_ranks(handle)  # type: ignore[assignment]
        cores = allowed_cores()
        try:
            with cuda_on_cpu(world.size, has_cuda):
                world.run(self._run_as_main, cores)
        finally:
            signal.signal = handle

    def _run_as_main(self, cores: set[int]) -> None:
        allow_cores(cores)  # for the processes that a script may start, such as those that load data
        main = ModuleType("__main__")
        main.__file__ = os.path.join(self.folder, self.path.name)
        main.__builtins__ = __builtins__  # type: ignore[attr-defined]
        sys.modules["__main__"] = main
        sys.argv = [str(self.path), *self.arguments]
        sys.path.insert(0, self.folder)
        sys.meta_path.insert(sys.meta_path.index(PathFinder), _BesideTheScript(self.folder, self._names))
        with OnCpu(), BackwardOnCpu():
            try:
                # Each rank compiles for itself: torch.compile keeps what it finds out about a function with its code.
                exec(compile(self._source, str(self.path), "exec", dont_inherit=True), vars(main))
            except SystemExit as end:
                if end.code not in (None, 0):
                    state = process_state.current()
                    rank = "a rank" if state is None else f"rank {state.rank}"
                    raise ScriptError(
                        f"{rank} called sys.exit({end.code!r}).\n"
                        "  A script that ends well calls sys.exit(0), or nothing; look at what it has printed above."
                    ) from None


def _ignored_on_ranks(handle: Callable[..., Any]) -> Callable[..., Any]:
    """Python lets only the main thread, which is no rank, handle signals."""
    return lambda number, handler: (
        handle(number, handler) if process_state.current() is None else signal.getsignal(number)
    )


class _BesideTheScript(MetaPathFinder):
    """Notes the names of modules that are found in the script's folder, so that each rank gets its own."""

    def __init__(self, folder: str, names: set[str]) -> None:
        self._folder, self._names = folder, names

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        parent, _, _ = name.rpartition(".")
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and (parent in self._names or (not parent and self._is_beside(name, spec))):
            self._names.add(name)
        return spec

    def _is_beside(self, name: str, spec: ModuleSpec) -> bool:
        places = (
            [os.path.dirname(spec.origin)] if spec.origin else list(spec.submodule_search_locations or ())
        )
        return any(place in (self._folder, os.path.join(self._folder, name)) for place in places)


def _source_of(path: Path) -> bytes:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ScriptError(
            f"{path} cannot be read: {error.strerror}.\n  Give the path of the script, as to torchrun."
        ) from None
    try:
        compile(source, str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise ScriptError(
            f"{path} is no Python: {error}.\n  Give a script that `python {path}` would run."
        ) from None
    return source


def describe_failure(error: BaseException) -> str:
    """What stopped a script: an error of the simulator in its own words, any other with the script's source lines."""
    if isinstance(error, SimulatorError):
        return f"{type(error).__name__}: {error}"
    described = traceback.TracebackException.from_exception(error)
    _keep_the_program(described)
    return "".join(described.format()).rstrip()


def _keep_the_program(described: traceback.TracebackException | None) -> None:
    """Leave out the lines of torch and the simulator, and those before the script begins."""
    if described is not None:
        lines = list(described.stack)
        begins = max((place for place, line in enumerate(lines) if line.filename == __file__), default=-1)
        own = [line for line in lines[begins + 1 :] if is_program(line.filename)]
        described.stack = traceback.StackSummary.from_list(own)
        _keep_the_program(described.__cause__)
        _keep_the_program(described.__context__)
