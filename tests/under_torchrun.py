"""A torchrun script: runs test bodies on gloo processes, and compares each with the same rank of a VirtualWorld.

torchrun --nproc-per-node 4 tests/under_torchrun.py
"""

import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist

from seqpar_ref import DistributedAttention, make_plan
from simulator import VirtualWorld
from tests.test_world import all_bodies, assert_same

TOKENS, HEADS, KV_HEADS, DIM = (3, 0, 5, 2), 9, 3, 4


def attention(planned: bool, layout: str):
    """Forward and gradients of uneven causal attention; values encode their address."""
    dtype, rank = torch.float64, dist.get_rank()
    plan = make_plan(ranks=len(TOKENS), heads=HEADS, kv_heads=KV_HEADS, tokens=TOKENS)
    torch.manual_seed(rank)
    shape = {"b": 2, "s": TOKENS[rank], "h": HEADS, "d": DIM}
    tensors = []
    for heads in (HEADS, KV_HEADS, KV_HEADS):
        shape["h"] = heads
        tensors.append(torch.randn([shape[name] for name in layout.split()], dtype=dtype, requires_grad=True))
    module = DistributedAttention(layout=layout, plan=plan if planned else None)
    output = module(*tensors, is_causal=True)
    (output * torch.arange(output.numel()).view_as(output)).sum().backward()
    return [output.detach(), *(tensor.grad for tensor in tensors)]


def main() -> None:
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cases = [(all_bodies, (torch.float32,))]
    cases += [
        (attention, (planned, layout)) for planned in (True, False) for layout in ("b s h d", "s b h d")
    ]
    for body, arguments in cases:
        torch.manual_seed(0)
        real = body(*arguments)
        assert_same(real, VirtualWorld(size).run(body, *arguments)[rank])
    print(f"rank {rank} of {size}: {len(cases)} cases equal to the bit", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
