"""`run(body, size, *args)`: the body of a test on every rank, the implementation as its first argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.defects.implementations import Original, Ours
from tests.defects.processes import FIRST_LIMIT_S, on_deepspeed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--implementation",
        choices=["seqpar_ref", "deepspeed"],
        default="seqpar_ref",
        help="what the defects' tests run against; deepspeed must be installed and is expected to fail",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "run" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--implementation", default="seqpar_ref")
        worlds = ["virtual", pytest.param("gloo", marks=pytest.mark.gloo)]
        if metafunc.definition.get_closest_marker("gloo"):
            worlds = ["gloo"]
        if chosen == "deepspeed":
            worlds = ["deepspeed"]
        metafunc.parametrize("run", worlds, indirect=True)


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """Starts `body(implementation, *args)` on `size` ranks and returns the results by rank."""
    if request.param == "deepspeed":
        request.getfixturevalue("compiled_extension")
        return lambda body, size, *args: on_deepspeed(body, size, Original, *args)
    from tests.launch import on_gloo, on_virtual

    launch = on_virtual if request.param == "virtual" else on_gloo
    return lambda body, size, *args: launch(body, size, Ours, *args)


@pytest.fixture(scope="session")
def compiled_extension() -> None:
    on_deepspeed(_nothing, 1, limit=FIRST_LIMIT_S)


def _nothing() -> None:
    pass
