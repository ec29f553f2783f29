"""Counts what a real rank sends: the counterpart of `VirtualWorld.bytes`."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class BytesSent(TorchDispatchMode):
    """Counts the bytes that this rank sends to each rank of the world while the mode is on.

    Counted are all_to_all_single and all_gather_single, in which each rank sends its own tensor to every other
    one; `uncounted` names any other collective that ran.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.by_receiver = np.zeros(ranks, dtype=np.int64)
        self.uncounted: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d.alltoall_base_.default:
            _, tensor, group, _, splits, *_ = args
            self._count(tensor, splits, _members(group))
        elif func is torch.ops.c10d._allgather_base_.default:
            _, tensor, group, *_ = args
            members = _members(group)
            self._count(tensor, [len(tensor)] * len(members), members)
        elif func.namespace == "c10d":
            self.uncounted.add(str(func))
        return func(*args, **(kwargs or {}))

    def _count(self, tensor: Tensor, splits: list[int], members: list[int]) -> None:
        rows = np.asarray(splits or [len(tensor) // len(members)] * len(members))
        sent = rows * (tensor[:1].numel() * tensor.element_size())
        sent[members.index(dist.get_rank())] = 0
        self.by_receiver[members] += sent


def _members(group: Any) -> list[int]:
    """Ranks of the world, in the order of the group."""
    return dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
