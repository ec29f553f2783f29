"""Execute the notebooks. Each is edited as a py:percent file; this makes the .ipynb beside it, outputs included.

python notebooks/execute.py            write the notebooks, and their pages for the docs site
python notebooks/execute.py --check    change nothing; say what is stale and end with exit code 1
"""

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

FOLDER = Path(__file__).parent
PAGES = FOLDER.parent / "docs" / "notebooks"


def executed(source: Path) -> nbformat.NotebookNode:
    """The notebook of a py:percent file, run from the top in a fresh kernel. Nothing in it depends on the hour."""
    notebook = jupytext.read(source)
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=120, record_timing=False, coalesce_streams=True
    )
    client.execute(cwd=str(FOLDER.parent))
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    notebook.metadata["jupytext"] = {"formats": "ipynb,py:percent"}
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def files_of(source: Path) -> dict[Path, str]:
    """Every file that is made from one py:percent file, with its content."""
    notebook = executed(source)
    made = {source.with_suffix(".ipynb"): nbformat.writes(notebook) + "\n"}
    page, resources = MarkdownExporter().from_notebook_node(notebook)
    for name, content in resources["outputs"].items():
        new_name = f"{source.stem}_{name}"
        page = page.replace(name, new_name)
        made[PAGES / new_name] = content.decode()
    made[PAGES / f"{source.stem}.md"] = page
    return made


def main() -> int:
    check = "--check" in sys.argv[1:]
    stale = []
    for source in sorted(FOLDER.glob("[0-9]*.py")):
        print(f"{source.name}: executing ...", flush=True)
        for path, content in files_of(source).items():
            if path.exists() and path.read_text(encoding="utf-8") == content:
                continue
            stale.append(str(path.relative_to(FOLDER.parent)))
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'stale: run python notebooks/execute.py' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
