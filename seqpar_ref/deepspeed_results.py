"""The local attention of `deepspeed.DistributedAttention`, and what all ranks have to know of its result.

It may have a head dim and a dtype of its own, and heads and dim merged. Where no plan was made the ranks tell each
other which, in a record of 40 bytes, and whether it raised, so that no rank sends what another one does not expect, or
waits for one that has left. Where some rank has no heads they do so in any case: it takes part in the exchange back
with an empty result of that kind.

Source: this package's own; the original compares nothing, and needs at least one head on each rank.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .agreement import EVERY_DTYPE
from .checks import check_tensor
from .errors import LocalAttentionError, RankMismatchError
from .group import TorchGroup
from .own_heads import OwnAttention, connected, own_heads
from .plan import Plan

KIND_BYTES = 40  # what each rank sends to each other one


def attend_alike(
    attend: OwnAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    group: TorchGroup,
    *,
    compare: bool,
) -> tuple[Tensor, bool]:
    """The local attention's result in four dims, and whether it merged heads and dim.

    Args:
        attend: this call's local attention.
        query, key, value: all tokens, `[batch, tokens, heads_local, dim]` in the order of its layout.
        plan, group: who owns which heads; the ranks that share the sequence.
        compare: tell the other ranks; otherwise only where some rank has no heads.

    Raises:
        LocalAttentionError, TensorError: it returned something that is no output. Where ranks are told,
            LocalAttentionError on every other rank, whatever it raised.
        RankMismatchError: its results differ in kind. On every rank, where they are told.
    """
    given, merged = attend.local, [False]

    def local(*args: Any, **kwargs: Any) -> Any:
        result = given(*args, **kwargs)
        merged[0] = isinstance(result, Tensor) and result.ndim == 3
        return result

    (own,) = own_heads(plan, group.rank)
    attend = replace(attend, local=local, free=True)
    if min(plan.heads_by_rank) and not compare:
        return attend(query, key, value, own), merged[0]
    context, failure, record = None, None, [0, 0, 0, 0, 0]
    if own.query:
        try:
            context = attend(query, key, value, own)
            check_tensor("the local attention's output", context, attend.layout)
            record = _record_of(context, merged[0])
        except Exception as error:
            failure, record = error, [1, 0, 0, 0, 0]
    told = group.all_gather_integers(record, query.device)
    if failure is not None:
        raise failure
    told = [record for record, heads in zip(told, plan.heads_by_rank, strict=True) if heads]
    merges, dim, dtype = _kind_of_all(told)
    if context is None:  # empty, of that kind, and like attention a function of all three
        tokens = value.sum(dim=(attend.layout.sequence, 3), keepdim=True).to(EVERY_DTYPE[dtype])
        context = attend(query, key, tokens.expand(*query.shape[:3], dim), own)
    if any(needs_gradient for *_, needs_gradient in told):  # of something that this rank may not know
        context = connected(context, torch.zeros(1, device=query.device, requires_grad=True))
    return context, bool(merges)


def _record_of(context: Tensor, merged: bool) -> list[int]:
    """Failed or not, merged or not, dim, dtype, and whether it needs a gradient."""
    return [0, int(merged), context.shape[3], EVERY_DTYPE.index(context.dtype), int(context.requires_grad)]


def _kind_of_all(told: list[list[int]]) -> list[int]:
    """What the ranks that have heads say alike: merged or not, dim and dtype."""
    failed = sum(record[0] for record in told)
    if failed:
        raise LocalAttentionError(
            f"the local attention raised on {failed} of the {len(told)} ranks that have heads.",
            "See what those ranks report.",
        )
    first, *others = (record[1:4] for record in told)
    for other in others:
        if other != first:
            raise RankMismatchError(
                f"the local attention returned {_in_words(first)} on one rank and {_in_words(other)} on another.",
                "Return the same dims and dtype on every rank.",
            )
    return first


def _in_words(kind: list[int]) -> str:
    merged, dim, dtype = kind
    dims = f"heads and dims of {dim} merged" if merged else f"a head dim of {dim}"
    return f"{str(EVERY_DTYPE[dtype]).removeprefix('torch.')} with {dims}"
