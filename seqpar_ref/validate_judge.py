"""Whether a case holds: what the ranks have together, beside one device, the plan, and virtual ranks.

The tolerance is measured and not chosen. One device, computing in the dtype of the case, has an error against
float64; that is what rounding does to these numbers in this dtype. The ranks round in the same places, but may sum
in another order (a kernel that is given fewer heads may block them otherwise; the weight gradients of the ranks are
rounded before they are summed), so they get `FACTOR` times that. One wrong head is off by as much as the numbers
are large, which in bfloat16 is still 10 times as much as is tolerated.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .agreement import Record
from .validate_body import VARIANTS, Share, Tensors, equal_bits, plan_of
from .validate_cases import Case, sequence_of
from .validate_oracle import one_device

FACTOR = 8.0
Named = dict[tuple[int, str], Tensor]  # by group and name
RECORD_BYTES = 8 * len(Record.__dataclass_fields__)


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


@dataclass(frozen=True)
class Row:
    """What the table says of one case.

    Args:
        variants: the ones that were compared bit by bit.
        bytes_sent, bytes_planned: of all ranks in the first variant, forward and backward.
        bytes_equal: each rank sent to each other what is planned, in every variant.
        variant_bits: whether all variants gave the same bits.
        virtual_bits: whether virtual ranks have the same bits; None where nobody compared.
        problems: what does not hold, in words; nothing where the case passes.
    """

    case: Case
    variants: tuple[str, ...]
    forward: Errors
    gradient: Errors
    bytes_sent: int
    bytes_planned: int
    bytes_equal: bool
    variant_bits: bool
    virtual_bits: bool | None
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Everything holds."""
        return not self.problems


def judge(case: Case, shares: list[Share], virtual: list[Tensors] | None, device: torch.device) -> Row:
    """Compare the shares of all ranks, by rank; with what virtual ranks have where it is given."""
    exact: Named = {}
    same: Named = {}
    found: Named = {}
    for group in range(len(case.groups)):
        sequence = sequence_of(case, group)
        for results, is_exact in ((exact, True), (same, False)):
            computed = one_device(case, sequence, device, exact=is_exact)
            results.update({(group, name): tensor.double() for name, tensor in computed.items()})
        found.update({(group, name): tensor for name, tensor in _joined(case, group, shares).items()})
    outputs = [key for key in exact if key[1] == "output"]
    gradients = [key for key in exact if key[1] != "output"]
    forward = _errors(case, found, same, exact, outputs)
    gradient = _errors(case, found, same, exact, gradients)
    planned = planned_bytes(case)
    first = VARIANTS[case.kind][0]
    virtual_bits = None if virtual is None else _same_everywhere(shares, virtual)
    byte_problems = _byte_problems(planned, shares)
    bit_problems = _bit_problems(shares)
    problems = [
        *_error_problems("output", forward),
        *_error_problems("gradients", gradient),
        *byte_problems,
        *bit_problems,
        *(["bits: virtual ranks have other ones"] if virtual_bits is False else []),
    ]
    return Row(
        case,
        VARIANTS[case.kind],
        forward,
        gradient,
        sum(int(share.sent[first].sum()) for share in shares),
        int(planned.sum()),
        not byte_problems,
        not bit_problems,
        virtual_bits,
        tuple(problems),
    )


def planned_bytes(case: Case) -> np.ndarray:
    """Bytes [sender, receiver] of a forward and a backward pass together, by rank of the world.

    With checkpointing the backward pass runs the forward pass again. Without a plan each rank sends a record to
    each other one in every forward pass.
    """
    ranks = len(case.tokens)
    forward, backward = np.zeros((2, ranks, ranks), dtype=np.int64)
    for group, members in enumerate(case.groups):
        plan = plan_of(case, group)
        sizes = (case.batch, case.head_dim, case.dtype)
        value_dim = case.head_dim if case.kind == "block" else case.value_dim
        own = np.ix_(members, members)
        forward[own] = plan.bytes(*sizes, value_dim=value_dim)
        backward[own] = plan.bytes(*sizes, backward=True, value_dim=value_dim)
        if not case.planned:
            forward[own] += RECORD_BYTES * (1 - np.eye(len(members), dtype=np.int64))
    return forward + backward + (forward if case.checkpoint else 0)


def _joined(case: Case, group: int, shares: list[Share]) -> dict[str, Tensor]:
    """Tokens one after the other; gradients of weights, of which each rank has its tokens' part, summed."""
    members = case.groups[group]
    joined = {}
    for name in shares[members[0]].tensors:
        parts = [shares[rank].tensors[name].double() for rank in members]
        of_weight = name.endswith((".weight", ".bias"))
        joined[name] = torch.stack(parts).sum(dim=0) if of_weight else torch.cat(parts, dim=1)
    return joined


def _errors(case: Case, found: Named, same: Named, exact: Named, keys: list[tuple[int, str]]) -> Errors:
    rounding = max(_difference(same[key], exact[key], exact[key]) for key in keys)
    return Errors(
        device=max(_difference(found[key], same[key], exact[key]) for key in keys),
        float64=max(_difference(found[key], exact[key], exact[key]) for key in keys),
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


def _error_problems(what: str, errors: Errors) -> list[str]:
    if errors.small:
        return []
    return [
        f"{what}: off by {errors.device:.2g} from one device and {errors.float64:.2g} from float64, "
        f"{errors.tolerance:.2g} is allowed"
    ]


def _byte_problems(planned: np.ndarray, shares: list[Share]) -> list[str]:
    problems = []
    for variant in shares[0].sent:
        matrix = np.stack([share.sent[variant] for share in shares])
        wrong = np.flatnonzero((matrix != planned).any(axis=1)).tolist()
        if wrong:
            problems.append(
                f"bytes ({variant}): ranks {wrong} sent {matrix.sum(axis=1)[wrong].tolist()}, "
                f"the plan says {planned.sum(axis=1)[wrong].tolist()}"
            )
    uncounted = sorted({name for share in shares for name in share.uncounted})
    if uncounted:
        problems.append(f"bytes: collectives that the plan does not know: {', '.join(uncounted)}")
    return problems


def _bit_problems(shares: list[Share]) -> list[str]:
    problems = []
    for variant in dict.fromkeys(variant for share in shares for variant in share.differing):
        ranks = [rank for rank, share in enumerate(shares) if variant in share.differing]
        problems.append(f"bits ({variant}): not the same as the first variant's, on ranks {ranks}")
    return problems


def _same_everywhere(shares: list[Share], virtual: list[Tensors]) -> bool:
    return all(equal_bits(a.tensors, b) for a, b in zip(shares, virtual, strict=True))
