"""Programs that were written for GPUs, on a CPU: "cuda" is accepted everywhere and means the CPU's memory.

A program says where it wants a tensor in arguments of PyTorch's functions, which a TorchFunctionMode changes on their
way, and in a few classes and in `torch.cuda`, which are replaced on rank threads while `cuda_on_cpu` is open. Tensors
say truthfully that they are on the CPU. `.cuda()`, `.cpu()` and `.to("cuda")` copy nothing, where hardware would.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.overrides import TorchFunctionMode

from . import process_state
from .rank_modes import RankMode
from .source_lines import is_program

_CUDA = re.compile(r"cuda(:\d+)?")
_MEMORY = 80 * 2**30

_DO_NOTHING = (
    "_lazy_init",
    "init",
    "empty_cache",
    "ipc_collect",
    "set_per_process_memory_fraction",
    "reset_peak_memory_stats",
    "reset_max_memory_allocated",
    "reset_max_memory_cached",
    "reset_accumulated_memory_stats",
    "_record_memory_history",
)
_COUNT_NOTHING = (
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "memory_cached",
    "max_memory_cached",
    "memory_usage",
    "utilization",
)


class OnCpu(TorchFunctionMode):
    """Lets every function of PyTorch that this thread calls make its tensors on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (Tensor.cuda, Tensor.pin_memory):
            return args[0]
        if function is torch.device:
            return (
                torch.device("cuda", *args)
                if args and isinstance(args[0], int)
                else function(*args, **kwargs)
            )
        numbers = function is Tensor.to
        return function(*args[:1], *(_cpu(x, numbers) for x in args[1:]), **_all_cpu(kwargs))


class BackwardOnCpu(RankMode):
    """The same for functions that a backward pass calls, in which no TorchFunctionMode is on."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operation(*args, **_all_cpu(kwargs or {}))


def _cpu(value: Any, numbers: bool = False) -> Any:
    """The CPU in place of a cuda device; with `numbers` also in place of a device's number."""
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    if isinstance(value, str):
        return "cpu" if _CUDA.fullmatch(value) else value
    return "cpu" if numbers and type(value) is int else value


def _all_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: False if name == "pin_memory" else _cpu(value, numbers=name == "device")
        for name, value in kwargs.items()
    }


@contextlib.contextmanager
def cuda_on_cpu(size: int, is_available: bool = False) -> Iterator[None]:
    """While this is open, ranks find `size` devices in `torch.cuda`, all of which are the CPU.

    Args:
        size: number of ranks.
        is_available: what torch.cuda.is_available() says to the program; to torch itself it always says False. With
            False, most programs take their own way for CPUs.
    """
    with contextlib.ExitStack() as undo:
        for owner, name, replacement in _replacements(size, is_available):
            real = vars(owner)[name]
            undo.callback(setattr, owner, name, real)
            is_function = callable(replacement) and not isinstance(replacement, type)
            setattr(owner, name, _routed(real, replacement) if is_function else replacement)
        yield


def _routed(real: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return (real if process_state.current() is None else replacement)(*args, **kwargs)

    return call


def _replacements(size: int, is_available: bool) -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, what stands there on rank threads)."""
    functions = _functions_of_cuda(size, is_available)
    for owner in (torch.cuda, torch.cuda.memory, torch.cuda.random):
        for name, function in functions.items():
            if name in vars(owner):
                yield owner, name, function
    # Without a timeout, torch warns that it has no nccl.
    yield distributed_c10d, "default_pg_nccl_timeout", timedelta(minutes=10)
    for name in ("range_push", "range_pop", "mark"):
        yield torch.cuda.nvtx, name, _nothing
    names = {
        "is_available": "is_available",
        "device_count": "device_count",
        "set_device_index": "set_device",
        "set_device_idx": "set_device",
        "current_device_index": "current_device",
        "current_device_idx": "current_device",
    }
    for name, same in names.items():
        yield torch.accelerator, name, functions[same]
    yield torch.accelerator, "current_accelerator", functions["current_accelerator"]
    yield torch.accelerator.device_index, "__enter__", _nothing
    yield torch.accelerator.device_index, "__exit__", _nothing
    yield from _methods()


def _functions_of_cuda(size: int, is_available: bool) -> dict[str, Callable[..., Any]]:
    selected: dict[int, int] = {}

    def set_device(device: Any) -> None:
        number = torch.cuda._utils._get_device_index(device, optional=True)
        if number >= 0:
            selected[_rank()] = number

    def exchange(number: int) -> int:
        before = selected.get(_rank(), 0)
        set_device(number)
        return before

    def current_accelerator(check_available: bool = False) -> torch.device | None:
        asked_by_program = is_program(sys._getframe(2).f_code.co_filename)
        return torch.device("cuda") if not check_available or (is_available and asked_by_program) else None

    def name_of(device: Any = None) -> str:
        return "a virtual device"

    def properties(device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(
            name=name_of(),
            major=9,
            minor=0,
            total_memory=_MEMORY,
            multi_processor_count=132,
            gcnArchName="",  # torch.compile asks for it
        )

    return {
        **dict.fromkeys(_DO_NOTHING, _nothing),
        **dict.fromkeys(_COUNT_NOTHING, lambda *args, **kwargs: 0),
        "is_available": lambda: is_available and is_program(sys._getframe(2).f_code.co_filename),
        "current_accelerator": current_accelerator,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "device_count": lambda: size,
        "set_device": set_device,
        "current_device": lambda: selected.get(_rank(), 0),
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "get_device_name": name_of,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": properties,
        "memory_stats": lambda *args, **kwargs: {},
        "memory_summary": lambda *args, **kwargs: "no memory of a virtual device is counted",
        "mem_get_info": lambda device=None: (_MEMORY, _MEMORY),
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": torch.default_generator.manual_seed,
        "seed": torch.default_generator.seed,
        "seed_all": torch.default_generator.seed,
        "initial_seed": torch.default_generator.initial_seed,
        "get_rng_state": lambda device=None: torch.default_generator.get_state(),
        "set_rng_state": lambda state, device=None: torch.default_generator.set_state(state),
    }


def _methods() -> Iterator[tuple[Any, str, Any]]:
    """What takes a device without being a function that a TorchFunctionMode sees."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils._device import DeviceContext

    begin_ddp, begin_autocast = DistributedDataParallel.__init__, torch.autocast.__init__
    begin_scaler, move, load = torch.amp.GradScaler.__init__, torch.nn.Module.to, torch.load

    def init_ddp(
        self: Any, module: Any, device_ids: Any = None, output_device: Any = None, *args: Any, **kw: Any
    ) -> None:
        begin_ddp(self, module, None, None, *args, **kw)

    def init_autocast(self: Any, device_type: str, dtype: Any = None, *args: Any, **kwargs: Any) -> None:
        if _cpu(device_type) != device_type and dtype is None:
            dtype = torch.get_autocast_dtype("cuda")
        begin_autocast(self, _cpu(device_type), dtype, *args, **kwargs)

    def init_scaler(self: Any, device: str = "cuda", *args: Any, **kwargs: Any) -> None:
        begin_scaler(self, _cpu(device), *args, **kwargs)

    def module_to(self: Any, *args: Any, **kwargs: Any) -> Any:
        return move(self, *(_cpu(x, numbers=True) for x in args), **_all_cpu(kwargs))

    def load_here(file: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(map_location, dict):
            map_location = {name: _cpu(device) for name, device in map_location.items()}
        place = "cpu" if map_location is None else _cpu(map_location, numbers=True)
        return load(file, place, *args, **kwargs)

    yield DistributedDataParallel, "__init__", init_ddp
    yield torch.autocast, "__init__", init_autocast
    yield torch.amp.GradScaler, "__init__", init_scaler
    yield torch.nn.Module, "to", module_to
    yield torch, "load", load_here
    yield torch, "Generator", _Generator
    for owner in (DeviceMesh, DeviceContext):
        yield owner, "__init__", _with_cpu(owner.__init__)


def _with_cpu(begin: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: begin(self, *(_cpu(x) for x in args), **_all_cpu(kwargs))


class _AnyGenerator(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch._C.Generator)


class _Generator(metaclass=_AnyGenerator):
    """Takes the place of torch.Generator: one for cuda draws on the CPU."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return torch._C.Generator(
            _cpu(device, numbers=True) if process_state.current() is not None else device
        )


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _rank() -> int:
    state = process_state.current()
    return -1 if state is None else state.rank
