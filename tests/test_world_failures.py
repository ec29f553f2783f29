"""Programs that are wrong: each ends at once, with an error that says where every rank stands."""

import contextlib
import threading
import time

import pytest
import torch
import torch.distributed as dist

from simulator import (
    BufferError,
    CollectiveMismatchError,
    DeadlockError,
    StaleGroupError,
    UnsupportedOperationError,
    VirtualWorld,
    WorldError,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _no_thread_stays_behind():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def skipped_collective():
    if dist.get_rank() != 2:
        dist.all_reduce(torch.ones(2))


def other_operation():
    if dist.get_rank() == 2:
        dist.all_gather_into_tensor(torch.empty(8), torch.ones(2))
    else:
        dist.all_reduce(torch.ones(2))


def other_dtype():
    dist.all_reduce(torch.ones(2, dtype=torch.float64 if dist.get_rank() == 2 else torch.float32))


def other_shape():
    dist.all_reduce(torch.ones(3 if dist.get_rank() == 2 else 2))


def other_root():
    dist.broadcast(torch.ones(2), src=1 if dist.get_rank() == 2 else 0)


def other_reduction():
    dist.all_reduce(torch.ones(2), op=dist.ReduceOp.MAX if dist.get_rank() == 2 else dist.ReduceOp.SUM)


def torn_split_matrix():
    sizes = [1, 1, 1, 1]
    if dist.get_rank() == 2:
        dist.all_to_all_single(torch.empty(5), torch.ones(4), [1, 2, 1, 1], sizes)
    else:
        dist.all_to_all_single(torch.empty(4), torch.ones(4), sizes, sizes)


def torn_list():
    rows = 3 if dist.get_rank() == 2 else 2
    dist.all_to_all([torch.empty(2) for _ in range(4)], [torch.ones(rows) for _ in range(4)])


def other_row_width():
    width = 3 if dist.get_rank() == 2 else 2
    dist.all_to_all_single(torch.empty(4, width), torch.ones(4, width))


def asynchronous_mismatch():
    if dist.get_rank() == 2:
        work = dist.broadcast(torch.ones(2), 0, async_op=True)
    else:
        work = dist.all_reduce(torch.ones(2), async_op=True)
    work.wait()


def other_message_shape():
    if dist.get_rank() == 2:
        dist.send(torch.ones(3), 0)
    elif dist.get_rank() == 0:
        dist.recv(torch.empty(2), 2)


MISMATCHES = [
    (other_operation, "different operations (all_gather_single, all_reduce)"),
    (other_dtype, "all_reduce with different dtype"),
    (other_shape, "all_reduce with different shape"),
    (other_root, "broadcast with different root"),
    (other_reduction, "all_reduce with different reduction"),
    (torn_split_matrix, "group rank 1 sends 1 rows to group rank 2, which expects 2"),
    (torn_list, "group rank 2 has [3] for group rank 0, whose buffer for it is [2]"),
    (other_row_width, "rows have [2, 3] elements"),
    (asynchronous_mismatch, "different operations (all_reduce, broadcast)"),
    (other_message_shape, "rank 2 sends send(shape [3], dtype float32) and rank 0 receives"),
]


@pytest.mark.parametrize(("body", "words"), MISMATCHES, ids=lambda x: getattr(x, "__name__", None))
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_a_disagreement_names_every_rank_and_its_line(body, words, seed):
    with pytest.raises(CollectiveMismatchError) as error:
        VirtualWorld(4, seed=seed).run(body)
    text = str(error.value)
    assert words in text
    for rank in range(4):
        line = next(line for line in text.splitlines() if line.startswith(f"  rank {rank}: "))
        assert "has returned" in line or (f"{__file__}:" in line and f" in {body.__name__}" in line)


def crossed_groups():
    first, second = dist.new_group([0, 1]), dist.new_group([0, 1])
    for group in (first, second) if dist.get_rank() == 0 else (second, first):
        dist.all_reduce(torch.ones(1), group=group)


def receive_without_sender():
    if dist.get_rank() == 0:
        dist.recv(torch.empty(1), 1)


def both_send_first():
    dist.send(torch.ones(1), 1 - dist.get_rank())
    dist.recv(torch.empty(1), 1 - dist.get_rank())


def other_tag():
    if dist.get_rank() == 0:
        dist.send(torch.ones(1), 1, tag=5)
    else:
        dist.recv(torch.empty(1), 0, tag=6)


def other_number_of_steps():
    for _ in range(2 + dist.get_rank()):
        dist.all_reduce(torch.ones(1))


def key_that_nobody_sets():
    if dist.get_rank() == 0:
        dist.distributed_c10d._get_default_store().get("missing")


DEADLOCKS = [
    (crossed_groups, "group '1' of all 2 ranks", "group '2' of all 2 ranks"),
    (receive_without_sender, "rank 0: waits in recv", "rank 1: has returned"),
    (both_send_first, "rank 0: waits in send", "rank 1: waits in send"),
    (other_tag, "to rank 1, tag 5", "from rank 0, tag 6"),
    (other_number_of_steps, "rank 0: has returned", "rank 1: waits in all_reduce"),
    (key_that_nobody_sets, "/missing'] in the store at", "rank 1: has returned"),
]


@pytest.mark.parametrize(("body", "first", "second"), DEADLOCKS, ids=lambda x: getattr(x, "__name__", None))
def test_a_deadlock_names_every_rank_and_what_it_waits_for(body, first, second):
    with pytest.raises(DeadlockError) as error:
        VirtualWorld(2).run(body)
    assert first in str(error.value) and second in str(error.value)


def reduction_that_nobody_waits_for():
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(1), async_op=True)


def send_that_nobody_receives():
    if dist.get_rank() == 0:
        dist.isend(torch.ones(1), 1)


def receive_that_nobody_serves():
    if dist.get_rank() == 0:
        dist.irecv(torch.ones(1), 1)


@pytest.mark.parametrize(
    "body",
    [reduction_that_nobody_waits_for, send_that_nobody_receives, receive_that_nobody_serves],
    ids=lambda body: body.__name__,
)
def test_a_call_without_an_answer_is_an_error_although_nobody_waits(body):
    with pytest.raises(DeadlockError) as error:
        VirtualWorld(2).run(body)
    assert "1 calls are without an answer" in str(error.value)
    assert f"{__file__}:" in str(error.value) and f"in {body.__name__}" in str(error.value)


def test_a_disagreement_in_a_joint_backward_names_the_line_that_began_it():
    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            dist.all_reduce(gradient.clone() if dist.get_rank() else gradient.double())
            return gradient

    x = torch.ones(2, requires_grad=True)
    results = VirtualWorld(2, autograd="joint").run(lambda: Odd.apply(x))
    with pytest.raises(CollectiveMismatchError) as error:
        sum(y.sum() for y in results).backward()
    assert str(error.value).count("in backward") == 2


def test_a_disagreement_in_the_second_dtype_of_a_coalesced_call_names_every_rank():
    def body():
        second = torch.ones(2, dtype=torch.float64 if dist.get_rank() else torch.float32)
        with dist._coalescing_manager():
            dist.all_reduce(torch.ones(2))
            dist.all_reduce(second)

    with pytest.raises(CollectiveMismatchError) as error:
        VirtualWorld(2).run(body)
    assert "different dtype" in str(error.value) and "rank 1: waits in" in str(error.value)


def test_an_exception_that_takes_no_note_comes_out_all_the_same():
    class Stubborn(Exception):
        def add_note(self, note):
            raise TypeError("no notes")

    def body():
        raise Stubborn

    with pytest.raises(Stubborn):
        VirtualWorld(2).run(body)


def test_a_rank_that_skips_a_collective_is_named():
    with pytest.raises(DeadlockError) as error:
        VirtualWorld(4).run(skipped_collective)
    assert "rank 2: has returned" in str(error.value)
    assert str(error.value).count("waits in all_reduce") == 3


@pytest.mark.parametrize("caught", [Exception, BaseException])
def test_swallowing_the_error_does_not_help(caught):
    def body():
        for _ in range(3):
            with contextlib.suppress(caught):
                other_shape()
        return "went on"

    with pytest.raises(CollectiveMismatchError):
        VirtualWorld(4).run(body)


def test_retrying_for_ever_does_not_hang():
    def body():
        while True:
            try:
                other_shape()
            except Exception:
                continue

    with pytest.raises(CollectiveMismatchError):
        VirtualWorld(4).run(body)


def test_a_large_world_stops_soon():
    def body():
        if dist.get_rank() != 100:
            dist.barrier()

    start = time.monotonic()
    with pytest.raises(DeadlockError, match="rank 100: has returned"):
        VirtualWorld(256).run(body)
    assert time.monotonic() - start < 5


def test_an_exception_comes_out_as_the_same_object_and_names_its_rank():
    mistake = KeyError("no such layer")

    def body():
        dist.barrier()
        if dist.get_rank() == 2:
            raise mistake
        dist.barrier()

    with pytest.raises(KeyError) as error:
        VirtualWorld(4).run(body)
    assert error.value is mistake
    assert error.value.__notes__ == ["raised on virtual rank 2"]


def test_ranks_clean_up_when_the_world_fails():
    cleaned = []

    def body():
        try:
            dist.barrier()
            if dist.get_rank() == 1:
                raise ValueError("wrong")
            dist.barrier()
        finally:
            cleaned.append(dist.get_rank())

    with pytest.raises(ValueError, match="wrong"):
        VirtualWorld(3).run(body)
    assert sorted(cleaned) == [0, 1, 2]


def test_a_world_can_be_used_again_after_a_failure():
    world = VirtualWorld(4)
    with pytest.raises(DeadlockError):
        world.run(skipped_collective)
    assert world.run(dist.get_rank) == [0, 1, 2, 3]


def test_a_rank_that_polls_a_collective_which_never_comes_is_stopped():
    def body():
        if dist.get_rank() == 0:
            work = dist.all_reduce(torch.ones(1), async_op=True)
            while not work.is_completed():
                pass

    with pytest.raises(DeadlockError, match="rank 0: waits in all_reduce"):
        VirtualWorld(2).run(body)


def overlapping():
    x = torch.ones(6)
    dist.all_to_all_single(x[2:6], x[:4])


BUFFER = torch.ones(4)
REFUSED = [
    (lambda: dist.all_reduce(torch.ones(3, 4).t()), "strides [1, 4]"),
    (lambda: dist.all_to_all_single(torch.empty(4, 2).t(), torch.ones(2, 4)), "strides [1, 2]"),
    (lambda: dist.all_reduce(torch.ones(1).expand(4)), "strides [0]"),
    (overlapping, "overlap in 8 bytes"),
    (lambda: dist.all_to_all_single(torch.empty(3), torch.ones(3)), "3 rows, which do not split in 2"),
    (lambda: dist.all_to_all_single(torch.empty(3), torch.ones(3), [1, 1], [2, 1]), "sum 2"),
    (lambda: dist.all_to_all_single(torch.empty(3), torch.ones(3), [4, -1], [2, 1]), "[4, -1]"),
    (lambda: dist.all_to_all_single(torch.tensor(1.0), torch.ones(2)), "has no dims"),
    (lambda: dist.all_gather([torch.empty(1)] * 3, torch.ones(1)), "3 output tensors and needs 2"),
    (lambda: dist.all_gather_into_tensor(torch.empty(3), torch.ones(2)), "3 output elements and needs 4"),
    (lambda: dist.reduce_scatter_tensor(torch.empty(3), torch.ones(2)), "2 input elements and needs 6"),
    (lambda: dist.all_reduce(torch.ones(2).to_sparse()), "layout torch.sparse_coo"),
    (lambda: dist.all_gather([BUFFER, BUFFER], torch.ones(4)), "two outputs overlap in 16 bytes"),
    (
        lambda: dist.all_to_all([BUFFER[:2], BUFFER[1:3]], [torch.ones(2)] * 2),
        "two outputs overlap in 4 bytes",
    ),
    (lambda: dist.all_gather_into_tensor(torch.ones(2, dtype=torch.int32), torch.ones(1)), "int32"),
    (lambda: [dist.irecv(BUFFER, 1 - dist.get_rank()) for _ in range(2)], "two outputs overlap"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_a_buffer_that_hardware_would_misread_is_refused_before_any_communication(call, words):
    world = VirtualWorld(2)
    with pytest.raises(BufferError) as error:
        world.run(call)
    assert words in str(error.value)
    assert world.bytes.sum() == 0


def test_a_reduction_that_is_not_there_is_refused():
    with pytest.raises(UnsupportedOperationError, match="no reduction"):
        VirtualWorld(2).run(lambda: dist.all_reduce(torch.ones(2), op=dist._make_nccl_premul_sum(2.0)))


@pytest.mark.parametrize(
    "options",
    [
        {"size": 0},
        {"size": -1},
        {"size": 2.0},
        {"size": True},
        {"size": 2, "autograd": "magic"},
        {"size": 2, "seed": 1.5},
    ],
)
def test_a_world_that_cannot_be_is_refused(options):
    with pytest.raises(WorldError):
        VirtualWorld(**options)


@pytest.mark.parametrize(
    "error", [RuntimeError("can't start new thread"), MemoryError("no memory")], ids=repr
)
@pytest.mark.parametrize("first", [0, 1, 4])
@pytest.mark.parametrize("seed", [None, 1])
def test_a_machine_without_threads_ends_the_world(monkeypatch, first, seed, error):
    """From the given rank on no thread can be started, while the ranks before it wait in a collective, or aside."""
    start, begun = threading.Thread.start, []

    def limited(thread):
        if len(begun) == first:
            raise error
        begun.append(thread)
        start(thread)

    def program():
        dist.all_reduce(torch.ones(2))
        dist.barrier()

    world = VirtualWorld(6, seed=seed)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", limited)
        with pytest.raises(WorldError, match=rf"rank \d of 6 cannot begin.*{error}"):
            world.run(program)
    assert len(begun) == first
    world.run(program)


def test_run_needs_a_function():
    with pytest.raises(WorldError, match="cannot be called"):
        VirtualWorld(2).run(3)


def test_a_group_of_an_earlier_run_and_a_backward_outside_are_refused():
    world = VirtualWorld(2)
    groups = world.run(lambda: dist.group.WORLD)
    with pytest.raises(StaleGroupError, match="outside of the run"):
        world.run(lambda: groups[dist.get_rank()].allreduce([torch.ones(1)]))
    with pytest.raises(StaleGroupError, match="autograd='joint'"):
        groups[0].allreduce([torch.ones(1)])
