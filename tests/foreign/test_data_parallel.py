"""torch's DistributedDataParallel: the gradients of one device, with each of its ways to get there."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from tests.foreign.models import (
    LEARNING_RATE,
    TOLERANCE,
    batches,
    build_model,
    same_bits,
    train_on_one_device,
)
from tests.launch import on_gloo, on_virtual

STEPS = 3


def train(options):
    """Three steps; each rank sees its part of the batch. Returns the parameters."""
    model = build_model()
    options = dict(options)
    hook = options.pop("hook", None)
    ddp = DistributedDataParallel(model, **options)
    if hook:
        ddp.register_comm_hook(None, getattr(default_hooks, hook))
    optimizer = torch.optim.SGD(ddp.parameters(), LEARNING_RATE, momentum=0.9)
    for inputs, targets in batches(STEPS):
        mine = slice(dist.get_rank(), None, dist.get_world_size())
        optimizer.zero_grad(set_to_none=not options.get("gradient_as_bucket_view", False))
        torch.nn.functional.mse_loss(ddp(inputs[mine]), targets[mine]).backward()
        optimizer.step()
    return [x.detach().clone() for x in model.parameters()]


OPTIONS = {
    "plain": {},
    "small buckets": {"bucket_cap_mb": 1e-4},
    "gradients are views of buckets": {"gradient_as_bucket_view": True},
    "unused parameters are looked for": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
    "communication hook": {"hook": "allreduce_hook"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ddp_trains_as_one_device(options):
    expected = train_on_one_device(STEPS)
    for parameters in on_virtual(train, 3, options):
        for parameter, own in zip(expected, parameters, strict=True):
            torch.testing.assert_close(own, parameter, **TOLERANCE)


def test_ddp_has_the_same_bits_on_gloo():
    virtual, gloo = on_virtual(train, 2, {}), on_gloo(train, 2, {})
    assert same_bits(virtual, gloo)


def test_ddp_gives_no_report_in_other_orders():
    expected = on_virtual(train, 3, OPTIONS["small buckets"])
    for seed in range(8):
        assert same_bits(on_virtual(train, 3, OPTIONS["small buckets"], seed=seed), expected)


def accumulate():
    """Two micro-batches, of which the first is not communicated."""
    model = build_model()
    ddp = DistributedDataParallel(model)
    (inputs, targets), *_ = batches(1)
    first, second = (slice(6 * i + dist.get_rank(), 6 * (i + 1), dist.get_world_size()) for i in range(2))
    with ddp.no_sync():
        (torch.nn.functional.mse_loss(ddp(inputs[first]), targets[first]) / 2).backward()
    (torch.nn.functional.mse_loss(ddp(inputs[second]), targets[second]) / 2).backward()
    return [x.grad for x in model.parameters()]


def test_ddp_without_communication_in_one_of_two_micro_batches():
    model = build_model()
    (inputs, targets), *_ = batches(1)
    torch.nn.functional.mse_loss(model(inputs), targets).backward()
    for gradients in on_virtual(accumulate, 3):
        for parameter, own in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(own, parameter.grad, **TOLERANCE)
