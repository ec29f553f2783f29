"""The two implementations that the tests of this folder can run against, behind the same few words.

`Ours` is seqpar_ref. `Original` is deepspeed.sequence.layer of the installed DeepSpeed, called with the
arguments that its signatures ask for; only `pytest tests/defects --implementation deepspeed` uses it. Overlap is
that of the original's names in both: `seqpar_ref.deepspeed` has them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import seqpar_ref.deepspeed
from seqpar_ref import DistributedAttention, apply_rotary, device

THETA = 10_000.0
Attention = Callable[..., Tensor]  # (query, key, value, *args) -> output


class Overlapped(NamedTuple):
    """Batch-first attention with a side stream.

    Args:
        remark: for the message of a failure.
        arrived: of "q" or "k", whether the gradient's exchange was waited for.
    """

    attention: Attention
    remark: Callable[[], str]
    arrived: Callable[[str], bool]


class Ours:
    @staticmethod
    def names() -> ModuleType:
        return seqpar_ref.deepspeed

    @staticmethod
    def module(local_attention: Attention, layout: str, group: Any = None) -> Attention:
        return DistributedAttention(local_attention, group, layout=layout)

    attention = module

    @staticmethod
    def attention_with_defaults(local_attention: Attention) -> Attention:
        return DistributedAttention(local_attention)

    @staticmethod
    def attention_with_rotary(local_attention: Attention, layout: str, tokens: Sequence[int]) -> Attention:
        """Rotates the shard by its global positions, then attends; a rank needs no other rank's angles."""
        rank = dist.get_rank()
        position_ids = torch.arange(sum(tokens[:rank]), sum(tokens[: rank + 1]))
        attention = Ours.module(local_attention, layout)

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key = (apply_rotary(x, position_ids, theta=THETA, layout=layout) for x in (query, key))
            return attention(query, key, value)

        return call

    @staticmethod
    def attention_with_overlap(local_attention: Attention, stream: Any = None) -> Overlapped:
        if stream is None:  # virtual ranks have streams, a CPU has none
            stream = NoAccelerator() if device.current_stream() is None else torch.Stream()
        module = Ours.names().DistributedAttention(local_attention, dist.group.WORLD, 2, 1, stream)
        return Overlapped(lambda query, key, value: module(query, key, value, 0), str, lambda name: True)

    @staticmethod
    @contextlib.contextmanager
    def on_accelerator(accelerator: Any) -> Iterator[None]:
        """While this is open, the current stream is the accelerator's. For processes, not for virtual ranks."""
        real, device.current_stream = device.current_stream, accelerator.current_stream
        try:
            yield
        finally:
            device.current_stream = real

    @staticmethod
    def declare_sequence_parallel_size(size: int | None) -> None:
        """Nothing to declare: the group that is passed in says all."""


class Original:
    # scatter_idx, gather_idx, batch_dim_idx: the dimensions of the heads, the sequence and the batch.
    INDICES: ClassVar = {
        "b s h d": (2, 1, 0),
        "s b h d": (2, 0, 1),
        "b h s d": (1, 2, 0),
        "h s b d": (0, 1, 2),
    }

    @staticmethod
    def names() -> ModuleType:
        from deepspeed.sequence import layer

        return layer

    @staticmethod
    def module(local_attention: Attention, layout: str, group: Any = None) -> Attention:
        scatter, gather, _ = Original.INDICES[layout]
        return Original.names().DistributedAttention(
            local_attention, group or dist.group.WORLD, scatter, gather
        )

    @staticmethod
    def attention(local_attention: Attention, layout: str, group: Any = None) -> Attention:
        module = Original.module(local_attention, layout, group)
        batch_dim = Original.INDICES[layout][2]
        return lambda query, key, value: module(query, key, value, batch_dim)

    @staticmethod
    def attention_with_defaults(local_attention: Attention) -> Attention:
        module = Original.names().DistributedAttention(local_attention, dist.group.WORLD)
        return lambda query, key, value: module(query, key, value, 0)

    @staticmethod
    def attention_with_rotary(local_attention: Attention, layout: str, tokens: Sequence[int]) -> Attention:
        """Rotates after the exchange, with cosines and sines of the whole sequence, [sequence, 1, 1, dim]."""
        module = Original.module(local_attention, layout)
        batch_dim = Original.INDICES[layout][2]

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            dim = query.shape[-1]
            frequency = THETA ** -(torch.arange(0, dim, 2, dtype=query.dtype) / dim)
            angle = torch.outer(torch.arange(sum(tokens), dtype=query.dtype), frequency)
            angle = angle.repeat(1, 2).reshape(-1, 1, 1, dim)
            return module(query, key, value, batch_dim, (angle.cos(), angle.sin()))

        return call

    @staticmethod
    def attention_with_overlap(local_attention: Attention, stream: Any = None) -> Overlapped:
        """A CPU has no streams: the waits of the stand-in do nothing, the asynchronous exchanges are real."""
        layer = Original.names()
        layer.get_accelerator = lambda: NoAccelerator  # for the backward pass too
        stream = NoAccelerator() if stream is None else stream
        module = layer.DistributedAttention(local_attention, dist.group.WORLD, 2, 1, stream)
        handles = module.overlap_handles = InFlight()

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return module(query, key, value, 0)

        def remark() -> str:
            return f" ({handles.overwritten} exchanges overwritten before their wait)"

        return Overlapped(attention, remark, lambda name: handles[f"d{name}_work"].waited)

    @staticmethod
    @contextlib.contextmanager
    def on_accelerator(accelerator: Any) -> Iterator[None]:
        layer = Original.names()
        real, layer.get_accelerator = layer.get_accelerator, lambda: accelerator
        try:
            yield
        finally:
            layer.get_accelerator = real

    @staticmethod
    def declare_sequence_parallel_size(size: int | None) -> None:
        """As deepspeed.initialize: consecutive ranks form a group of a process-wide mesh."""
        import deepspeed.comm
        from deepspeed.utils import groups

        groups.mesh_device = None
        if size is not None:
            shape, names = (dist.get_world_size() // size, size), ("data_parallel", "sequence_parallel")
            groups.mesh_device = deepspeed.comm.initialize_mesh_device(shape, names)


class NoAccelerator:
    """An accelerator that is also its only stream."""

    def wait_stream(self, other: object) -> None:
        """On a CPU, work runs in program order."""

    @classmethod
    def default_stream(cls) -> NoAccelerator:
        return cls()

    current_stream = default_stream


class InFlight(dict[str, Any]):
    """The original's table of exchanges in flight, which counts those overwritten before their wait."""

    overwritten = 0

    def __setitem__(self, name: str, entry: Any) -> None:
        if name.endswith("_work"):
            self.overwritten += name in self and not self[name].waited
            entry = WatchedWork(entry)
        super().__setitem__(name, entry)


class WatchedWork:
    def __init__(self, work: Any) -> None:
        self.work = work
        self.waited = False

    def wait(self) -> None:
        self.waited = True
        self.work.wait()
