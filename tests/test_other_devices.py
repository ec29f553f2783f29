"""A dry run of the code path of devices that are not here: no data, but every tensor has to stay on its device."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from seqpar_ref import DistributedAttention, apply_rotary, make_plan, position_ids_of

RANK, RANKS, DIM = 1, 4, 16


@pytest.fixture
def fake_group():
    """PyTorch's own stand-in for a group, in which collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("layout", ["b s h d", "s b h d", "b h s d"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "tokens"),
    [(8, 8, 16), (8, 2, 16), (9, 3, 16), (9, 3, [3, 5, 0, 8]), (1, 1, [3, 5, 0, 8])],
)
def test_forward_and_backward_stay_on_the_device(fake_group, layout, heads, kv_heads, tokens):
    device = torch.device("meta")
    plan = make_plan(ranks=RANKS, heads=heads, kv_heads=kv_heads, tokens=tokens)
    positions = position_ids_of(plan, RANK, device=device)
    sizes = {"b": 2, "s": len(positions), "d": DIM}
    shards = [
        torch.empty(
            [{**sizes, "h": count}[name] for name in layout.split()],
            device=device,
            dtype=torch.bfloat16,
            requires_grad=True,
        )
        for count in (heads, kv_heads, kv_heads)
    ]
    query, key, value = shards
    query, key = (apply_rotary(x, positions, layout=layout) for x in (query, key))
    output = DistributedAttention(layout=layout, plan=plan)(query, key, value, is_causal=True)
    output.sum().backward()
    for tensor, like in ((output, shards[0]), *((shard.grad, shard) for shard in shards)):
        assert (tensor.device, tensor.dtype, tensor.shape) == (like.device, like.dtype, like.shape)
