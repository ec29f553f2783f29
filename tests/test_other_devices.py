"""Dry runs of the code path of devices that are not here: no data, but every tensor has to stay on its device.

On "meta" forward and backward run. On fake tensors that say they are on "cuda" the forward pass does, with its graph
being recorded; the backward pass needs autograd's threads for the device, which only a build for CUDA has. There
PyTorch refuses an operation whose tensors are on different devices, which it does not on "meta".
"""

import ctypes
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from seqpar_ref import DistributedAttention, apply_rotary, make_plan, position_ids_of
from seqpar_ref.block import UlyssesBlock
from seqpar_ref.device import device_of_backend
from seqpar_ref.errors import NoAcceleratorError
from seqpar_ref.exchange import qkv_to_heads, start_heads_to_sequence, start_sequence_to_heads
from seqpar_ref.overlap import ChunkedAttention

RANK, RANKS, DIM, WIDTH = 1, 4, 16, 24
LAYOUTS = ["b s h d", "s b h d", "b h s d"]
SIZES = [(8, 8, 16), (8, 2, 16), (9, 3, 16), (9, 3, [3, 5, 0, 8]), (1, 1, [3, 5, 0, 8])]
SOME_SIZES = [SIZES[1], SIZES[3], SIZES[4]]
OVERLAPS = ["none", "projections", "chunks"]


@pytest.fixture
def fake_group():
    """PyTorch's own stand-in for a group, in which collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    yield
    dist.destroy_process_group()


def plan_and_shards(layout, heads, kv_heads, tokens, device, requires_grad):
    plan = make_plan(ranks=RANKS, heads=heads, kv_heads=kv_heads, tokens=tokens)
    sizes = {"b": 2, "s": len(plan.tokens_of(RANK)), "d": DIM}
    shapes = [
        [{**sizes, "h": count}[name] for name in layout.split()] for count in (heads, kv_heads, kv_heads)
    ]
    options = {"device": device, "dtype": torch.bfloat16, "requires_grad": requires_grad}
    return plan, [torch.empty(shape, **options) for shape in shapes]


def attention_of(kind, layout, plan):
    return (
        ChunkedAttention(layout=layout, plan=plan, chunks=2)
        if kind == "chunks"
        else DistributedAttention(layout=layout, plan=plan, wire=kind)
    )


def block_of(overlap, layout, plan, device):
    return UlyssesBlock(
        WIDTH, plan.heads, plan.kv_heads, DIM, layout=layout, plan=plan, overlap=overlap, chunks=2,
        device=device, dtype=torch.bfloat16,
    )  # fmt: skip


def is_like(tensor, like):
    return (tensor.device, tensor.dtype, tensor.shape) == (like.device, like.dtype, like.shape)


@pytest.mark.parametrize("kind", ["fused", "separate", "pipelined", "chunks"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "kv_heads", "tokens"), SIZES)
def test_forward_and_backward_stay_on_the_device(fake_group, kind, layout, heads, kv_heads, tokens):
    plan, shards = plan_and_shards(layout, heads, kv_heads, tokens, "meta", True)
    query, key, value = shards
    positions = position_ids_of(plan, RANK, device=torch.device("meta"))
    query, key = (apply_rotary(x, positions, layout=layout) for x in (query, key))
    output = attention_of(kind, layout, plan)(query, key, value, is_causal=True)
    output.sum().backward()
    assert is_like(output, shards[0])
    assert all(is_like(shard.grad, shard) for shard in shards)


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "kv_heads", "tokens"), SIZES)
def test_the_block_stays_on_the_device(fake_group, overlap, layout, heads, kv_heads, tokens):
    plan, _ = plan_and_shards(layout, heads, kv_heads, tokens, "meta", True)
    block = block_of(overlap, layout, plan, "meta")
    x = torch.empty(
        2, len(plan.tokens_of(RANK)), WIDTH, device="meta", dtype=torch.bfloat16, requires_grad=True
    )
    x = x.transpose(0, 1) if layout == "s b h d" else x
    x.retain_grad()
    output = block(x, is_causal=True)
    output.sum().backward()
    assert is_like(output, x) and is_like(x.grad, x)
    assert all(is_like(parameter.grad, parameter) for parameter in block.parameters())


@pytest.fixture(scope="module")
def fake_mode():
    """Many operations ask for a device guard first, which only a build for CUDA has: lend "cuda" that of "meta".

    Both do nothing. The registry is an array of pointers, by number of the device type.
    """
    cuda, meta = (torch._C._autograd.DeviceType.__members__[name].value for name in ("CUDA", "Meta"))
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * (meta + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    own = registry[cuda]
    registry[cuda] = own or registry[meta]
    yield FakeTensorMode()  # one for all tests: exchanges keep tensors of positions
    registry[cuda] = own


@pytest.fixture
def fake_cuda(fake_group, fake_mode):
    with fake_mode:
        yield torch.device("cuda", 0)


@pytest.mark.parametrize("kind", ["fused", "separate", "pipelined", "chunks"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "kv_heads", "tokens"), SOME_SIZES)
def test_forward_on_fake_cuda_tensors(fake_cuda, kind, layout, heads, kv_heads, tokens):
    plan, (query, key, value) = plan_and_shards(layout, heads, kv_heads, tokens, fake_cuda, True)
    positions = position_ids_of(plan, RANK, device=fake_cuda)
    query, key = (apply_rotary(x, positions, layout=layout) for x in (query, key))
    output = attention_of(kind, layout, plan)(query, key, value, is_causal=True)
    assert is_like(output, query) and output.device.type == "cuda"
    with pytest.raises(RuntimeError, match="accelerator"):
        output.sum().backward()  # where this works, test the gradients as well


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "kv_heads", "tokens"), SOME_SIZES)
def test_the_block_on_fake_cuda_tensors(fake_cuda, overlap, layout, heads, kv_heads, tokens):
    plan, _ = plan_and_shards(layout, heads, kv_heads, tokens, fake_cuda, True)
    x = torch.empty(2, len(plan.tokens_of(RANK)), WIDTH, device=fake_cuda, dtype=torch.bfloat16)
    x = x.transpose(0, 1) if layout == "s b h d" else x
    output = block_of(overlap, layout, plan, fake_cuda)(x, is_causal=True)
    assert is_like(output, x) and output.device.type == "cuda"


@pytest.mark.parametrize("heads", ["query", "kv"])
@pytest.mark.parametrize(("all_heads", "kv_heads", "tokens"), SIZES)
def test_exchanges_that_are_started_on_fake_cuda_tensors(fake_cuda, heads, all_heads, kv_heads, tokens):
    plan, (query, key, value) = plan_and_shards("b s h d", all_heads, kv_heads, tokens, fake_cuda, True)
    shard = query if heads == "query" else key
    there = start_sequence_to_heads(shard, plan, heads=heads).finish()
    own = plan.query_heads(RANK) if heads == "query" else plan.kv_heads_of(RANK)
    assert there.device == fake_cuda and there.shape == (2, plan.tokens, len(own), DIM)
    back = start_heads_to_sequence(there, plan, heads=heads).finish()
    assert is_like(back, shard)
    for tensor in qkv_to_heads(query, key, value, plan):
        assert tensor.device == fake_cuda


def test_fake_cuda_tensors_would_show_a_step_on_the_cpu(fake_cuda):
    with pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cpu"):
        torch.empty(3, device=fake_cuda) + torch.empty(3)


def test_each_rank_takes_the_device_of_its_place_on_the_machine(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    assert device_of_backend("nccl", 3, 4) == torch.device("cuda", 3)
    assert chosen == [3]
    assert device_of_backend("gloo", 3, 8) == torch.device("cpu")
    with pytest.raises(NoAcceleratorError, match="each of the 5 ranks on this machine; torch finds 4"):
        device_of_backend("nccl", 0, 5)
