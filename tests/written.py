"""Counts the bytes that tensor operations write, before and after each collective."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqpar_ref.group import TorchGroup

UNFILLED = {"empty", "new_empty", "empty_like", "empty_strided"}


class BytesWritten(TorchDispatchMode):
    """`phases[i]` is what was written between collectives i - 1 and i.

    A result that shares no memory with the operation's inputs counts whole, unless the operation leaves it
    unfilled; an argument that is written in place counts whole as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phases = [0]

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operation(*args, **(kwargs or {}))
        schema = operation._schema
        named = dict(
            zip((argument.name for argument in schema.arguments), args, strict=False), **(kwargs or {})
        )
        written = [
            named[argument.name]
            for argument in schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name in named
        ]
        if schema.name.split("::")[1] not in UNFILLED and not schema.name.startswith("c10d"):
            seen = {
                leaf.untyped_storage().data_ptr()
                for leaf in tree_leaves((args, kwargs))
                if isinstance(leaf, Tensor)
            }
            fresh = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
            written += [leaf for leaf in fresh if leaf.untyped_storage().data_ptr() not in seen]
        if schema.name == "seqpar::write_rows":  # in place as well, but row by row: what it is told to write
            buffer, positions, _ = args
            rows = sum(table.numel() for table in positions)
            self.phases[-1] += rows * buffer.shape[1] * buffer.itemsize
            return results
        self.phases[-1] += sum(tensor.numel() * tensor.itemsize for tensor in tree_leaves(written))
        return results


class CountingGroup(TorchGroup):
    """A group that opens a new phase of a BytesWritten at each all-to-all, and keeps their splits."""

    written: BytesWritten

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: Any, input_splits: Any, async_op: bool = False
    ) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            work = super().all_to_all_single(output, input, output_splits, input_splits, async_op)
        self.written.phases.append(0)
        return work
