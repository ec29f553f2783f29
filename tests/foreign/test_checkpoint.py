"""torch.utils.checkpoint with collectives inside: the second forward, in the backward pass, calls them again."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tests.foreign.models import batches, build_model, same_bits
from tests.launch import on_gloo, on_virtual


class AllReduce(torch.autograd.Function):
    """The sum over ranks; its gradient is the sum of the gradients."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return AllReduce.apply(gradient)


def exchange_and_sum(x):
    """An all-to-all and an all-reduce, between operations that save tensors for backward."""
    exchanged = all_to_all_single_autograd(torch.sin(x), None, None, dist.group.WORLD)
    return AllReduce.apply(torch.sin(exchanged) * x)


def with_dropout(x):
    """The second forward must draw the first's random numbers, those of this rank."""
    return torch.nn.functional.dropout(exchange_and_sum(x), p=0.25)


def run(function, mode):
    """Output and input gradient; mode None is without a checkpoint."""
    torch.manual_seed(dist.get_rank())
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    output = function(x) if mode is None else checkpoint(function, x, use_reentrant=mode == "reentrant")
    output.square().sum().backward()
    return output.detach(), x.grad


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("function", [exchange_and_sum, with_dropout])
def test_a_checkpoint_changes_no_bit(function, mode):
    assert same_bits(on_virtual(run, 3, function, mode), on_virtual(run, 3, function, None))


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
def test_a_checkpoint_has_the_same_bits_on_gloo(mode):
    assert same_bits(on_virtual(run, 2, with_dropout, mode), on_gloo(run, 2, with_dropout, mode))


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
def test_no_report_in_other_orders(mode):
    expected = on_virtual(run, 3, with_dropout, None)
    for seed in range(20):
        assert same_bits(on_virtual(run, 3, with_dropout, mode, seed=seed), expected)


def train_with_checkpoints(mode):
    """A step of DDP in which every layer is computed twice; gradients by parameter."""
    model = build_model()
    (inputs, targets), *_ = batches(1)
    mine = slice(dist.get_rank(), None, dist.get_world_size())

    class Checkpointed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, x):
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=mode == "reentrant") if mode else layer(x)
            return x

    ddp = DistributedDataParallel(Checkpointed())
    torch.nn.functional.mse_loss(ddp(inputs[mine].requires_grad_()), targets[mine]).backward()
    return [x.grad for x in model.parameters()]


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
def test_checkpoints_in_ddp_change_no_bit(mode):
    assert same_bits(on_virtual(train_with_checkpoints, 2, mode), on_virtual(train_with_checkpoints, 2, None))
