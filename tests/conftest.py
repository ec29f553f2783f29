"""Shared by all tests: one thread, one seed, and the nursery that gloo workers are forked from."""

import pytest
import torch

from tests import launch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_finish(session: pytest.Session) -> None:
    """All test modules are imported, and no test has run a backward pass yet."""
    if session.items and not session.config.option.collectonly:
        launch.start_nursery()
