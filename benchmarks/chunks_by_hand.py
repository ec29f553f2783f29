"""Attention in chunks of heads as one would write it for sizes that divide: no autograd, no plan and no check.

The order is that of `seqpar_ref.overlap.in_chunks`: the next chunk is packed, then this one is waited for; while it is
attended with, the next one comes and the result of the one before returns. So what `overlap.py` finds for both is what
the machine lets through, and the difference between them what autograd and generality cost.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from seqpar_ref.group import Group, Work

Attend = Callable[..., Sequence[Tensor]]


def one_pass(
    group: Group, tensors: Sequence[Tensor], results: int, chunks: int, attend: Attend
) -> list[Tensor]:
    """Forward with query, key and value and one result, or backward with one gradient and three results.

    Args:
        tensors: this rank's tokens, [1, tokens of a rank, heads, dim].
        chunks: how many; they divide the heads of a rank.
        attend: called with the number of the chunk and its tensors, [1, tokens, heads of a chunk, dim]; returns as
            many results of that shape.

    Returns:
        The results, [1, tokens of a rank, heads, dim].
    """
    cut = [tensor.unflatten(2, (group.size, chunks, -1)) for tensor in tensors]
    made = [torch.empty_like(tensors[0]) for _ in range(results)]
    after, returning = packed(cut, 0), []
    coming = issued(group, after)
    for chunk in range(chunks):
        after = packed(cut, chunk + 1) if chunk + 1 < chunks else []
        here = [buffer.flatten(0, 2).unsqueeze(0) for buffer in arrived(coming)]
        coming = issued(group, after)
        done = attend(chunk, *here)
        returning.append(issued(group, [x.unflatten(1, (group.size, 1, -1)).squeeze(0) for x in done]))
    for chunk, flights in enumerate(returning):
        for result, buffer in zip(made, arrived(flights), strict=True):
            result.unflatten(2, (group.size, chunks, -1))[:, :, :, chunk].copy_(buffer.permute(1, 2, 0, 3, 4))
    return made


def packed(cut: Sequence[Tensor], chunk: int) -> list[Tensor]:
    """One copy of each tensor's chunk to [ranks, 1, tokens of a rank, heads of a chunk, dim]."""
    return [tensor[:, :, :, chunk].permute(2, 0, 1, 3, 4).contiguous() for tensor in cut]


def issued(group: Group, buffers: Sequence[Tensor]) -> list[tuple[Work | None, Tensor, Tensor]]:
    """A collective for each buffer, under way; what is sent stays with it."""
    flights = []
    for sent in buffers:
        received = torch.empty_like(sent)
        splits = [sent.numel() // group.size] * group.size
        work = group.all_to_all_single(received.flatten(), sent.flatten(), splits, splits, async_op=True)
        flights.append((work, received, sent))
    return flights


def arrived(flights: Sequence[tuple[Work | None, Tensor, Tensor]]) -> list[Tensor]:
    """What was received, waited for."""
    for work, _, _ in flights:
        if work is not None:
            work.wait()
    return [received for _, received, _ in flights]
