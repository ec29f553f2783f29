"""D6-D9: how many heads a rank gets, for any head counts and any number of models in the process."""

from __future__ import annotations

import pytest

from tests.defects.cases import Case, attend, causal_attention, check


def attend_each(implementation, cases):
    """One module a case, one after the other in the same process, as two models would."""
    modules = [implementation.attention(causal_attention(case.layout), case.layout) for case in cases]
    return [attend(module, case) for module, case in zip(modules, cases, strict=True)]


def attend_one(implementation, case):
    return attend_each(implementation, [case])[0]


@pytest.mark.parametrize("heads", [(5, 8), (8, 5, 8)], ids=str)
def test_d6_two_models_with_different_head_counts_live_in_one_process(run, heads):
    cases = [Case(heads=count, tokens=(3, 3)) for count in heads]
    results = run(attend_each, 2, cases)
    for index, case in enumerate(cases):
        check(case, [result[index] for result in results])


@pytest.mark.parametrize(("ranks", "heads", "kv_heads"), [(2, 6, 3), (4, 15, 5), (4, 14, 2)])
def test_d7_query_heads_stay_with_their_kv_head(run, ranks, heads, kv_heads):
    case = Case(heads=heads, kv_heads=kv_heads, tokens=(3,) * ranks)
    check(case, run(attend_one, ranks, case))


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (4, 1), (3, 3)])
def test_d8_fewer_heads_than_ranks(run, heads, kv_heads):
    case = Case(heads=heads, kv_heads=kv_heads, tokens=(3,) * 4)
    check(case, run(attend_one, 4, case))


def test_d9_head_counts_are_integers(run):
    case = Case(heads=59, tokens=(3, 3))  # the second rank has 29 heads, and int(29 * (59 / 29)) is 58
    check(case, run(attend_one, 2, case))
