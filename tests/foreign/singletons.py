"""Global variables of other people's packages, one value a rank."""

import contextlib
from collections.abc import Iterator
from types import ModuleType

from simulator.process_state import ProcessState


@contextlib.contextmanager
def one_for_each_rank(*variables: tuple[ModuleType, str]) -> Iterator[None]:
    """While this is open, each rank of each world finds its own values; every one begins with what is there now."""
    real = ProcessState.enter, ProcessState.leave
    before = [getattr(module, name) for module, name in variables]
    values: dict[ProcessState, list[object]] = {}

    def enter(state: ProcessState) -> None:
        real[0](state)
        for (module, name), value in zip(variables, values.get(state, before), strict=True):
            setattr(module, name, value)

    def leave(state: ProcessState) -> None:
        values[state] = [getattr(module, name) for module, name in variables]
        real[1](state)

    ProcessState.enter, ProcessState.leave = enter, leave
    try:
        yield
    finally:
        ProcessState.enter, ProcessState.leave = real
        for (module, name), value in zip(variables, before, strict=True):
            setattr(module, name, value)
