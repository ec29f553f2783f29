"""Bad input to every public function: a named error that has the numbers, before any communication.

The last word is checked too: the second line of each message says what to change.
"""

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from seqpar_ref import (
    DistributedAttention,
    Plan,
    SeqparError,
    UlyssesBlock,
    apply_rotary,
    deepspeed,
    errors,
    heads_to_sequence,
    make_plan,
    position_ids_of,
    qkv_to_heads,
    sequence_to_heads,
    start_sequence_to_heads,
)
from seqpar_ref.device import device_of_backend
from seqpar_ref.local_attention import fused_attention
from tests.launch import on_gloo, on_virtual

PLAN = make_plan(ranks=1, heads=6, kv_heads=2, tokens=5)
X = torch.zeros(2, 5, 6, 4)
KV = torch.zeros(2, 5, 2, 4)
IDS = torch.arange(5)
TABLE = torch.zeros(5, 4)
NESTED = torch.nested.nested_tensor([torch.zeros(5, 6, 4), torch.zeros(4, 6, 4)], layout=torch.jagged)

Refusal = tuple[Callable[[], Any], type[SeqparError], str]


def plan(**changes: Any) -> Callable[[], Any]:
    return partial(make_plan, **({"ranks": 4, "heads": 6, "kv_heads": 2, "tokens": 8} | changes))


PLANS: dict[str, Refusal] = {
    "no ranks": (plan(ranks=0), errors.PlanError, "at least 1 rank"),
    "float ranks": (plan(ranks=4.0), errors.PlanError, "holds 4.0, a float"),
    "bool ranks": (plan(ranks=True), errors.PlanError, "holds True, a bool"),
    "text ranks": (plan(ranks="4"), errors.PlanError, "holds '4', a str"),
    "no heads": (plan(heads=0), errors.PlanError, "0 query heads"),
    "negative heads": (plan(heads=-3), errors.PlanError, "holds -3"),
    "kv heads do not divide": (plan(kv_heads=4), errors.PlanError, "divides 6: 1, 2, 3, 6"),
    "no kv heads": (plan(kv_heads=0), errors.PlanError, "0 kv heads cannot serve 6"),
    "float kv heads": (plan(kv_heads=2.0), errors.PlanError, "Use integers"),
    "tokens of other ranks": (plan(tokens=[1, 2, 3]), errors.PlanError, "3 entries for 4 ranks"),
    "negative tokens": (plan(tokens=[1, -2, 3, 4]), errors.PlanError, "holds -2"),
    "float tokens": (plan(tokens=8.0), errors.PlanError, "tokens is 8.0"),
    "float in the list": (plan(tokens=[1, 2, 3, 4.5]), errors.PlanError, "holds 4.5"),
    "no tokens given": (plan(tokens=None), errors.PlanError, "tokens is None"),
    "text tokens": (plan(tokens="1234"), errors.PlanError, "tokens is '1234'"),
    "too many": (plan(tokens=2**60), errors.PlanError, "too many to count"),
    "tokens in an array without dims": (plan(tokens=np.array(5)), errors.PlanError, "array(5)"),
    "tokens in a tensor without dims": (plan(tokens=torch.tensor(5)), errors.PlanError, "tensor(5)"),
    "tokens in an array of two dims": (plan(tokens=np.ones((4, 1), int)), errors.PlanError, "a list of them"),
    "tokens in a dict": (plan(tokens={3: 1, 2: 1, 1: 1, 0: 1}), errors.PlanError, "{3: 1"),
    "tokens in a set": (plan(tokens={1, 2, 3, 4}), errors.PlanError, "{1, 2, 3, 4}"),
    "ranks beyond memory": (plan(ranks=10**12), errors.PlanError, "1000000000000 ranks"),
    "ranks beyond int64": (plan(ranks=10**19), errors.PlanError, "at most 1048576"),
    "unknown policy": (plan(policy="even"), errors.PlanError, "'even' is no policy"),
    "plan of two lengths": (
        lambda: Plan((1, 2), (3,), 1),
        errors.PlanError,
        "2 entries, heads_by_rank has 1",
    ),
    "empty plan": (lambda: Plan((), (), 1), errors.PlanError, "at least one rank"),
    "plan of floats": (lambda: Plan((1.0,), (2,), 1), errors.PlanError, "holds 1.0"),  # type: ignore[arg-type]
    "plan whose kv heads do not divide": (lambda: Plan((1,), (4,), 3), errors.PlanError, "divides 4"),
    "rank beyond": (lambda: PLAN.tokens_of(1), errors.PlanError, "no rank 1 among 1"),
    "rank below": (lambda: PLAN.query_heads(-1), errors.PlanError, "no rank -1"),
    "float rank": (lambda: PLAN.kv_heads_of(0.0), errors.PlanError, "no rank 0.0"),  # type: ignore[arg-type]
    "bytes of a float batch": (lambda: PLAN.bytes(1.5, 4, torch.float32), errors.PlanError, "1.5"),  # type: ignore[arg-type]
    "bytes of no dtype": (lambda: PLAN.bytes(1, 4, "bf16"), errors.PlanError, "torch.bfloat16"),  # type: ignore[arg-type]
    "bytes beyond count": (lambda: PLAN.bytes(2**60, 4, torch.float32), errors.PlanError, "smaller"),
    "bytes of which pass": (lambda: PLAN.bytes(1, 4, torch.half, "x"), errors.PlanError, "backward is 'x'"),  # type: ignore[arg-type]
    "vectors of what": (lambda: PLAN.vectors("keys"), errors.PlanError, "'keys'"),  # type: ignore[arg-type]
}

ROTARY: dict[str, Refusal] = {
    "layout": (lambda: apply_rotary(X, IDS, layout="bshd"), errors.LayoutError, "'bshd' is no layout"),
    "no tensor": (lambda: apply_rotary([1.0], IDS), errors.TensorError, "x is a list"),  # type: ignore[arg-type]
    "integers": (lambda: apply_rotary(X.long(), IDS), errors.TensorError, "torch.int64"),
    "three dims": (lambda: apply_rotary(X[0], IDS), errors.ShapeError, "3 dims"),
    "odd rotary dim": (lambda: apply_rotary(X, IDS, rotary_dim=3), errors.RotaryError, "rotary dim is 3"),
    "wide rotary dim": (lambda: apply_rotary(X, IDS, rotary_dim=6), errors.RotaryError, "head dim 4"),
    "float rotary dim": (lambda: apply_rotary(X, IDS, rotary_dim=2.0), errors.RotaryError, "2.0"),  # type: ignore[arg-type]
    "odd head dim": (lambda: apply_rotary(X[..., :3], IDS), errors.RotaryError, "even"),
    "head dim 1": (lambda: apply_rotary(X[..., :1], IDS), errors.RotaryError, "at least 2"),
    "other layout's sizes": (
        lambda: apply_rotary(X, IDS, layout="s b h d"),
        errors.RotaryError,
        "2 tokens and batch 5",
    ),
    "ids of other tokens": (lambda: apply_rotary(X, torch.arange(6)), errors.RotaryError, "(6,)"),
    "ids of another batch": (lambda: apply_rotary(X, IDS.expand(3, 5)), errors.RotaryError, "(3, 5)"),
    "float ids": (lambda: apply_rotary(X, IDS.float()), errors.RotaryError, "torch.float32"),
    "bool ids": (lambda: apply_rotary(X, IDS > 2), errors.RotaryError, "torch.bool"),
    "list of ids": (lambda: apply_rotary(X, [0, 1, 2, 3, 4]), errors.RotaryError, "a list"),  # type: ignore[arg-type]
    "no positions at all": (lambda: apply_rotary(X, None), errors.RotaryError, "neither"),
    "cos alone": (lambda: apply_rotary(X, IDS, cos=TABLE), errors.RotaryError, "only one of cos and sin"),
    "cos of another dim": (
        lambda: apply_rotary(X, IDS, cos=TABLE[:, :3], sin=TABLE),
        errors.RotaryError,
        "(5, 3)",
    ),
    "sin of another dim": (
        lambda: apply_rotary(X, IDS, cos=TABLE, sin=TABLE[:, :3]),
        errors.RotaryError,
        "sin is",
    ),
    "cos of a shard": (lambda: apply_rotary(X, IDS + 5, cos=TABLE, sin=TABLE), errors.RotaryError, "5 to 9"),
    "negative position": (
        lambda: apply_rotary(X, IDS - 1, cos=TABLE, sin=TABLE),
        errors.RotaryError,
        "-1 to 3",
    ),
    "rows missing": (
        lambda: apply_rotary(X, None, cos=TABLE[:4], sin=TABLE[:4]),
        errors.RotaryError,
        "5 tokens",
    ),
    "rows and ids": (
        lambda: apply_rotary(X, IDS, cos=TABLE[None], sin=TABLE[None]),
        errors.RotaryError,
        "position_ids=None",
    ),
    "integer cos": (
        lambda: apply_rotary(X, IDS, cos=TABLE.long(), sin=TABLE),
        errors.RotaryError,
        "cos is a torch.int64",
    ),
    "cos no tensor": (lambda: apply_rotary(X, IDS, cos=1.0, sin=TABLE), errors.RotaryError, "cos is a float"),  # type: ignore[arg-type]
    "theta": (lambda: apply_rotary(X, IDS, theta=-1.0), errors.RotaryError, "theta is -1.0"),
    "theta not a number": (
        lambda: apply_rotary(X, IDS, theta=float("nan")),
        errors.RotaryError,
        "theta is nan",
    ),
    "theta beyond floats": (lambda: apply_rotary(X, IDS, theta=10**400), errors.RotaryError, "theta is 1000"),
    "theta beside cos": (
        lambda: apply_rotary(X, IDS, theta="junk", cos=TABLE, sin=TABLE),  # type: ignore[arg-type]
        errors.RotaryError,
        "theta is 'junk'",
    ),
    "interleaved": (lambda: apply_rotary(X, IDS, interleaved="no"), errors.RotaryError, "'no'"),  # type: ignore[arg-type]
    "sparse ids": (lambda: apply_rotary(X, IDS.to_sparse()), errors.RotaryError, "a sparse or nested"),
    "sparse cos": (
        lambda: apply_rotary(X, IDS, cos=TABLE.to_sparse(), sin=TABLE),
        errors.RotaryError,
        "cos is a sparse",
    ),
    "cos and sin of two shapes": (
        lambda: apply_rotary(X, IDS, cos=TABLE, sin=TABLE[:, :2]),
        errors.RotaryError,
        "(5, 4) and sin is (5, 2)",
    ),
    "nested x": (lambda: apply_rotary(NESTED, IDS), errors.TensorError, "a nested tensor"),
    "positions on no device": (lambda: position_ids_of(PLAN, 0, "nope"), errors.ArgumentError, "'nope'"),  # type: ignore[arg-type]
    "positions of no plan": (lambda: position_ids_of(4, 0), errors.ArgumentError, "plan is a int"),  # type: ignore[arg-type]
    "positions of no rank": (lambda: position_ids_of(PLAN, 4), errors.PlanError, "no rank 4"),
    "module's layout": (lambda: DistributedAttention(layout="sbhd"), errors.LayoutError, "'sbhd'"),
    "module's callable": (lambda: DistributedAttention(3), errors.ArgumentError, "a int"),  # type: ignore[arg-type]
    "module's group": (lambda: DistributedAttention(group="x"), errors.GroupError, "group is a str"),  # type: ignore[arg-type]
    "module's plan": (lambda: DistributedAttention(plan={}), errors.ArgumentError, "plan is a dict"),  # type: ignore[arg-type]
    "no process group": (lambda: DistributedAttention()(X, KV, KV), errors.GroupError, "init_process_group"),
    "no group for an exchange": (lambda: sequence_to_heads(X, PLAN), errors.GroupError, "init_process_group"),
}

OTHERS: dict[str, Refusal] = {
    "wire": (lambda: DistributedAttention(wire="fast"), errors.ArgumentError, "wire is 'fast'"),  # type: ignore[arg-type]
    "wire no text": (lambda: DistributedAttention(wire=["fused"]), errors.ArgumentError, "wire is ['fused']"),  # type: ignore[arg-type]
    "no devices": (
        lambda: device_of_backend("nccl", 0, 2),
        errors.NoAcceleratorError,
        "nccl needs a device for each of the 2 ranks",
    ),
}
ALONE = PLANS | ROTARY | OTHERS


@pytest.mark.parametrize("name", ALONE)
def test_without_any_rank(name: str) -> None:
    call, kind, words = ALONE[name]
    check(caught(call), kind, words)


def caught(call: Callable[[], Any]) -> SeqparError:
    with pytest.raises(SeqparError) as caught:
        call()
    return caught.value


def check(error: SeqparError, kind: type[SeqparError], words: str) -> None:
    assert type(error) is kind
    assert words in str(error)
    first, second = str(error).split("\n")
    assert first.endswith(".") and second.startswith("  ") and second.endswith(".")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error)


def attend(
    query: Any = X, key: Any = KV, value: Any = KV, *args: Any, plan: Plan | None = None, **kwargs: Any
) -> Any:
    return DistributedAttention(plan=plan)(query, key, value, *args, **kwargs)


def finished_twice() -> None:
    pending = start_sequence_to_heads(X, PLAN)
    pending.finish()
    pending.finish()


ON_ONE_RANK: dict[str, Refusal] = {
    "query no tensor": (lambda: attend(query=None), errors.TensorError, "query is a NoneType"),
    "integers": (lambda: attend(X.int()), errors.TensorError, "torch.int32"),
    "sparse": (lambda: attend(X.to_sparse()), errors.TensorError, "torch.sparse_coo"),
    "nested": (lambda: attend(NESTED, NESTED, NESTED), errors.TensorError, "query is a nested"),
    "merged input": (lambda: attend(X.flatten(2)), errors.ShapeError, "3 dims"),
    "empty head dim": (lambda: attend(X[..., :0]), errors.ShapeError, "head dim 0"),
    "dtypes differ": (lambda: attend(value=KV.double()), errors.TensorError, "value is torch.float64"),
    "devices differ": (lambda: attend(value=KV.to("meta")), errors.TensorError, "on meta"),
    "batches differ": (lambda: attend(key=KV[:1], value=KV[:1]), errors.ShapeError, "batch differ"),
    "cross attention": (
        lambda: attend(key=KV[:, :3], value=KV[:, :3]),
        errors.UnsupportedError,
        "cross attention",
    ),
    "value's tokens": (lambda: attend(value=KV[:, :3]), errors.ShapeError, "tokens differ"),
    "value's heads": (lambda: attend(value=KV[:, :, :1]), errors.ShapeError, "kv heads differ"),
    "key's dim": (lambda: attend(key=KV[..., :2]), errors.ShapeError, "head dims differ"),
    "kv heads do not divide": (lambda: attend(X[:, :, :5]), errors.ShapeError, "2 kv heads cannot serve 5"),
    "no heads": (lambda: attend(X[:, :, :0]), errors.ShapeError, "cannot serve 0"),
    "another plan's tokens": (
        lambda: attend(plan=make_plan(ranks=1, heads=6, kv_heads=2, tokens=4)),
        errors.ShapeError,
        "5 tokens, 6 query heads and 2 kv heads",
    ),
    "another plan's ranks": (
        lambda: attend(plan=make_plan(ranks=2, heads=6, kv_heads=2, tokens=10)),
        errors.GroupError,
        "1 ranks, the plan 2",
    ),
    "finished twice": (finished_twice, errors.OrderError, "finished already"),
    "wire of a call": (
        lambda: qkv_to_heads(X, KV, KV, PLAN, wire="any"),  # type: ignore[arg-type]
        errors.ArgumentError,
        "wire is 'any'",
    ),
    "unknown argument": (lambda: attend(window=3), errors.ArgumentError, "window"),
    "layout as an argument": (lambda: attend(layout="b h s d"), errors.ArgumentError, "layout"),
    "dropout": (lambda: attend(dropout_p=1.5), errors.ArgumentError, "1.5"),
    "scale": (lambda: attend(scale="small"), errors.ArgumentError, "'small'"),
    "scale nan": (lambda: attend(scale=float("nan")), errors.ArgumentError, "scale is nan"),
    "scale inf": (lambda: attend(scale=float("inf")), errors.ArgumentError, "scale is inf"),
    "causal": (lambda: attend(is_causal="no"), errors.ArgumentError, "is_causal is 'no'"),
    "gqa": (lambda: attend(enable_gqa=1), errors.ArgumentError, "enable_gqa is 1"),
    "sparse mask": (
        lambda: attend(attn_mask=torch.zeros(5, 5).to_sparse()),
        errors.MaskError,
        "sparse or nested",
    ),
    "mask and causal": (
        lambda: attend(attn_mask=torch.ones(5, 5, dtype=torch.bool), is_causal=True),
        errors.ArgumentError,
        "both attn_mask and is_causal",
    ),
    "mask of a shard": (lambda: attend(attn_mask=torch.zeros(4, 4)), errors.MaskError, "5 tokens"),
    "mask of own heads": (lambda: attend(attn_mask=torch.zeros(3, 5, 5)), errors.MaskError, "6 query heads"),
    "mask of another batch": (lambda: attend(attn_mask=torch.zeros(3, 1, 5, 5)), errors.MaskError, "batch 2"),
    "mask of another dtype": (
        lambda: attend(attn_mask=torch.zeros(5, 5).double()),
        errors.MaskError,
        "torch.float64",
    ),
    "mask of integers": (lambda: attend(attn_mask=torch.ones(5, 5).long()), errors.MaskError, "torch.bool"),
    "mask of one dim": (lambda: attend(attn_mask=torch.zeros(5)), errors.MaskError, "two to four dims"),
    "mask no tensor": (lambda: attend(attn_mask=[[True]]), errors.MaskError, "list"),
    "shard no tensor": (lambda: sequence_to_heads(3, PLAN), errors.TensorError, "shard is a int"),  # type: ignore[arg-type]
    "shard of other tokens": (
        lambda: sequence_to_heads(X[:, :4], PLAN),
        errors.ShapeError,
        "4 tokens and 6 heads",
    ),
    "shard of other heads": (
        lambda: sequence_to_heads(X, PLAN, heads="kv"),
        errors.ShapeError,
        "5 tokens and 2 heads",
    ),
    "shard of another layout": (
        lambda: sequence_to_heads(X, PLAN, layout="b h s d"),
        errors.ShapeError,
        "'b h s d'",
    ),
    "heads returned": (lambda: heads_to_sequence(KV, PLAN), errors.ShapeError, "5 tokens and 2 heads"),
    "no plan": (lambda: heads_to_sequence(X, None), errors.ArgumentError, "plan is a NoneType"),  # type: ignore[arg-type]
    "unknown heads": (lambda: heads_to_sequence(X, PLAN, heads="k"), errors.ArgumentError, "heads is 'k'"),  # type: ignore[arg-type]
    "unknown layout": (lambda: sequence_to_heads(X, PLAN, layout="s h b d"), errors.LayoutError, "'s h b d'"),
    "group of another kind": (lambda: sequence_to_heads(X, PLAN, "world"), errors.GroupError, "a str"),  # type: ignore[arg-type]
    "fused, key of other heads": (lambda: qkv_to_heads(X, X, X, PLAN), errors.ShapeError, "key is"),
    "fused, value's batch": (lambda: qkv_to_heads(X, KV, KV[:1], PLAN), errors.ShapeError, "batch differ"),
}


def refused_on_rank(name: str) -> tuple[SeqparError, int]:
    call, _, _ = ON_ONE_RANK[name]
    return caught(call), dist.get_rank()


@pytest.mark.parametrize("name", ON_ONE_RANK)
def test_before_anything_is_sent(name: str) -> None:
    """On a world of one rank; attention without a plan has exchanged its record at most."""
    ((error, _),) = on_virtual(refused_on_rank, 1, name)
    check(error, *ON_ONE_RANK[name][1:])


RESULTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "nothing": (lambda q: None, "a NoneType"),
    "a tuple": (lambda q: (q, q), "a tuple"),
    "fewer tokens": (lambda q: q[:, :2], "(2, 2, 6, 4)"),
    "another dtype": (lambda q: q.double(), "torch.float64"),
    "another head dim": (lambda q: q[..., :2], "(2, 5, 6, 2)"),
    "another order": (lambda q: q.transpose(1, 2), "(2, 6, 5, 4)"),
    "sparse": (lambda q: q.to_sparse(), "a tensor that is not dense"),
    "merged otherwise": (lambda q: q.flatten(0, 1), "(10, 6, 4)"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_what_a_local_attention_returns(name: str) -> None:
    result, words = RESULTS[name]

    def body() -> SeqparError:
        return caught(lambda: DistributedAttention(lambda q, k, v: result(q))(X, KV, KV))

    check(on_virtual(body, 1)[0], errors.LocalAttentionError, words)


def groups_of_others() -> list[tuple[SeqparError, str]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    pair = dist.new_group([0, 1])
    found = [(caught(lambda: sequence_to_heads(X, PLAN, mesh)), "2 axes, ('data', 'sequence')")]
    if dist.get_rank() > 1:
        found.append(
            (caught(lambda: sequence_to_heads(X, PLAN, pair)), f"global rank {dist.get_rank()} is no member")
        )
        found.append((caught(lambda: DistributedAttention(group=pair)(X, KV, KV)), "no member"))
    else:
        found.append((caught(lambda: sequence_to_heads(X, PLAN, pair)), "the group has 2 ranks, the plan 1"))
    return found


@pytest.mark.gloo
@pytest.mark.parametrize("launch", [on_virtual, on_gloo])
def test_groups(launch: Any) -> None:
    for found in launch(groups_of_others, 4):
        for error, words in found:
            check(error, errors.GroupError, words)


def test_a_mesh_of_another_rank_or_run() -> None:
    def make() -> DeviceMesh:
        return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))["sequence"]

    mesh = on_virtual(make, 4)[0]

    def body() -> SeqparError:
        return caught(lambda: sequence_to_heads(X, PLAN, mesh))

    for error in on_virtual(body, 4):
        check(error, errors.GroupError, "the device mesh is not in use")


def disagreeing(rank: int, what: str) -> SeqparError:
    """Rank 1 comes with something else; without a plan all ranks raise the same."""
    query, kv, layout = torch.zeros(2, 5, 6, 4), torch.zeros(2, 5, 2, 4), "b s h d"
    value = kv
    if rank == 1:
        if what == "query heads":
            query = query[:, :, :4]
        if what == "kv heads":
            kv = value = kv[:, :, :1]
        if what == "head dim":
            query, kv = query[..., :2], kv[..., :2]
        if what == "value dim":
            value = kv[..., :3]
        if what == "batch":
            query, kv, value = query[:1], kv[:1], value[:1]
        if what == "dtype":
            query, kv, value = query.bfloat16(), kv.bfloat16(), value.bfloat16()
        if what == "layout":
            query, kv, value, layout = (
                query.transpose(0, 1),
                kv.transpose(0, 1),
                value.transpose(0, 1),
                "s b h d",
            )
        if what == "requires grad":
            query = query.requires_grad_()
    return caught(lambda: DistributedAttention(layout=layout)(query, kv, value))


def disagree(what: str) -> SeqparError:
    return disagreeing(dist.get_rank(), what)


class Scaled(torch.nn.Module):
    """A local attention with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return fused_attention(query, key, value, layout="b s h d") * self.scale


def need_apart(module: str) -> SeqparError:
    rank = dist.get_rank()
    shards = [torch.ones(1, 2, 4, 4, requires_grad=rank == 0) for _ in range(3)]
    if module == "block":
        block = UlyssesBlock(8, 4, local_attention=Scaled())
        for projection in (block.query, block.key, block.value):
            projection.requires_grad_(False)
        return caught(lambda: block(torch.ones(1, 2, 8, requires_grad=rank == 0)))
    if module == "deepspeed":
        return caught(lambda: deepspeed.DistributedAttention(Scaled(), None, 2, 1)(*shards, 0))
    return caught(lambda: DistributedAttention(Scaled())(*shards))


@pytest.mark.parametrize("module", ["attention", "block", "deepspeed"])
def test_what_the_local_attention_needs_does_not_hide_that_shards_disagree(module: str) -> None:
    words = "needed on rank 0; needed by the local attention alone on rank 1"
    for error in on_virtual(need_apart, 2, module):
        check(error, errors.RankMismatchError, words)


def trains_the_output_on_one_rank() -> bool:
    block = UlyssesBlock(8, 4).requires_grad_(False)
    block.output.requires_grad_(dist.get_rank() == 0)
    return block(torch.ones(1, 2, 8)).requires_grad


def test_what_no_exchange_depends_on_may_differ() -> None:
    assert on_virtual(trains_the_output_on_one_rank, 2) == [True, False]


@pytest.mark.gloo
@pytest.mark.parametrize("launch", [on_virtual, on_gloo])
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("query heads", "6 on rank 0; 4 on rank 1"),
        ("kv heads", "2 on rank 0; 1 on rank 1"),
        ("head dim", "4 on rank 0; 2 on rank 1"),
        ("value dim", "4 on rank 0; 3 on rank 1"),
        ("batch", "2 on rank 0; 1 on rank 1"),
        ("dtype", "float32 on rank 0; bfloat16 on rank 1"),
        ("layout", "'b s h d' on rank 0; 's b h d' on rank 1"),
        ("requires grad", "not needed on rank 0; needed on rank 1"),
    ],
)
def test_ranks_that_disagree_all_raise_the_same(launch: Any, what: str, words: str) -> None:
    found = launch(disagree, 2, what)
    assert len({str(error) for error in found}) == 1
    for error in found:
        check(error, errors.RankMismatchError, words)
        assert f"differ in {what}" in str(error)


def test_every_error_is_of_the_family() -> None:
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SeqparError)
    ]
    raised = {kind for _, kind, _ in (*ALONE.values(), *ON_ONE_RANK.values())}
    raised |= {errors.LocalAttentionError, errors.RankMismatchError}
    assert raised | {SeqparError} == set(kinds)
    assert issubclass(errors.PlanError, ValueError) and issubclass(errors.TensorError, TypeError)
