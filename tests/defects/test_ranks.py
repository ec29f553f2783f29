"""D14, D17: who holds how many tokens, and which rank a process has in the group that was passed in."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from tests.defects.cases import Case, attend, causal_attention, check


def attend_one(implementation, case):
    return attend(implementation.attention(causal_attention(case.layout), case.layout), case)


def test_d14_ranks_may_hold_different_numbers_of_tokens(run):
    case = Case(heads=4, tokens=(3, 5))
    check(case, run(attend_one, 2, case))


def attend_in_strided_groups(implementation, case, declared):
    """Groups {0, 2} and {1, 3}; the original's process-wide mesh says {0, 1} and {2, 3}, or nothing."""
    implementation.declare_sequence_parallel_size(declared)
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = groups[dist.get_rank() % 2]
    attention = implementation.attention(causal_attention(case.layout), case.layout, mine)
    return attend(attention, case, rank=dist.get_rank(mine))


@pytest.mark.parametrize("declared", [2, None])
def test_d17_the_rank_is_the_one_in_the_group_that_was_passed_in(run, declared):
    case = Case(heads=5, tokens=(3, 3))
    results = run(attend_in_strided_groups, 4, case, declared)
    check(case, [results[0], results[2]])
    check(case, [results[1], results[3]])
