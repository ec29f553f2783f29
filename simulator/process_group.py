"""The face that torch.distributed sees: a process group whose members are virtual ranks, and its Work handles.

It is a real `dist.ProcessGroup`, so `dist.all_reduce(...)`, functional collectives, DDP, DeviceMesh and code that
nobody here wrote run on it unchanged. Each method turns torch's arguments into a `Call`, refuses what hardware would
silently get wrong, and hands it to the group's `Channel`.
"""

# mypy: disable-error-code="override, assignment"

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from . import process_state
from .buffers import (
    check_count,
    check_disjoint,
    check_dtypes,
    check_overlap,
    check_tensor,
    check_transforms,
    part,
    poison,
    rows_by_rank,
    unobserved,
)
from .calls import Call
from .errors import BufferError, StaleGroupError, UnsupportedOperationError
from .executions import COLLECTIVES
from .matching import Channel
from .messages import Message
from .source_lines import Lines, program_lines
from .work import AllOf, VirtualWork


class VirtualGroup(dist.ProcessGroup):
    """One rank's end of a process group of virtual ranks."""

    def __init__(self, rank: int, size: int, channel: Channel) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._rank, self._size, self.channel = rank, size, channel
        self._coalesced: list[VirtualWork] | None = None
        self._name = ""

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    @property
    def group_name(self) -> str:
        return self._name

    def getBackendName(self) -> str:
        return "virtual"

    def shutdown(self) -> None:
        """Nothing to release: the group is forgotten with its run."""

    abort = shutdown

    def __repr__(self) -> str:
        return f"VirtualGroup(rank {self._rank} of {self.channel})"

    def _collective(
        self,
        kind: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        opts: Any = None,
        splits: tuple[np.ndarray, np.ndarray] | None = None,
        **agree: Any,
    ) -> VirtualWork:
        self._check_member()
        check_transforms(kind)
        for tensor in (*inputs, *outputs):
            check_tensor(kind, tensor)
        check_dtypes(kind, inputs, outputs)
        check_disjoint(kind, outputs)
        dtypes = dict.fromkeys(x.dtype for x in inputs)
        if dtypes:
            agree["dtype"] = next(iter(dtypes)) if len(dtypes) == 1 else tuple(x.dtype for x in inputs)
        is_async = getattr(opts, "asyncOp", True)
        where = self._where()
        call = Call(
            kind, self.channel, self._rank, agree, inputs, outputs, where, splits, is_async, _is_functional()
        )
        self._issue(call)
        work = VirtualWork(call, self.channel.meet(call, COLLECTIVES[kind]))
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work

    def _issue(self, call: Call) -> None:
        """Tell the instruments, and make what the call receives useless until `wait()`."""
        run = self.channel.run
        run.scheduler.check(self.channel.ranks[self._rank])
        run.instruments.issued(self.channel.ranks[self._rank], call)
        if call.is_async:
            call.inputs = poison(call.inputs, call.outputs)

    def _where(self) -> Lines:
        """The program's lines; in a joint backward, in which there are none, those that began it."""
        return program_lines() or self.channel.run.origin

    def _check_member(self) -> None:
        state = process_state.current()
        if state is None or state.run is not self.channel.run or state.rank != self.channel.ranks[self._rank]:
            raise StaleGroupError(
                f"rank {self.channel.ranks[self._rank]}'s end of the {self.channel} is used outside of the run, or of "
                "the rank, that made it.\n  Make groups inside the function that run() calls; to differentiate what "
                "run() returns, use VirtualWorld(..., autograd='joint')."
            )

    def allreduce(self, tensors: Any, opts: Any = None) -> dist.Work:
        tensors, op = _as_list(tensors), _reduction(opts)
        return self._collective("all_reduce", tensors, tensors, opts, reduction=op, shape=_shapes(tensors))

    allreduce_coalesced = allreduce

    def reduce(self, tensors: Any, opts: Any) -> dist.Work:
        tensors, op = _as_list(tensors), _reduction(opts)
        outputs = tensors if opts.rootRank == self._rank else []
        return self._collective(
            "reduce", tensors, outputs, opts, reduction=op, root=opts.rootRank, shape=_shapes(tensors)
        )

    def broadcast(self, tensors: Any, opts: Any) -> dist.Work:
        tensors = _as_list(tensors)
        return self._collective(
            "broadcast", tensors, tensors, opts, root=opts.rootRank, shape=_shapes(tensors)
        )

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        outputs, (tensor,) = _as_list(outputs[0]), _as_list(inputs)
        check_count("all_gather", "output tensors", len(outputs), self._size)
        check_overlap("all_gather", outputs, tensor, own=outputs[self._rank])
        return self._collective("all_gather", [tensor], outputs, opts)

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> dist.Work:
        return self.all_gather_single_coalesced([output], [tensor], opts)

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        for output, tensor in zip(outputs, inputs, strict=True):
            check_count("all_gather_single", "output elements", output.numel(), self._size * tensor.numel())
            check_overlap("all_gather_single", [output], tensor, own=part(output, self._rank, self._size))
            check_overlap("all_gather_single", [other for other in outputs if other is not output], tensor)
        return self._collective("all_gather_single", inputs, outputs, opts, shape=_shapes(inputs))

    def allgather_coalesced(self, output_lists: Any, inputs: Any, opts: Any = None) -> dist.Work:
        works = [
            self.allgather([[by_rank[i] for by_rank in output_lists]], [tensor], opts)
            for i, tensor in enumerate(inputs)
        ]
        return AllOf(works)

    def gather(self, outputs: Any, inputs: Any, opts: Any) -> dist.Work:
        (tensor,), buffers = _as_list(inputs), list(outputs[0]) if outputs else []
        check_count(
            "gather", "output tensors", len(buffers), self._size if opts.rootRank == self._rank else 0
        )
        for buffer in buffers:
            check_count("gather", "elements of an output tensor", buffer.numel(), tensor.numel())
        check_overlap("gather", buffers, tensor, own=buffers[self._rank] if buffers else None)
        return self._collective(
            "gather", [tensor], buffers, opts, root=opts.rootRank, shape=_shapes([tensor])
        )

    def scatter(self, outputs: Any, inputs: Any, opts: Any) -> dist.Work:
        (output,), parts = _as_list(outputs), list(inputs[0]) if inputs else []
        check_count("scatter", "input tensors", len(parts), self._size if opts.rootRank == self._rank else 0)
        for piece in parts:
            if piece.shape != output.shape:
                raise BufferError(
                    f"scatter: a part is {list(piece.shape)}, the output {list(output.shape)}.\n  Give all one shape."
                )
        check_overlap("scatter", parts, output, own=parts[self._rank] if parts else None)
        agree = {"root": opts.rootRank, "shape": _shapes([output]), "dtype": output.dtype}
        return self._collective("scatter", parts, [output], opts, **agree)

    def reduce_scatter(self, outputs: Any, input_lists: Any, opts: Any = None) -> dist.Work:
        (output,), inputs, op = _as_list(outputs), list(input_lists[0]), _reduction(opts)
        check_count("reduce_scatter", "input tensors", len(inputs), self._size)
        check_overlap("reduce_scatter", inputs, output, own=inputs[self._rank])
        return self._collective("reduce_scatter", inputs, [output], opts, reduction=op)

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> dist.Work:
        return self.reduce_scatter_single_coalesced([output], [tensor], opts)

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        for output, tensor in zip(outputs, inputs, strict=True):
            check_count(
                "reduce_scatter_single", "input elements", tensor.numel(), self._size * output.numel()
            )
            check_overlap("reduce_scatter_single", [tensor], output, own=part(tensor, self._rank, self._size))
        return self._collective(
            "reduce_scatter_single", inputs, outputs, opts, reduction=_reduction(opts), shape=_shapes(inputs)
        )

    def all_to_all_single(
        self,
        output: Tensor,
        tensor: Tensor,
        output_splits: Any = None,
        input_splits: Any = None,
        opts: Any = None,
    ) -> dist.Work:
        splits = (
            rows_by_rank("input", tensor, input_splits, self._size),
            rows_by_rank("output", output, output_splits, self._size),
        )
        check_overlap("all_to_all_single", [output], tensor)
        return self._collective("all_to_all_single", [tensor], [output], opts, splits)

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        check_count("all_to_all", "input tensors", len(inputs), self._size)
        check_count("all_to_all", "output tensors", len(outputs), self._size)
        for tensor in inputs:
            check_overlap("all_to_all", outputs, tensor)
        return self._collective("all_to_all", list(inputs), list(outputs), opts)

    def barrier(self, opts: Any = None) -> dist.Work:
        return self._collective("barrier", [], [], opts)

    def monitored_barrier(self, timeout: Any = None, wait_all_ranks: bool = False) -> None:
        self.barrier().wait()

    def send(self, tensors: Any, peer: int, tag: int = 0) -> dist.Work:
        return self._message(tensors, peer, tag, sends=True)

    def recv(self, tensors: Any, peer: int, tag: int = 0) -> dist.Work:
        return self._message(tensors, peer, tag, sends=False)

    def recv_anysource(self, tensors: Any, tag: int = 0) -> dist.Work:
        return self._message(tensors, None, tag, sends=False)

    def _message(self, tensors: Any, peer: int | None, tag: int, sends: bool) -> VirtualWork:
        self._check_member()
        kind, (tensor,) = "send" if sends else "recv", _as_list(tensors)
        check_transforms(kind)
        check_tensor(kind, tensor)
        agree = {"shape": _shapes([tensor]), "dtype": tensor.dtype}
        inputs, outputs = ([tensor], []) if sends else ([], [tensor])
        call = Call(kind, self.channel, self._rank, agree, inputs, outputs, self._where())
        self._issue(call)
        if sends:
            with unobserved():
                call.inputs = [tensor.detach().clone()]
        message = Message(self.channel, call, sends, peer, tag, self.channel.run.next_order())
        self.channel.mailbox.post(message)
        work = VirtualWork(call, message)
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work

    def _start_coalescing(self, device: Any = None) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: Any = None) -> dist.Work:
        works, self._coalesced = self._coalesced or [], None
        return AllOf(works)

    # The names that these methods had before torch 2.13; torch's own C++ code still uses some of them.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _is_functional() -> bool:
    """Whether the group's method was called by an operator, as functional collectives do, and not by Python code."""
    caller = sys._getframe(3)
    return caller.f_code.co_filename == torch._ops.__file__


def _reduction(opts: Any) -> str:
    op = opts.reduceOp if opts is not None else dist.ReduceOp.SUM
    for known in ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR"):
        if op == getattr(dist.ReduceOp, known):
            return known.lower()
    raise UnsupportedOperationError(
        f"virtual ranks have no reduction {op}.\n  Use SUM, AVG, PRODUCT, MIN, MAX, BAND, BOR, BXOR."
    )


def _shapes(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple(tensors[0].shape) if len(tensors) == 1 else tuple(tuple(x.shape) for x in tensors)


def _as_list(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)
