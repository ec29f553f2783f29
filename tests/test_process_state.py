"""What a process would have of its own is each virtual rank's own, and the surrounding process sees nothing of it."""

import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist

from simulator import UnsupportedTransformError, VirtualWorld
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
