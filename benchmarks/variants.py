"""The exchanges that `exchange.py` compares, each as one function: query, key and value in, this rank's output back.

All get a local attention and the sizes of a point, in which everything divides: exchanges written by hand and those of
other packages divide nothing else.
"""

import importlib
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seqpar_ref import DistributedAttention, heads_to_sequence, make_plan, qkv_to_heads

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

INSTALL = "DS_BUILD_OPS=0 pip install --no-deps --no-build-isolation --target FOLDER deepspeed==0.19.8"


@dataclass(frozen=True)
class Point:
    """Sizes of one attention, float32 and "b s h d"; tokens are those of all ranks."""

    ranks: int
    tokens: int
    kv_heads: int
    batch: int = 1
    heads: int = 16
    dim: int = 64

    def __str__(self) -> str:
        heads = str(self.heads) if self.kv_heads == self.heads else f"{self.heads}/{self.kv_heads}"
        return f"{self.ranks} processes, B={self.batch}, S={self.tokens}, H={heads}, D={self.dim}"

    @property
    def pair_bytes(self) -> int:
        """What one rank sends to another one of query, key and value together."""
        return 4 * self.batch * self.tokens * (self.heads + 2 * self.kv_heads) * self.dim // self.ranks**2


def ours(point: Point, local: Attention, wire: Any) -> Attention:
    """The functions of seqpar_ref, given a plan."""
    plan = plan_of(point)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = local(*qkv_to_heads(query, key, value, plan, wire=wire))
        return heads_to_sequence(output, plan)

    return attention


def our_module(point: Point, local: Attention) -> Attention:
    """The module of seqpar_ref, given a plan."""
    return DistributedAttention(local, plan=plan_of(point))


def plan_of(point: Point) -> Any:
    return make_plan(ranks=point.ranks, heads=point.heads, kv_heads=point.kv_heads, tokens=point.tokens)


def deepspeed(point: Point, local: Attention) -> Attention:
    """DeepSpeed's module, without overlap, which needs a GPU. All that is written is written into new memory."""
    from deepspeed.sequence.layer import DistributedAttention as Theirs

    module = Theirs(local, dist.group.WORLD, 2, 1)
    return lambda query, key, value: module(query, key, value, 0)


def yunchang(point: Point, local: Attention) -> Attention:
    """yunchang's Ulysses module. Its attention kernels have no form for the CPU, so the local one replaces them."""
    from yunchang.kernels import AttnType
    from yunchang.ulysses import UlyssesAttention

    module = UlyssesAttention(dist.group.WORLD, attn_type=AttnType.TORCH_MATH)
    module.attn_fn = lambda query, key, value, **options: local(query, key, value)
    return module


def by_hand(point: Point, local: Attention, exchange: type[torch.autograd.Function]) -> Attention:
    """What one would write for these sizes and nothing else: no check, no plan, no uneven anything."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = local(*exchange.apply(True, query, key, value))
        return Separate.apply(False, output)[0]

    return attention


def pack(tensor: Tensor, to_heads: bool) -> Tensor:
    """One copy to [ranks, batch, tokens of a rank, heads of a rank, dim], or none where it lies like that."""
    ranks = dist.get_world_size()
    if to_heads:
        return tensor.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4)
    return tensor.unflatten(1, (ranks, -1)).transpose(0, 1)


def unpack(buffer: Tensor, to_heads: bool) -> Tensor:
    """One copy from there to [batch, tokens, heads, dim], or none where it lies like that."""
    if to_heads:
        return buffer.transpose(0, 1).flatten(1, 2)
    return buffer.permute(1, 2, 0, 3, 4).flatten(2, 3)


class Separate(torch.autograd.Function):
    """Each tensor in a collective of its own, one after the other."""

    @staticmethod
    def forward(ctx: Any, to_heads: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.to_heads = to_heads
        results = []
        for tensor in tensors:
            sent = pack(tensor, to_heads).contiguous()
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent)
            results.append(unpack(received, to_heads))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *Separate.apply(not ctx.to_heads, *gradients)


class Pipelined(torch.autograd.Function):
    """The same, each packed while the one before it travels."""

    @staticmethod
    def forward(ctx: Any, to_heads: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.to_heads = to_heads
        flights = []
        for tensor in tensors:
            sent = pack(tensor, to_heads).contiguous()
            received = torch.empty_like(sent)
            flights.append((dist.all_to_all_single(received, sent, async_op=True), received))
        results = []
        for work, received in flights:
            work.wait()
            results.append(unpack(received, to_heads))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *Pipelined.apply(not ctx.to_heads, *gradients)


class Fused(torch.autograd.Function):
    """One pack copy, one collective, one unpack copy: a rank's query, key and value heads lie side by side.

    To the heads, with a batch of one, nothing is copied to unpack: the three are views of what was received.
    """

    @staticmethod
    def forward(ctx: Any, to_heads: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.to_heads = to_heads
        pieces = [pack(tensor, to_heads) for tensor in tensors]
        sent = torch.cat(pieces, dim=3)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        heads = [piece.shape[3] for piece in pieces]
        return tuple(unpack(piece, to_heads) for piece in received.split(heads, dim=3))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *Fused.apply(not ctx.to_heads, *gradients)


VARIANTS: dict[str, Callable[[Point, Attention], Attention]] = {
    "DeepSpeed": deepspeed,
    "yunchang": yunchang,
    "by hand: fused": partial(by_hand, exchange=Fused),
    "by hand: separate": partial(by_hand, exchange=Separate),
    "by hand: pipelined": partial(by_hand, exchange=Pipelined),
    "ours: fused": partial(ours, wire="fused"),
    "ours: separate": partial(ours, wire="separate"),
    "ours: pipelined": partial(ours, wire="pipelined"),
    "ours: auto": partial(ours, wire="auto"),
    "ours: DistributedAttention": our_module,
}


def import_peers(deepspeed_folder: str | None) -> dict[str, str]:
    """Import the other packages, before processes are forked; name -> version, or why it can't be measured."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if deepspeed_folder:
        sys.path.insert(0, deepspeed_folder)
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import deepspeed
            import deepspeed.sequence.layer

            # Its own all-reduce through shared memory, which it would compile when it starts and nothing here uses.
            importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
            found["DeepSpeed"] = deepspeed.__version__
        except ImportError as error:
            found["DeepSpeed"] = f"not measured: {error}. Install it: {INSTALL}"
        try:
            import yunchang.kernels
            import yunchang.ulysses  # noqa: F401

            found["yunchang"] = importlib.metadata.version("yunchang")
        except ImportError as error:
            found["yunchang"] = f"not measured: {error}. Install it: pip install --no-deps yunchang==0.6.4"
    return found
