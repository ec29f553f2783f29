"""How far the ranks are from one device and from float64, and how far they may be.

The tolerance is measured and not chosen. One device, computing in the dtype of the case, has an error against
float64; that is what rounding does to these numbers in this dtype. The ranks round in the same places, but may sum
in another order (a kernel that is given fewer heads may block them otherwise; the weight gradients of the ranks are
rounded before they are summed), so they get `FACTOR` times that. One wrong head is off by as much as the numbers
are large, which in bfloat16 is still many times as much as is tolerated.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .validate_body import Share, Tensors
from .validate_cases import Case, sequence_of
from .validate_oracle import one_device

FACTOR = 8.0
Named = dict[tuple[int, str], Tensor]  # by group and name


@dataclass(frozen=True)
class Errors:
    """Of the output, or of all gradients: the largest difference, as a part of the largest exact number.

    Args:
        device: from one device in the same dtype.
        float64: from float64.
        tolerance: what both may be at most.
    """

    device: float
    float64: float
    tolerance: float

    @property
    def small(self) -> bool:
        """Within the tolerance; nan is not."""
        return self.device <= self.tolerance and self.float64 <= self.tolerance


def errors_of(case: Case, shares: list[Share], device: torch.device) -> tuple[Errors, Errors]:
    """Of the output and of the gradients, the largest of any variant.

    Args:
        shares: of all ranks, by rank.
        device: where to compute what one device does.
    """
    exact, same = (_on_one_device(case, device, exact=exact) for exact in (True, False))
    variants = dict.fromkeys(variant for share in shares for variant in share.differing)
    results = [_joined(case, [share.tensors for share in shares])]
    for variant in variants:
        results.append(_joined(case, [share.differing.get(variant, share.tensors) for share in shares]))
    outputs = [key for key in exact if key[1].endswith("output")]
    gradients = [key for key in exact if not key[1].endswith("output")]
    return _errors(case, results, same, exact, outputs), _errors(case, results, same, exact, gradients)


def _on_one_device(case: Case, device: torch.device, exact: bool) -> Named:
    found = {}
    for group in range(len(case.groups)):
        tensors = one_device(case, sequence_of(case, group), device, exact=exact)
        found.update({(group, name): tensor.double() for name, tensor in tensors.items()})
    return found


def _joined(case: Case, by_rank: list[Tensors]) -> Named:
    """Tokens one after the other; gradients of weights, of which each rank has its tokens' part, summed."""
    joined = {}
    for group, members in enumerate(case.groups):
        for name in by_rank[members[0]]:
            parts = [by_rank[rank][name].double() for rank in members]
            of_weight = name.endswith((".weight", ".bias"))
            joined[group, name] = torch.stack(parts).sum(dim=0) if of_weight else torch.cat(parts, dim=1)
    return joined


def _errors(
    case: Case, results: list[Named], same: Named, exact: Named, keys: list[tuple[int, str]]
) -> Errors:
    rounding = max(_difference(same[key], exact[key], exact[key]) for key in keys)
    return Errors(
        device=max(_difference(found[key], same[key], exact[key]) for found in results for key in keys),
        float64=max(_difference(found[key], exact[key], exact[key]) for found in results for key in keys),
        tolerance=FACTOR * max(rounding, torch.finfo(case.dtype).eps),
    )


def _difference(a: Tensor, b: Tensor, exact: Tensor) -> float:
    """The largest difference, as a part of the largest exact number; infinite where it is no number."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    difference = ((a - b).abs().max() / exact.abs().max().clamp(min=1e-30)).item()
    return difference if difference < float("inf") else float("inf")
