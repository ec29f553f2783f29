"""The ledger records every collective and message, and its totals are the bytes of the world."""

import inspect

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

from simulator import VirtualWorld
from simulator.errors import LedgerError, WorldError


def program():
    rank, size = dist.get_rank(), dist.get_world_size()
    pair = dist.new_group([0, 2])
    dist.all_reduce(torch.ones(6, dtype=torch.float64))
    work = dist.all_reduce(torch.ones(3), async_op=True)
    if rank in (0, 2):
        dist.all_gather([torch.empty(5), torch.empty(5)], torch.ones(5), group=pair)
    work.wait()
    if rank == 1:
        dist.send(torch.ones(7, dtype=torch.int16), 2)
    if rank == 2:
        dist.recv(torch.empty(7, dtype=torch.int16), 1)
    splits = [rank + 1] * size
    received = torch.empty(sum(range(1, size + 1)))
    dist.all_to_all_single(received, torch.ones(sum(splits)), list(range(1, size + 1)), splits)
    dist.barrier()


def line_of(text):
    lines, first = inspect.getsourcelines(program)
    return first + next(number for number, line in enumerate(lines) if text in line)


@pytest.fixture(scope="module")
def world():
    world = VirtualWorld(3)
    world.run(program)
    return world


def test_each_collective_is_a_record(world):
    records = world.ledger.records
    found = [(x.kind, x.group, x.number, x.ranks, x.dtype) for x in records if x.kind != "send"]
    pair = next(x.group for x in records if x.kind == "all_gather")
    assert pair != "0" and sorted(found, key=lambda record: (record[1] != "0", record[2])) == [
        ("all_reduce", "0", 0, (0, 1, 2), torch.float64),
        ("all_reduce", "0", 1, (0, 1, 2), torch.float32),
        ("all_to_all_single", "0", 2, (0, 1, 2), torch.float32),
        ("barrier", "0", 3, (0, 1, 2), None),
        ("all_gather", pair, 0, (0, 2), torch.float32),
    ]
    assert {x.number: x.is_async for x in records if x.kind == "all_reduce"} == {
        0: (False,) * 3,
        1: (True,) * 3,
    }
    exchanged = next(x for x in records if x.kind == "all_to_all_single")
    assert exchanged.bytes.tolist() == [[0, 4, 4], [8, 0, 8], [12, 12, 0]]
    message = next(x for x in records if x.kind == "send")
    assert (
        message.ranks == (1, 2)
        and message.dtype == torch.int16
        and message.bytes.tolist() == [[0, 14], [0, 0]]
    )
    assert message.where(1) == f"{__file__}:{line_of('dist.send')} in program"
    assert message.where(2) == f"{__file__}:{line_of('dist.recv')} in program"


def test_the_totals_are_the_worlds_bytes(world):
    ledger = world.ledger
    np.testing.assert_array_equal(ledger.by_pair(), world.bytes)
    np.testing.assert_array_equal(ledger.by_rank()[:, 0], world.bytes.sum(axis=1))
    np.testing.assert_array_equal(ledger.by_rank()[:, 1], world.bytes.sum(axis=0))
    for totals in (ledger.by_kind(), ledger.by_line()):
        assert sum(total.bytes for total in totals.values()) == world.bytes.sum()
    assert ledger.by_kind()["all_reduce"].calls == 2
    line = f"{__file__}:{line_of('all_to_all_single(')} in program"
    assert ledger.by_line()[line] == (3, 48)


def test_a_joint_backward_adds_to_the_ledger():
    def body(x):
        return functional.all_gather_single_autograd(x * dist.get_rank(), 0, dist.group.WORLD)

    world = VirtualWorld(3, autograd="joint")
    x = torch.ones(4, requires_grad=True)
    results = world.run(body, x)
    before = len(world.ledger.records)
    sum(result.sum() for result in results).backward()
    assert len(world.ledger.records) > before > 0
    np.testing.assert_array_equal(world.ledger.by_pair(), world.bytes)


def test_expectations_that_hold(world):
    ledger = world.ledger
    ledger.expect(int(world.bytes.sum()))
    ledger.expect(48, kind="all_to_all_single", calls=1)
    ledger.expect(8, kind="all_to_all_single", rank=0)
    ledger.expect(12, kind="all_to_all_single", rank=2, to=1, line="test_ledger.py", group="0")
    ledger.expect(0, kind="send", rank=0)
    ledger.expect(14, line=f":{line_of('dist.send')} ", calls=1)
    ledger.expect(0, kind="scatter", calls=0)


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        (
            {"bytes": 47, "kind": "all_to_all_single"},
            "expected 47 bytes for kind 'all_to_all_single', counted 48 bytes in 1",
        ),
        ({"bytes": 48, "kind": "all_to_all_single", "calls": 2}, "expected 48 bytes in 2 calls"),
        ({"bytes": 0, "kind": "alltoall"}, "no collective 'alltoall'"),
        ({"bytes": 0, "rank": 3}, "no rank 3 among 3"),
        ({"bytes": 0, "to": -1}, "no rank -1"),
        ({"bytes": 0, "group": "mine"}, "group 'mine' called nothing"),
        ({"bytes": 0, "line": "train.py"}, "nothing was called at 'train.py'"),
    ],
)
def test_expectations_that_do_not_hold(world, expected, words):
    with pytest.raises(LedgerError) as caught:
        world.ledger.expect(**expected)
    assert words in str(caught.value) and isinstance(caught.value, AssertionError)


def test_a_run_has_a_ledger_of_its_own_and_a_world_may_have_none():
    world = VirtualWorld(2)
    assert world.ledger.records == []
    for _ in range(2):
        world.run(lambda: dist.barrier())
        assert len(world.ledger.records) == 1
    without = VirtualWorld(2, ledger=False)
    without.run(lambda: dist.all_reduce(torch.ones(2)))
    assert without.bytes.sum() == 16
    with pytest.raises(WorldError, match="no ledger"):
        _ = without.ledger
    with pytest.raises(WorldError, match="ledger="):
        VirtualWorld(2, ledger=1)


def test_equal_matrices_are_kept_once():
    def loop():
        for _ in range(50):
            dist.all_reduce(torch.ones(4))

    world = VirtualWorld(4)
    world.run(loop)
    assert len(world.ledger.records) == 50 and len({id(x.bytes) for x in world.ledger.records}) == 1


def test_the_table_says_what_was_sent(world):
    text = str(world.ledger)
    assert f"6 collectives and messages of 3 ranks, {world.bytes.sum():,} bytes sent" in text
    assert f"{__file__}:{line_of('dist.send')} in program" in text
    assert max(map(len, text.splitlines())) < 200
    large = VirtualWorld(64)
    large.run(lambda: dist.barrier())
    assert len(str(large.ledger).splitlines()) < 30 and "not shown" in str(large.ledger)


def test_it_draws_itself(world):
    svg = world.ledger._repr_svg_()
    assert svg.startswith("<?xml") and svg == world.ledger._repr_svg_()
    VirtualWorld(2).ledger.draw()  # nothing was sent
