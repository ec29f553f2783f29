r"""Models of hardware: what a device computes, and how fast bytes move between devices.

A `Cluster` is a handful of numbers. `dataclasses.replace(H100_NODE, link_bandwidth=225e9)` changes one of them.

Sources
-------
Each number is one of these, or the preset says "assumed".

| number | value | source |
|---|---|---|
| A100 peak FLOP/s, dense | 312e12 bf16 and fp16, 19.5e12 fp32, 19.5e12 fp64 on tensor cores (9.7e12 without) | [A100] |
| A100 memory | 2,039e9 B/s (80 GB SXM), 1,935e9 B/s (80 GB PCIe) | [A100] |
| H100 SXM peak FLOP/s, dense | 989e12 bf16 and fp16, 67e12 fp32, 67e12 fp64 on tensor cores (34e12 without) | [H100] |
| H100 SXM memory | 3.35e12 B/s | [H100] |
| NVLink, each direction | 600/2 = 300e9 B/s (A100), 900/2 = 450e9 B/s (H100) | [A100], [H100] |
| PCIe 4.0 x16, each direction | 16e9 * 16 lanes * 128/130 / 8 = 31.5e9 B/s | [PCIe] |
| NIC | 200e9/8 = 25e9 B/s (HDR), 400e9/8 = 50e9 B/s (NDR), 8 of them for 8 devices | [DGX] |
| part of the FLOP/s that a matrix product reaches | 0.869 (A100 SXM), 0.811 (A100 PCIe), 0.803 (H100 SXM) | [MAMF] |
| part of the memory bandwidth | 0.9 at 100 MB (A100); the same is assumed for H100 | [Calculon] |
| part of NVLink that NCCL reaches | 370/450 = 0.82 (H100), 235/300 = 0.78 (A100) | [NVLink], [NCCL 2.10] |
| part of PCIe | 12/15.75 = 0.76: NCCL counts 12e9 B/s for PCIe 3.0 x16 | [NCCL topo] |
| part of a NIC | 48.5/50 = 0.97 (NDR); the same is assumed for HDR | [A2A] |
| latency of a call | 6.6e-6 s: `baseLat`, ring, LL | [NCCL] |
| latency of a step | 0.6e-6 s NVLink, 1.0e-6 s PCIe, 2.7e-6 s network: `hwLat`, ring, LL | [NCCL] |
| launch of a kernel | 3e-6 s for a kernel that does nothing | [launch] |

- [A100] NVIDIA A100 Tensor Core GPU datasheet, nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf.
- [H100] NVIDIA H100 Tensor Core GPU datasheet, column H100 SXM; the values without sparsity.
- [PCIe] PCI Express Base Specification 4.0: 16 GT/s a lane, 128b/130b encoding.
- [DGX] NVIDIA DGX A100 (8 ConnectX-6 HDR) and DGX H100 (8 ConnectX-7 NDR) user guides.
- [MAMF] github.com/stas00/ml-engineering, compute/accelerator: Maximum Achievable Matmul FLOPS, bf16.
- [Calculon] github.com/calculon-ai/calculon, systems/a100_80g.json, `mem1`.
- [NVLink] github.com/NVIDIA/nccl-tests/issues/212, a maintainer's answer of 2024-05-06.
- [NCCL 2.10] github.com/NVIDIA/nccl, src/graph/tuning.cc: `busBw` of compute capability 8.0 is at most 235.
- [NCCL topo] the same, src/graph/topo.h: `PCI_BW`.
- [NCCL] the same, src/graph/tuning.cc at commit b647562. LL is the protocol of small messages; a large one pays a
  few more microseconds a step (3.4 instead of 0.6 on NVLink), which are left out.
- [A2A] github.com/NVIDIA/nccl-tests/issues/267: each device uses one NIC, which reaches 48 to 49e9 B/s.
- [launch] forums.developer.nvidia.com/t/233645.

What the model does not see makes it too fast rather than too slow. Of what was published: an all-to-all in which each
of 8 H200 (NVLink as H100) sends 84.7e6 bytes took 0.417e-3 s (pypi.org/project/fast-ulysses); the model says 0.237e-3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from .errors import ClusterError


@dataclass(frozen=True, kw_only=True)
class Cluster:
    r"""Nodes of equal devices. Rank $r$ is device $r \bmod d$ of node $\lfloor r / d \rfloor$, $d$ devices a node.

    Attributes:
        name: how it is called on the command line.
        devices_per_node: devices of a node.
        nodes: how many nodes there are; None for as many as the ranks need.
        float64_flops: peak FLOP/s of matrix products in float64.
        float32_flops: the same in float32, and in every dtype that is not named here. With TF32, put its peak here:
            156e12 on A100.
        half_flops: the same in bfloat16 and float16.
        compute_efficiency: the part of these that an operation reaches, in (0, 1].
        memory_bandwidth: bytes/s between a device and its memory.
        memory_efficiency: the part of it that an operation reaches.
        launch_seconds: what each operation costs before it computes, seconds.
        link_bandwidth: bytes/s of a device to the other devices of its node, in each direction.
        link_efficiency: the part of it that a transfer reaches.
        link_latency: seconds of one step inside a node.
        nics_per_node: network cards of a node. Neighbouring devices share one if there are fewer cards than devices.
        network_bandwidth: bytes/s of one card in each direction.
        network_efficiency: the part of it that a transfer reaches.
        network_latency: seconds of one step between nodes.
        call_latency: seconds that a collective or message takes before its first step.

    Raises:
        ClusterError: a number is not finite, negative, zero where it divides, or an efficiency above 1.
    """

    name: str
    devices_per_node: int
    nodes: int | None
    float64_flops: float
    float32_flops: float
    half_flops: float
    compute_efficiency: float
    memory_bandwidth: float
    memory_efficiency: float
    launch_seconds: float
    link_bandwidth: float
    link_efficiency: float
    link_latency: float
    nics_per_node: int
    network_bandwidth: float
    network_efficiency: float
    network_latency: float
    call_latency: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "name" or (field.name == "nodes" and value is None):
                continue
            if field.name in ("devices_per_node", "nodes", "nics_per_node"):
                self._check(field.name, value, _is_whole(value) and value >= 1, "a whole number from 1 on")
            elif field.name.endswith("_efficiency"):
                self._check(field.name, value, _is_number(value) and 0 < value <= 1, "a part in (0, 1]")
            elif field.name.endswith(("_latency", "_seconds")):
                self._check(field.name, value, _is_number(value) and value >= 0, "seconds, 0 or more")
            else:
                self._check(field.name, value, _is_number(value) and value > 0, "a rate per second above 0")

    def _check(self, field: str, value: object, holds: bool, wanted: str) -> None:
        if not holds:
            raise ClusterError(f"cluster {self.name!r} has {field}={value!r}.\n  Give {field} {wanted}.")

    def flops_per_second(self, dtype: torch.dtype) -> float:
        """FLOP/s that a matrix product of this dtype reaches."""
        peak = {
            torch.float64: self.float64_flops,
            torch.bfloat16: self.half_flops,
            torch.float16: self.half_flops,
        }.get(dtype, self.float32_flops)
        return peak * self.compute_efficiency

    @property
    def memory_rate(self) -> float:
        """Bytes/s that an operation reads and writes."""
        return self.memory_bandwidth * self.memory_efficiency

    @property
    def link_rate(self) -> float:
        """Bytes/s that a device sends, and receives, inside its node."""
        return self.link_bandwidth * self.link_efficiency

    @property
    def network_rate(self) -> float:
        """Bytes/s that a network card sends, and receives."""
        return self.network_bandwidth * self.network_efficiency

    def node_of(self, ranks: np.ndarray) -> np.ndarray:
        """The node of each global rank, from 0: [ranks] to [ranks]."""
        return ranks // self.devices_per_node

    def nic_of(self, ranks: np.ndarray) -> np.ndarray:
        """The network card of each global rank, counted over all nodes, from 0: [ranks] to [ranks]."""
        own = ranks % self.devices_per_node * self.nics_per_node // self.devices_per_node
        return self.node_of(ranks) * self.nics_per_node + own


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


A100_NODE = Cluster(
    name="a100-node",
    devices_per_node=8,
    nodes=1,
    float64_flops=19.5e12,
    float32_flops=19.5e12,
    half_flops=312e12,
    compute_efficiency=0.869,
    memory_bandwidth=2.039e12,
    memory_efficiency=0.9,
    launch_seconds=3e-6,
    link_bandwidth=300e9,
    link_efficiency=0.78,
    link_latency=0.6e-6,
    nics_per_node=8,
    network_bandwidth=25e9,
    network_efficiency=0.97,
    network_latency=2.7e-6,
    call_latency=6.6e-6,
)
"""8 A100 80 GB SXM on NVLink 3 and NVSwitch."""

H100_NODE = replace(
    A100_NODE,
    name="h100-node",
    float64_flops=67e12,
    float32_flops=67e12,
    half_flops=989e12,
    compute_efficiency=0.803,
    memory_bandwidth=3.35e12,
    link_bandwidth=450e9,
    link_efficiency=0.82,
    network_bandwidth=50e9,
)
"""8 H100 80 GB SXM on NVLink 4 and NVSwitch."""

A100_NODES = replace(A100_NODE, name="a100-nodes", nodes=None)
"""As many `A100_NODE` as the ranks need, each with 8 HDR InfiniBand cards of 200 Gb/s."""

H100_NODES = replace(H100_NODE, name="h100-nodes", nodes=None)
"""As many `H100_NODE` as the ranks need, each with 8 NDR InfiniBand cards of 400 Gb/s."""

PCIE_NODE = replace(
    A100_NODE,
    name="pcie-node",
    compute_efficiency=0.811,
    memory_bandwidth=1.935e12,
    link_bandwidth=31.5e9,
    link_efficiency=0.76,
    link_latency=1.0e-6,
    nics_per_node=1,
)
"""8 A100 80 GB PCIe in one node, PCIe 4.0 x16 and no NVLink bridge. One network card is assumed; a single node has no
use for it."""

CLUSTERS = {cluster.name: cluster for cluster in (A100_NODE, H100_NODE, A100_NODES, H100_NODES, PCIE_NODE)}
"""The presets by name."""


def cluster_of(cluster: str | Cluster, ranks: int) -> Cluster:
    """The cluster of that name, or the cluster itself.

    Args:
        cluster: name of a preset, or a `Cluster`.
        ranks: number of ranks that are to fit.

    Raises:
        ClusterError: there is no preset of that name, or it has fewer devices than there are ranks.
    """
    if isinstance(cluster, str) and cluster in CLUSTERS:
        cluster = CLUSTERS[cluster]
    if not isinstance(cluster, Cluster):
        raise ClusterError(
            f"cluster={cluster!r} is no cluster.\n"
            f"  Use one of {', '.join(CLUSTERS)}, or a Cluster, such as dataclasses.replace(H100_NODE, ...)."
        )
    devices = None if cluster.nodes is None else cluster.nodes * cluster.devices_per_node
    if devices is not None and ranks > devices:
        raise ClusterError(
            f"{ranks} ranks do not fit on {cluster.name!r}, which has {devices} devices.\n"
            f"  Use at most {devices} ranks, or several nodes: "
            f"{', '.join(name for name, known in CLUSTERS.items() if known.nodes is None)}."
        )
    return cluster
