"""A case of `validate` on virtual ranks."""

import torch

from simulator import VirtualWorld

from .validate_body import VARIANTS, Share, Tensors, run_variant, share_of
from .validate_cases import Case

CPU = torch.device("cpu")


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
