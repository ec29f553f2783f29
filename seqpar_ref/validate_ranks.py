"""`validate` on real ranks: each runs the cases, rank 0 compares and prints."""

import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from .device import device_of_backend
from .environment import environment_of_process, joined
from .errors import ArgumentError
from .progress import Steps
from .rendezvous import Meeting, meet
from .sent import BytesSent
from .torchrun import local_rank
from .validate_body import VARIANTS, Share, run_variant, share_of
from .validate_cases import Case
from .validate_judge import judge
from .validate_report import Report
from .validate_times import measure, sizes_for
from .validate_virtual import first_variant_on_virtual_ranks
from .watch import Watch


class Ranks:
    """This process as one of the ranks.

    Args:
        backend: gloo, or that of the accelerator.
        timeout: seconds after which a missing rank is an error.
        report: rank 0 writes what it found, also if it fails.
    """

    def __init__(self, backend: str, timeout: float, report: Report, console: Console) -> None:
        self.backend, self.timeout, self.report, self.console = backend, timeout, report, console

    def run(self, cases: list[Case], with_times: bool) -> bool:
        """Whether every case passed, on every rank. Ends the process if a rank is missing or fails."""
        self.device = self._device()
        with BytesSent(1):
            torch.zeros(1)  # PyTorch imports much before the first operation in a mode; nobody waits yet
        if self.device.type == "cpu":
            torch.set_num_threads(1)  # the order of a sum must not depend on the machine
        meeting = meet(self.timeout)
        self.rank = meeting.rank
        self.watch = Watch(meeting, self.timeout, self._stopped)
        try:
            self._start(meeting)
            self._check(cases)
            if with_times:
                self._time()
            passed = self._agree_on_the_end()
            dist.destroy_process_group()
        except Exception as error:
            self.watch.fail(error)
        self.watch.finish()
        return passed

    def _device(self) -> torch.device:
        several = os.environ.get("WORLD_SIZE", "1") != "1"
        if self.backend != "gloo" and several and "LOCAL_RANK" not in os.environ:
            raise ArgumentError(
                "LOCAL_RANK is not set, so all ranks of a host would take its first device.",
                "Set it to the rank within the host (Slurm: LOCAL_RANK=$SLURM_LOCALID), or use torchrun.",
            )
        return device_of_backend(self.backend, *local_rank())

    def _start(self, meeting: Meeting) -> None:
        self.watch.step("waiting for all ranks")
        with Steps(self.console).step(f"waiting for {meeting.size} ranks"):
            self.watch.wait_for_everyone()
        self.watch.step(f"starting {self.backend}")
        dist.init_process_group(
            self.backend,
            store=dist.PrefixStore("group", meeting.store),
            rank=meeting.rank,
            world_size=meeting.size,
            timeout=timedelta(seconds=self.timeout),
            device_id=None if self.device.type == "cpu" else self.device,
        )
        by_rank = self._gather(environment_of_process(self.backend, self.device))
        if self.rank == 0:
            self.report.environment = joined(by_rank)
            self.report.show_environment(self.console)

    def _check(self, cases: list[Case]) -> None:
        doing = f"checking {len(cases)} cases on {dist.get_world_size()} ranks ({self.backend})"
        for number, case in Steps(self.console).each(list(enumerate(cases, start=1)), doing):
            self.watch.step(f"case {number} of {len(cases)} ({case})")
            shares = self._gather(self._share(case))
            if self.rank == 0:
                virtual = first_variant_on_virtual_ranks(case) if self.backend == "gloo" else None
                self.report.rows.append(judge(case, shares, virtual, self.device))
        if self.rank == 0:
            self.report.show_cases(self.console)

    def _share(self, case: Case) -> Share:
        results, sent, uncounted = {}, {}, set()
        for variant in VARIANTS[case.kind]:
            with BytesSent(dist.get_world_size()) as counter:
                results[variant] = run_variant(case, variant, self.device)
            sent[variant] = counter.by_receiver
            uncounted |= counter.uncounted
        return share_of(case, results, sent, uncounted)

    def _time(self) -> None:
        sizes = sizes_for(dist.get_world_size(), self.device)
        with Steps(self.console).step(f"timing ({sizes})"):
            times = measure(sizes, self.device, self.watch.step)
        if self.rank == 0:
            self.report.sizes, self.report.times = sizes, times
            self.report.show_times(self.console)

    def _agree_on_the_end(self) -> bool:
        self.watch.step("agreeing on the result")
        self.report.error = None
        passed = [self.report.passed]
        dist.broadcast_object_list(passed, src=0, device=self.device)
        return passed[0]

    def _gather(self, mine: Any) -> list[Any]:
        """Every rank's, on rank 0."""
        everyone: list[Any] | None = [None] * dist.get_world_size() if self.rank == 0 else None
        dist.gather_object(mine, everyone, dst=0)
        return everyone or []

    def _stopped(self, verdict: str) -> None:
        """Told by the watch, on every rank, before it ends the process."""
        self.report.error = verdict
        self.report.write()
        print(f"rank {self.rank}: validate stopped: {verdict}", file=sys.stderr, flush=True)
        if 0 < len(self.report.rows) < self.report.expected:
            self.report.show_cases(self.console)
