"""The explorer without a browser: its numbers, the lines that it shows, and whether its built file is stale."""

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from explorer.from_python import collected
from tests.explorer_numbers import Setting, check_frames, check_numbers

ROOT = Path(__file__).parent.parent
BUILT = ROOT / "docs" / "explorer.js"
MEND = "run: make explorer (it needs node)"

IN_NODE = """
const { readFileSync } = require("node:fs");
require("node:vm").runInThisContext(readFileSync(process.argv[1], "utf8"));
const [name, settings] = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(settings.map((setting) => seqparExplorer[name](setting))));
"""


def run_in_node(name: str, settings: list[Setting]) -> list[Any]:
    done = subprocess.run(
        ["node", "-e", IN_NODE, str(BUILT)],
        input=json.dumps([name, settings]), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


needs_node = pytest.mark.skipif(
    not shutil.which("node"), reason="needs node; tests/browser runs the same in Chromium"
)


@needs_node
def test_numbers_are_those_of_make_plan():
    check_numbers(run_in_node)


@needs_node
def test_every_tile_shows_the_slice_that_has_its_block():
    check_frames(run_in_node)


def test_the_shown_lines_and_the_colours_are_those_of_the_packages():
    stored = (ROOT / "explorer" / "from_python.json").read_text(encoding="utf-8")
    assert stored == collected(), f"explorer/from_python.json is stale: {MEND}"


def test_the_built_file_is_made_from_these_sources():
    folder = ROOT / "explorer"
    digest = hashlib.sha256()
    for source in sorted(folder.iterdir()):
        if source.suffix in (".ts", ".css", ".js", ".json"):
            digest.update(source.name.encode() + source.read_bytes())
    first_line = BUILT.read_text(encoding="utf-8").split("\n", 1)[0]
    assert re.search(r"Sources: (\w+)$", first_line)[1] == digest.hexdigest(), (
        f"docs/explorer.js is stale: {MEND}"
    )
