"""Plain torch.distributed on virtual ranks: every operation, and the same body on gloo gives the same bits."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn.functional as nn_functional
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from simulator import VirtualWorld
from tests.launch import on_gloo, on_virtual

SIZE = 4
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def mine(rows: int, width: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Entry [i, j] of rank r is 100 r + 10 i + j."""
    address = 100 * dist.get_rank() + 10 * torch.arange(rows)[:, None] + torch.arange(width)[None, :]
    return address.to(dtype)


def even_all_to_all(dtype):
    output = torch.empty(8, 3, dtype=dtype)
    dist.all_to_all_single(output, mine(8, dtype=dtype))
    return output


def uneven_all_to_all(dtype):
    rank = dist.get_rank()
    splits = [[1, 2, 0, 1], [0, 1, 3, 0], [2, 1, 1, 4], [0, 0, 0, 0]]
    received = [row[rank] for row in splits]
    output = torch.empty(sum(received), 3, dtype=dtype)
    dist.all_to_all_single(output, mine(sum(splits[rank]), dtype=dtype), received, splits[rank])
    return output


def asynchronous_all_to_all(dtype):
    output = torch.empty(4, 3, dtype=dtype)
    work = dist.all_to_all_single(output, mine(4, dtype=dtype), async_op=True)
    work.wait()
    return output, work.is_completed()


def lists(dtype):
    rank = dist.get_rank()
    outputs = [torch.empty(2, 3, dtype=dtype) for _ in range(SIZE)]
    dist.all_to_all(outputs, list(mine(8, dtype=dtype).split(2)))
    gathered = [torch.empty(2, 3, dtype=dtype) for _ in range(SIZE)]
    dist.all_gather(gathered, mine(2, dtype=dtype))
    reduced = torch.empty(2, 3, dtype=dtype)
    dist.reduce_scatter(reduced, list(mine(8, dtype=dtype).split(2)))
    scattered = torch.empty(2, 3, dtype=dtype)
    dist.scatter(scattered, list(mine(8, dtype=dtype).split(2)) if rank == 2 else None, src=2)
    collected = [torch.empty(2, 3, dtype=dtype) for _ in range(SIZE)] if rank == 1 else None
    dist.gather(mine(2, dtype=dtype), collected, dst=1)
    return outputs, gathered, reduced, scattered, collected


def tensors(dtype):
    summed, maximum, sent, reduced = (mine(4, dtype=dtype) for _ in range(4))
    dist.all_reduce(summed)
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
    dist.broadcast(sent, src=3)
    dist.reduce(reduced, dst=1)
    gathered = torch.empty(16, 3, dtype=dtype)
    dist.all_gather_into_tensor(gathered, mine(4, dtype=dtype))
    scattered = torch.empty(1, 3, dtype=dtype)
    dist.reduce_scatter_tensor(scattered, mine(4, dtype=dtype))
    dist.barrier()
    return summed, maximum, sent, reduced if dist.get_rank() == 1 else None, gathered, scattered


def messages(dtype):
    rank = dist.get_rank()
    right, left = (rank + 1) % SIZE, (rank - 1) % SIZE
    around = torch.empty(2, 3, dtype=dtype)
    operations = [dist.P2POp(dist.isend, mine(2, dtype=dtype), right), dist.P2POp(dist.irecv, around, left)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    if rank != 0:
        dist.send(mine(rank, dtype=dtype), 0, tag=rank)
        return around
    return around, [dist.recv(torch.empty(r, 3, dtype=dtype), r, tag=r) for r in (3, 1, 2)]


def from_anyone(dtype):
    if dist.get_rank() != 0:
        dist.send(mine(1, dtype=dtype), 0)
        return None
    received = []
    for _ in range(SIZE - 1):
        buffer = torch.empty(1, 3, dtype=dtype)
        source = dist.recv(buffer)
        received.append((source, buffer))
    return sorted(received, key=lambda pair: pair[0])


def objects(dtype):
    everyone = [None] * SIZE
    dist.all_gather_object(everyone, {"rank": dist.get_rank()})
    word = [f"from {dist.get_rank()}"]
    dist.broadcast_object_list(word, src=2)
    return everyone, word


def subgroups(dtype):
    evens, odds = dist.new_group([0, 2]), dist.new_group([1, 3])
    group = odds if dist.get_rank() % 2 else evens
    total = mine(2, dtype=dtype)
    dist.all_reduce(total, group=group)
    backwards = dist.new_group([3, 2, 1, 0])
    gathered = torch.empty(4, 3, dtype=dtype)
    dist.all_gather_into_tensor(gathered, mine(1, dtype=dtype), group=backwards)
    return (
        total,
        gathered,
        dist.get_rank(group),
        dist.get_world_size(group),
        dist.get_process_group_ranks(group),
    )


def meshes(dtype):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    total = mine(2, dtype=dtype)
    dist.all_reduce(total, group=mesh.get_group("inner"))
    return total, list(mesh.get_coordinate()), dist.get_process_group_ranks(mesh["outer"].get_group())


def coalesced(dtype):
    several = [mine(2, dtype=dtype), mine(1, dtype=dtype)]
    with dist._coalescing_manager():
        for tensor in several:
            dist.all_reduce(tensor)
    dist.all_reduce_coalesced(several)
    lists = [[torch.empty(2, 3, dtype=dtype), torch.empty(1, 3, dtype=dtype)] for _ in range(SIZE)]
    dist.all_gather_coalesced(lists, [mine(2, dtype=dtype), mine(1, dtype=dtype)])
    return several, lists


BODIES = [
    even_all_to_all,
    uneven_all_to_all,
    asynchronous_all_to_all,
    lists,
    tensors,
    messages,
    from_anyone,
    objects,
    subgroups,
    meshes,
    coalesced,
]


def all_bodies(dtype):
    return {body.__name__: body(dtype) for body in BODIES}


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name])
    else:
        assert a == b


@pytest.mark.gloo
def test_every_operation_gives_the_same_bits_on_virtual_ranks_and_on_gloo():
    """The values are whole numbers, so that the order in which gloo adds does not matter."""
    assert_same(on_virtual(all_bodies, SIZE, torch.float32), on_gloo(all_bodies, SIZE, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.complex64])
def test_other_dtypes_give_the_same_values(dtype):
    bodies = (even_all_to_all, uneven_all_to_all, asynchronous_all_to_all, messages)
    for body in bodies:
        reference = on_virtual(body, SIZE, torch.float32)
        result = on_virtual(body, SIZE, dtype)
        assert_same(_as_numbers(reference), _as_numbers(result))


def _as_numbers(value):
    if isinstance(value, torch.Tensor):
        value = value.real if value.is_complex() else value
        return value.to(torch.bfloat16).double()
    return [_as_numbers(v) for v in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_other_schedules_give_the_same_results(body):
    fixed = on_virtual(body, SIZE, torch.float32)
    for seed in range(8):
        assert_same(fixed, on_virtual(body, SIZE, torch.float32, seed=seed))


def arrival_order():
    if dist.get_rank():
        dist.send(torch.zeros(1), 0)
        return None
    return [dist.recv(torch.empty(1)) for _ in range(SIZE - 1)]


def test_a_seed_draws_a_schedule_and_draws_it_again():
    orders = [tuple(VirtualWorld(SIZE, seed=seed).run(arrival_order)[0]) for seed in range(20)]
    assert len(set(orders)) > 1
    assert orders == [tuple(VirtualWorld(SIZE, seed=seed).run(arrival_order)[0]) for seed in range(20)]
    assert VirtualWorld(SIZE).run(arrival_order) == VirtualWorld(SIZE).run(arrival_order)


def functional_collectives():
    group, rank = dist.group.WORLD, dist.get_rank()
    x = (mine(4, 1) + 1).requires_grad_()
    total = functional.all_reduce(x.detach(), "sum", group)
    moved = functional.all_to_all_single_autograd(x * x, [1] * SIZE, [1] * SIZE, group)
    (moved * (rank + 1)).sum().backward()
    return total + 0, moved.detach() + 0, x.grad


def test_functional_collectives_and_their_gradients():
    for rank, (total, moved, gradient) in enumerate(on_virtual(functional_collectives, SIZE)):
        x = [(100.0 * r + 10 * torch.arange(4) + 1)[:, None] for r in range(SIZE)]
        assert torch.equal(total, sum(x))
        assert torch.equal(moved, torch.stack([y[rank] for y in x]) ** 2)
        assert torch.equal(gradient, 2 * x[rank] * torch.arange(1.0, SIZE + 1)[:, None])


def functional_of_nn():
    x = torch.arange(4.0, requires_grad=True)
    y = nn_functional.all_reduce(x * dist.get_rank())
    z = nn_functional.all_to_all_single(torch.empty(4), x * 2)
    (y.sum() + (z * z).sum()).backward()
    return x.grad


def test_torch_distributed_nn_functional():
    for rank, gradient in enumerate(on_virtual(functional_of_nn, SIZE)):
        assert torch.equal(gradient, SIZE * rank + 8 * torch.arange(4.0))


def test_one_rank_is_a_world():
    def body():
        x = torch.arange(3.0)
        output = torch.empty(3)
        dist.all_reduce(x)
        dist.all_to_all_single(output, x)
        return output.tolist()

    assert VirtualWorld(1).run(body) == [[0.0, 1.0, 2.0]]


def test_arguments_reach_every_rank():
    assert VirtualWorld(2).run(lambda a, *, b: (a, b, dist.get_rank()), 1, b=2) == [(1, 2, 0), (1, 2, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_asynchronous_outputs_are_poisoned_until_wait(dtype):
    def body():
        output = torch.ones(2, dtype=dtype)
        work = dist.all_to_all_single(output, torch.ones(2, dtype=dtype), async_op=True)
        early = output.clone()
        dist.barrier()
        later = output.clone()
        work.wait()
        return early, later, output

    for early, later, output in VirtualWorld(2, hazards="off").run(body):
        assert not (early == 1).any() and not (later == 1).any()
        assert (output == 1).all()


def test_a_received_message_lands_in_wait_and_an_asynchronous_reduction_reads_before_the_poison():
    def body():
        rank, x, received = dist.get_rank(), torch.full((2,), 3.0), torch.zeros(2)
        reduction = dist.all_reduce(x, async_op=True)
        sending = dist.isend(torch.full((2,), float(rank)), 1 - rank)
        receiving = dist.irecv(received, 1 - rank)
        dist.barrier()
        early = received.clone(), x.clone()
        for work in (reduction, sending, receiving):
            work.wait()
        return early, received.tolist(), x.tolist()

    for rank, (early, received, x) in enumerate(VirtualWorld(2, hazards="off").run(body)):
        assert early[0].isnan().all() and early[1].isnan().all()
        assert received == [1.0 - rank] * 2 and x == [6.0, 6.0]


def test_a_sender_may_write_to_its_buffer_once_the_call_has_returned():
    """Rank 0 runs on before the others have fetched what it sent."""

    def body():
        x = torch.full((2,), float(dist.get_rank()))
        parts = [torch.empty(2) for _ in range(3)]
        dist.broadcast(x, src=0)
        dist.all_gather(parts, x + dist.get_rank())
        kept = x.clone()
        x.fill_(99.0)
        return kept.tolist(), [part.tolist() for part in parts]

    expected = ([0.0, 0.0], [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    for seed in (None, 1, 2, 3):
        assert VirtualWorld(3, seed=seed).run(body) == [expected] * 3


def test_the_in_place_forms_of_hardware_are_accepted():
    def body():
        rank, whole = dist.get_rank(), torch.zeros(6)
        whole[2 * rank : 2 * rank + 2] = rank + 1
        dist.all_gather_into_tensor(whole, whole[2 * rank : 2 * rank + 2])
        ones = torch.ones(6)
        dist.reduce_scatter_tensor(ones[2 * rank : 2 * rank + 2], ones)
        return whole.tolist(), ones[2 * rank : 2 * rank + 2].tolist()

    assert VirtualWorld(3).run(body) == [([1.0, 1.0, 2.0, 2.0, 3.0, 3.0], [3.0, 3.0])] * 3


def test_a_batch_may_send_and_receive_in_one_buffer():
    def body():
        x, other = torch.full((2,), float(dist.get_rank())), 1 - dist.get_rank()
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, x, other), dist.P2POp(dist.irecv, x, other)]
        ):
            work.wait()
        return x.tolist()

    assert VirtualWorld(2).run(body) == [[1.0, 1.0], [0.0, 0.0]]


def test_a_group_can_be_destroyed_and_barriers_be_monitored():
    def body():
        group = dist.new_group([0, 1])
        dist.monitored_barrier()
        dist.destroy_process_group(group)
        return dist.get_world_size()

    assert VirtualWorld(2).run(body) == [2, 2]


class Operations(TorchDispatchMode):
    """Names of the operations that a rank runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_rank_that_watches_its_operations_does_not_see_the_networks():
    def body():
        x, y, buffer = torch.ones(2), torch.ones(2), torch.empty(2)
        with Operations() as seen:
            dist.all_reduce(x)
            dist.all_to_all_single(buffer, y)
            work = dist.all_reduce(x, async_op=True)
            work.wait()
            other = 1 - dist.get_rank()
            for p2p in (dist.isend(x, other), dist.irecv(y, other)):
                p2p.wait()
        return [name for name in seen.names if "detach" not in name]

    assert VirtualWorld(2).run(body) == [[], []]


COUNTED = [
    (lambda: dist.all_to_all_single(torch.empty(6), torch.ones(6)), [[0, 8, 8], [8, 0, 8], [8, 8, 0]]),
    (lambda: dist.all_gather_into_tensor(torch.empty(6), torch.ones(2)), [[0, 8, 8], [8, 0, 8], [8, 8, 0]]),
    (lambda: dist.reduce_scatter_tensor(torch.empty(2), torch.ones(6)), [[0, 8, 8], [8, 0, 8], [8, 8, 0]]),
    (lambda: dist.all_reduce(torch.ones(6)), [[0, 16, 16], [16, 0, 16], [16, 16, 0]]),
    (lambda: dist.all_reduce(torch.ones(4)), [[0, 12, 12], [12, 0, 8], [12, 8, 0]]),
    (lambda: dist.broadcast(torch.ones(3), 1), [[0, 0, 0], [12, 0, 12], [0, 0, 0]]),
    (lambda: dist.reduce(torch.ones(3), 1), [[0, 12, 0], [0, 0, 0], [0, 12, 0]]),
    (lambda: dist.barrier(), [[0, 0, 0]] * 3),
]


@pytest.mark.parametrize(("call", "expected"), COUNTED)
def test_bytes_are_counted_by_sender_and_receiver(call, expected):
    world = VirtualWorld(3)
    world.run(call)
    assert world.bytes.tolist() == expected
    world.run(lambda: None)
    assert world.bytes.sum() == 0


def test_bytes_of_messages_and_of_groups_stand_at_global_ranks():
    def body():
        group = dist.new_group([0, 2])
        if dist.get_rank() == 2:
            dist.send(torch.ones(5), 1)
        if dist.get_rank() == 1:
            dist.recv(torch.empty(5), 2)
        if dist.get_rank() != 1:
            dist.all_to_all_single(torch.empty(2), torch.ones(2), group=group)

    world = VirtualWorld(3)
    world.run(body)
    assert world.bytes.tolist() == [[0, 0, 4], [0, 0, 0], [4, 20, 0]]


def test_averages():
    def body():
        rank = dist.get_rank()
        x, out = torch.full((2,), float(rank)), torch.empty(1)
        dist.all_reduce(x, dist.ReduceOp.AVG)
        dist.reduce_scatter_single(out, torch.arange(3.0) + 3 * rank, dist.ReduceOp.AVG)
        return x.tolist(), out.item()

    assert VirtualWorld(3).run(body) == [([1.0, 1.0], 3.0), ([1.0, 1.0], 4.0), ([1.0, 1.0], 5.0)]
