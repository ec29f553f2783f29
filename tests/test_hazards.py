"""Buffers in flight, forgotten Works and shared modules are reported; programs that are right are not."""

import contextlib
import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from simulator import VirtualWorld
from simulator.errors import (
    BufferError,
    EarlyAccessError,
    HazardError,
    InFlightWriteError,
    OverlappingCallsError,
    SharedModuleError,
    UnwaitedWorkError,
    WorldError,
)


def in_flight(dtype=torch.float32):
    """An all-reduce whose result is not there yet, and its buffer."""
    x = torch.ones(8, dtype=dtype)
    return dist.all_reduce(x, async_op=True), x


READS = {
    "sum": lambda x: x.sum(),
    "view": lambda x: x.view(2, 4)[1] + 1,
    "last element": lambda x: x[-1].item(),
    "tolist": lambda x: x.tolist(),
    "tolist of a view": lambda x: x[2:4].tolist(),
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: np.asarray(x),
    "dlpack": lambda x: torch.from_dlpack(x),
    "deepcopy": lambda x: copy.deepcopy(x),
    "pickle": lambda x: pickle.dumps(x),
    "print": lambda x: repr(x),
    "write": lambda x: x.zero_(),
    "write to a view": lambda x: x.view(2, 4).t()[3].fill_(0),
    "out": lambda x: torch.add(torch.ones(8), 1, out=x),
    "every second": lambda x: x[::2].sum(),
    "argument of a list": lambda x: torch.cat([torch.zeros(1), x]),
    "send": lambda x: dist.all_reduce(x.clone()),
    "comparison": lambda x: bool((x == 1).all()),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in READS for dtype in (torch.float32, torch.int64)] + [("tolist", torch.bool)],
    ids=str,
)
def test_what_a_call_receives_may_not_be_touched_before_wait(name, dtype):
    def body():
        x = torch.ones(8, dtype=dtype)
        work = dist.broadcast(x, 0, async_op=True)
        READS[name](x)
        work.wait()

    with pytest.raises(EarlyAccessError) as caught:
        VirtualWorld(2).run(body)
    message = str(caught.value)
    line = inspect.getsourcelines(body)[1]
    assert "rank 0" in message and "wait()" in message.splitlines()[-1]
    assert f"{__file__}:{line + 2} in body" in message  # the call; the lambda's own line is there as well
    assert "in <lambda>" in message


UNTOUCHED = {
    "shapes": lambda x: (x.shape, x.numel(), x.stride(), x.dtype, x.is_contiguous(), len(x), x.dim()),
    "views": lambda x: (x.view(2, 4), x[3:], x.t(), x.unsqueeze(0), x.detach(), x.expand(3, 8), x.chunk(2)),
    "memory of the same shape": lambda x: (torch.empty_like(x), torch.zeros_like(x), x.new_ones(3)),
    "empty slices": lambda x: (x[:0] + 1, x[8:].tolist()),
    "data_ptr": lambda x: x.data_ptr(),
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_metadata_is_no_access(name):
    def body():
        work, x = in_flight()
        UNTOUCHED[name](x)
        work.wait()
        return x.tolist()

    assert VirtualWorld(2).run(body) == [[2.0] * 8] * 2


def test_the_rest_of_a_flat_buffer_is_no_access():
    def body():
        flat = torch.ones(4, 6)
        work = dist.all_reduce(flat[2], async_op=True)
        flat[:2].add_(1)
        flat[3].mul_(3)
        flat[::3].add_(1)  # rows 0 and 3, on both sides of what is in flight
        other = flat[:2].sum() + flat[3:].sum()
        work.wait()
        return flat.tolist(), other.item()

    rows, other = VirtualWorld(2).run(body)[0]
    assert rows == [[3.0] * 6, [2.0] * 6, [2.0] * 6, [4.0] * 6]
    assert other == 54.0


def test_columns_beside_a_row_in_flight_are_an_access():
    def body():
        flat = torch.ones(4, 6)
        work = dist.all_reduce(flat[2], async_op=True)
        flat[:, 5].add_(1)
        work.wait()

    with pytest.raises(EarlyAccessError):
        VirtualWorld(2).run(body)


def writes_by_an_operation(x):
    x.add_(1)


def writes_by_numpy(x):
    x.numpy()[3] = 7


@pytest.mark.parametrize("write", [writes_by_an_operation, writes_by_numpy])
def test_an_input_may_not_be_written_in_flight(write):
    def body():
        x, y = torch.ones(8), torch.empty(16)
        work = dist.all_gather_single(y, x, async_op=True)
        x.sum()  # reading it is right
        write(x)
        work.wait()

    with pytest.raises(InFlightWriteError, match=r"rank [01]: .* in body"):
        VirtualWorld(2).run(body)


def test_a_write_in_a_backward_node_is_seen_at_every_node():
    """The mode that watches is there throughout a backward pass, not only in its first node."""

    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, buffer):
            ctx.buffer = buffer
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            ctx.buffer.add_(1)
            return gradient * 2, None

    class Early(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, buffer):
            ctx.buffer = buffer
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            ctx.work = dist.all_reduce(ctx.buffer, async_op=True)
            return gradient * 2, None

    def body():
        buffer, x = torch.ones(4), torch.ones(3, requires_grad=True)
        Early.apply(Late.apply(x, buffer).sin(), buffer).sum().backward()

    with pytest.raises(EarlyAccessError, match="in backward"):
        VirtualWorld(2).run(body)


def receive_twice(x):
    return dist.irecv(x, 1 - dist.get_rank()), dist.irecv(x, 1 - dist.get_rank())


def reduce_twice(x):
    return dist.all_reduce(x, async_op=True), dist.all_reduce(x, async_op=True)


def send_what_is_received(x):
    return dist.broadcast(x, 0, async_op=True), dist.isend(x, 1 - dist.get_rank())


def synchronous_on_what_is_in_flight(x):
    return dist.broadcast(x, 0, async_op=True), dist.all_reduce(x)


@pytest.mark.parametrize(
    "calls", [receive_twice, reduce_twice, send_what_is_received, synchronous_on_what_is_in_flight]
)
def test_two_calls_on_one_buffer(calls):
    with pytest.raises(OverlappingCallsError, match="overlap") as caught:
        VirtualWorld(2).run(lambda: calls(torch.ones(4)))
    assert isinstance(caught.value, BufferError)
    assert str(caught.value).count(f"in {calls.__name__}") == 2


def test_what_is_sent_may_not_be_written_beside_a_receive_of_the_same_line():
    """As torch's pipelines do, whose own lines are none of the program's."""

    def body():
        sent, received, peer = torch.ones(4), torch.empty(4), 1 - dist.get_rank()
        works = [call(x, peer) for call, x in ((dist.isend, sent), (dist.irecv, received))]
        sent.numpy()[2] = 5
        for work in works:
            work.wait()

    with pytest.raises(InFlightWriteError, match="send"):
        VirtualWorld(2).run(body)


def in_place_scatter(coalesced):
    """The output is the rank's part of the input, as hardware allows."""
    rank, inputs = dist.get_rank(), [torch.arange(4.0), torch.ones(4)]
    if coalesced:
        with dist._coalescing_manager(async_ops=True) as work:
            for x in inputs:
                dist.reduce_scatter_single(x[2 * rank : 2 * rank + 2], x)
        work.wait()
    else:
        for x in inputs:
            dist.reduce_scatter_single(x[2 * rank : 2 * rank + 2], x, async_op=True).wait()
    return [x[2 * rank : 2 * rank + 2].tolist() for x in inputs]


@pytest.mark.parametrize("coalesced", [False, True])
def test_the_in_place_forms_of_hardware_are_no_hazard(coalesced):
    for seed in (None, 0, 1):
        results = VirtualWorld(2, seed=seed).run(in_place_scatter, coalesced)
        assert results == [[[0.0, 2.0], [2.0, 2.0]], [[4.0, 6.0], [2.0, 2.0]]]


def test_the_in_place_forms_are_watched():
    def body():
        rank, x = dist.get_rank(), torch.ones(4)
        work = dist.reduce_scatter_single(x[2 * rank : 2 * rank + 2], x, async_op=True)
        x[2 * (1 - rank)] = 5  # in the input, beside the output
        work.wait()

    with pytest.raises(InFlightWriteError):
        VirtualWorld(2).run(body)


def test_two_calls_may_read_one_buffer_and_work_on_two_halves():
    def body():
        x, peer = torch.ones(4), 1 - dist.get_rank()
        works = [dist.isend(x, peer, tag=1), dist.isend(x, peer, tag=2)]
        y, z = torch.empty(4), torch.empty(4)
        works += [dist.irecv(y, peer, tag=1), dist.irecv(z, peer, tag=2)]
        flat = torch.ones(8)
        works += [dist.all_reduce(flat[:4], async_op=True), dist.all_reduce(flat[4:], async_op=True)]
        for work in works:
            work.wait()
        return (y + z + flat[:4]).tolist()

    assert VirtualWorld(2).run(body) == [[4.0] * 4] * 2


def test_a_work_that_nobody_waits_for():
    def body():
        if dist.get_rank() == 1:
            dist.all_reduce(torch.ones(3), async_op=True)
        else:
            dist.all_reduce(torch.ones(3))

    line = inspect.getsourcelines(body)[1] + 2
    with pytest.raises(UnwaitedWorkError) as caught:
        VirtualWorld(2).run(body)
    assert "rank 1" in str(caught.value) and f"{__file__}:{line} in body" in str(caught.value)


def test_a_work_that_says_it_is_complete_may_be_used():
    def body():
        work, x = in_flight()
        while not work.is_completed():
            pass
        return x.tolist()

    for seed in (None, 0, 1):
        assert VirtualWorld(3, seed=seed).run(body) == [[3.0] * 8] * 3


def test_swallowing_the_error_does_not_help():
    def body():
        work, x = in_flight()
        with contextlib.suppress(HazardError):
            x.sum()
        work.wait()
        return x

    with pytest.raises(EarlyAccessError):
        VirtualWorld(2).run(body)


def test_recording_goes_on_and_lists_each_hazard_once():
    def body():
        for _ in range(3):
            work, x = in_flight()
            x.sum()
            work.wait()
        dist.all_reduce(torch.ones(1), async_op=True)
        return x.tolist()

    world = VirtualWorld(2, hazards="record")
    assert world.run(body) == [[2.0] * 8] * 2
    found = [(type(hazard.error), hazard.rank) for hazard in world.hazards]
    assert sorted(found, key=str) == sorted(
        [(error, rank) for error in (EarlyAccessError, UnwaitedWorkError) for rank in (0, 1)], key=str
    )
    assert "EarlyAccessError: rank 0" in str(world.hazards[0])


def test_with_the_checks_off_nothing_is_watched():
    def body():
        work, x = in_flight()
        early = x.isnan().all().item()
        return early, work.wait(), torch._C._len_torch_dispatch_stack()

    world = VirtualWorld(2, hazards="off")
    assert world.run(body) == [(True, True, 0)] * 2
    assert world.hazards == []


def train(model):
    model(torch.ones(2, 3)).sum().backward()
    return model.weight.grad.sum().item()


def test_a_module_that_several_ranks_train_is_explained():
    shared = nn.Linear(3, 2)
    with pytest.raises(SharedModuleError, match=r"rank 1: .*'(weight|bias)'.* rank 0") as caught:
        VirtualWorld(2).run(lambda: train(shared))
    assert str(caught.value).count("in train") == 2
    assert "copy.deepcopy" in str(caught.value)


def test_a_module_of_each_rank_may_be_trained_and_a_shared_one_read():
    shared = nn.Linear(3, 2)

    def body():
        with torch.no_grad():
            shared(torch.ones(2, 3))
        gradients = torch.autograd.grad(shared(torch.ones(2, 3)).sum(), list(shared.parameters()))
        own = copy.deepcopy(shared)
        return train(own) + train(own) - gradients[0].sum().item()

    assert VirtualWorld(2).run(body) == [24.0] * 2
    assert shared.weight.grad is None


def test_one_world_after_another_may_train_the_same_module():
    shared = nn.Linear(3, 2)
    world = VirtualWorld(2)
    for rank in (0, 1):
        world.run(lambda rank=rank: train(shared) if dist.get_rank() == rank else None)


@pytest.mark.parametrize("policy", ["loud", None, True])
def test_other_policies_are_refused(policy):
    with pytest.raises(WorldError, match="hazards="):
        VirtualWorld(2, hazards=policy)


def right_program():
    """Overlap of calls and arithmetic, with everything waited for before it is used."""
    rank, size = dist.get_rank(), dist.get_world_size()
    flat = torch.arange(24.0) + rank
    chunks, total = flat.chunk(4), torch.zeros(6)
    works = [dist.all_reduce(chunk, async_op=True) for chunk in chunks[:3]]
    chunks[3].mul_(2)
    for work, chunk in zip(works, chunks, strict=False):
        work.wait()
        total += chunk
    received = torch.empty(6)
    ring = [dist.isend(total, (rank + 1) % size), dist.irecv(received, (rank - 1) % size)]
    twice = total * 2
    for work in ring:
        work.wait()
    total.add_(received)
    gathered = [torch.empty(6) for _ in range(size)]
    work = dist.all_gather(gathered, twice, async_op=True)
    numbers = torch.full((size,), rank)
    out = torch.empty_like(numbers)
    other = dist.all_to_all_single(out, numbers, async_op=True)
    total.sin_()
    work.get_future().wait()
    other.wait()
    return (total.sum() + sum(gathered).sum()).item(), out.tolist()


def test_a_right_program_is_never_reported_under_100_schedules():
    expected = VirtualWorld(4).run(right_program)
    for seed in range(100):
        assert VirtualWorld(4, seed=seed).run(right_program) == expected
