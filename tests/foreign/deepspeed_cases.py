"""What can be asked of the names of `deepspeed.sequence.layer`, each with the right answer, for both implementations.

A row runs on every rank and returns what the rank got and what it should have got. `names` is the module that has the
names: `deepspeed.sequence.layer` or `seqpar_ref.deepspeed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.defects.cases import INPUTS, TOLERANCE, Case, causal_attention
from tests.defects.implementations import NoAccelerator

Pairs = dict[str, tuple[Tensor, Tensor]]  # what -> (what the rank got, what is right)
INDICES = {"b s h d": (2, 1, 0), "s b h d": (2, 0, 1), "b h s d": (1, 2, 0)}


@dataclass(frozen=True)
class Row:
    """One line of the table in docs/deepspeed.md; `ask(names, **options)` is its program."""

    what: str
    ask: Callable[..., Pairs]
    ranks: int = 2
    options: dict[str, Any] = field(default_factory=dict)


def shares(count: int) -> list[range]:
    """Heads by rank, as evenly as can be, the larger shares first."""
    size = dist.get_world_size()
    bounds = [rank * (count // size) + min(rank, count % size) for rank in range(size + 1)]
    return [range(*bound) for bound in pairwise(bounds)]


def addresses(*shape: int) -> Tensor:
    """No two values are equal."""
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


@dataclass(frozen=True)
class Exchanged:
    """A tensor [2, tokens, heads, ...] of all ranks, in the original's layouts, whole and as two kinds of shards."""

    heads: int
    tokens: tuple[int, ...]
    batch_dim: int
    behind: tuple[int, ...]

    @property
    def whole(self) -> Tensor:
        whole = addresses(2, sum(self.tokens), self.heads, *self.behind)
        return whole if self.batch_dim == 0 else whole.transpose(0, 1)

    @property
    def by_tokens(self) -> Tensor:
        return self.whole.split(self.tokens, dim=1 - self.batch_dim)[dist.get_rank()].contiguous()

    @property
    def by_heads(self) -> Tensor:
        own = shares(self.heads)[dist.get_rank()]
        return self.whole[:, :, own.start : own.stop].contiguous()


def exchange(
    names: ModuleType,
    function: str,
    there: bool,
    heads: int,
    indices: tuple[int, int, int],
    tokens: tuple[int, ...] = (3, 3),
    behind: tuple[int, ...] = (4,),
    dtype: torch.dtype = torch.float64,
) -> Pairs:
    """One exchange, and its gradient where it has one."""
    problem = Exchanged(heads, tokens, indices[2], behind)
    given, right = problem.by_tokens.to(dtype), problem.by_heads.to(dtype)
    given, right = (given, right) if there else (right, given)
    if function == "_SeqAllToAll":
        given.requires_grad_()
        got = names._SeqAllToAll.apply(dist.group.WORLD, given, *indices)
        got.backward(2 * right if got.shape == right.shape else torch.ones_like(got))
        return {"output": (got.detach(), right), "gradient": (given.grad, 2 * given.detach())}
    return {"output": (getattr(names, function)(given, *indices, dist.group.WORLD), right)}


def heads_first(names: ModuleType, heads: int) -> Pairs:
    """[batch, heads, sequence, dim] there and back."""
    whole = addresses(2, heads, 6, 4)
    rank, own = dist.get_rank(), shares(heads)[dist.get_rank()]
    given, right = whole.split(3, dim=2)[rank].contiguous(), whole[:, own.start : own.stop].contiguous()
    there = names._SeqAllToAll.apply(dist.group.WORLD, given, 1, 2, 0)
    return {
        "there": (there, right),
        "back": (names._SeqAllToAll.apply(dist.group.WORLD, right, 2, 1, 0), given),
    }


def dim_zero(names: ModuleType) -> Pairs:
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = addresses(size, size, 3, 4)
    given = whole[rank].clone().requires_grad_()
    got = names._DimZeroAllToAll.apply(dist.group.WORLD, given)
    got.backward(2 * whole[:, rank])
    return {"output": (got.detach(), whole[:, rank]), "gradient": (given.grad, 2 * whole[rank])}


def asynchronous(names: ModuleType, heads: int) -> Pairs:
    """What the original's backward pass does with dq and dk."""
    problem, handle = Exchanged(heads, (3, 3), 0, (4,)), {}
    names.single_all_to_all(problem.by_tokens, 2, 1, 0, dist.group.WORLD, True, handle, "dq")
    handle["dq_work"].wait()
    got = handle["dq_post_all2all_func"](handle["dq_grad"])
    return {"output": (got, problem.by_heads)}


def angles(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all tokens, [sequence, 1, 1, dim]."""
    frequency = 10_000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.outer(torch.arange(tokens, dtype=torch.float64), frequency).repeat(1, 2)
    return angle.cos()[:, None, None], angle.sin()[:, None, None]


def turned(x: Tensor, rotary_dim: int) -> Tensor:
    """Half-split rotary of a whole [batch, sequence, heads, dim] tensor, as complex numbers."""
    if not rotary_dim:
        return x
    first, second = x[..., :rotary_dim].chunk(2, dim=-1)
    cos, sin = (table[:, 0, :, : rotary_dim // 2] for table in angles(x.shape[1], rotary_dim))
    product = torch.complex(first, second) * torch.complex(cos, sin)
    return torch.cat([product.real, product.imag, x[..., rotary_dim:]], dim=-1)


def rotary(names: ModuleType, rotary_dim: int) -> Pairs:
    """On tensors [sequence, batch, heads, dim], as the function's docstring has them."""
    whole = Case(heads=3, tokens=(6,), dim=8).whole("query")
    got = names.apply_rotary_pos_emb(whole.transpose(0, 1), *angles(6, rotary_dim))
    return {"output": (got, turned(whole, rotary_dim).transpose(0, 1))}


def attention(
    names: ModuleType,
    case: Case,
    indices: tuple[int, int, int] | None = None,
    rotary_dim: int = 0,
    merged: bool = False,
    local_attention: Callable[..., Tensor] | None = None,
    arguments: tuple[Any, ...] = (),
    side_stream: bool = False,
    leaves: bool = True,
) -> Pairs:
    """Output and gradients of one rank."""
    scatter, gather, batch_dim = INDICES[case.layout] if indices is None else indices
    local = local_attention or causal_attention(case.layout)
    if merged:
        inner = local
        local = lambda *inputs: inner(*inputs).flatten(2)  # noqa: E731
    stream = (NoAccelerator(),) if side_stream else ()
    module = names.DistributedAttention(local, dist.group.WORLD, scatter, gather, *stream)
    given = [case.shard(case.whole(name), dist.get_rank()).requires_grad_() for name in INPUTS]
    used = given if leaves else [x.view_as(x).view_as(x) for x in given]
    if rotary_dim:
        arguments = (angles(sum(case.tokens), rotary_dim), *arguments)
    output = module(*used, batch_dim, *arguments)
    right, *gradients = dense(case, rotary_dim)
    pairs = {"output": (output.detach(), right.flatten(2) if merged else right)}
    upstream = case.shard(case.whole("upstream"), dist.get_rank())
    output.backward(
        upstream.reshape(output.shape) if output.numel() == upstream.numel() else torch.ones_like(output)
    )
    return pairs | {name: (x.grad, right) for name, x, right in zip(INPUTS, given, gradients, strict=True)}


def dense(case: Case, rotary_dim: int) -> list[Tensor]:
    """This rank's share of the output and the gradients of one device."""
    whole = [case.whole(name).requires_grad_() for name in INPUTS]
    query, key, value = whole
    output = causal_attention("b s h d")(turned(query, rotary_dim), turned(key, rotary_dim), value)
    output.backward(case.whole("upstream"))
    return [case.shard(x, dist.get_rank()) for x in (output.detach(), *(x.grad for x in whole))]


def cross(names: ModuleType, heads: int) -> Pairs:
    """Two query tokens and three tokens of key and value on each rank."""
    rank = dist.get_rank()
    query, key, value = (torch.sin(addresses(2, 2 * tokens, heads, 4) + 100 * tokens) for tokens in (2, 3, 3))

    def local(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    module = names.DistributedAttention(local, dist.group.WORLD, 2, 1)
    own = [x.split(x.shape[1] // 2, dim=1)[rank] for x in (query, key, value)]
    return {"output": (module(*own, 0), local(query, key, value).split(2, dim=1)[rank])}


def two_models(names: ModuleType) -> Pairs:
    results = [attention(names, Case(heads=heads, tokens=(3, 3))) for heads in (5, 8)]
    return {
        f"{name} of model {index}": pair
        for index, pairs in enumerate(results)
        for name, pair in pairs.items()
    }


def mask_as_before(names: ModuleType, mask: Tensor | None) -> Pairs:
    """The call as it was before batch_dim_idx."""

    def local(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return value if mask is None else value + 1

    shards = [Case(heads=4, tokens=(3, 3)).whole(name)[:, :3] for name in INPUTS]
    got = names.DistributedAttention(local, dist.group.WORLD, 2, 1)(*shards, mask)
    return {"output": (got, local(*shards, mask))}


def beside_the_value(names: ModuleType, dtype: torch.dtype, dims: int) -> Pairs:
    """The local attention returns another dtype, and fewer dims of each head."""
    shards = [Case(heads=4, tokens=(3, 3)).whole(name)[:, :3] for name in INPUTS]

    def local(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value[..., :dims].to(dtype)

    got = names.DistributedAttention(local, dist.group.WORLD, 2, 1)(*shards, 0)
    return {"output": (got, local(*shards))}


def judged(pairs: Pairs) -> str:
    """In a word, what a rank got."""
    for what, (got, right) in pairs.items():
        if got is None or got.shape != right.shape:
            return "wrong shape" if what == "output" else f"wrong shape ({what})"
        if got.dtype != right.dtype or ((got - right).abs() > TOLERANCE).any():
            return "wrong values" if what == "output" else f"wrong values ({what})"
    return "right"


def exchanges() -> list[Row]:
    rows = []
    for heads in (4, 5):
        for batch_dim, name in ((0, "batch"), (1, "sequence")):
            there, back = (2, 1 - batch_dim, batch_dim), (1 - batch_dim, 2, batch_dim)
            for function in ("_SeqAllToAll", "single_all_to_all", "uneven_heads_all2all"):
                for is_there, indices in ((True, there), (False, back)):
                    what = f"{function}{indices}, {name} first, {heads} heads"
                    options = {"function": function, "there": is_there, "heads": heads, "indices": indices}
                    rows.append(Row(what, exchange, options=options))
    seq = {"function": "_SeqAllToAll", "there": True}
    rows += [
        Row("_SeqAllToAll(2, 0, 0): gather_idx as by default, 4 heads", exchange,
            options={**seq, "heads": 4, "indices": (2, 0, 0)}),
        Row("_SeqAllToAll(2, 0, 0): gather_idx as by default, 5 heads", exchange,
            options={**seq, "heads": 5, "indices": (2, 0, 0)}),
        Row("_SeqAllToAll(0, 2, 0), 4 heads", exchange,
            options={**seq, "there": False, "heads": 4, "indices": (0, 2, 0)}),
        Row("_SeqAllToAll(1, 2, 0) and (2, 1, 0) of heads-first tensors, 4 heads", heads_first, options={"heads": 4}),
        Row("_SeqAllToAll(1, 2, 0) and (2, 1, 0) of heads-first tensors, 5 heads", heads_first, options={"heads": 5}),
        Row("_SeqAllToAll of 7 heads on 4 ranks", exchange, 4,
            {**seq, "heads": 7, "indices": (2, 1, 0), "tokens": (3,) * 4}),
        Row("_SeqAllToAll of 3 heads on 4 ranks", exchange, 4,
            {**seq, "heads": 3, "indices": (2, 1, 0), "tokens": (3,) * 4}),
        Row("_SeqAllToAll of 59 heads, back", exchange,
            options={**seq, "there": False, "heads": 59, "indices": (1, 2, 0)}),
        Row("_SeqAllToAll of 3 and 5 tokens", exchange,
            options={**seq, "heads": 4, "indices": (2, 1, 0), "tokens": (3, 5)}),
        Row("single_all_to_all of integers", exchange,
            options={"function": "single_all_to_all", "there": True, "heads": 4, "indices": (2, 1, 0),
                     "dtype": torch.int64}),
        Row("single_all_to_all of three dims, 5 heads, there", exchange,
            options={"function": "single_all_to_all", "there": True, "heads": 5, "indices": (2, 1, 0), "behind": ()}),
        Row("single_all_to_all of three dims, 5 heads, back", exchange,
            options={"function": "single_all_to_all", "there": False, "heads": 5, "indices": (1, 2, 0), "behind": ()}),
        Row("single_all_to_all of five dims, 5 heads, there", exchange,
            options={"function": "single_all_to_all", "there": True, "heads": 5, "indices": (2, 1, 0),
                     "behind": (4, 3)}),
        Row("single_all_to_all of five dims, 4 heads, there", exchange,
            options={"function": "single_all_to_all", "there": True, "heads": 4, "indices": (2, 1, 0),
                     "behind": (4, 3)}),
        Row("single_all_to_all with async_op, 4 heads", asynchronous, options={"heads": 4}),
        Row("single_all_to_all with async_op, 5 heads", asynchronous, options={"heads": 5}),
        Row("_DimZeroAllToAll", dim_zero),
        Row("apply_rotary_pos_emb of the whole head dim", rotary, options={"rotary_dim": 8}),
        Row("apply_rotary_pos_emb of half the head dim", rotary, options={"rotary_dim": 4}),
    ]  # fmt: skip
    return rows


def attentions() -> list[Row]:
    rows = []
    for layout in INDICES:
        for heads in (4, 5):
            case = Case(heads=heads, tokens=(4, 4), layout=layout)
            rows.append(Row(f"attention, {layout!r}, {heads} heads", attention, options={"case": case}))
        case = Case(heads=4, tokens=(4, 4), layout=layout)
        rows.append(
            Row(f"attention with rotary, {layout!r}", attention, options={"case": case, "rotary_dim": 4})
        )
    even, uneven = Case(heads=4, tokens=(3, 3)), Case(heads=5, tokens=(3, 3))
    grouped = {"6 and 3 heads on 2": (6, 3, 2), "15 and 5 heads on 4": (15, 5, 4), "8 and 4 heads on 4": (8, 4, 4),
               "8 and 2 heads on 4": (8, 2, 4)}  # fmt: skip
    for what, (heads, kv_heads, ranks) in grouped.items():
        case = Case(heads=heads, kv_heads=kv_heads, tokens=(3,) * ranks)
        rows.append(Row(f"attention, grouped, {what} ranks", attention, ranks, {"case": case}))
    masked = {"local_attention": _with_arguments, "arguments": (None, 2.5)}
    streamed = {"side_stream": True, "leaves": False}
    rows += [
        Row("attention, default indices, batch first, 4 heads", attention,
            options={"case": even, "indices": (2, 0, 0)}),
        Row("attention, default indices, batch first, 5 heads", attention,
            options={"case": uneven, "indices": (2, 0, 0)}),
        Row("attention with rotary of half the head dim", attention,
            options={"case": Case(heads=4, tokens=(3, 3), dim=8), "rotary_dim": 4}),
        Row("attention of 3 and 5 tokens", attention, options={"case": Case(heads=4, tokens=(3, 5))}),
        Row("attention that merges heads and dim, 4 heads", attention, options={"case": even, "merged": True}),
        Row("attention that merges heads and dim, 5 heads", attention, options={"case": uneven, "merged": True}),
        Row("attention with arguments behind rotary_pos_emb", attention, options={"case": even, **masked}),
        Row("attention that returns bfloat16 for float64", beside_the_value,
            options={"dtype": torch.bfloat16, "dims": 4}),
        Row("attention that returns another head dim", beside_the_value, options={"dtype": torch.float64, "dims": 3}),
        Row("cross attention, 4 heads", cross, options={"heads": 4}),
        Row("cross attention, 5 heads", cross, options={"heads": 5}),
        Row("5 heads, then 8 in the same process", two_models),
        Row("attention with sp_stream, 4 heads", attention, options={"case": even, **streamed}),
        Row("attention with sp_stream, 5 heads", attention, options={"case": uneven, **streamed}),
        Row("attention with sp_stream of leaf tensors", attention, options={"case": even, "side_stream": True}),
        Row("a mask [2, 2] in the place of batch_dim_idx", mask_as_before, options={"mask": torch.ones(2, 2)}),
        Row("a mask of one zero in the place of batch_dim_idx", mask_as_before, options={"mask": torch.zeros(1)}),
        Row("None in the place of batch_dim_idx", mask_as_before, options={"mask": None}),
    ]  # fmt: skip
    return rows


def _with_arguments(query: Tensor, key: Tensor, value: Tensor, factor: float) -> Tensor:
    return causal_attention("b s h d")(query, key, value) * (factor / 2.5)


ROWS = exchanges() + attentions()
