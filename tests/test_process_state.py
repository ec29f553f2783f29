"""What a process would have of its own is each virtual rank's own, and the surrounding process sees nothing of it."""

import collections
import math
import os
import random
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist

from simulator import UnsupportedTransformError, VirtualWorld
from simulator.errors import WorldError
from tests.launch import on_gloo


def script():
    """A program as it is written for torchrun."""
    dist.init_process_group("gloo")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    assert (rank, size) == (dist.get_rank(), dist.get_world_size())
    assert os.environ["LOCAL_RANK"] == str(rank)
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    backend = dist.get_backend()
    dist.destroy_process_group()
    assert not dist.is_initialized()
    return total.item(), backend


def test_a_torchrun_script_runs_unchanged():
    assert VirtualWorld(3).run(script) == [(3.0, "gloo")] * 3


def test_groups_can_be_started_again_but_not_twice():
    def body():
        script()
        dist.init_process_group("gloo")
        with pytest.raises(ValueError, match="twice"):
            dist.init_process_group("gloo")
        return dist.get_world_size()

    assert VirtualWorld(2).run(body) == [2, 2]


def test_a_wrong_rank_in_init_process_group_is_refused():
    with pytest.raises(RuntimeError, match="asks for rank 0 of 2; this is rank 1 of 2"):
        VirtualWorld(2).run(lambda: dist.init_process_group("gloo", rank=0, world_size=2))


def test_a_script_that_asks_first_finds_its_group():
    def body():
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        return dist.get_rank()

    assert VirtualWorld(2).run(body) == [0, 1]


def test_environment_is_each_ranks_own_and_is_restored():
    before = dict(os.environ)

    def body():
        os.environ["SEQPAR_TEST"] = os.environ["RANK"]
        dist.barrier()
        return os.environ["SEQPAR_TEST"]

    assert VirtualWorld(3).run(body) == ["0", "1", "2"]
    assert dict(os.environ) == before
    seen_by_c = subprocess.run(["sh", "-c", "echo $SEQPAR_TEST"], capture_output=True, text=True, check=True)
    assert seen_by_c.stdout.strip() == ""


def test_random_numbers_are_each_ranks_own_and_are_restored():
    def body():
        torch.manual_seed(dist.get_rank())
        dist.barrier()
        first = torch.rand(3)
        dist.barrier()
        return torch.cat((first, torch.rand(3)))

    torch.manual_seed(5)
    expected_after = torch.rand(1)
    torch.manual_seed(5)
    results = VirtualWorld(3).run(body)
    assert torch.equal(torch.rand(1), expected_after)
    for rank, numbers in enumerate(results):
        torch.manual_seed(rank)
        assert torch.equal(numbers, torch.rand(6))


def test_grad_and_autocast_modes_are_the_callers():
    def body():
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    with torch.no_grad():
        assert VirtualWorld(2).run(body)[1][0] is False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert VirtualWorld(2).run(body)[1] == (True, True, torch.bfloat16)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_collective_is_no_operation_of_the_rank_that_completes_it(which):
    """Its modes change neither what is sent nor who may use what has come: autocast casts no other half type, and
    what is inference mode's stays on its rank."""

    def program():
        rank = dist.get_rank()
        with torch.autocast("cpu", enabled=rank == which), torch.inference_mode(rank == which):
            sent, came = (
                torch.full((3,), rank + 1.0, dtype=torch.float16),
                torch.empty(3, dtype=torch.float16),
            )
            dist.all_to_all_single(came, sent)
            pairs = torch.empty(3, 3, dtype=torch.float16)
            dist.all_gather_single(pairs.view(9), sent)
            dist.all_reduce(sent)
        assert came.tolist() == [1, 2, 3] and pairs[:, 0].tolist() == [1, 2, 3] and sent.tolist() == [6] * 3
        assert came.is_inference() == sent.is_inference() == (rank == which)
        if rank != which:
            before = came._version
            scale = torch.ones(3, dtype=torch.float16, requires_grad=True)
            (scale * came).sum().backward()
            assert scale.grad.tolist() == [1, 2, 3] and before > 0

    for seed in (None, 1, 2):
        VirtualWorld(3, seed=seed).run(program)


def test_threads_and_hooks_are_restored():
    hook, threads, running = sys.excepthook, torch.get_num_threads(), threading.active_count()
    registry = dist.distributed_c10d._world
    VirtualWorld(3).run(script)
    assert (sys.excepthook, torch.get_num_threads(), threading.active_count()) == (hook, threads, running)
    assert dist.distributed_c10d._world is registry


def beside_a_real_group():
    before = torch.tensor([1.0 + dist.get_rank()])
    dist.all_reduce(before)
    virtual = VirtualWorld(3).run(script)
    after = torch.tensor([1.0 + dist.get_rank()])
    dist.all_reduce(after)
    return before.item(), virtual, after.item(), dist.get_world_size()


@pytest.mark.gloo
def test_a_real_process_group_goes_on_working():
    assert on_gloo(beside_a_real_group, 2) == [(3.0, [(3.0, "gloo")] * 3, 3.0, 2)] * 2


def test_a_world_may_run_inside_of_another_ones_rank():
    inner = []

    def body():
        x = torch.tensor([float(dist.get_rank())])
        inner.append(VirtualWorld(2).run(lambda: dist.get_rank() + 10))
        dist.all_reduce(x)
        return x.item()

    assert VirtualWorld(3).run(body) == [3.0] * 3
    assert inner == [[10, 11]] * 3


def test_worlds_in_two_threads_keep_their_environment_and_random_numbers():
    def body(seed):
        torch.manual_seed(seed + dist.get_rank())
        seen = []
        for _ in range(20):
            dist.barrier()
            seen.append((os.environ["RANK"], os.environ["WORLD_SIZE"], torch.rand(1).item()))
        return seen

    results = {}
    sizes = (2, 3)
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: VirtualWorld(n).run(body, 10 * n)}))
        for n in sizes
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: VirtualWorld(n).run(body, 10 * n) for n in sizes}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transforms_that_would_lose_their_derivative_are_refused():
    x = torch.ones(4)

    def reduce(y):
        dist.all_reduce(y)
        return y.sum()

    with pytest.raises(UnsupportedTransformError, match="functorch"):
        VirtualWorld(2).run(lambda: torch.func.grad(reduce)(x))
    with pytest.raises(UnsupportedTransformError, match="functorch"):
        torch.func.grad(lambda y: VirtualWorld(2).run(lambda: y * 2)[0].sum())(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(UnsupportedTransformError, match="forward-mode"):
            VirtualWorld(2).run(reduce, dual)
        with pytest.raises(UnsupportedTransformError, match="forward-mode"):
            VirtualWorld(2).run(lambda: reduce(dual))


def draws():
    """Numbers of every global generator, with hand-overs between the two halves of a pair of normal numbers."""
    numbers = []
    for _ in range(3):
        numbers += [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn())]
        numbers += [torch.rand(()).item(), random.randrange(1000)]
        dist.barrier()
    return numbers


def test_global_generators_are_each_ranks_own_and_are_restored():
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = VirtualWorld(1).run(draws)[0]
    after = random.random(), float(np.random.randn()), torch.rand(()).item()
    for seed in (None, 0, 1, 2):
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        assert VirtualWorld(3, seed=seed).run(draws) == [expected] * 3
        assert (random.random(), float(np.random.randn()), torch.rand(()).item()) == after


def test_a_rank_that_seeds_does_not_seed_the_others():
    def body():
        rank = dist.get_rank()
        random.seed(rank), np.random.seed(rank), torch.manual_seed(rank)
        dist.barrier()
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    alone = []
    for rank in range(3):
        random.seed(rank), np.random.seed(rank), torch.manual_seed(rank)
        alone.append((random.random(), float(np.random.rand()), torch.rand(()).item()))
    for seed in (None, 0, 1):
        assert VirtualWorld(3, seed=seed).run(body) == alone


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_the_second_of_a_pair_of_normal_numbers_is_given_once(seed):
    def body():
        numbers = []
        for _ in range(6):
            numbers.append(float(np.random.randn()))
            dist.barrier()
        return numbers

    np.random.seed(3)
    expected = [float(np.random.randn()) for _ in range(6)]
    np.random.seed(3)
    assert VirtualWorld(3, seed=seed).run(body) == [expected] * 3


def test_a_rank_that_seeds_numpy_with_a_list_is_noticed():
    def body():
        np.random.seed([dist.get_rank(), 7])
        dist.barrier()
        return float(np.random.rand())

    alone = []
    for rank in range(3):
        np.random.seed([rank, 7])
        alone.append(float(np.random.rand()))
    np.random.seed([9, 9])
    assert VirtualWorld(3).run(body) == alone


def test_a_rank_may_replace_numpys_generator():
    def body():
        np.random.set_bit_generator(np.random.PCG64(dist.get_rank()))
        dist.barrier()
        return float(np.random.rand())

    before = np.random.get_bit_generator()
    alone = [float(np.random.RandomState(np.random.PCG64(rank)).rand()) for rank in range(3)]
    assert VirtualWorld(3).run(body) == alone
    assert np.random.get_bit_generator() is before


def test_a_rank_goes_on_with_its_numbers_after_an_inner_world_and_after_an_error():
    def inner():
        draws()
        raise ValueError("here")

    def body():
        first = random.random(), float(np.random.rand())
        with pytest.raises(ValueError, match="here"):
            VirtualWorld(2).run(inner)
        second = random.random(), float(np.random.rand())
        dist.barrier()
        return [*first, *second, random.random(), float(np.random.rand())]

    random.seed(3), np.random.seed(3)
    expected = [number for _ in range(3) for number in (random.random(), float(np.random.rand()))]
    for _ in range(2):
        random.seed(3), np.random.seed(3)
        assert VirtualWorld(2).run(body) == [expected] * 2


def test_python_generators_are_exchanged_by_their_own_methods_where_memory_is_laid_out_otherwise(monkeypatch):
    monkeypatch.setattr("simulator.generators._COPIES_MEMORY", False)
    test_global_generators_are_each_ranks_own_and_are_restored()


def test_a_joint_backward_goes_on_with_the_ranks_numbers_and_singletons():
    registry, numbers = Registry(), {}

    class Draw(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            registry.rank = dist.get_rank()
            random.seed(registry.rank), np.random.seed(registry.rank)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            numbers[registry.rank] = random.random(), float(np.random.rand())
            return gradient

    x = torch.ones(2, requires_grad=True)
    outputs = VirtualWorld(3, autograd="joint", singletons=[registry]).run(Draw.apply, x)
    sum(output.sum() for output in outputs).backward()
    alone = {}
    for rank in range(3):
        random.seed(rank), np.random.seed(rank)
        alone[rank] = random.random(), float(np.random.rand())
    assert (numbers, registry.rank) == (alone, None)


def test_the_default_dtype_is_each_ranks_own():
    def body():
        if dist.get_rank() == 1:
            torch.set_default_dtype(torch.float64)
        dist.barrier()
        return torch.ones(1).dtype

    assert VirtualWorld(3).run(body) == [torch.float32, torch.float64, torch.float32]
    assert torch.get_default_dtype() == torch.float32


class Registry:
    def __init__(self):
        self.rank, self.seen = None, {"before": 1}


def test_singletons_are_each_ranks_own_and_are_restored():
    registry, module = Registry(), types.ModuleType("settings")
    module.GROUP, module.SHARED = None, []

    def body(again=False):
        if not again:
            registry.rank = module.GROUP = dist.get_rank()
            registry.seen[registry.rank] = True
        dist.barrier()
        module.SHARED.append(registry.rank)
        return registry.rank, sorted(map(str, registry.seen)), module.GROUP

    for seed in (None, 0, 1):
        world = VirtualWorld(3, seed=seed, singletons=[registry, (module, "GROUP")])
        assert world.run(body) == [(rank, [str(rank), "before"], rank) for rank in range(3)]
        assert (registry.rank, registry.seen, module.GROUP) == (None, {"before": 1}, None)
    assert sorted(module.SHARED) == [0, 0, 0, 1, 1, 1, 2, 2, 2]

    def failing():
        registry.rank = dist.get_rank()
        raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        VirtualWorld(2, singletons=[registry]).run(failing)
    assert registry.rank is None


def test_a_rank_may_delete_an_attribute():
    module = types.ModuleType("settings")
    module.GROUP = 1

    def body():
        if dist.get_rank() == 0:
            del module.GROUP
        dist.barrier()
        return hasattr(module, "GROUP")

    assert VirtualWorld(2, singletons=[(module, "GROUP")]).run(body) == [False, True]
    assert module.GROUP == 1


def test_containers_of_the_standard_library_are_copied():
    registry = Registry()
    registry.calls, registry.order = collections.defaultdict(int), collections.deque()

    def body():
        registry.calls[dist.get_rank()] += 1
        registry.order.append(dist.get_rank())
        dist.barrier()
        return dict(registry.calls), list(registry.order)

    assert VirtualWorld(2, singletons=[registry]).run(body) == [({0: 1}, [0]), ({1: 1}, [1])]
    assert (registry.calls, len(registry.order)) == ({}, 0)


@pytest.mark.parametrize(
    "entries",
    [[3], [math], [Registry], [(math, "nothing")], "name", 5, [(object(), "__class__")], [(3, "real")]],
)
def test_singletons_that_cannot_be_exchanged_are_refused(entries):
    with pytest.raises(WorldError):
        VirtualWorld(2, singletons=entries)


def test_the_default_device_is_the_callers():
    with torch.device("meta"):
        assert VirtualWorld(2).run(lambda: str(torch.ones(1).device)) == ["meta"] * 2
    assert VirtualWorld(2).run(lambda: str(torch.ones(1).device)) == ["cpu"] * 2


class Stubborn:
    """Cannot be read any more once a rank has set it."""

    def __init__(self):
        self.broken = False

    @property
    def value(self):
        if self.broken and dist.is_initialized():
            raise RuntimeError("gone")
        return 1

    @value.setter
    def value(self, value):
        pass


def test_state_that_cannot_be_exchanged_stops_the_world():
    stubborn = Stubborn()

    def body():
        stubborn.broken = True
        dist.barrier()

    with pytest.raises(RuntimeError, match="gone"):
        VirtualWorld(3, singletons=[(stubborn, "value")]).run(body)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no thread to a core")
def test_ranks_share_one_core_and_the_caller_gets_its_own_back():
    before = os.sched_getaffinity(0)
    seen = VirtualWorld(3).run(lambda: os.sched_getaffinity(0))
    assert len(seen[0]) == 1 and seen[0] <= before and seen == [seen[0]] * 3
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ZeroDivisionError):
        VirtualWorld(2).run(lambda: 1 // 0)
    assert os.sched_getaffinity(0) == before
