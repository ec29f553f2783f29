"""The names of `deepspeed.sequence.layer` in both implementations: equal bits where the original is right.

Every row of `deepspeed_cases.py` runs in both on virtual ranks; what the original makes of it is the table in
docs/deepspeed.md. The rows that it gets right run over gloo as well.
"""

import contextlib
import inspect
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import seqpar_ref.deepspeed as ours
from simulator.errors import SimulatorError
from tests.defects.cases import INPUTS, Case
from tests.defects.implementations import NoAccelerator, Original
from tests.foreign import packages
from tests.foreign.deepspeed_cases import ROWS, angles, judged
from tests.foreign.models import same_bits
from tests.launch import on_gloo, on_virtual

PAGE = Path(__file__).parents[2] / "docs" / "deepspeed.md"
BEGIN, END = "<!-- table of tests/foreign/deepspeed_cases.py -->", "<!-- end of the table -->"
NAMES = [
    "DistributedAttention",
    "_SeqAllToAll",
    "single_all_to_all",
    "uneven_heads_all2all",
    "_DimZeroAllToAll",
    "apply_rotary_pos_emb",
]


def original():
    """deepspeed.sequence.layer of 0.19.0, on a CPU, without the extension that it would compile when it starts."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    layer = packages.load("deepspeed.sequence.layer")
    assert packages.load("deepspeed").__version__ == "0.19.0", packages.INSTALL["deepspeed"]
    packages.load("deepspeed.comm.torch").build_shm_op = lambda: None
    return layer


with contextlib.suppress(ModuleNotFoundError):  # the fixture says what to install
    original()  # gloo workers are forked with it: each would take its time to import it


def ask(name, numbers):
    """On a rank: what these rows get, each as a word or two and its tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = ours if name == "ours" else prepared()
    answers = []
    for number in numbers:
        if name == "original":
            from deepspeed.module_inject import tp_shard

            tp_shard.set_num_kv_heads(heads_set_beforehand(ROWS[number]))
        pairs = ROWS[number].ask(names, **ROWS[number].options)
        answers.append((judged(pairs), [got for got, _ in pairs.values()]))
    return answers


def prepared():
    """The original, as after deepspeed.initialize: its backend, and a mesh of all ranks."""
    layer = original()
    import deepspeed.comm

    layer.get_accelerator = lambda: NoAccelerator
    deepspeed.comm.init_distributed("gloo", verbose=False)
    Original.declare_sequence_parallel_size(dist.get_world_size())
    return layer


def heads_set_beforehand(row):
    """The way back of uneven heads reads the count of heads that the way there would have set."""
    heads = row.options.get("heads", 0)
    apart = row.options.get("function") == "uneven_heads_all2all" or not row.options.get("there", True)
    return (
        heads if apart and (heads % row.ranks or row.options["function"] == "uneven_heads_all2all") else None
    )


def globals_of_deepspeed():
    original()
    from deepspeed.comm import comm
    from deepspeed.module_inject import tp_shard
    from deepspeed.utils import groups

    return [(comm, "cdb"), (tp_shard, "num_kv_heads"), (groups, "mesh_device")]


def on_ranks(name, number, **options):
    """One row on virtual ranks. Each has its own values of DeepSpeed's globals."""
    own = globals_of_deepspeed() if name == "original" else []
    results = on_virtual(ask, ROWS[number].ranks, name, [number], singletons=own, **options)
    return [result for (result,) in results]


@pytest.fixture(scope="module", autouse=True)
def _cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        layer = original()
        patch.setattr(layer, "get_accelerator", layer.get_accelerator)
        yield


@pytest.fixture(scope="module")
def in_a_word():
    """What each row comes to, in the original and here, and whether both have the same bits."""
    found = []
    for number in range(len(ROWS)):
        theirs, their_word = outcome("original", number)
        mine, my_word = outcome("ours", number)
        found.append(
            (their_word, my_word, theirs is not None and mine is not None and same_bits(theirs, mine))
        )
    return found


def outcome(name, number):
    try:
        results = on_ranks(name, number)
    except SimulatorError:
        return None, "the ranks disagree on sizes"
    except Exception as error:
        return None, f"raises {type(error).__name__}"
    words = [word for word, _ in results]
    return [tensors for _, tensors in results], next((word for word in words if word != "right"), "right")


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[row.what for row in ROWS])
def test_equal_bits_where_the_original_is_right_and_right_where_it_is_not(in_a_word, number):
    theirs, mine, equal = in_a_word[number]
    if "in the place of batch_dim_idx" in ROWS[number].what:
        assert mine == "raises ArgumentError"
    else:
        assert mine == "right"
    assert equal == (theirs == "right")


def table(in_a_word):
    lines = ["| | deepspeed 0.19.0 | here |", "|---|---|---|"]
    for row, (theirs, mine, equal) in zip(ROWS, in_a_word, strict=True):
        lines.append(f"| {row.what} | {theirs} | {'equal bits' if equal else mine} |")
    return "\n".join(lines)


def test_the_table_in_the_docs_is_what_was_found(in_a_word):
    stored = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()
    assert stored == table(in_a_word), (
        f"put this between the two comments of {PAGE.name}:\n{table(in_a_word)}"
    )


@pytest.mark.gloo
@pytest.mark.parametrize("ranks", sorted({row.ranks for row in ROWS}))
def test_the_same_over_gloo(in_a_word, ranks):
    numbers = [n for n, row in enumerate(ROWS) if row.ranks == ranks and in_a_word[n][0] == "right"]
    assert numbers
    theirs, mine = (on_gloo(ask, ranks, name, numbers) for name in ("original", "ours"))
    for rank in range(ranks):
        for number, their_answer, my_answer in zip(numbers, theirs[rank], mine[rank], strict=True):
            virtual = on_ranks("ours", number)[rank]
            for answer in (their_answer, my_answer):
                assert answer[0] == "right" and same_bits(answer[1], virtual[1]), ROWS[number].what


def in_low_precision(autocast):
    """bfloat16 with float32 angles; under autocast float32 tensors, which the local attention casts."""
    case = Case(heads=4, tokens=(3, 3), dim=8)

    def local(query, key, value):
        query, key, value = (x.transpose(1, 2) for x in (query, key.to(query.dtype), value.to(query.dtype)))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    found = []
    for names in (prepared(), ours):
        inputs = [case.shard(case.whole(name), dist.get_rank()) for name in INPUTS]
        inputs = [x.to(torch.float32 if autocast else torch.bfloat16).requires_grad_() for x in inputs]
        module = names.DistributedAttention(local, dist.group.WORLD, 2, 1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = module(*inputs, 0, [table.float() for table in angles(6, 4)])
        output.sum().backward()
        found.append([output, *(x.grad for x in inputs)])
    assert [x.dtype for x in found[0]] == [x.dtype for x in found[1]] and same_bits(*found)
    return found[1][0].dtype


@pytest.mark.parametrize("autocast, dtype", [(False, torch.float32), (True, torch.bfloat16)])
def test_equal_bits_in_low_precision(autocast, dtype):
    assert on_virtual(in_low_precision, 2, autocast, singletons=globals_of_deepspeed()) == [dtype] * 2


@pytest.mark.parametrize("name", NAMES)
def test_the_signatures_begin_with_the_originals(name):
    pairs = [(getattr(original(), name), getattr(ours, name))]
    if name.endswith("ToAll"):  # an autograd function's apply takes what its forward takes behind ctx
        pairs = [(pairs[0][0].forward, pairs[0][1].apply)]
    if name == "DistributedAttention":
        pairs += [
            (getattr(pairs[0][0], part), getattr(pairs[0][1], part)) for part in ("forward", "layer_sync")
        ]
    for theirs, mine in pairs:
        expected = [p for p in inspect.signature(theirs).parameters.values() if p.name != "ctx"]
        found = list(inspect.signature(mine).parameters.values())
        for parameter, other in zip(expected, found, strict=False):
            assert (parameter.name, parameter.kind, parameter.default) == (
                other.name,
                other.kind,
                other.default,
            )
        assert {p.kind for p in found[len(expected) :]} <= {inspect.Parameter.KEYWORD_ONLY}
        assert len(found) >= len(expected)


def test_state_dicts_go_from_one_to_the_other():
    local = torch.nn.Linear(2, 2)
    modules = [names.DistributedAttention(local, None) for names in (original(), ours)]
    assert (
        list(modules[0].state_dict())
        == list(modules[1].state_dict())
        == ["local_attn.weight", "local_attn.bias"]
    )
