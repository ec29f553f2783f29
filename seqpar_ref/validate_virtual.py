"""`validate` on virtual ranks: they run the cases one after the other, in this process."""

import torch
from rich.console import Console

from simulator import VirtualWorld

from .environment import environment_of_process, joined
from .progress import Steps
from .validate_body import VARIANTS, Share, Tensors, run_variant, share_of
from .validate_cases import Case
from .validate_judge import judge
from .validate_report import Report

CPU = torch.device("cpu")


def run_virtual(cases: list[Case], ranks: int, schedules: int, report: Report, console: Console) -> bool:
    """Whether every case passed. What was found is printed, also if a case raises."""
    report.environment = joined([environment_of_process("virtual", CPU)] * ranks)
    report.show_environment(console)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for case in Steps(console).each(cases, f"checking {len(cases)} cases on {ranks} virtual ranks"):
            report.doing = str(case)
            report.rows.append(judge(case, run_on_virtual_ranks(case, schedules), None, CPU))
        report.error = None
    finally:
        torch.set_num_threads(threads)
        report.show_cases(console)
    console.print("No times: virtual ranks share one core, and what they send goes nowhere.", highlight=False)
    return report.passed


def run_on_virtual_ranks(case: Case, schedules: int = 0) -> list[Share]:
    """Every rank's share.

    Args:
        schedules: how many other orders of the ranks to run all variants in; each counts as a variant more.
    """
    results, sent = {}, {}
    for seed in (None, *range(schedules)):
        for variant in VARIANTS[case.kind]:
            name = variant if seed is None else f"{variant}, schedule {seed}"
            world = VirtualWorld(len(case.tokens), seed=seed)
            results[name] = world.run(run_variant, case, variant, CPU)
            sent[name] = world.bytes
    return [
        share_of(
            case,
            {variant: by_rank[rank] for variant, by_rank in results.items()},
            {variant: matrix[rank] for variant, matrix in sent.items()},
            set(),
        )
        for rank in range(len(case.tokens))
    ]


def first_variant_on_virtual_ranks(case: Case) -> list[Tensors]:
    """What the first variant gives on each rank."""
    return VirtualWorld(len(case.tokens)).run(run_variant, case, VARIANTS[case.kind][0], CPU)
