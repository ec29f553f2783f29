"""Broken programs, each of a kind that people have lost days with, and the error that it must give on virtual ranks.

Every program is broken when called with `right=False`; with `right=True` it is the same program, mended. The lines that
the error must name end in `# HERE`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from simulator.errors import (
    BufferError,
    CollectiveMismatchError,
    DeadlockError,
    EarlyAccessError,
    InFlightWriteError,
    OverlappingCallsError,
    SharedModuleError,
    StreamRaceError,
    UnwaitedWorkError,
)


@dataclass(frozen=True)
class Broken:
    """A program, the error that it must give, how many ranks it takes, and a rank that the error must name."""

    program: Callable[[bool], Any]
    error: type[BaseException]
    size: int
    rank: int | None
    needs_accelerator: bool = False


BROKEN: dict[str, Broken] = {}


def gives(
    error: type[BaseException], size: int = 3, rank: int | None = None, needs_accelerator: bool = False
) -> Any:
    def register(program: Callable[[bool], Any]) -> Callable[[bool], Any]:
        BROKEN[program.__name__] = Broken(program, error, size, rank, needs_accelerator)
        return program

    return register


def ones(size: int = 4) -> torch.Tensor:
    return torch.ones(size) * (1 + dist.get_rank())


def peer() -> int:
    return 1 - dist.get_rank()


# Collectives that not all ranks call


@gives(DeadlockError, rank=1)
def skipped_collective(right):
    """Rank 1 returns before the reduction."""
    x = ones()
    if dist.get_rank() == 1 and not right:
        return x.tolist()
    dist.all_reduce(x)  # HERE
    return x.tolist()


@gives(CollectiveMismatchError, rank=0)
def collective_in_a_rank_dependent_branch(right):
    """Only rank 0 writes a checkpoint, and gathers for it; the others go on to the next step."""
    x = ones()
    if dist.get_rank() == 0 or right:
        dist.reduce(x, 0)  # HERE
    y = ones()
    dist.all_reduce(y)  # HERE
    return y.tolist()


@gives(DeadlockError, rank=2)
def data_dependent_loop_count(right):
    """Each rank steps until its own loss is small."""
    loss, steps = torch.tensor(float(dist.get_rank() + 1)), 0
    while loss.item() > 0.5 if not right else steps < 3:
        total = loss.clone()
        dist.all_reduce(total)  # HERE
        loss, steps = loss - 1, steps + 1
    return steps


@gives(DeadlockError, rank=0)
def barrier_in_one_branch(right):
    """Rank 0 prepares the data while the others should wait."""
    if dist.get_rank() == 0 or right:
        dist.barrier()  # HERE
    return 0


@gives(DeadlockError, rank=1)
def collective_in_an_except_path(right):
    """A rank that fails calls for help; nobody hears it."""
    x = ones()
    try:
        if dist.get_rank() == 1:
            raise ValueError("bad batch")
    except ValueError:
        if not right:
            dist.all_reduce(torch.ones(1))  # HERE
    return x.tolist()


@gives(CollectiveMismatchError)
def gradient_that_not_all_ranks_need(right):
    """A frozen layer on one rank: its backward pass has one collective less."""

    class Reduce(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            gradient = gradient.clone()
            dist.all_reduce(gradient)  # HERE
            return gradient

    x = ones().requires_grad_(right or dist.get_rank() != 2)
    w = ones().requires_grad_()
    (Reduce.apply(x) * w).sum().backward()
    norm = w.grad.sum()
    dist.broadcast(norm, 0)  # HERE
    return norm.item()


@gives(DeadlockError, rank=1)
def one_backward_pass_more(right):
    """Rank 1 has one micro-batch more than the others."""
    batches = 2 if right or dist.get_rank() != 1 else 3
    w = ones().requires_grad_()
    for _ in range(batches):
        (w * 2).sum().backward()
        dist.all_reduce(w.grad)  # HERE
    return w.grad.tolist()


# Collectives that ranks call differently


@gives(CollectiveMismatchError, rank=1)
def wrong_operation(right):
    """One rank gathers where the others reduce."""
    x = ones()
    if dist.get_rank() == 1 and not right:
        dist.all_gather([torch.empty(4) for _ in range(3)], x)  # HERE
    else:
        dist.all_reduce(x)  # HERE
    return x.tolist()


@gives(CollectiveMismatchError, rank=1)
def different_issue_order(right):
    """Two buckets, reduced in another order on rank 1."""
    buckets = [torch.ones(4) * dist.get_rank(), torch.ones(6) * dist.get_rank()]
    for bucket in reversed(buckets) if dist.get_rank() == 1 and not right else buckets:
        dist.all_reduce(bucket)  # HERE
    return [bucket.tolist() for bucket in buckets]


@gives(CollectiveMismatchError, rank=2)
def wrong_dtype(right):
    """Rank 2 has loaded its part in half precision."""
    x = ones()
    if dist.get_rank() == 2 and not right:
        x = x.half()
    dist.all_reduce(x)  # HERE
    return x.tolist()


@gives(CollectiveMismatchError, rank=2)
def wrong_shape(right):
    """The last batch is smaller."""
    x = ones(3 if dist.get_rank() == 2 and not right else 4)
    dist.all_reduce(x)  # HERE
    return x.tolist()


@gives(CollectiveMismatchError, rank=1)
def wrong_reduction(right):
    """One rank takes the maximum, the others the sum."""
    x = ones()
    dist.all_reduce(x, dist.ReduceOp.MAX if dist.get_rank() == 1 and not right else dist.ReduceOp.SUM)  # HERE
    return x.tolist()


@gives(CollectiveMismatchError, rank=0)
def wrong_root(right):
    """Each rank takes itself for the source."""
    x = ones()
    dist.broadcast(x, 0 if right else dist.get_rank())  # HERE
    return x.tolist()


@gives(CollectiveMismatchError, size=2, rank=0)
def torn_split_matrix(right):
    """Rank 0 sends two rows to rank 1, which expects one."""
    rank = dist.get_rank()
    sent = [[1, 2], [1, 1]][rank]
    received = [[1, 1], [2 if right else 1, 1]][rank]
    x, out = torch.arange(float(sum(sent))), torch.full((sum(received),), -1.0)
    dist.all_to_all_single(out, x, received, sent)  # HERE
    return out.tolist()


@gives(DeadlockError, size=2, rank=0)
def crossed_groups(right):
    """Two groups of the same ranks, used in another order on each."""
    first, second = dist.new_group([0, 1]), dist.new_group([0, 1])
    x, y = ones(), ones()
    if dist.get_rank() == 0 or right:
        dist.all_reduce(x, group=first)  # HERE
        dist.all_reduce(y, group=second)
    else:
        dist.all_reduce(y, group=second)  # HERE
        dist.all_reduce(x, group=first)
    return x.tolist()


# Messages


@gives(DeadlockError, size=2, rank=0)
def message_without_partner(right):
    """Rank 1 has stopped one micro-batch earlier."""
    if dist.get_rank() == 0:
        dist.send(ones(), 1)
        if not right:
            dist.send(ones(), 1)  # HERE
        return 0
    x = torch.empty(4)
    dist.recv(x, 0)
    return x.tolist()


@gives(DeadlockError, size=2, rank=1)
def both_receive_first(right):
    """The exchange of a pipeline in which nobody sends first."""
    x, out = ones(), torch.empty(4)
    if right and dist.get_rank() == 0:
        dist.send(x, 1)
        dist.recv(out, 1)
    else:
        dist.recv(out, peer())  # HERE
        dist.send(x, peer())
    return out.tolist()


@gives(DeadlockError, size=2, rank=1)
def wrong_tag(right):
    """The tags of forward and backward are exchanged."""
    x = ones()
    if dist.get_rank() == 0:
        dist.send(x, 1, tag=7)
    else:
        dist.recv(x, 0, tag=7 if right else 8)  # HERE
    return x.tolist()


@gives(CollectiveMismatchError, size=2, rank=1)
def message_of_another_size(right):
    """The receiver has an old sequence length."""
    if dist.get_rank() == 0:
        dist.send(ones(6), 1)  # HERE
        return 0
    x = torch.full((6 if right else 8,), -1.0)
    dist.recv(x, 0)  # HERE
    return x.tolist()


# Buffers


@gives(BufferError)
def strided_buffer(right):
    """Gathers into a transposed buffer."""
    x = torch.arange(6.0).view(2, 3) + 10 * dist.get_rank()
    out = [torch.empty(2, 3) if right else torch.empty(3, 2).t() for _ in range(3)]
    dist.all_gather(out, x)  # HERE
    return [y.tolist() for y in out]


@gives(BufferError)
def too_few_outputs(right):
    """The world has grown, the list has not."""
    out = [torch.zeros(4) for _ in range(3 if right else 2)]
    dist.all_gather(out, ones())  # HERE
    return [y.tolist() for y in out]


# Asynchronous calls


@gives(EarlyAccessError, rank=0)
def missing_wait(right):
    """The gradient is used while it is still being reduced."""
    gradient, weight = ones(), torch.zeros(4)
    work = dist.all_reduce(gradient, async_op=True)  # HERE
    if right:
        work.wait()
    weight -= gradient  # HERE
    work.wait()
    return weight.tolist()


@gives(EarlyAccessError, rank=0)
def early_read_through_a_view(right):
    """One row of a flat buffer of gradients is read too early."""
    flat = torch.ones(4, 8)
    work = dist.all_reduce(flat, async_op=True)  # HERE
    last = flat.view(-1)[24:]
    if right:
        work.wait()
    total = last.sum()  # HERE
    work.wait()
    return total.item()


@gives(EarlyAccessError, rank=0)
def early_read_by_tolist(right):
    """Counts of tokens for each expert, wanted on the host."""
    counts = torch.tensor([3, 1, 2])
    out = torch.empty_like(counts)
    work = dist.all_to_all_single(out, counts, async_op=True)  # HERE
    if right:
        work.wait()
    found = out.tolist()  # HERE
    work.wait()
    return found


@gives(EarlyAccessError, rank=0)
def early_read_by_numpy(right):
    """The loss is plotted before it has been reduced."""
    loss = ones(1)
    work = dist.all_reduce(loss, async_op=True)  # HERE
    if right:
        work.wait()
    found = float(loss.numpy()[0])  # HERE
    work.wait()
    return found


@gives(EarlyAccessError, rank=0)
def early_write(right):
    """The buffer is cleared for the next step while it is being filled."""
    x = ones()
    work = dist.broadcast(x, 0, async_op=True)  # HERE
    if right:
        work.wait()
    x.zero_()  # HERE
    work.wait()
    return x.tolist()


@gives(InFlightWriteError, rank=0)
def write_in_flight(right):
    """The input of a gather is changed while it is being sent."""
    x, out = ones(), torch.empty(12)
    work = dist.all_gather_single(out, x, async_op=True)  # HERE
    if right:
        work.wait()
    x.add_(100)  # HERE
    work.wait()
    return out.tolist()


@gives(InFlightWriteError, size=2, rank=0)
def send_buffer_reused(right):
    """A pipeline stage computes into the buffer that it is still sending."""
    if dist.get_rank() == 0:
        x = ones()
        work = dist.isend(x, 1)  # HERE
        if right:
            work.wait()
        x.mul_(100)  # HERE
        work.wait()
        return 0
    x = torch.empty(4)
    dist.recv(x, 0)
    return x.tolist()


@gives(UnwaitedWorkError, rank=2)
def unwaited_work(right):
    """The Work of a reduction is thrown away."""
    x = ones()
    work = dist.all_reduce(x, async_op=True)  # HERE
    if right or dist.get_rank() != 2:
        work.wait()
    return 0


@gives(OverlappingCallsError, rank=0)
def two_calls_on_one_buffer(right):
    """Two reductions of one buffer at once."""
    x = ones()
    first = dist.all_reduce(x, async_op=True)  # HERE
    if right:
        first.wait()
    second = dist.all_reduce(x, async_op=True)  # HERE
    first.wait()
    second.wait()
    return x.tolist()


@gives(EarlyAccessError, rank=0)
def optimizer_before_its_gradients(right):
    """The optimizer steps before the last bucket has been reduced."""
    torch.manual_seed(dist.get_rank())
    model = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    work = dist.all_reduce(model.weight.grad, async_op=True)  # HERE
    if right:
        work.wait()
    optimizer.step()  # HERE
    work.wait()
    return model.weight.grad.tolist()


# One rank alone


@gives(ZeroDivisionError, rank=2)
def exception_on_one_rank(right):
    """One rank has an empty batch."""
    x = ones()
    mean = 1 / (dist.get_rank() - 2 if not right else 1)
    dist.all_reduce(x)
    return x.tolist() if mean else 0


shared = nn.Linear(3, 2)


@gives(SharedModuleError, size=2, rank=1)
def shared_module(right):
    """A module made outside of the function, which processes would each have for themselves."""
    model = nn.Linear(3, 2) if right else shared
    model(torch.ones(1, 3)).sum().backward()  # HERE
    return model.weight.grad.sum().item()


# Streams


@gives(StreamRaceError, size=2, rank=0, needs_accelerator=True)
def missing_event_wait(right):
    """A side stream copies; the default stream uses the copy."""
    x, stream = torch.ones(4), torch.Stream()
    stream.wait_stream(torch.accelerator.current_stream())
    with stream:
        y = x * 2  # HERE
    if right:
        torch.accelerator.current_stream().wait_stream(stream)
    z = y + 1  # HERE
    return z.tolist()


@gives(StreamRaceError, size=2, needs_accelerator=True)
def wait_on_the_wrong_stream(right):
    """The side stream waits for the reduction, the default stream uses it."""
    x, stream = ones(), torch.Stream()
    work = dist.all_reduce(x, async_op=True)  # HERE
    if right:
        work.wait()
    with stream:
        work.wait()
    y = x + 1  # HERE
    return y.tolist()


@gives(StreamRaceError, size=2, rank=0, needs_accelerator=True)
def event_recorded_too_early(right):
    """The event stands before the work that it is to announce."""
    x, stream, event = torch.ones(4), torch.Stream(), torch.Event()
    stream.wait_stream(torch.accelerator.current_stream())
    if not right:
        event.record(stream)
    with stream:
        y = x * 2  # HERE
    if right:
        event.record(stream)
    torch.accelerator.current_stream().wait_event(event)
    z = y + 1  # HERE
    return z.tolist()


@gives(StreamRaceError, size=2, rank=0, needs_accelerator=True)
def reduction_of_what_another_stream_computes(right):
    """Gradients are computed on one stream and reduced from another."""
    x, stream = torch.ones(4), torch.Stream()
    stream.wait_stream(torch.accelerator.current_stream())
    with stream:
        x.mul_(3)  # HERE
    if right:
        torch.accelerator.current_stream().wait_stream(stream)
    dist.all_reduce(x)  # HERE
    return x.tolist()
