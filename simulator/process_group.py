"""The face that torch.distributed sees: a process group whose members are virtual ranks, and its Work handles.

It is a real `dist.ProcessGroup`, so `dist.all_reduce(...)`, functional collectives, DDP, DeviceMesh and code that nobody
here wrote run on it unchanged. Each method turns torch's arguments into a `Call`, refuses what hardware would silently
get wrong, and hands it to the group's `Channel`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed import distributed_c10d as c10d

from . import process_state
from .errors import BufferError, StaleGroupError, UnsupportedOperationError, UnsupportedTransformError
from .executions import COLLECTIVES
from .matching import Call, Channel, Meeting, Message, nbytes, program_lines

_POLLS_BEFORE_BLOCKING = 10_000


class VirtualGroup(dist.ProcessGroup):
    """One rank's end of a process group of virtual ranks."""

    def __init__(self, rank: int, size: int, channel: Channel) -> None:
        super().__init__(rank, size)
        self._rank, self._size, self.channel = rank, size, channel
        self._coalesced: list[VirtualWork] | None = None

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    @property
    def group_name(self) -> str:
        return c10d._world.pg_names[self]

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
        for tensor in (*inputs, *outputs):
            _check_tensor(kind, tensor)
        if inputs:
            agree["dtype"] = inputs[0].dtype
        is_async = getattr(opts, "asyncOp", True)
        if is_async:
            inputs = [x.detach().clone() if any(_overlap(x, output) for output in outputs) else x for x in inputs]
        call = Call(kind, self._rank, agree, inputs, outputs, program_lines(), splits, deferred=is_async)
        if is_async:
            _poison(outputs)
        work = VirtualWork(call, self.channel.meet(call, COLLECTIVES[kind]))
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work

    def _check_member(self) -> None:
        state = process_state.current()
        if state is None or state.run is not self.channel.run or state.rank != self.channel.ranks[self._rank]:
            raise StaleGroupError(
                f"rank {self.channel.ranks[self._rank]}'s end of the {self.channel} is used outside of the run, or of the "
                "rank, that made it.\n  Make groups inside the function that run() calls; to differentiate what run() "
                "returns, use VirtualWorld(..., autograd='joint')."
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
        return self._collective("broadcast", tensors, tensors, opts, root=opts.rootRank, shape=_shapes(tensors))

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        outputs, (tensor,) = _as_list(outputs[0]), _as_list(inputs)
        _check_count("all_gather", "output tensors", len(outputs), self._size)
        _check_overlap("all_gather", outputs, tensor, own=outputs[self._rank])
        return self._collective("all_gather", [tensor], outputs, opts)

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> dist.Work:
        return self.all_gather_single_coalesced([output], [tensor], opts)

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        for output, tensor in zip(outputs, inputs, strict=True):
            _check_count("all_gather_single", "output elements", output.numel(), self._size * tensor.numel())
            _check_overlap("all_gather_single", [output], tensor, own=_part(output, self._rank, self._size))
        return self._collective("all_gather_single", inputs, outputs, opts, shape=_shapes(inputs))

    def allgather_coalesced(self, output_lists: Any, inputs: Any, opts: Any = None) -> dist.Work:
        works = [
            self.allgather([[by_rank[i] for by_rank in output_lists]], [tensor], opts) for i, tensor in enumerate(inputs)
        ]
        return _AllOf(works)

    def gather(self, outputs: Any, inputs: Any, opts: Any) -> dist.Work:
        (tensor,), buffers = _as_list(inputs), list(outputs[0]) if outputs else []
        _check_count("gather", "output tensors", len(buffers), self._size if opts.rootRank == self._rank else 0)
        for buffer in buffers:
            _check_count("gather", "elements of an output tensor", buffer.numel(), tensor.numel())
        _check_overlap("gather", buffers, tensor, own=buffers[self._rank] if buffers else None)
        return self._collective("gather", [tensor], buffers, opts, root=opts.rootRank, shape=_shapes([tensor]))

    def scatter(self, outputs: Any, inputs: Any, opts: Any) -> dist.Work:
        (output,), parts = _as_list(outputs), list(inputs[0]) if inputs else []
        _check_count("scatter", "input tensors", len(parts), self._size if opts.rootRank == self._rank else 0)
        for part in parts:
            _check_count("scatter", "elements of an input tensor", part.numel(), output.numel())
            if part.dtype != output.dtype:
                raise BufferError(
                    f"scatter: a part has dtype {part.dtype}, the output {output.dtype}.\n  Give all one dtype."
                )
        _check_overlap("scatter", parts, output, own=parts[self._rank] if parts else None)
        agree = {"root": opts.rootRank, "shape": _shapes([output]), "dtype": output.dtype}
        return self._collective("scatter", parts, [output], opts, **agree)

    def reduce_scatter(self, outputs: Any, input_lists: Any, opts: Any = None) -> dist.Work:
        (output,), inputs, op = _as_list(outputs), list(input_lists[0]), _reduction(opts)
        _check_count("reduce_scatter", "input tensors", len(inputs), self._size)
        _check_overlap("reduce_scatter", inputs, output, own=inputs[self._rank])
        return self._collective("reduce_scatter", inputs, [output], opts, reduction=op)

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> dist.Work:
        return self.reduce_scatter_single_coalesced([output], [tensor], opts)

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        for output, tensor in zip(outputs, inputs, strict=True):
            _check_count("reduce_scatter_single", "input elements", tensor.numel(), self._size * output.numel())
            _check_overlap("reduce_scatter_single", [tensor], output, own=_part(tensor, self._rank, self._size))
        return self._collective(
            "reduce_scatter_single", inputs, outputs, opts, reduction=_reduction(opts), shape=_shapes(inputs)
        )

    def all_to_all_single(
        self, output: Tensor, tensor: Tensor, output_splits: Any = None, input_splits: Any = None, opts: Any = None
    ) -> dist.Work:
        splits = _splits("input", tensor, input_splits, self._size), _splits("output", output, output_splits, self._size)
        _check_overlap("all_to_all_single", [output], tensor)
        return self._collective("all_to_all_single", [tensor], [output], opts, splits)

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        _check_count("all_to_all", "input tensors", len(inputs), self._size)
        _check_count("all_to_all", "output tensors", len(outputs), self._size)
        for tensor in inputs:
            _check_overlap("all_to_all", outputs, tensor)
        return self._collective("all_to_all", list(inputs), list(outputs), opts)

    def barrier(self, opts: Any = None) -> dist.Work:
        return self._collective("barrier", [], [], opts)

    def send(self, tensors: Any, peer: int, tag: int = 0) -> dist.Work:
        return self._message(tensors, peer, tag, sends=True)

    def recv(self, tensors: Any, peer: int, tag: int = 0) -> dist.Work:
        return self._message(tensors, peer, tag, sends=False)

    def recv_anysource(self, tensors: Any, tag: int = 0) -> dist.Work:
        return self._message(tensors, None, tag, sends=False)

    def _message(self, tensors: Any, peer: int | None, tag: int, sends: bool) -> VirtualWork:
        self._check_member()
        kind, (tensor,) = "send" if sends else "recv", _as_list(tensors)
        _check_tensor(kind, tensor)
        agree = {"shape": _shapes([tensor]), "dtype": tensor.dtype}
        call = Call(kind, self._rank, agree, [tensor] * sends, [tensor] * (not sends), program_lines())
        message = Message(self.channel, call, sends, peer, tag, self.channel.run.next_order())
        _poison(call.outputs)
        self.channel.post(message)
        work = VirtualWork(call, message)
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work

    def _start_coalescing(self, device: Any = None) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: Any = None) -> dist.Work:
        works, self._coalesced = self._coalesced or [], None
        return _AllOf(works)

    # The names that these methods had before torch 2.13; torch's own C++ code still uses some of them.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


class VirtualWork(dist.Work):
    """The handle of one call. What the call receives arrives in its outputs in `wait()` and not before."""

    def __init__(self, call: Call, place: Meeting | Message) -> None:
        super().__init__()
        self._call, self._place = call, place
        self._polls = 0

    def wait(self, timeout: Any = None) -> bool:
        if not self._call.landed:
            self._place.wait(self._call)
        return True

    def is_completed(self) -> bool:
        if self._call.landed:
            return True
        self._polls += 1
        if self._polls > _POLLS_BEFORE_BLOCKING:
            return self.wait()
        state = process_state.current()
        if state is not None:
            state.run.scheduler.step_aside(state.rank)
        return self._place.executed

    def is_success(self) -> bool:
        return self._call.landed

    def exception(self) -> None:
        return None

    def synchronize(self) -> None:
        self.wait()

    def result(self) -> list[Tensor]:
        self.wait()
        return list(self._call.outputs)

    def source_rank(self) -> int:
        return self._place.peer if isinstance(self._place, Message) and self._place.peer is not None else -1

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future:
        """A future that is complete: waiting for a future would stop all virtual ranks, so this call waits."""
        self.wait()
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(list(self._call.outputs))
        return future


class _AllOf(dist.Work):
    """Several calls under one handle."""

    def __init__(self, works: Sequence[dist.Work]) -> None:
        super().__init__()
        self._works = works

    def wait(self, timeout: Any = None) -> bool:
        return all([work.wait() for work in self._works])

    def is_completed(self) -> bool:
        return all([work.is_completed() for work in self._works])

    def get_future(self) -> torch.futures.Future:
        self.wait()
        future: torch.futures.Future = torch.futures.Future()
        future.set_result([tensor for work in self._works for tensor in work.result()])
        return future


def new_process_group(
    group_size: int, group_rank: int, ranks: Sequence[int], backend: Any, store: Any, group_name: Any, **options: Any
) -> tuple[Any, Any]:
    """Takes the place of torch's `_new_process_group_helper` on virtual ranks; `ranks` is empty for the default group.

    Any backend name is accepted and kept, because programs ask for it: the ranks are virtual all the same.
    """
    state = process_state.current()
    if state is None:
        raise StaleGroupError("a virtual group is made outside of a virtual rank.\n  Make it inside run().")
    members = tuple(ranks) or tuple(range(state.run.size))
    if group_size not in (len(members), -1) or (not ranks and group_rank not in (state.rank, -1)):
        raise UnsupportedOperationError(
            f"init_process_group asks for rank {group_rank} of {group_size}; this is rank {state.rank} of "
            f"{state.run.size} virtual ranks.\n  Take both from the environment: RANK and WORLD_SIZE are set."
        )
    if state.rank not in members:
        return dist.GroupMember.NON_GROUP_MEMBER, None
    tag = options.get("pg_tag")
    if tag and (existing := c10d._find_pg_by_ranks_and_tag(tag, list(members))) is not None:
        return existing, c10d._world.pg_map[existing][1]
    prefix_store = dist.PrefixStore(f"{group_name}/", store)
    group = VirtualGroup(members.index(state.rank), len(members), state.run.channel(group_name, members))
    group._set_group_name(group_name)
    group._set_group_desc(options.get("group_desc") or "undefined")
    registered = {"pg_tag": f"user:{tag}"} if tag else {"add_to_default_tag": True}
    config = str(c10d.BackendConfig(backend))
    c10d._register_pg_in_world(group, backend, prefix_store, group_name, config, **registered)
    return group, prefix_store


def rendezvous(*args: Any, **options: Any) -> Iterator[tuple[dist.Store, int, int]]:
    """Takes the place of torch's rendezvous on virtual ranks, which have met already."""
    state = process_state.current()
    assert state is not None
    yield state.run.store, state.rank, state.run.size


def _check_tensor(kind: str, tensor: Tensor) -> None:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise UnsupportedTransformError(
            f"{kind} got a tensor inside a functorch transform (grad, vmap, jvp, ...), whose derivative would silently "
            "be zero.\n  Use torch.autograd.grad, or VirtualWorld(..., autograd='joint') with gradcheck."
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise UnsupportedTransformError(
            f"{kind} got a tensor with a forward-mode tangent, which would silently be lost.\n  Use reverse mode."
        )
    if tensor.is_sparse or tensor.layout != torch.strided:
        raise BufferError(f"{kind} got a tensor of layout {tensor.layout}.\n  Pass dense tensors.")
    if not tensor.is_contiguous():
        raise BufferError(
            f"{kind} got a tensor of shape {list(tensor.shape)} with strides {list(tensor.stride())}; gloo and NCCL refuse "
            "it or read its memory in the wrong order.\n  Pass tensor.contiguous(), or for a buffer torch.empty(shape)."
        )


def _check_count(kind: str, what: str, got: int, wanted: int) -> None:
    if got != wanted:
        raise BufferError(f"{kind} got {got} {what} and needs {wanted}.\n  Pass {wanted}.")


def _check_overlap(kind: str, many: Sequence[Tensor], one: Tensor, own: Tensor | None = None) -> None:
    """Refuse buffers that share memory, except the in-place form, in which `one` is exactly the rank's own part."""
    if own is not None and _bytes_of(own) == _bytes_of(one):
        return
    for tensor in many:
        if shared := _overlap(one, tensor):
            raise BufferError(
                f"{kind}: an input and an output overlap in {shared} bytes.\n  Give the output memory of its own."
            )


def _overlap(one: Tensor, other: Tensor) -> int:
    """Bytes that two contiguous tensors share."""
    (first, end), (other_first, other_end) = _bytes_of(one), _bytes_of(other)
    return max(0, min(end, other_end) - max(first, other_first))


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + nbytes(tensor)


def _part(tensor: Tensor, rank: int, size: int) -> Tensor:
    length = tensor.numel() // size
    return tensor.view(-1)[rank * length : (rank + 1) * length] if tensor.is_contiguous() else tensor


def _splits(name: str, tensor: Tensor, splits: Sequence[int] | None, size: int) -> np.ndarray:
    """Rows by rank, checked against the tensor; equal parts if no sizes are given."""
    if tensor.dim() == 0:
        raise BufferError(f"all_to_all_single: the {name} has no dims.\n  Pass a tensor with rows along dim 0.")
    rows = len(tensor)
    if not splits:
        if rows % size:
            raise BufferError(
                f"all_to_all_single: the {name} has {rows} rows, which do not split in {size} equal parts.\n"
                f"  Pass {name}_split_sizes, or a multiple of {size} rows."
            )
        return np.full(size, rows // size, dtype=np.int64)
    sizes = np.asarray(splits, dtype=np.int64)
    if len(sizes) != size or sizes.sum() != rows or sizes.min() < 0:
        raise BufferError(
            f"all_to_all_single: {name}_split_sizes {list(splits)} has {len(sizes)} entries with sum {sizes.sum()}; the "
            f"{name} has {rows} rows and the group {size} ranks.\n"
            f"  Pass {size} sizes, none negative, with sum {rows}."
        )
    return sizes


def _reduction(opts: Any) -> str:
    op = opts.reduceOp if opts is not None else dist.ReduceOp.SUM
    for known in ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR"):
        if op == getattr(dist.ReduceOp, known):
            return known.lower()
    raise UnsupportedOperationError(f"virtual ranks have no reduction {op}.\n  Use SUM, AVG, PRODUCT, MIN, MAX, BAND, BOR, BXOR.")


def _shapes(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple(tensors[0].shape) if len(tensors) == 1 else tuple(tuple(x.shape) for x in tensors)


def _as_list(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _poison(outputs: Sequence[Tensor]) -> None:
    """Fill the outputs of an asynchronous call with what cannot be mistaken for data, until `wait()`."""
    for output in outputs:
        tensor = output.detach()
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(float("nan"))
        elif tensor.dtype == torch.bool:
            tensor.logical_not_()
        else:
            limits = torch.iinfo(tensor.dtype)
            tensor.fill_(limits.min or limits.max)
