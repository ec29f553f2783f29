"""torch's DTensor: every way from one placement to another, and tensor parallelism, on virtual ranks."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.foreign.models import TOLERANCE, Block, same_bits
from tests.launch import on_gloo, on_virtual

PLACEMENTS = (Shard(0), Shard(1), Replicate())
MOVES = [*itertools.product((*PLACEMENTS, Partial()), PLACEMENTS), (Partial(), Partial())]
"""From another placement to Partial is torch's own business: it does so in backward passes, and refuses users."""


def whole(shape):
    """A tensor in which every element is its address."""
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.float64).reshape(shape)


def as_partial(tensor, mesh):
    """The tensor as a sum over the ranks, of which each has another part."""
    rank, size = dist.get_rank(), dist.get_world_size()
    part = tensor * (rank + 1) / (size * (size + 1) / 2)
    return DTensor.from_local(part, mesh, [Partial()], run_check=False)


def redistribute(shape, source, target):
    """The tensor after the move, whole, and the shape of what this rank has of it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensor = whole(shape)
    start = as_partial(tensor, mesh) if source == Partial() else distribute_tensor(tensor, mesh, [source])
    moved = start.redistribute(mesh, [target])
    return moved.full_tensor(), tuple(moved.to_local().shape)


@pytest.mark.parametrize("shape", [(12, 24), (7, 5), (2, 5)], ids=["even", "uneven", "fewer rows than ranks"])
@pytest.mark.parametrize(("source", "target"), MOVES, ids=str)
def test_redistribute(shape, source, target):
    results = on_virtual(redistribute, 3, shape, source, target)
    for full, _ in results:
        torch.testing.assert_close(full, whole(shape), **TOLERANCE)
    if isinstance(target, Shard):
        parts = [len(x) for x in torch.arange(shape[target.dim]).chunk(3)]
        sizes = [local[target.dim] for _, local in results]
        assert sizes == parts + [0] * (3 - len(parts))


def forward_and_backward_over_two_dims():
    """Sharded over both dims of a mesh, replicated, multiplied, and back: output and gradient, whole."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    x = distribute_tensor(whole((7, 5)), mesh, [Shard(0), Shard(1)]).requires_grad_()
    y = distribute_tensor(whole((5, 3)), mesh, [Replicate(), Shard(0)])
    product = x @ y
    (product.redistribute(mesh, [Replicate(), Replicate()]) ** 2).sum().backward()
    return product.full_tensor().detach(), x.grad.full_tensor()


def test_a_product_over_a_mesh_of_two_dims():
    x, y = whole((7, 5)).requires_grad_(), whole((5, 3))
    ((x @ y) ** 2).sum().backward()
    for product, gradient in on_virtual(forward_and_backward_over_two_dims, 4):
        assert torch.equal(product, (x @ y).detach())  # integers: sums are exact
        assert torch.equal(gradient, x.grad)


def tensor_parallel(sequence_parallel):
    """A block cut by columns, then by rows; with sequence parallelism its input and output are cut by rows."""
    block = build_block()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = {"input_layouts": Shard(0)} if sequence_parallel else {}
    plan = {
        "first": ColwiseParallel(**rows),
        "second": RowwiseParallel(**({"output_layouts": Shard(0)} if sequence_parallel else {})),
    }
    parallelize_module(block, mesh, plan)
    inputs = inputs_of_block()
    if sequence_parallel:
        inputs = inputs.chunk(dist.get_world_size())[dist.get_rank()]
    output = block(inputs)
    (output**2).sum().backward()
    return output.detach(), [x.grad.full_tensor() for x in block.parameters()]


def build_block():
    generator = torch.Generator().manual_seed(3)
    block = Block(width=5, hidden=6).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return block


def inputs_of_block():
    return whole((9, 5)).sin()


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "tensor and sequence"])
def test_tensor_parallelism(sequence_parallel):
    block = build_block()
    expected = block(inputs_of_block())
    (expected**2).sum().backward()
    results = on_virtual(tensor_parallel, 3, sequence_parallel)
    outputs = [output for output, _ in results]
    output = torch.cat(outputs) if sequence_parallel else outputs[0]
    torch.testing.assert_close(output, expected.detach(), **TOLERANCE)
    for _, gradients in results:
        for parameter, own in zip(block.parameters(), gradients, strict=True):
            torch.testing.assert_close(own, parameter.grad, **TOLERANCE)


def test_redistribute_has_the_same_bits_on_gloo():
    arguments = (2, (7, 5), Shard(0), Shard(1))
    for (full, local), (theirs, their_local) in zip(
        on_virtual(redistribute, *arguments), on_gloo(redistribute, *arguments), strict=True
    ):
        assert torch.equal(full, theirs)
        assert local == their_local


PROGRAMS = {
    "mesh of two dims": (forward_and_backward_over_two_dims, 4),
    "tensor and sequence": (tensor_parallel, 3, True),
    "shard to shard": (redistribute, 3, (7, 5), Shard(0), Shard(1)),
    "partial to shard": (redistribute, 3, (7, 5), Partial(), Shard(0)),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_no_report_in_other_orders(program):
    expected = on_virtual(*program)
    for seed in range(8):
        assert same_bits([x[0] for x in on_virtual(*program, seed=seed)], [x[0] for x in expected])
