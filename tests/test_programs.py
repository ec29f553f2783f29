"""Code that nobody here wrote, on virtual ranks: each result equals that of one device."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from simulator import VirtualWorld

SIZE = 4
pytestmark = pytest.mark.filterwarnings("ignore")


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()


def batch(rank: int, step: int):
    torch.manual_seed(100 * step + rank)
    return torch.randn(5, 3, dtype=torch.float64)


def train(net, optimizer, data):
    for step in range(3):
        optimizer.zero_grad()
        (net(data(step)) ** 2).mean().backward()
        optimizer.step()


def one_device():
    net = model()
    whole = torch.optim.SGD(net.parameters(), lr=0.1)
    train(net, whole, lambda step: torch.cat([batch(rank, step) for rank in range(SIZE)]))
    return [p.detach() for p in net.parameters()]


def with_ddp():
    net = model()
    parallel = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    train(parallel, optimizer, lambda step: batch(dist.get_rank(), step))
    return [p.detach() for p in net.parameters()]


def with_fully_shard():
    net, mesh = model(), init_device_mesh("cpu", (SIZE,))
    for layer in (net[0], net[2], net):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    train(net, optimizer, lambda step: batch(dist.get_rank(), step))
    return [p.full_tensor().detach() for p in net.parameters()]


@pytest.mark.parametrize("program", [with_ddp, with_fully_shard], ids=lambda f: f.__name__)
def test_three_training_steps_equal_one_device(program):
    expected = one_device()
    for parameters in VirtualWorld(SIZE).run(program):
        for ours, theirs in zip(parameters, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


class SumOverRanks(torch.autograd.Function):
    """Sums over ranks in both directions."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return SumOverRanks.apply(gradient.contiguous())


def with_checkpoint(use_reentrant):
    x = (torch.arange(3.0) + dist.get_rank()).requires_grad_()
    y = checkpoint(lambda x: SumOverRanks.apply(x * x) * x, x, use_reentrant=use_reentrant)
    y.sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_the_collectives(use_reentrant):
    xs = [(torch.arange(3.0) + rank).requires_grad_() for rank in range(SIZE)]
    total = sum(x * x for x in xs)
    outputs = [total * x for x in xs]
    gradients = torch.autograd.grad(sum(y.sum() for y in outputs), xs)
    results = VirtualWorld(SIZE).run(with_checkpoint, use_reentrant)
    for (y, gradient), expected, expected_gradient in zip(results, outputs, gradients, strict=True):
        assert torch.equal(y, expected) and torch.equal(gradient, expected_gradient)
