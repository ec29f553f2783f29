"""Two operators on the rows of a buffer: write rows of tensors to positions, and sum rows of positions.

They are adjoint. Both are registered with PyTorch as operators of their own, so that a profile, or a count of
the bytes written, shows one write of the result, and not the steps inside: one partial write of the buffer
for each tensor, or the tensors of numbers that `embedding_bag` returns beside its sums.
"""

import contextlib

import torch
from torch import Tensor

_library = torch.library.Library("seqpar", "FRAGMENT")


def _write_rows(buffer: Tensor, positions: list[Tensor], tensors: list[Tensor]) -> None:
    for where, rows in zip(positions, tensors, strict=True):
        buffer.index_put_((where,), rows.unsqueeze(-2))


def _sum_rows(buffer: Tensor, read: Tensor, bags: Tensor) -> Tensor:
    # On a CPU the fast kernel for bfloat16 rounds ties up instead of to even. It stands back where some row
    # is excluded from all sums.
    rounds_ties_up = buffer.dtype == torch.bfloat16 and buffer.device.type == "cpu"
    excluded = len(buffer) - 1 if rounds_ties_up else None
    return torch.embedding_bag(buffer, read, bags, False, 0, False, None, False, excluded)[0]


with contextlib.suppress(RuntimeError):  # they are there already when the module is loaded again
    _library.define("write_rows(Tensor(a!) buffer, Tensor[] positions, Tensor[] tensors) -> ()")
    _library.define("sum_rows(Tensor buffer, Tensor read, Tensor bags) -> Tensor")
    _library.impl("write_rows", _write_rows, "CompositeExplicitAutograd")
    _library.impl("sum_rows", _sum_rows, "CompositeExplicitAutograd")


def write_rows(buffer: Tensor, positions: list[Tensor], tensors: list[Tensor]) -> None:
    """Write each row of each tensor, `[..., row]`, to its positions in the buffer, `[..., copies]`.

    `buffer` is [rows, row]. The positions of all tensors together are all rows of the buffer, each once.
    """
    torch.ops.seqpar.write_rows(buffer, positions, tensors)


def sum_rows(buffer: Tensor, read: Tensor, bags: Tensor) -> Tensor:
    """For each bag the sum of its rows, in order: [bags, row]. An empty bag gives zeros.

    Half types are summed in float32 and rounded once. `read` holds the positions of all bags' rows, `bags`
    says where in it each begins. The last row of the buffer must not be read.
    """
    result: Tensor = torch.ops.seqpar.sum_rows(buffer, read, bags)
    return result
