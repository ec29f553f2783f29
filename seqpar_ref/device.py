"""All that depends on the kind of device: written over torch.accelerator, so that CUDA, ROCm and XPU share it.

Without an accelerator there are no streams, and every function here does nothing or says "cpu". The overlap of
this package needs none of it: `Work.wait()` makes the current stream wait for the collective, on any device.
Streams appear only where a caller brings one, as with DeepSpeed's `sp_stream`.

Source: docs.pytorch.org/docs/stable/accelerator.html, and D5 and D19 in docs/defects.md.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .errors import NoAcceleratorError


def current_stream() -> Any:
    """The torch.Stream that the next operation of this rank goes to; None where there is no accelerator."""
    try:
        return torch.accelerator.current_stream()
    except RuntimeError:  # there is none; virtual ranks have streams on any machine
        return None


class NoStream:
    """In the place of a stream where there are none. Nothing is given to it, so there is nothing to wait for."""

    def wait_stream(self, other: Any) -> None:
        """Nothing to wait for."""


def side_stream() -> Any:
    """A torch.Stream beside the current one, or a `NoStream` where there is no accelerator."""
    return NoStream() if current_stream() is None else torch.Stream()


def wait_for_event(event: Any) -> None:
    """The current stream waits for a torch.Event. Nothing to do where there is no accelerator."""
    if current_stream() is not None:
        event.wait()


def wait_for_stream(stream: Any) -> None:
    """The current stream waits for all that another torch.Stream has been given so far.

    Nothing to do where there is no accelerator, or for a stand-in that cannot record an event.
    """
    now = current_stream()
    if now is not None and hasattr(stream, "record_event"):
        now.wait_stream(stream)


def keep_for_current_stream(tensor: Tensor) -> None:
    """The memory of a tensor of another stream, of any shape, is not used again before the current stream is
    done with it.
    """
    now = current_stream()
    if now is not None and tensor.device.type == now.device.type:
        tensor.record_stream(now)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast is off inside, on a kind of device that has it."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def synchronize() -> None:
    """Wait until the device has done all that it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def device_of_backend(backend: str, local_rank: int, local_ranks: int) -> torch.device:
    """The device whose tensors the backend's collectives take on this rank; it becomes the current one.

    Args:
        backend: "gloo" and "virtual" exchange tensors of the CPU, any other those of the accelerator.
        local_rank: this rank among the ranks of its machine.
        local_ranks: ranks on this machine.

    Raises:
        NoAcceleratorError: the machine has fewer devices than ranks.
    """
    if backend in ("gloo", "virtual"):
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    found = torch.accelerator.device_count()
    if kind is None or found < local_ranks:
        raise NoAcceleratorError(
            f"{backend} needs a device for each of the {local_ranks} ranks on this machine; torch finds {found}.",
            "Use --backend gloo or --backend virtual, or a machine with GPUs and a build of torch for them.",
        )
    torch.accelerator.set_device_index(local_rank)
    return torch.device(kind.type, local_rank)
