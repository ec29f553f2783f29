"""The notebooks are what their py:percent files say and keep to the rules for them; stale outputs are found.

All of them are executed, and their outputs compared, by `python notebooks/execute.py --check`, which .ci/run calls.
"""

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("jupytext", "nbclient")),
        reason="needs the extra `notebooks`",
    ),
]
FOLDER = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))


def execute(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(root / "notebooks" / "execute.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280)


def test_what_is_stale_fails_or_is_missing_is_found(tmp_path):
    """A changed value changes an output; a file without its notebook is found, too; so is a cell that fails."""
    (tmp_path / "notebooks").mkdir()
    shutil.copy(FOLDER / "execute.py", tmp_path / "notebooks")
    source = tmp_path / "notebooks" / "01_small.py"
    source.write_text("# %%\nprint(1)\n")
    (tmp_path / "notebooks" / "02_fails.py").write_text("# %%\n1 / 0\n")
    (tmp_path / "notebooks" / "03_needs.py").write_text(
        "# %%\n# needs: no_such_package\nimport no_such_package\n"
    )
    done = execute(tmp_path)
    assert done.returncode == 1
    assert "01_small.ipynb: written" in done.stdout and "ZeroDivisionError" in done.stdout
    assert "03_needs.py: skipped, it needs the package no_such_package" in done.stdout
    notebook = source.with_suffix(".ipynb")
    notebook.write_text(notebook.read_text().replace('"1\\n"', '"2\\n"'))
    done = execute(tmp_path, "--check", "01", "03")
    assert done.returncode == 1
    assert "01_small.ipynb: stale" in done.stdout


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_rules_for_notebooks(source):
    import jupytext  # takes seconds, so not where all test files are collected

    notebook = jupytext.read(source.with_suffix(".ipynb"))
    cells = notebook.cells
    assert notebook.metadata["jupytext"]["formats"] == "ipynb,py:percent"
    assert "extension: .py" in source.read_text().split("# ---")[1]
    assert [cell.source for cell in cells] == [cell.source for cell in jupytext.read(source).cells]
    assert cells[0].cell_type == "markdown"
    code = [cell for cell in cells if cell.cell_type == "code"]
    for cell in code:
        assert len(cell.source.splitlines()) <= 12, cell.source
        assert not re.search(r"^\s*[%!]", cell.source, re.MULTILINE), "no magics"
    for before, cell in itertools.pairwise(cells):
        if cell.cell_type == "code" and cell.outputs:
            assert "**Question.**" in before.source, cell.source
    assert code[-1].source.count("assert") > 1
    puzzles = cells[-1].source
    assert puzzles.count("<details>") == 2
