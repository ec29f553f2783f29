"""What a report of a defect needs to say about the machine that it was found on."""

import importlib.metadata
import os
import platform
import socket
from typing import Any

import torch

PREFIXES = (
    "NCCL_",
    "TORCH_NCCL_",
    "GLOO_",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "TORCH_DISTRIBUTED_DEBUG",
)


def environment_of_process(backend: str, device: torch.device) -> dict[str, Any]:
    """Versions, the machine, the device and the environment variables that change what a backend does."""
    found: dict[str, Any] = {
        "seqpar": importlib.metadata.version("seqpar"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "host": socket.gethostname(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "backend": backend,
        "device": _name(device),
    }
    versions = {"CUDA": torch.version.cuda, "HIP": torch.version.hip, "NCCL": _nccl_version(device)}
    found |= {name: version for name, version in versions.items() if version}
    found["variables"] = {
        name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)
    }
    return found


def joined(by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """One block for all ranks: what they agree on as it is, what differs as a list of the values, by rank."""
    block: dict[str, Any] = {"ranks": len(by_rank), "hosts": len({found["host"] for found in by_rank})}
    for name in by_rank[0]:
        values = [found.get(name) for found in by_rank]
        block[name] = values[0] if all(value == values[0] for value in values) else values
    return block


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu ({platform.machine()})"
    module = torch.get_device_module(device)
    return f"{device.type} ({module.get_device_name(device)})"


def _nccl_version(device: torch.device) -> str | None:
    if device.type != "cuda" or not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))
