"""Whether a case holds: what the ranks have together, beside one device, the plan, and virtual ranks."""

from dataclasses import dataclass

import numpy as np
import torch

from .agreement import Record
from .deepspeed_results import KIND_BYTES
from .deepspeed_sizes import RECORD_BYTES as DEEPSPEED_RECORD_BYTES
from .validate_body import VARIANTS, Share, Tensors, equal_bits
from .validate_calls import plan_of
from .validate_cases import Case
from .validate_errors import Errors, errors_of

RECORD_BYTES = 8 * len(Record.__dataclass_fields__)


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
    """Compare the shares of all ranks, by rank; with what virtual ranks have where it is given.

    On the CPU variants may not differ in a bit. Kernels of other devices may sum in an order that depends on how
    many heads they are given, or on chance: there each variant has to be within the tolerance.
    """
    forward, gradient = errors_of(case, shares, device)
    planned, first = planned_bytes(case), VARIANTS[case.kind][0]
    byte_problems, bit_problems = _byte_problems(planned, shares), _bit_problems(shares)
    virtual_bits = None if virtual is None else _same_everywhere(shares, virtual)
    problems = [
        *_dtype_problems(case, shares),
        *_error_problems("output", forward),
        *_error_problems("gradients", gradient),
        *byte_problems,
        *(bit_problems if device.type == "cpu" else []),
        *(["bits: virtual ranks have other ones"] if virtual_bits is False else []),
    ]
    return Row(
        case,
        VARIANTS[case.kind],
        forward,
        gradient,
        bytes_sent=sum(int(share.sent[first].sum()) for share in shares),
        bytes_planned=int(planned.sum()),
        bytes_equal=not byte_problems,
        variant_bits=not bit_problems,
        virtual_bits=virtual_bits,
        problems=tuple(problems),
    )


def planned_bytes(case: Case) -> np.ndarray:
    """Bytes [sender, receiver] of a forward and a backward pass together, by rank of the world.

    With checkpointing the backward pass runs the forward pass again. Without a plan each rank sends a record to
    each other one in every forward pass; in `deepspeed` a second one, also where some rank has no heads.
    """
    ranks = len(case.tokens)
    forward, backward = np.zeros((2, ranks, ranks), dtype=np.int64)
    for group, members in enumerate(case.groups):
        plan = plan_of(case, group)
        sizes = (case.batch, case.head_dim, case.travelling)
        value_dim = case.head_dim if case.kind == "block" else case.value_dim
        own = np.ix_(members, members)
        forward[own] = plan.bytes(*sizes, value_dim=value_dim)
        backward[own] = plan.bytes(*sizes, backward=True, value_dim=value_dim)
        others = 1 - np.eye(len(members), dtype=np.int64)
        of_original = case.kind == "deepspeed"
        if not case.planned:
            forward[own] += others * (DEEPSPEED_RECORD_BYTES if of_original else RECORD_BYTES)
        if of_original and not (case.planned and min(plan.heads_by_rank)):
            forward[own] += others * KIND_BYTES
    again = forward if case.checkpoint else 0
    return (forward + backward) * len(case.calls) + again


def _dtype_problems(case: Case, shares: list[Share]) -> list[str]:
    """A result of another dtype may be near enough all the same."""
    problems = {}
    for share in shares:
        for variant, tensors in {VARIANTS[case.kind][0]: share.tensors, **share.differing}.items():
            for name, tensor in tensors.items():
                expected = case.travelling if name.endswith("output") else case.dtype
                if tensor.dtype != expected:
                    problems[f"dtype ({variant}): {name} is {tensor.dtype}, not {expected}"] = True
    return list(problems)


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
