"""Execute the notebooks. Each is edited as a py:percent file; this makes the .ipynb beside it, outputs included.

python notebooks/execute.py            write the notebooks, and their pages for the docs site
python notebooks/execute.py --check    change nothing; say what is stale and end with exit code 1

Names may follow: `execute.py 03 04` takes only the notebooks that begin with 03 or 04. As many run at a time as there
are cores. A notebook that has a line `# needs: PACKAGE` is skipped where that package is not installed.
"""

import asyncio
import importlib.util
import os
import re
import socket
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import MarkdownExporter

FOLDER = Path(__file__).parent
PAGES = FOLDER.parent / "docs" / "notebooks"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many kernels as cores
for _, name in socket.if_nameindex():
    if name in ("lo", "lo0"):  # without it gloo prints a warning where the host's name leads to no address
        ENVIRONMENT.setdefault("GLOO_SOCKET_IFNAME", name)


async def executed(source: Path, sockets: str) -> nbformat.NotebookNode:
    """The notebook of a py:percent file, run from the top in a fresh kernel. Nothing in it depends on the hour.

    Kernels talk through files in the folder `sockets`: of those that start together, none takes another's ports.
    """
    notebook = jupytext.read(source)
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=300, record_timing=False, coalesce_streams=True
    )
    client.create_kernel_manager()
    client.km.transport, client.km.ip = "ipc", f"{sockets}/{source.stem}"
    await client.async_execute(cwd=str(FOLDER.parent), env=ENVIRONMENT)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    notebook.metadata["jupytext"] = {"formats": "ipynb,py:percent"}
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def files_of(source: Path, notebook: nbformat.NotebookNode) -> dict[Path, str]:
    """Every file that is made from one py:percent file, with its content."""
    made = {source.with_suffix(".ipynb"): nbformat.writes(notebook) + "\n"}
    page, resources = MarkdownExporter().from_notebook_node(notebook)
    for name, content in resources["outputs"].items():
        new_name = f"{source.stem}_{name}"
        page = page.replace(name, new_name)
        made[PAGES / new_name] = content.decode()
    page = page.replace("<details>", '<details markdown="1">')  # what is inside is Markdown for the site, too
    made[PAGES / f"{source.stem}.md"] = page
    return made


def missing_package(source: Path) -> str | None:
    """A package that the notebook says it needs and that is not there."""
    needed = re.findall(r"^# needs: (\w+)$", source.read_text(encoding="utf-8"), re.MULTILINE)
    return next((name for name in needed if importlib.util.find_spec(name) is None), None)


def update(made: dict[Path, str], old_figures: set[Path], check: bool) -> list[Path]:
    """Write what has changed, unless it is only to be checked; the files that were stale."""
    stale = [path for path in old_figures if path not in made]
    for path, content in made.items():
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            stale.append(path)
    if not check:
        for path in stale:
            if path in made:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(made[path], encoding="utf-8")
            else:
                path.unlink()
    return stale


async def run(sources: list[Path], check: bool) -> int:
    """Execute them, as many at a time as there are cores; how many were stale or have failed."""
    cores, bad, done = asyncio.Semaphore(os.cpu_count() or 1), 0, 0

    async def one(source: Path) -> None:
        nonlocal bad, done
        async with cores:
            start, missing = time.monotonic(), missing_package(source)
            if missing:
                lines = [f"skipped, it needs the package {missing}"]
            else:
                try:
                    made = files_of(source, await executed(source, sockets))
                    stale = update(made, set(PAGES.glob(f"{source.stem}_output_*")), check)
                    advice = "stale, run: python notebooks/execute.py" if check else "written"
                    lines = [f"ran in {time.monotonic() - start:.1f} s"]
                    lines += [f"{path.relative_to(FOLDER.parent)}: {advice}" for path in sorted(stale)]
                    bad += bool(check and stale)
                except CellExecutionError as error:
                    lines, bad = [f"failed\n{error}"], bad + 1
            done += 1
            print(f"[{done}/{len(sources)}] {source.name}: " + "\n    ".join(lines), flush=True)

    with tempfile.TemporaryDirectory(prefix="kernels-") as sockets:
        await asyncio.gather(*map(one, reversed(sources)))  # the last ones take longest, so they start first
    return bad


def main() -> int:
    check = "--check" in sys.argv[1:]
    names = tuple(name for name in sys.argv[1:] if name != "--check") or ("",)
    sources = [source for source in sorted(FOLDER.glob("[0-9]*.py")) if source.name.startswith(names)]
    print(f"executing {len(sources)} notebooks", flush=True)
    return 1 if asyncio.run(run(sources, check)) else 0


if __name__ == "__main__":
    sys.exit(main())
