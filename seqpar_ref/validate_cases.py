"""What `validate` checks: one attention, or one block, for each kind of sizes, dtype, layout and call.

The sizes follow from the number of ranks, so that each case means on any number what its name says. Where that
cannot be (one rank has nobody to be unequal to) it falls back to the plain case, which has to hold as well.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["attention", "block", "wire", "deepspeed"]
Call = Literal[
    "plain",
    "mask and scale",
    "boolean mask",
    "autocast",
    "given positions",
    "frozen query",
    "two at a time",
]
FLOAT64, FLOAT32, BFLOAT16, FLOAT16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
AUTOCAST = torch.bfloat16
SCALE = 0.25  # of the scores, where a case is called with one
THETA = 10000.0


@dataclass(frozen=True)
class Case:
    """One thing to check. The ranks of the world may form several groups, each with a sequence of its own.

    Args:
        name: says what is special about it.
        kind: "attention": rotary (where asked for) and DistributedAttention, once plain and once in chunks.
            "wire": the same, once with each wire form. "block": UlyssesBlock, once with each kind of overlap.
            "deepspeed": seqpar_ref.deepspeed, once as it is and once with a side stream.
        tokens: by rank of the world.
        groups: world ranks of each group.
        checkpoint: activation checkpointing of the whole call, None for none.
        call: how it is called, or what it is given beside its tensors. "frozen query": of the block's projections
            key's and value's alone need gradients. "two at a time": a second call, of the negative inputs, comes
            between the first one's forward and backward pass.
    """

    name: str
    tokens: tuple[int, ...]
    heads: int
    kv_heads: int
    dtype: torch.dtype
    groups: tuple[tuple[int, ...], ...]
    kind: Kind = "attention"
    layout: str = "b s h d"
    batch: int = 2
    head_dim: int = 8
    value_dim: int = 8
    width: int = 16
    rotary: Literal["none", "half-split", "interleaved"] = "none"
    bias: bool = False
    causal: bool = True
    planned: bool = True
    checkpoint: Literal["reentrant", "non-reentrant"] | None = None
    call: Call = "plain"
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.kind}, {self.name}, {self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        """The dtype in words."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def travelling(self) -> torch.dtype:
        """The dtype in which query, key, value and output travel."""
        return AUTOCAST if self.call == "autocast" else self.dtype

    @property
    def calls(self) -> tuple[str, ...]:
        """What the names of each call's results begin with."""
        return ("", "second ") if self.call == "two at a time" else ("",)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Inputs and weights that need no gradient."""
        return ("x", "query.weight") if self.call == "frozen query" else ()

    def tokens_of(self, group: int) -> list[int]:
        """Tokens of each rank of the group."""
        return [self.tokens[rank] for rank in self.groups[group]]

    def group_of(self, rank: int) -> int:
        """Which group the rank of the world belongs to."""
        return next(index for index, members in enumerate(self.groups) if rank in members)

    def own_tokens(self, rank: int) -> slice:
        """Which tokens of its group's sequence the rank of the world owns."""
        members = self.groups[self.group_of(rank)]
        first = sum(self.tokens[other] for other in members if other < rank)
        return slice(first, first + self.tokens[rank])


@dataclass(frozen=True)
class Sequence:
    """What one group works on, on the CPU and in the case's dtype.

    Args:
        inputs: `query`, `key` and `value` [batch, seq, heads, dim], or `x` [batch, seq, width].
        weights: of the block's projections, by the names of its parameters. None for attention.
        gradient: of the loss with respect to the output.
        positions: of the tokens in the rotary embedding, [seq].
        mask: [1, heads or 1, seq, seq], added to the scores, or [seq, seq], where keys are seen. None for none.
    """

    inputs: dict[str, Tensor]
    weights: dict[str, Tensor]
    gradient: Tensor
    positions: Tensor
    mask: Tensor | None = None


def sequence_of(case: Case, group: int) -> Sequence:
    """The same numbers on every machine: small multiples of a power of two, which all dtypes hold."""
    generator = torch.Generator().manual_seed(1000 * case.seed + group)
    batch, tokens = case.batch, sum(case.tokens_of(group))

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        integers = torch.randint(-128, 129, shape, generator=generator)
        return (integers.double() / 64 * scale).to(case.dtype)

    positions = torch.arange(tokens)
    if case.call == "given positions":
        positions = 5 + 2 * positions.flip(0)
    if case.kind != "block":
        sizes = {
            "query": (case.heads, case.head_dim),
            "key": (case.kv_heads, case.head_dim),
            "value": (case.kv_heads, case.value_dim),
        }
        inputs = {name: draw(batch, tokens, *size) for name, size in sizes.items()}
        gradient, mask = draw(batch, tokens, case.heads, case.value_dim), None
        earlier = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        if case.call == "mask and scale":
            heads = case.heads if len(case.tokens) <= 64 else 1  # thousands of them would fill the memory
            mask = draw(1, heads, tokens, tokens).masked_fill(~earlier, float("-inf"))
        if case.call == "boolean mask":
            mask = earlier & (draw(tokens, tokens) > 0) | torch.eye(tokens, dtype=torch.bool)
        return Sequence(inputs, {}, gradient, positions, mask)
    rows = {"query": case.heads, "key": case.kv_heads, "value": case.kv_heads}
    weights = {
        f"{name}.weight": draw(heads * case.head_dim, case.width, scale=0.25) for name, heads in rows.items()
    }
    inner = case.heads * case.head_dim
    weights["output.weight"] = draw(case.width, inner, scale=2.0 ** -(inner.bit_length() // 2))
    if case.bias:
        weights |= {f"{name}.bias": draw(heads * case.head_dim) for name, heads in rows.items()}
        weights["output.bias"] = draw(case.width)
    x, gradient = draw(batch, tokens, case.width), draw(batch, tokens, case.width)
    return Sequence({"x": x}, weights, gradient, positions)


def cases_for(ranks: int) -> list[Case]:
    """All cases, for so many ranks."""
    cases = [*_attention(ranks), *_wire(ranks), *_block(ranks), *_deepspeed(ranks)]
    return [replace(case, seed=seed) for seed, case in enumerate(cases)]


def _attention(ranks: int) -> Iterator[Case]:
    even, sizes = _plain(ranks), _sizes(ranks)
    yield even
    yield replace(even, name="sequence first", layout="s b h d", **sizes["uneven heads"])
    yield replace(even, name="heads first", layout="b h s d", **sizes["uneven heads"])
    yield replace(even, name="all tokens see all", causal=False)
    for dtype in (FLOAT32, BFLOAT16, FLOAT16):
        yield replace(even, name="uneven heads", dtype=dtype, **sizes["uneven heads"])
        yield replace(even, name="GQA", dtype=dtype, **sizes["GQA"])
    yield replace(even, name="GQA, uneven", dtype=BFLOAT16, **sizes["GQA, uneven"])
    yield replace(even, name="MQA", dtype=FLOAT32, **sizes["MQA"])
    for dtype in (FLOAT64, FLOAT32, BFLOAT16, FLOAT16):
        yield replace(even, name="kv heads < ranks", dtype=dtype, **sizes["kv heads < ranks"])
    yield replace(even, name="heads < ranks", dtype=FLOAT32, **sizes["heads < ranks"])
    yield replace(even, name="unequal tokens", dtype=BFLOAT16, tokens=_unequal(ranks), **sizes["GQA, uneven"])
    yield replace(even, name="a rank without tokens", tokens=_one_without(ranks), **sizes["kv heads < ranks"])
    yield replace(even, name="value of another dim", value_dim=12, **sizes["GQA"])
    yield replace(even, name="no plan", planned=False, tokens=_unequal(ranks), **sizes["uneven heads"])
    yield replace(even, name="rotary, half-split", dtype=BFLOAT16, rotary="half-split", **sizes["GQA"])
    yield replace(even, name="rotary, interleaved", rotary="interleaved", tokens=_unequal(ranks))
    for name, groups in (("sub-groups, strided", _strided(ranks)), ("sub-groups, halves", _halves(ranks))):
        yield replace(even, name=name, groups=groups, tokens=_unequal(ranks), **sizes["GQA, uneven"])
    yield replace(even, name="checkpoint, reentrant", checkpoint="reentrant", **sizes["uneven heads"])
    yield replace(even, name="checkpoint, non-reentrant", checkpoint="non-reentrant", **sizes["uneven heads"])
    yield _called(even, "mask and scale", dtype=FLOAT32, causal=False, **sizes["GQA, uneven"])
    yield _called(even, "boolean mask", causal=False, layout="s b h d", **sizes["GQA"])
    yield _called(even, "autocast", dtype=FLOAT32, **sizes["uneven heads"])
    yield _called(even, "two at a time", tokens=_unequal(ranks), **sizes["uneven heads"])


def _wire(ranks: int) -> Iterator[Case]:
    plain, sizes = replace(_plain(ranks), kind="wire"), _sizes(ranks)
    yield replace(plain, name="wire forms", dtype=FLOAT32)
    yield replace(plain, name="wire forms, GQA", dtype=BFLOAT16, tokens=_unequal(ranks), **sizes["GQA"])


def _block(ranks: int) -> Iterator[Case]:
    even, sizes = replace(_plain(ranks), kind="block", rotary="half-split"), _sizes(ranks)
    yield even
    yield replace(even, name="sequence first", layout="s b h d", bias=True, **sizes["uneven heads"])
    yield replace(even, name="heads first", layout="b h s d", **sizes["GQA"])
    yield replace(even, name="no rotary", rotary="none", causal=False)
    yield replace(even, name="uneven heads", dtype=FLOAT32, **sizes["uneven heads"])
    yield replace(even, name="GQA, uneven", dtype=BFLOAT16, **sizes["GQA, uneven"])
    yield replace(even, name="MQA", dtype=FLOAT16, **sizes["MQA"])
    yield replace(even, name="kv heads < ranks", dtype=FLOAT32, **sizes["kv heads < ranks"])
    yield replace(even, name="heads < ranks", **sizes["heads < ranks"])
    yield replace(even, name="unequal tokens", dtype=FLOAT16, tokens=_unequal(ranks), **sizes["GQA, uneven"])
    yield replace(even, name="a rank without tokens", tokens=_one_without(ranks), **sizes["kv heads < ranks"])
    yield replace(even, name="no plan", planned=False, tokens=_unequal(ranks), **sizes["uneven heads"])
    for name, groups in (("sub-groups, strided", _strided(ranks)), ("sub-groups, halves", _halves(ranks))):
        yield replace(even, name=name, groups=groups, tokens=_unequal(ranks), **sizes["GQA, uneven"])
    yield replace(even, name="checkpoint, reentrant", checkpoint="reentrant", **sizes["GQA"])
    yield replace(even, name="checkpoint, non-reentrant", checkpoint="non-reentrant", **sizes["GQA"])
    yield _called(even, "autocast", dtype=FLOAT32, bias=True, **sizes["uneven heads"])
    yield _called(even, "given positions", tokens=_unequal(ranks), **sizes["GQA"])
    yield _called(even, "frozen query", **sizes["GQA"])
    yield _called(even, "two at a time", **sizes["GQA, uneven"])


def _deepspeed(ranks: int) -> Iterator[Case]:
    even, sizes = replace(_plain(ranks), kind="deepspeed", planned=False), _sizes(ranks)
    yield replace(even, dtype=FLOAT32)
    yield replace(even, name="sequence first", layout="s b h d", rotary="half-split", **sizes["uneven heads"])
    yield replace(even, name="heads first", layout="b h s d", dtype=BFLOAT16, planned=True, **sizes["GQA"])
    yield replace(even, name="unequal tokens", tokens=_unequal(ranks), **sizes["GQA, uneven"])
    yield replace(even, name="heads < ranks", dtype=FLOAT32, **sizes["heads < ranks"])


def _called(case: Case, call: Call, **changes: Any) -> Case:
    return replace(case, name=call, call=call, **changes)


def _plain(ranks: int) -> Case:
    """Everything divides by the ranks. Worlds of many ranks get less of everything on each."""
    few = ranks <= 16
    return Case(
        name="even heads",
        tokens=(4 if few else 2,) * ranks,
        heads=2 * ranks if few else ranks,
        kv_heads=2 * ranks if few else ranks,
        dtype=FLOAT64,
        groups=(tuple(range(ranks)),),
    )


def _sizes(ranks: int) -> dict[str, dict[str, Any]]:
    """Query heads and kv heads, by what is special about them. Where they are many enough they come in chunks."""
    kv_few = (ranks + 1) // 2
    return {
        "uneven heads": _heads(2 * ranks + 1 if ranks <= 16 else ranks + 1),
        "GQA": _heads(4 * ranks, 2 * ranks) if ranks <= 16 else _heads(2 * ranks, ranks),
        "GQA, uneven": _heads(2 * (ranks + 1), ranks + 1),
        "MQA": _heads(ranks + 1, 1),
        "kv heads < ranks": _heads(3 * kv_few, kv_few),
        "heads < ranks": _heads(max(1, ranks // 2)),
    }


def _heads(heads: int, kv_heads: int | None = None) -> dict[str, Any]:
    return {"heads": heads, "kv_heads": heads if kv_heads is None else kv_heads}


def _unequal(ranks: int) -> tuple[int, ...]:
    return tuple(2 + (3 * rank + 1) % 4 for rank in range(ranks))


def _one_without(ranks: int) -> tuple[int, ...]:
    return tuple(0 if ranks > 1 and rank == ranks // 2 else 3 + rank % 2 for rank in range(ranks))


def _strided(ranks: int) -> tuple[tuple[int, ...], ...]:
    """Every other rank: those of even number, those of odd number."""
    return tuple(tuple(range(first, ranks, 2)) for first in range(min(2, ranks)))


def _halves(ranks: int) -> tuple[tuple[int, ...], ...]:
    """The lower and the upper half of the ranks."""
    half = (ranks + 1) // 2
    return tuple(part for part in (tuple(range(half)), tuple(range(half, ranks))) if part)
