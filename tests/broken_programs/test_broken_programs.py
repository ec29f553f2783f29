"""Each broken program gives its error, which names rank and line; none hangs; mended, none is reported."""

import inspect
import json
from pathlib import Path

import pytest

from simulator import VirtualWorld
from tests.broken_programs.programs import BROKEN

GLOO = json.loads(Path(__file__).with_name("gloo.json").read_text(encoding="utf-8"))
NAMES_NO_LINE = ("exception_on_one_rank",)  # it comes out as it is, with its own traceback


def test_there_are_enough_of_them():
    assert len(BROKEN) >= 24 and set(BROKEN) == set(GLOO)


@pytest.mark.parametrize("name", BROKEN)
def test_it_gives_its_error(name):
    broken = BROKEN[name]
    with pytest.raises(broken.error) as caught:
        VirtualWorld(broken.size).run(broken.program, False)
    message = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    lines, first = inspect.getsourcelines(broken.program)
    marked = [first + number for number, line in enumerate(lines) if line.rstrip().endswith("# HERE")]
    assert marked or name in NAMES_NO_LINE
    traceback = "".join(f"{entry.path}:{entry.lineno + 1} " for entry in caught.traceback)
    for line in marked:
        assert f"{inspect.getsourcefile(broken.program)}:{line} " in f"{message} {traceback}"
    assert "rank" in message
    if broken.rank is not None:
        assert f"rank {broken.rank}" in message


@pytest.mark.parametrize("name", BROKEN)
def test_mended_it_is_not_reported(name):
    broken = BROKEN[name]
    expected = VirtualWorld(broken.size).run(broken.program, True)
    for seed in range(5):
        assert VirtualWorld(broken.size, seed=seed).run(broken.program, True) == expected


@pytest.mark.parametrize("name", BROKEN)
def test_under_other_schedules_it_gives_an_error_too(name):
    broken = BROKEN[name]
    for seed in range(5):
        with pytest.raises(broken.error):
            VirtualWorld(broken.size, seed=seed).run(broken.program, False)
