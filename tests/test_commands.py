"""Every command and every example in README.md and docs/ runs, or its page says why not.

A block of commands is fenced as bash, an example as python, and everything else as text. They run unless a comment
stands above the block:

    <!-- not run: REASON -->
    <!-- run as: COMMAND | REASON -->             a cheaper form of the same command
    <!-- run by: tests/FILE.py::TEST | REASON -->   another test runs it

Each command runs in a folder of its own that has the repository's files and a script train.py. The examples of a page
share their names. Those of the notebooks' pages are left to tests/test_notebooks.py.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"(?:^ *<!-- ([^\n]*) -->\n\n?)?^( *)```([^\n]*)\n(.*?)^\2```$", re.MULTILINE | re.DOTALL)
REASONS = {"bash": "GPU", "python": "fragment"}  # why a block is not run
Done = subprocess.CompletedProcess[str]
MARK = re.compile(r"(not run|run as|run by): ([^|]*?)(?: \| (.+))?")


@dataclass(frozen=True)
class Block:
    """A fenced block, and the comment above it."""

    page: str
    mark: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0][:50]}"

    @property
    def how(self) -> tuple[str, str]:
        """How it runs, and what that needs to know."""
        found = MARK.fullmatch(self.mark)
        return (found[1], found[2]) if found else ("as it is", "")


def blocks_of(text: str, page: str) -> Iterator[Block]:
    for mark, indent, language, inside in FENCE.findall(text):
        inside = re.sub(f"^{indent}", "", inside, flags=re.MULTILINE)
        yield Block(page, mark if MARK.fullmatch(mark) else "", language, inside)


BLOCKS = [
    block
    for path in PAGES
    for block in blocks_of(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
]
COMMANDS = [block for block in BLOCKS if block.language == "bash"]
RUN = {  # each once, on whichever pages it stands
    text: block
    for block in COMMANDS
    for text in [block.how[1] if block.how[0] == "run as" else block.text]
    if block.how[0] in ("as it is", "run as")
}
EXAMPLES = [
    block for block in BLOCKS if block.language == "python" and not block.page.startswith("docs/notebooks/")
]


def make_folder(folder: Path) -> Path:
    """The repository's files, and a script of the reader's."""
    folder.mkdir()
    for name in ("tests", "benchmarks", "notebooks", "docs", "seqpar_ref", "simulator", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("Makefile", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copy(ROOT / "tests" / "scripts" / "pipeline.py", folder / "train.py")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    return folder


@pytest.fixture(scope="module")
def done(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Done]]]:
    """What becomes of each command that is to be tested. Two run at a time."""
    callspecs = [getattr(item, "callspec", None) for item in request.session.items]
    texts = [text for text in RUN if any(spec and spec.params.get("text") == text for spec in callspecs)]
    parent = tmp_path_factory.mktemp("commands")
    folders = [make_folder(parent / str(number)) for number in range(len(texts))]
    with ThreadPoolExecutor(2) as pool:
        yield {text: pool.submit(run, text, folder) for text, folder in zip(texts, folders, strict=True)}


def run(text: str, folder: Path) -> Done:
    assert not re.search(r"\binstall\b(?! --dry-run)", text), "the tests install nothing"
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PET_MASTER_PORT": str(port),  # torchrun's, so that two can run at a time
    }
    command = ["bash", "-euo", "pipefail", "-c", text]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.slow
@pytest.mark.parametrize("text", RUN, ids=[str(block) for block in RUN.values()])
def test_the_command_runs(text: str, done: dict[str, Future[Done]]) -> None:
    ended = done[text].result()
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("page", sorted({block.page for block in EXAMPLES}))
def test_the_examples_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page}
    for block in EXAMPLES:
        if block.page == page and block.how[0] == "as it is":
            exec(compile(block.text, page, "exec"), names)
    if page == "README.md":
        assert names["output"].shape == (2, 10, 9, 16)  # type: ignore[attr-defined]
    capsys.readouterr()


def test_every_block_says_what_it_is() -> None:
    unknown = [
        str(block)
        for block in BLOCKS
        if block.language not in ("bash", "python", "text") and not block.page.startswith("docs/notebooks/")
    ]
    assert not unknown
    assert len(COMMANDS) > 15 and len(EXAMPLES) > 10 and len(RUN) >= 5


def test_what_is_not_run_has_a_reason() -> None:
    for block in [*COMMANDS, *EXAMPLES]:
        how, what = block.how
        if how == "not run":
            assert REASONS[block.language] in what, f"{block}: {what}"
        if how == "run as":
            assert set(block.text.split()[:2]) & set(what.split()), f"{block}: {what} is another command"
        if how == "run by":
            file, _, name = what.partition("::")
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{block}: no {what}"


def test_a_block_and_its_mark_are_found() -> None:
    text = (
        "words\n\n<!-- not run: needs a GPU -->\n```bash\nseqpar\n```\n\n- item\n\n    ```text\n    a\n    ```\n\n"
        "<!-- a remark -->\n\n```bash\nmake\n```\n"
    )
    assert list(blocks_of(text, "page")) == [
        Block("page", "not run: needs a GPU", "bash", "seqpar\n"),
        Block("page", "", "text", "a\n"),
        Block("page", "", "bash", "make\n"),
    ]
