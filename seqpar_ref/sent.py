"""Counts what a real rank sends: the counterpart of `VirtualWorld.bytes`."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class BytesSent(TorchDispatchMode):
    """Counts the bytes that this rank sends to each rank while the mode is on.

    Only all_to_all_single is counted; `uncounted` names any other collective that ran.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.by_receiver = np.zeros(ranks, dtype=np.int64)
        self.uncounted: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d.alltoall_base_.default:
            self._count(args[1], args[4])
        elif func.namespace == "c10d":
            self.uncounted.add(str(func))
        return func(*args, **(kwargs or {}))

    def _count(self, tensor: Tensor, splits: list[int]) -> None:
        ranks = len(self.by_receiver)
        rows = np.asarray(splits or [len(tensor) // ranks] * ranks)
        row_bytes = tensor[:1].numel() * tensor.element_size()
        sent = rows * row_bytes
        sent[dist.get_rank()] = 0
        self.by_receiver += sent
