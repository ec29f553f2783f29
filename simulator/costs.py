r"""What an operation and a transfer cost on a `Cluster`, in seconds.

**Operations** follow the roofline model (Williams, Waterman, Patterson 2009): whichever takes longer, computing or
moving bytes between device and memory, after the launch,

$$
t = t_\text{launch} + \max\left(\frac{F}{e_c C}, \frac{B}{e_m M}\right),
$$

with $F$ FLOPs by torch's own counter (matrix products, convolutions, attention; all else counts none), $B$ the bytes
that the operation reads and writes, $C$ and $M$ the peak rates and $e_c$, $e_m$ the parts of them that are reached.
As in torch's counter, a causal mask makes attention no cheaper. Caches are not modelled.

**Transfers.** All-to-all, gather, scatter and messages send each byte straight to its receiver. With $X_{rs}$ the bytes
from rank $r$ to rank $s$, split into those within a node and those between nodes,

$$
t = t_\text{call} + t_\text{step} + \max\left(
\max_r \frac{\max(\sum_s X^\text{node}_{rs}, \sum_s X^\text{node}_{sr})}{B_\text{link}},
\max_c \frac{\max(\sum_{r \in c} \sum_s X^\text{net}_{rs}, \sum_{r \in c} \sum_s X^\text{net}_{sr})}{B_\text{card}}
\right),
$$

$c$ over the network cards, each shared by the devices next to it.

The other collectives run around a ring, as in NCCL. Each link of the ring carries $n$ bytes,

| collective | $n$ | passes $p$ |
|---|---|---|
| all_reduce of $S$ bytes | $2 S (P-1) / P$ | 2 |
| all_gather, reduce_scatter of $S$ bytes in all | $S (P-1) / P$; uneven: $S$ without the smallest shard | 1 |
| broadcast, reduce of $S$ bytes | $S$ | 1 |
| barrier | 0 | 2 |

$$t = t_\text{call} + p \left((P - N)\, t_\text{link} + (N - 1)\, t_\text{net}\right) + \frac{n}{B}$$

on $P$ ranks and $N$ nodes. $B$ is $B_\text{link}$ on one node; on several the ring crosses them through all the cards
that its members have: $B = \min(B_\text{link}, k B_\text{card})$ with $k$ the cards of the node that has fewest.
One rank alone takes no time. Sources: nccl-tests, doc/PERFORMANCE.md, for $n$; `ncclTopoTuneModel` in NCCL's
src/graph/tuning.cc for the latencies. Trees, in-network reduction and the chunks of a pipeline are not modelled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import flop_counter

from .accesses import Access
from .clusters import Cluster

_RING_BYTES: dict[str, Callable[[np.ndarray], int]] = {
    "all_reduce": lambda sent: sent.sum(axis=1).max(),
    "reduce_scatter": lambda sent: sent.sum(axis=1).max(),
    "reduce_scatter_single": lambda sent: sent.sum(axis=1).max(),
    "all_gather": lambda sent: sent.sum(axis=0).max(),
    "all_gather_single": lambda sent: sent.sum(axis=0).max(),
    "broadcast": lambda sent: sent.max(),
    "reduce": lambda sent: sent.max(),
    "barrier": lambda sent: 0,
}
"""The bytes on each link of the ring, from the bytes [sender, receiver] of the direct algorithm."""

_TWO_PASSES = ("all_reduce", "barrier")


def transfer_seconds(cluster: Cluster, kind: str, sent: np.ndarray, ranks: Sequence[int]) -> float:
    """How long a collective or message takes once all members are there.

    Args:
        cluster: where it runs.
        kind: name of the collective; "send" for a message.
        sent: bytes of the direct algorithm, [sender, receiver] as places in `ranks`.
        ranks: global ranks.
    """
    places = np.unique(np.asarray(ranks))
    if len(places) == 1:
        return 0.0
    if kind in _RING_BYTES:
        passes = 2 if kind in _TWO_PASSES else 1
        return _ring_seconds(cluster, int(_RING_BYTES[kind](sent)), passes, places)
    return _direct_seconds(cluster, sent, np.asarray(ranks))


def _ring_seconds(cluster: Cluster, link_bytes: int, passes: int, ranks: np.ndarray) -> float:
    nodes = np.unique(cluster.node_of(ranks))
    steps = (len(ranks) - len(nodes)) * cluster.link_latency + (len(nodes) - 1) * cluster.network_latency
    rates = []
    if len(ranks) > len(nodes):
        rates.append(cluster.link_rate)
    if len(nodes) > 1:
        cards = np.unique(cluster.nic_of(ranks)) // cluster.nics_per_node
        rates.append(int(np.unique(cards, return_counts=True)[1].min()) * cluster.network_rate)
    return cluster.call_latency + passes * steps + link_bytes / min(rates)


def _direct_seconds(cluster: Cluster, sent: np.ndarray, ranks: np.ndarray) -> float:
    nodes, cards = cluster.node_of(ranks), cluster.nic_of(ranks)
    within = np.where(nodes[:, None] == nodes[None, :], sent, 0)
    between = sent - within
    link = max(within.sum(axis=0).max(), within.sum(axis=1).max()) / cluster.link_rate
    card = max(np.bincount(cards, weights=between.sum(axis=axis)).max() for axis in (0, 1))
    step = cluster.network_latency if card else cluster.link_latency if link else 0.0
    return float(cluster.call_latency + step + max(link, card / cluster.network_rate))


class Cost(NamedTuple):
    """What one operation takes: seconds, FLOPs, and bytes read and written."""

    seconds: float
    flops: int
    bytes: int


class OperationCosts:
    """The costs of operations on one cluster. FLOPs are counted once for the same shapes of arguments and results."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._launch, self._memory_rate = cluster.launch_seconds, cluster.memory_rate
        self._counters: dict[Any, Callable[..., int] | None] = {}
        self._flops: dict[Any, tuple[int, float]] = {}

    def of(
        self, operation: Any, args: Any, kwargs: Any, result: Any, accesses: Sequence[Access]
    ) -> Cost | None:
        """The cost of an operation that has run; None for a view, and for all else that touches no memory."""
        if not accesses:
            return None
        moved = 0
        for access in accesses:
            moved += _touched_bytes(access.tensor) * (access.reads + access.writes)
        try:
            counter = self._counters[operation]
        except KeyError:
            counter = self._counters[operation] = _counter(operation)
        if counter is None:
            return Cost(self._launch + moved / self._memory_rate, 0, moved)
        key = (operation, accesses[0].tensor.dtype, *[x.tensor.shape for x in accesses])
        if key not in self._flops:
            flops = int(counter(*args, **kwargs, out_val=result))
            self._flops[key] = flops, flops / self._cluster.flops_per_second(accesses[0].tensor.dtype)
        flops, seconds = self._flops[key]
        return Cost(self._launch + max(seconds, moved / self._memory_rate), flops, moved)


def _touched_bytes(tensor: Tensor) -> int:
    """Bytes of the elements; of an expanded tensor at most what its storage has."""
    return tensor.nbytes if tensor.is_contiguous() else min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _counter(operation: Any) -> Callable[..., int] | None:
    """torch's formula for an operation."""
    packet = getattr(operation, "overloadpacket", operation)
    return _ON_CPU.get(packet) or flop_counter.flop_registry.get(packet)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return flop_counter.sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    return flop_counter.sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


_ON_CPU: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Attention on CPU, for which torch's registry has no formula: the same as on CUDA."""
