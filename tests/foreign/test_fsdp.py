"""torch's fully_shard (FSDP2): three training steps equal those of one device."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_

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


def train(options, mesh_shape=None):
    """Three steps with every layer sharded, then the whole parameters."""
    model = build_model()
    mesh = None
    if mesh_shape is not None:
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicas", "shards")[-len(mesh_shape) :])
    for layer in model:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)
    for inputs, targets in batches(STEPS):
        mine = slice(dist.get_rank(), None, dist.get_world_size())
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs[mine]), targets[mine]).backward()
        optimizer.step()
    return [x.full_tensor().detach().clone() for x in model.parameters()]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_fully_shard_trains_as_one_device(size, reshard_after_forward):
    expected = train_on_one_device(STEPS)
    for parameters in on_virtual(train, size, {"reshard_after_forward": reshard_after_forward}):
        for parameter, own in zip(expected, parameters, strict=True):
            torch.testing.assert_close(own, parameter, **TOLERANCE)


def test_fully_shard_over_two_dims_of_a_mesh():
    expected = train_on_one_device(STEPS)
    for parameters in on_virtual(train, 4, {}, (2, 2)):
        for parameter, own in zip(expected, parameters, strict=True):
            torch.testing.assert_close(own, parameter, **TOLERANCE)


def test_fully_shard_has_the_same_bits_on_gloo():
    virtual, gloo = on_virtual(train, 2, {}), on_gloo(train, 2, {})
    assert same_bits(virtual, gloo)


def test_fully_shard_gives_no_report_in_other_orders():
    expected = on_virtual(train, 3, {})
    for seed in range(8):
        assert same_bits(on_virtual(train, 3, {}, seed=seed), expected)


def mixed_precision_and_clipping():
    """Parameters gathered in bfloat16, gradients reduced in float32 and clipped to a norm of 1."""
    model = build_model().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    (inputs, targets), *_ = batches(1)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    loss = torch.nn.functional.mse_loss(model(inputs[mine].float()), targets[mine].bfloat16())
    loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)
    return torch.cat([x.grad.full_tensor().reshape(-1) for x in model.parameters()])


def test_mixed_precision_and_clipping_agree_on_all_ranks():
    gradients = on_virtual(mixed_precision_and_clipping, 3)
    assert all(torch.equal(x, gradients[0]) for x in gradients)
    torch.testing.assert_close(gradients[0].norm().item(), 1.0, rtol=1e-5, atol=0.0)
