"""Shared by all tests: one thread, one seed, the nursery that gloo workers are forked from, and the docs site."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

from tests import launch

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shapes_unchecked() -> Iterator[None]:
    """For a test that repeats a program many times, which another test runs with the shapes of all calls checked."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the docs site, built once, without a warning and, where Linux lets us, without a network."""
    mkdocs = shutil.which("mkdocs", path=str(Path(sys.executable).parent))
    if mkdocs is None:
        pytest.skip("needs the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    offline = ["unshare", "--map-root-user", "--net"]
    may = shutil.which("unshare") and not subprocess.run([*offline, "true"], capture_output=True).returncode
    done = subprocess.run(
        [*(offline if may else ()), mkdocs, "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def pytest_collection_finish(session: pytest.Session) -> None:
    """All test modules are imported, and no test has run a backward pass yet."""
    if session.items and not session.config.option.collectonly:
        launch.start_nursery()
