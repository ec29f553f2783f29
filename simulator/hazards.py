"""Buffers in flight: what a program must not touch between an asynchronous call and its `wait()`.

The outputs of a call in flight may be neither read nor written, its inputs may not be written. What overlaps is found
by byte ranges, so that the other half of a flat buffer is no access, and views of a buffer are.

Source: docs.pytorch.org/docs/stable/distributed.html, on asynchronous operations and `Work.wait`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .accesses import Access, Region, region_of
from .buffers import unobserved
from .calls import Call
from .errors import (
    EarlyAccessError,
    HazardError,
    InFlightWriteError,
    OverlappingCallsError,
    SharedModuleError,
    UnwaitedWorkError,
)
from .graphs import leaves_of
from .instruments import Instrument
from .scheduler import Scheduler
from .source_lines import Lines, lines_text, program_lines

Policy = Literal["raise", "record", "off"]


@dataclass(frozen=True)
class Hazard:
    """One thing that a program may not do.

    Attributes:
        rank: global rank.
        error: what is raised for it; `str(error)` names both source lines and what to add.
        where: source lines at which the rank stood.
        issued: source lines of the other access, or of the call in flight.
    """

    rank: int
    error: HazardError
    where: Lines
    issued: Lines

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {self.error}"


class Reports:
    """The hazards of a run. With policy "raise" the first one stops the world."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.found: dict[Any, Hazard] = {}
        self.scheduler: Scheduler

    def add(self, rank: int, error: HazardError, where: Lines, issued: Lines) -> None:
        """Report a hazard; the same one, of the same lines and rank, once only."""
        if self.policy == "off":
            return
        hazard = Hazard(rank, error, where, issued)
        self.found.setdefault((rank, type(error), where[:1], issued[:1]), hazard)
        if self.policy == "raise":
            self.scheduler.fail(error)
            raise error


@dataclass(eq=False)
class InFlight:
    """A call between its issue and its wait.

    Attributes:
        regions: the memory of each buffer, and whether it is an output. An input that is part of an output is not
            there: the in-place forms.
        contents: each input that shares no byte with an output, with a copy of what it held, to find writes that are
            no operation of PyTorch.
    """

    call: Call
    regions: list[tuple[Region, bool]]
    contents: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Hazards(Instrument):
    """Watches the buffers that are in flight on each rank."""

    watches_operations = True

    def __init__(self, size: int, reports: Reports) -> None:
        self._reports = reports
        self._in_flight: list[dict[Call, InFlight]] = [{} for _ in range(size)]
        self._trained: dict[int, tuple[weakref.ref[Tensor], int, Lines]] = {}

    def is_watching(self, rank: int) -> bool:
        return bool(self._in_flight[rank])

    def issued(self, rank: int, call: Call) -> None:
        own = self._in_flight[rank]
        if own:
            self._check_other_calls(rank, call, own)
        if call.is_async:
            outputs = [region_of(x) for x in call.outputs]
            inputs = [x for x in call.inputs if not any(region.covers(region_of(x)) for region in outputs)]
            regions = [(region, True) for region in outputs] + [(region_of(x), False) for x in inputs]
            apart = [x for x in inputs if not any(region.meets(region_of(x)) for region in outputs)]
            with unobserved():
                contents = [(x, x.detach().clone()) for x in apart]
            own[call] = InFlight(call, regions, contents)

    def waited(self, rank: int, call: Call) -> None:
        flight = self._in_flight[rank].pop(call, None)
        if flight is None:
            return
        with unobserved():
            changed = [x for x, before in flight.contents if not _same_bytes(x, before)]
        if changed:
            self._report(
                rank,
                InFlightWriteError,
                call,
                f"the input of shape {list(changed[0].shape)} is not what it was when the call was made",
                "Write to it after wait() (a numpy array or another rank may share its memory).",
            )

    def before(self, rank: int, operation: Any, accesses: Sequence[Access]) -> None:
        for access in accesses:
            for flight in self._in_flight[rank].values():
                for region, is_output in flight.regions:
                    if (is_output or access.writes) and region.meets(region_of(access.tensor)):
                        self._touched(rank, operation, access, flight.call, is_output)
                        return

    def _touched(self, rank: int, operation: Any, access: Access, call: Call, is_output: bool) -> None:
        error = EarlyAccessError if is_output else InFlightWriteError
        what = f"{operation} {access} {'what it receives' if is_output else 'its input'} before wait()"
        self._report(rank, error, call, what, "Call wait() on its Work before this line.")

    def _check_other_calls(self, rank: int, call: Call, own: dict[Call, InFlight]) -> None:
        for other, flight in own.items():
            if (other.kind, call.kind) == ("send", "recv") and call.where == other.where:
                if any(region.meets(region_of(x)) for region, _ in flight.regions for x in call.outputs):
                    # A batch that receives where it has sent from. The memory stays its own until wait().
                    flight.contents = [(x, x) for x, _ in flight.contents]
                continue
            for tensors, writes in ((call.outputs, True), (call.inputs, False)):
                for tensor in tensors:
                    for region, is_output in flight.regions:
                        if (is_output or writes) and region.meets(region_of(tensor)):
                            self._report(
                                rank,
                                OverlappingCallsError,
                                other,
                                f"{'two outputs' if is_output and writes else 'an input and an output'} overlap: "
                                f"{call} uses its memory before wait()",
                                "Call wait() on the first Work before the second call, or use another buffer.",
                            )
                            return

    def _report(self, rank: int, error: type[HazardError], call: Call, what: str, advice: str) -> None:
        here = program_lines()
        self._reports.add(
            rank,
            error(
                f"rank {rank}: {call} is in flight since {lines_text(call.where[:1])}; {what}, at "
                f"{lines_text(here)}.\n  {advice}"
            ),
            here,
            call.where,
        )

    def finish(self) -> None:
        """At the end of the run: report every Work that nobody waited for."""
        for rank, own in enumerate(self._in_flight):
            forgotten = [call for call in own if not call.is_functional]
            own.clear()
            for call in forgotten:
                others = f" (and {len(forgotten) - 1} more of this rank)" if len(forgotten) > 1 else ""
                error = UnwaitedWorkError(
                    f"rank {rank}: {call} at {lines_text(call.where)} was never waited for{others}; what it receives "
                    "is undefined.\n"
                    "  Keep the Work that the call returns, and call wait() on it."
                )
                self._reports.add(rank, error, call.where, call.where)

    def backward(
        self, rank: int, tensors: Sequence[Tensor], inputs: Sequence[Any], accumulates: bool
    ) -> None:
        """Refuse a parameter that gets gradients from two ranks: on hardware each rank has a copy of its own."""
        if not accumulates:
            return
        roots = [x for x in inputs if isinstance(x, Tensor)] if inputs else leaves_of(tensors)
        for leaf in roots:
            if not isinstance(leaf, torch.nn.Parameter):
                continue
            known, owner, where = self._trained.get(id(leaf), (None, rank, ()))
            if known is None or known() is not leaf:
                self._trained[id(leaf)] = weakref.ref(leaf), rank, program_lines()
            elif owner != rank:
                here = program_lines()
                error = SharedModuleError(
                    f"rank {rank}: backward() at {lines_text(here)} adds to the gradient of a parameter"
                    f"{_name_of(leaf)} of shape {list(leaf.shape)} that rank {owner} trains as well, at "
                    f"{lines_text(where)}. On hardware each rank has a module of its own; here the gradients of all "
                    "ranks would be summed silently.\n"
                    "  Make the module inside the function that run() calls, or copy.deepcopy it there."
                )
                self._reports.add(rank, error, here, where)
                return


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.detach().reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _name_of(parameter: Tensor) -> str:
    """Its name, as ` 'weight'`, in the nearest module that a function on the stack has at hand."""
    frame = sys._getframe()
    while frame is not None:
        for value in list(frame.f_locals.values()):
            if isinstance(value, torch.nn.Module):
                for name, own in value.named_parameters():
                    if own is parameter:
                        return f" {name!r}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
