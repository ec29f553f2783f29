"""A case of `validate` on virtual ranks."""

import torch

from simulator import VirtualWorld

from .validate_body import VARIANTS, Share, Tensors, run_variant, share_of
from .validate_cases import Case

CPU = torch.device("cpu")


def run_on_virtual_ranks(case: Case, seed: int | None = None) -> list[Share]:
    """Every rank's share. With a seed the ranks run in another order, the same for the same seed."""
    results, sent = {}, {}
    for variant in VARIANTS[case.kind]:
        world = VirtualWorld(len(case.tokens), seed=seed)
        results[variant] = world.run(run_variant, case, variant, CPU)
        sent[variant] = world.bytes
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
