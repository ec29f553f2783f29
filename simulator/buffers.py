"""What may be the buffer of a collective. Refused is what gloo or NCCL would read or fill in the wrong order."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from .errors import BufferError, UnsupportedTransformError

_TRANSFORMS = tuple(
    str(Path(torch.__file__).parent / "_functorch" / name)
    for name in ("eager_transforms.py", "vmap.py", "apis.py")
)

_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu")


def check_transforms(kind: str) -> None:
    """Refuse forward-mode AD and functorch, of which a collective would keep no trace."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename not in _TRANSFORMS:
        frame = frame.f_back
    if frame is not None:
        raise UnsupportedTransformError(
            f"{kind} is called inside a functorch transform (torch.func.grad, vmap, jvp, ...), whose derivative would "
            "silently be zero.\n  Use torch.autograd.grad, or VirtualWorld(..., autograd='joint') with gradcheck."
        )
    if forward_ad._current_level >= 0:
        raise UnsupportedTransformError(
            f"{kind} is called under forward-mode AD, whose tangents would silently be lost.\n  Use reverse mode."
        )


def check_tensor(kind: str, tensor: Tensor) -> None:
    if tensor.is_sparse or tensor.layout != torch.strided:
        raise BufferError(f"{kind} got a tensor of layout {tensor.layout}.\n  Pass dense tensors.")
    if not tensor.is_contiguous():
        raise BufferError(
            f"{kind} got a tensor of shape {list(tensor.shape)} with strides {list(tensor.stride())}; gloo and NCCL "
            "refuse it or read its memory in the wrong order.\n"
            "  Pass tensor.contiguous(), or for a buffer torch.empty(shape)."
        )


def check_count(kind: str, what: str, got: int, wanted: int) -> None:
    if got != wanted:
        raise BufferError(f"{kind} got {got} {what} and needs {wanted}.\n  Pass {wanted}.")


def check_overlap(kind: str, many: Sequence[Tensor], one: Tensor, own: Tensor | None = None) -> None:
    """Refuse buffers that share memory, except the in-place form, in which `one` is exactly the rank's own part."""
    if own is not None and _bytes_of(own) == _bytes_of(one):
        return
    for tensor in many:
        if shared := overlap(one, tensor):
            raise BufferError(
                f"{kind}: an input and an output overlap in {shared} bytes.\n  Give the output memory of its own."
            )


def check_disjoint(kind: str, tensors: Sequence[Tensor]) -> None:
    """Refuse outputs that share memory with each other."""
    if len(tensors) < 2:
        return
    ranges = sorted(_bytes_of(tensor) for tensor in tensors if tensor.numel())
    for (_, end), (following, _) in itertools.pairwise(ranges):
        if following < end:
            raise BufferError(
                f"{kind}: two outputs overlap in {end - following} bytes or more.\n  Give each memory of its own."
            )


def check_dtypes(kind: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Refuse an output of another dtype than what it receives."""
    paired = inputs if len(inputs) == len(outputs) else [*inputs[:1]] * len(outputs)
    for tensor, output in zip(paired, outputs, strict=False):
        if tensor.dtype != output.dtype:
            raise BufferError(
                f"{kind}: an input has dtype {tensor.dtype}, its output {output.dtype}.\n  Give both the same dtype."
            )


def overlap(one: Tensor, other: Tensor) -> int:
    """Bytes that two contiguous tensors share."""
    (first, end), (other_first, other_end) = _bytes_of(one), _bytes_of(other)
    return max(0, min(end, other_end) - max(first, other_first))


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + nbytes(tensor)


def part(tensor: Tensor, rank: int, size: int) -> Tensor:
    length = tensor.numel() // size
    return tensor.view(-1)[rank * length : (rank + 1) * length] if tensor.is_contiguous() else tensor


def rows_by_rank(name: str, tensor: Tensor, splits: Sequence[int] | None, size: int) -> np.ndarray:
    """Rows by rank, checked against the tensor; equal parts if no sizes are given."""
    if tensor.dim() == 0:
        raise BufferError(
            f"all_to_all_single: the {name} has no dims.\n  Pass a tensor with rows along dim 0."
        )
    rows = tensor.shape[0]
    if not splits:
        if rows % size:
            raise BufferError(
                f"all_to_all_single: the {name} has {rows} rows, which do not split in {size} equal parts.\n"
                f"  Pass {name}_split_sizes, or a multiple of {size} rows."
            )
        return _equal_rows(rows // size, size)
    sizes = np.asarray(splits, dtype=np.int64)
    if len(sizes) != size or sizes.sum() != rows or sizes.min() < 0:
        raise BufferError(
            f"all_to_all_single: {name}_split_sizes {list(splits)} has {len(sizes)} entries with sum {sizes.sum()}; "
            f"the {name} has {rows} rows and the group {size} ranks.\n"
            f"  Pass {size} sizes, none negative, with sum {rows}."
        )
    return sizes


@lru_cache(maxsize=64)
def _equal_rows(rows: int, size: int) -> np.ndarray:
    """The same array for every rank that asks."""
    sizes = np.full(size, rows, dtype=np.int64)
    sizes.flags.writeable = False
    return sizes


def poison(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Fill the outputs of an asynchronous call with what cannot be mistaken for data, until `wait()`.

    Returns:
        The inputs; those that share memory with an output as copies made before.
    """
    with unobserved():
        inputs = [x.detach().clone() if any(overlap(x, output) for output in outputs) else x for x in inputs]
        for output in outputs:
            tensor = output.detach()
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(float("nan"))
            elif tensor.dtype == torch.bool:
                tensor.logical_not_()
            else:
                limits = torch.iinfo(tensor.dtype)
                tensor.fill_(limits.min or limits.max)
    return inputs


@contextlib.contextmanager
def unobserved() -> Iterator[None]:
    """The network's work, not the rank's: no gradient, and no mode that the rank has entered sees it."""
    with contextlib.ExitStack() as modes:
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
        for device in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False))
        if torch._C._len_torch_dispatch_stack():
            modes.enter_context(_disable_current_modes())
        if torch._C._len_torch_function_stack():
            modes.enter_context(torch._C.DisableTorchFunction())
        modes.enter_context(torch.no_grad())
        yield


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
