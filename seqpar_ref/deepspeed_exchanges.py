r"""The exchanges of `deepspeed.sequence.layer` one by one, under its names: see `deepspeed.py`.

Each cuts its tensor along one dim into a part for each rank, and joins what comes along another one:

$$[\dots, \text{scattered}, \dots, \text{gathered}_P, \dots] \to
[\dots, \text{scattered}_P, \dots, \text{gathered}, \dots]$$

The scattered dim is divided as evenly as can be, the larger parts first. What the other ranks have along the
gathered dim they say in each call: a record of 72 bytes goes to each other rank, and the dims behind the third in a
second one if they are several. Nothing is remembered (D6), so heads and tokens need not divide by the ranks (D9, D12,
D14).

Source: `deepspeed/sequence/layer.py` of deepspeed 0.19.0.
"""

import math
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from .agreement import EVERY_DTYPE, gather, gradients
from .checks import is_dense, is_integer, no_type_check
from .device import wait_for_stream
from .direct import Exchange
from .errors import ArgumentError, ShapeError, TensorError
from .flight import Flight
from .graphs import outside_graphs
from .group import GroupLike, TorchGroup, group_of
from .plan import Plan, divide
from .routes import Load, Route, routes_to_heads
from .shapes import Layout

HEADS = 2  # where the original's layouts, [batch, sequence, heads, dim] and [sequence, batch, heads, dim], have them


@outside_graphs
@no_type_check
def single_all_to_all(
    input: Tensor,
    scatter_idx: int,
    gather_idx: int,
    batch_dim_idx: int,
    group: GroupLike,
    async_op: bool = False,
    handle: MutableMapping[str, Any] | None = None,
    type: str | None = None,
) -> Tensor:
    """One exchange. Differentiable, unless `async_op`.

    Of the two indices one is 2, the heads, and the other one 0 or 1. Which of these two is the sequence is what
    `batch_dim_idx` says, as in the original: scatter_idx 2 gives heads away, gather_idx 2 gathers them, and
    the other index is not read further (D10, D11). With batch_dim_idx 0 the indices (1, 2) and (2, 1) are also
    right for [batch, heads, sequence, dim], there and back.

    Args:
        scatter_idx, gather_idx, batch_dim_idx: numbers of dims, from 0; see above.
        input: [batch, sequence, heads, dim], or [sequence, batch, heads, dim] where batch_dim_idx is 1. Three
            dims are taken as a head dim of 1, more than four as a head dim in several. Of any dtype that the
            backend sends.
        async_op: return at once. `handle[type + "_work"].wait()` fills the tensor that is returned;
            `handle[type + "_grad"]` is that tensor, and `handle[type + "_post_all2all_func"]` returns it as it
            is. Uneven heads are no exception (D12).

    Raises:
        GroupError, ArgumentError, TensorError, ShapeError: before any communication.
        RankMismatchError: on all ranks alike, where they differ in more than their part of the gathered dim.
        PlanError: more elements than can be counted.
    """
    scattered, gathered = dims_of(scatter_idx, gather_idx, batch_dim_idx)
    if not async_op:
        member, flat, route, shape = _prepared(input, scattered, gathered, group)
        (result,) = Exchange.apply(member, (route,), False, flat)
        return result.view(shape)
    if not isinstance(handle, MutableMapping) or not isinstance(type, str):
        raise ArgumentError(
            f"async_op is set, handle is {handle!r} and type {type!r}: nobody could wait for the result.",
            'Pass a dict as handle, and the name that its entries begin with as type, such as "dq".',
        )
    member, flat, route, shape = _prepared(input.detach(), scattered, gathered, group)
    flight = Flight(member, route)
    flight.leave((0,), (flat,))
    result = flat.new_empty(shape)
    _note(handle, type, Arrival(flight, result), result)
    return result


@no_type_check
def uneven_heads_all2all(
    input: Tensor, scatter_idx: int, gather_idx: int, batch_dim_idx: int, group: GroupLike
) -> Tensor:
    """`single_all_to_all`: uneven heads are no special case, and no count of heads is set beforehand (D6, D9).

    Args:
        input: [batch, sequence, heads, dim], or [sequence, batch, heads, dim] where batch_dim_idx is 1.
        scatter_idx, gather_idx, batch_dim_idx: numbers of dims, as for `single_all_to_all`.
        group: the ranks that exchange.

    Raises:
        GroupError, ArgumentError, TensorError, ShapeError, RankMismatchError, PlanError: as `single_all_to_all`.
    """
    return single_all_to_all(input, scatter_idx, gather_idx, batch_dim_idx, group)


class Arrival:
    """What an asynchronous exchange receives is in `result` after `wait()`, in the shape that it has when issued."""

    def __init__(self, flight: Flight, result: Tensor) -> None:
        self._flight: Flight | None = flight
        self._result = result

    def wait(self) -> bool:
        """Return when it is there; on a GPU make the current stream wait. A second time does nothing."""
        flight, self._flight = self._flight, None
        if flight is not None:
            (arrived,) = flight.wait((0,))
            self._result.copy_(arrived.view(self._result.shape))
        return True


class _SeqAllToAll:
    """The differentiable exchange. Its gradient is the exchange the other way."""

    @staticmethod
    @outside_graphs
    @no_type_check
    def apply(
        group: GroupLike,
        input: Tensor,
        scatter_idx: int,
        gather_idx: int,
        batch_dim_idx: int,
        stream: torch.Stream | None = None,
        handle: MutableMapping[str, Any] | None = None,
        type: str | None = None,
        is_fwd: bool = True,
    ) -> Tensor:
        """`single_all_to_all`, with what the original does beside it in a backward pass.

        The gradient is complete whatever is asked for: nothing has to be waited for, and an operation between a
        projection and the exchange reads what has arrived (D2, D3). `is_fwd` False says that this call is
        itself a backward pass.

        Args:
            stream: where type is "o", the current stream waits for it after the backward pass's exchange, so
                that what it computed meanwhile may be used (D5: streams are never compared).
            handle: where type is "q" or "k", gets the entries of `single_all_to_all` in the backward pass,
                for callers that wait themselves.
        """

        def after(result: Tensor) -> None:
            if type == "o" and stream is not None:
                wait_for_stream(stream)
            if type in ("q", "k") and handle is not None:
                _note(handle, f"d{type}", Arrived(), result)

        if is_fwd and (stream is not None or handle is not None):
            input = WithGradient.apply(input, after)
        result = single_all_to_all(input, scatter_idx, gather_idx, batch_dim_idx, group)
        if not is_fwd:
            after(result)
        return result


class Arrived:
    """In the place of an `Arrival` whose result is there already."""

    def wait(self) -> bool:
        """Nothing to wait for."""
        return True


class WithGradient(torch.autograd.Function):
    """A tensor as it is. In the backward pass its gradient is shown to `call`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, call: Callable[[Tensor], None]) -> Tensor:
        ctx.call = call
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.call(gradient)
        return gradient, None


class _DimZeroAllToAll:
    """The differentiable exchange along dim 0: entry r of the input goes to rank r, entry r comes from it."""

    @staticmethod
    @outside_graphs
    @no_type_check
    def apply(group: GroupLike, input: Tensor) -> Tensor:
        """[ranks, ...] to [ranks, ...].

        Raises:
            ShapeError: dim 0 is not the number of ranks.
            GroupError, TensorError, RankMismatchError: as for `single_all_to_all`.
        """
        member = group_of(group)
        _check_tensor(input, 1)
        if input.shape[0] != member.size:
            raise ShapeError(
                f"input is {tuple(input.shape)}: dim 0 is {input.shape[0]}, and the group has {member.size} ranks.",
                f"Give it one entry for each rank, [{member.size}, ...].",
            )
        if not input.numel():
            raise ShapeError(f"input is {tuple(input.shape)}.", "Give each rank something to exchange.")
        member, flat, route, _ = _prepared(input[None, None], 2, 1, member)
        return Exchange.apply(member, (route,), False, flat)[0].view(input.shape)


@no_type_check
def dims_of(scatter_idx: int, gather_idx: int, batch_dim_idx: int) -> tuple[int, int]:
    """Which dim is scattered and which one gathered: see `single_all_to_all`.

    Args:
        scatter_idx, gather_idx, batch_dim_idx: numbers of dims, from 0.

    Raises:
        ArgumentError: indices that the original has no meaning for, or a wrong one.
    """
    check_batch_dim(batch_dim_idx)
    sequence = 1 - int(batch_dim_idx)
    if _is_one_of(scatter_idx, HEADS) and _is_one_of(gather_idx, 0, 1):
        return HEADS, sequence
    if _is_one_of(scatter_idx, 0, 1) and _is_one_of(gather_idx, HEADS):
        return sequence, HEADS
    raise ArgumentError(
        f"scatter_idx is {scatter_idx!r} and gather_idx {gather_idx!r}.",
        f"Give one of them {HEADS}, the heads, and the other {sequence}, the sequence where batch_dim_idx is "
        f"{batch_dim_idx}.",
    )


@no_type_check
def check_batch_dim(batch_dim_idx: int) -> None:
    """Refuse what is no dim of the batch, such as an argument that stood in its place once (D18).

    Args:
        batch_dim_idx: number of the dim, 0 or 1.

    Raises:
        ArgumentError: neither 0 nor 1.
    """
    if not _is_one_of(batch_dim_idx, 0, 1):
        found = (
            f"a tensor {tuple(batch_dim_idx.shape)}" if isinstance(batch_dim_idx, Tensor) else batch_dim_idx
        )
        raise ArgumentError(
            f"batch_dim_idx is {found}.",
            "Use 0, [batch, sequence, heads, dim], or 1, [sequence, batch, heads, dim]. What goes to the local "
            "attention, such as a mask, comes behind rotary_pos_emb, or by keyword.",
        )


def _is_one_of(index: object, *known: int) -> bool:
    return is_integer(index) and index in known


def _check_tensor(input: Tensor, least_dims: int) -> None:
    if not isinstance(input, Tensor) or not is_dense(input):
        found = "tensor that is not dense" if isinstance(input, Tensor) else type(input).__name__
        raise TensorError(f"input is a {found}.", "Pass a dense tensor.")
    if input.ndim < least_dims or 0 in input.shape[3:]:
        raise ShapeError(
            f"input is {tuple(input.shape)}.", f"Give it at least {least_dims} dims, and no head dim of 0."
        )


def _prepared(
    input: Tensor, scattered: int, gathered: int, group: GroupLike
) -> tuple[TorchGroup, Tensor, Route, tuple[int, ...]]:
    """The group, the input in four dims, its way, and the shape of what arrives."""
    member = group_of(group)
    _check_tensor(input, 3)
    if not input.shape[scattered]:
        raise ShapeError(
            f"input is {tuple(input.shape)}: dim {scattered} is 0.", "Give each rank something to scatter."
        )
    batch = 3 - scattered - gathered
    behind = math.prod(input.shape[3:])
    record = {
        "size_to_gather": input.shape[gathered],
        "size_to_scatter": input.shape[scattered],
        "scattered_dim": scattered,
        "gathered_dim": gathered,
        "batch": input.shape[batch],
        "head_dim": behind,
        "dtype": EVERY_DTYPE.index(input.dtype),
        "tensor's_dims": input.ndim,
        "requires_grad": gradients((input,), ()),
    }
    sizes = gather(member, record, ("size_to_gather",), input.device)["size_to_gather"]
    if input.ndim > 4:
        gather(member, {f"dim_{dim}": input.shape[dim] for dim in range(3 - input.ndim, 0)}, (), input.device)
    plan = Plan(sizes, divide(input.shape[scattered], member.size), input.shape[scattered])
    flat = input.reshape(*input.shape[:3], behind).resolve_conj().resolve_neg()  # in memory as in value
    layout = Layout("as the indices say", batch=batch, sequence=gathered, heads=scattered)
    (route,) = routes_to_heads(plan, member.rank, layout, (Load(("query",), (behind,)),), flat)
    shape = list(input.shape)
    shape[scattered], shape[gathered] = plan.heads_by_rank[member.rank], plan.tokens
    return member, flat, route, tuple(shape)


def _note(handle: MutableMapping[str, Any], name: str, work: Any, result: Tensor) -> None:
    """The entries that the original leaves in `handle`."""
    handle[f"{name}_work"], handle[f"{name}_grad"] = work, result
    handle[f"{name}_post_all2all_func"] = lambda arrived: arrived
