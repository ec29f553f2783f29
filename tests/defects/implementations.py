"""The two implementations that the tests of this folder can run against, behind the same few words.

`Ours` is seqpar_ref. `Original` is deepspeed.sequence.layer of the installed DeepSpeed, called with the
arguments that its signatures ask for; only `pytest tests/defects --implementation deepspeed` uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from seqpar_ref import DistributedAttention, apply_rotary

THETA = 10_000.0
Attention = Callable[..., Tensor]  # (query, key, value, *args) -> output


class Ours:
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
    def attention_with_overlap(local_attention: Attention) -> tuple[Attention, Callable[[], str]]:
        """Batch-first attention, and a remark for the message of a failure."""
        return Ours.module(local_attention, "b s h d"), str

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
    def module(local_attention: Attention, layout: str, group: Any = None) -> Attention:
        from deepspeed.sequence import layer

        scatter, gather, _ = Original.INDICES[layout]
        return layer.DistributedAttention(local_attention, group or dist.group.WORLD, scatter, gather)

    @staticmethod
    def attention(local_attention: Attention, layout: str, group: Any = None) -> Attention:
        module = Original.module(local_attention, layout, group)
        batch_dim = Original.INDICES[layout][2]
        return lambda query, key, value: module(query, key, value, batch_dim)

    @staticmethod
    def attention_with_defaults(local_attention: Attention) -> Attention:
        from deepspeed.sequence import layer

        module = layer.DistributedAttention(local_attention, dist.group.WORLD)
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
    def attention_with_overlap(local_attention: Attention) -> tuple[Attention, Callable[[], str]]:
        """A CPU has no streams: the waits of the stand-in do nothing, the asynchronous exchanges are real."""
        from deepspeed.sequence import layer

        layer.get_accelerator = lambda: NoAccelerator
        module = layer.DistributedAttention(local_attention, dist.group.WORLD, 2, 1, NoAccelerator())
        module.overlap_handles = InFlight()

        def remark() -> str:
            return f" ({module.overlap_handles.overwritten} exchanges overwritten before their wait)"

        return lambda query, key, value: module(query, key, value, 0), remark

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
