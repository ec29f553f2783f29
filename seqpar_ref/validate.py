"""`python -m seqpar_ref.validate`, or `seqpar validate`: does all of it hold on this machine?

    torchrun --nproc-per-node 4 -m seqpar_ref.validate --backend gloo

Every case of `validate_cases.py` is run on all ranks and compared with one device, with the plan's bytes and, on
gloo, with virtual ranks; then the parts of a step are timed. docs/real_ranks.md says what the tables mean.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from .device import device_of_backend
from .errors import ArgumentError
from .torchrun import become_torchrun, check_ranks, is_first, is_started, started_processes
from .validate_cases import cases_for
from .validate_ranks import Ranks
from .validate_report import Report
from .validate_virtual import run_virtual

DAY = 24 * 60 * 60.0  # in seconds


@dataclass(frozen=True)
class Options:
    """What to run; the command line's options.

    Args:
        backend: "virtual", "gloo", or that of the accelerator ("nccl", "xccl"). None: virtual where no
            processes were started, else the accelerator's, or gloo where there is none.
        ranks: None for as many as were started, else 4.
        only: a part of the names of the cases to run.
        schedules: on virtual ranks, how many other orders of the ranks to try as well.
    """

    backend: str | None = None
    ranks: int | None = None
    timeout: float = 30.0
    json: Path | None = None
    only: str = ""
    schedules: int = 0
    times: bool = True


def run(options: Options, console: Console) -> bool:
    """Whether everything passed.

    Raises:
        ArgumentError: an option that cannot be, or that contradicts what was started.
        NoAcceleratorError, MissingRankError: devices, or ranks, that are not there.
    """
    report = Report(options.json if is_first() else None)
    report.write()  # find out now whether the file can be written, and leave no old result in it
    try:
        return _run(options, report, console)
    except BaseException as error:
        report.stop(error)
        if report.doing:
            console.print(f"FAILED {report.error}", highlight=False, soft_wrap=True, markup=False)
        raise
    finally:
        report.write()


def _run(options: Options, report: Report, console: Console) -> bool:
    backend = _backend(options)
    ranks = started_processes(otherwise=4) if options.ranks is None else options.ranks
    _check(options, backend)
    check_ranks(ranks, backend)
    if not is_started():
        device_of_backend(backend, 0, ranks)  # refuses more ranks than there are devices
    cases = [case for case in cases_for(ranks) if options.only in str(case)]
    if not cases:
        raise ArgumentError(
            f"--only {options.only!r} is in the name of no case.", "Leave it out to see them."
        )
    report.expected = len(cases)
    if backend == "virtual":
        return run_virtual(cases, ranks, options.schedules, report, console)
    if is_started():
        return Ranks(backend, options.timeout, report, console).run(cases, options.times)
    become_torchrun(["validate", *_arguments(options, backend)], ranks)


def _backend(options: Options) -> str:
    if options.backend is not None:
        return options.backend
    if not is_started():
        return "virtual"
    kind = torch.accelerator.current_accelerator()
    return "gloo" if kind is None else dist.get_default_backend_for_device(kind.type)


def _check(options: Options, backend: str) -> None:
    kind = torch.accelerator.current_accelerator()
    own = "nccl" if kind is None else dist.get_default_backend_for_device(kind.type)
    if backend not in ("virtual", "gloo", own):
        raise ArgumentError(f"--backend {backend} cannot be used here.", f"Use virtual, gloo or {own}.")
    if options.schedules < 0 or (options.schedules and backend != "virtual"):
        raise ArgumentError(
            f"--schedules {options.schedules} on {backend} ranks.", "Use 0 or more, with --backend virtual."
        )
    if not options.timeout > 0:
        raise ArgumentError(f"--timeout {options.timeout} leaves no time.", "Give seconds, such as 30.")
    if options.timeout > DAY:
        raise ArgumentError(f"--timeout {options.timeout} is longer than a day.", "Give seconds, such as 30.")


def _arguments(options: Options, backend: str) -> list[str]:
    arguments = ["--backend", backend, "--timeout", str(options.timeout)]
    arguments += ["--times" if options.times else "--no-times"]
    if options.only:
        arguments += ["--only", options.only]
    if options.json is not None:
        arguments += ["--json", str(options.json)]
    return arguments


if __name__ == "__main__":
    from .cli import main

    main(["validate", *sys.argv[1:]], name="python -m seqpar_ref.validate")
