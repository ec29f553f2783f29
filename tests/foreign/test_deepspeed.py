"""DeepSpeed's DistributedAttention, 0.19.0: what works on virtual ranks as on gloo, and how D1, D6 and D7 show.

The defects are those of docs/defects.md, mended in DeepSpeed 0.19.7. There a process aborts or waits; here one named
error says which rank and which line, or all ranks return and the values are wrong.
"""

import pytest
import torch
import torch.distributed as dist

from simulator.errors import CollectiveMismatchError
from tests.defects.cases import TOLERANCE, Case, attend, causal_attention, check
from tests.defects.implementations import Original
from tests.foreign import packages
from tests.foreign.models import same_bits
from tests.launch import on_virtual

ROWS_DIFFER = (
    r"(?s)the split matrix is torn.*group rank 0 sends .* rows to group rank 1, which expects .*layer\.py"
)


@pytest.fixture(scope="module", autouse=True)
def _deepspeed():
    """DeepSpeed without its own all-reduce through shared memory, which it would compile when it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        packages.load("deepspeed.sequence.layer")
        assert packages.load("deepspeed").__version__ == "0.19.0", packages.INSTALL["deepspeed"]
        patch.setattr(packages.load("deepspeed.comm.torch"), "build_shm_op", lambda: None)
        yield


def on_ranks(body, size, *args, **options):
    """Each rank has its own values of DeepSpeed's globals: its backend, the count of heads and the mesh."""
    from deepspeed.comm import comm
    from deepspeed.module_inject import tp_shard
    from deepspeed.utils import groups

    own = [(comm, "cdb"), (tp_shard, "num_kv_heads"), (groups, "mesh_device")]
    return on_virtual(body, size, *args, singletons=own, **options)


def attend_each(cases, backward=True):
    """One module a case, one after the other in the same process, as two models would."""
    import deepspeed.comm

    deepspeed.comm.init_distributed("gloo", verbose=False)
    Original.declare_sequence_parallel_size(dist.get_world_size())
    modules = [Original.attention(causal_attention(case.layout), case.layout) for case in cases]
    if backward:
        return [attend(module, case) for module, case in zip(modules, cases, strict=True)]
    return [
        module(*(case.shard(case.whole(name), dist.get_rank()) for name in ("query", "key", "value")))
        for module, case in zip(modules, cases, strict=True)
    ]


WORKING = [Case(heads=4, tokens=(3, 3)), Case(heads=5, tokens=(3, 3)), Case(heads=7, tokens=(3, 3, 3))]


@pytest.mark.parametrize("case", WORKING, ids=["even", "uneven", "uneven on 3 ranks"])
def test_batch_first_equals_one_device(case):
    expected = on_ranks(attend_each, len(case.tokens), [case])
    check(case, [result for (result,) in expected])
    for seed in range(20):
        assert same_bits(on_ranks(attend_each, len(case.tokens), [case], seed=seed), expected)


def test_d1_sequence_first_comes_back_in_another_shape():
    case = Case(heads=4, tokens=(4, 4), dim=3, layout="s b h d")
    for rank, (output,) in enumerate(on_ranks(attend_each, 2, [case], False)):
        assert list(case.shard(case.whole("upstream"), rank).shape) == [4, 2, 4, 3]
        assert list(output.shape) == [2, 16, 1, 3]


@pytest.mark.parametrize("heads", [(5, 8), (8, 5, 8)], ids=str)
def test_d6_a_second_model_is_cut_by_the_first_ones_heads(heads):
    with pytest.raises(CollectiveMismatchError, match=ROWS_DIFFER):
        on_ranks(attend_each, 2, [Case(heads=count, tokens=(3, 3)) for count in heads])


def test_d7_a_rank_has_more_query_heads_than_kv_heads_to_go_with():
    """Its local attention raises; the world ends with that error and the rank's name, and no other rank waits."""
    with pytest.raises(RuntimeError, match="size of tensor a") as failure:
        on_ranks(attend_each, 2, [Case(heads=6, kv_heads=3, tokens=(3, 3))])
    assert failure.value.__notes__ == ["raised on virtual rank 0"]


def test_d7_a_rank_without_kv_heads_divides_by_zero():
    with pytest.raises(ZeroDivisionError) as failure:
        on_ranks(attend_each, 4, [Case(heads=14, kv_heads=2, tokens=(3,) * 4)])
    assert failure.value.__notes__ == ["raised on virtual rank 2"]


def test_d7_query_heads_attend_to_another_groups_kv_head():
    """The forward pass of 15 and 5 heads on 4 ranks raises nowhere; its backward pass is torn.

    The ranks get query heads 0-3, 4-7, 8-11, 12-14 and kv heads 0-1, 2, 3, 4. Query head i belongs to kv head i // 3:
    2 is given kv head 1, 4 and 5 are given 2, and 8 is given 3.
    """
    case = Case(heads=15, kv_heads=5, tokens=(3,) * 4)
    for rank, (output,) in enumerate(on_ranks(attend_each, 4, [case], False)):
        right = case.shard(case.answer()["output"], rank)
        wrong = (output - right).abs().amax(dim=(0, 1, 3)) > TOLERANCE
        assert torch.nonzero(wrong).flatten().tolist() == [2, 4, 5, 8]
    with pytest.raises(CollectiveMismatchError, match=ROWS_DIFFER):
        on_ranks(attend_each, 4, [case])
