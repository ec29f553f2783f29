"""Runs every broken program on real gloo processes and writes down what happens, in gloo.json and the docs' table.

python -m tests.broken_programs.measure_gloo
"""

import json
import re
import time
from pathlib import Path

from simulator import VirtualWorld
from tests.broken_programs.programs import BROKEN, Broken
from tests.launch import RankFailed, on_gloo, start_nursery

SECONDS = 8.0
HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "broken_programs.md"
INTRODUCTION = """# Broken programs, here and on gloo

Each of these programs is broken in a way that costs people days. The second column is the error that virtual ranks
give, within a second, with the rank and the source line. The last column is what gloo did with the same program on real
processes, measured by `python -m tests.broken_programs.measure_gloo` (PyTorch {version}, CPU, a limit of {seconds:.0f}
s, one run each: what races may end otherwise another time). The programs are in `tests/broken_programs/programs.py`,
each with its mended form, which runs without a report under several schedules.

| program | on virtual ranks | on gloo |
|---|---|---|
"""


def outcome(broken: Broken) -> str:
    """What gloo does with the program, in words."""
    if broken.needs_accelerator:
        return "not run: streams need an accelerator"
    right = VirtualWorld(broken.size).run(broken.program, True)
    try:
        found = on_gloo(broken.program, broken.size, False, timeout=SECONDS)
    except RankFailed as failure:
        lines = [line.strip() for line in str(failure).splitlines()]
        errors = [line for line in lines if "Error" in line.split(":")[0] and not line.startswith("File")]
        hang = any(line.endswith(": not done") for line in lines)
        words = f"hangs (nothing after {SECONDS:.0f} s)" if hang else ""
        if errors:
            # without the place in gloo's source, on the machine that built it
            error = re.sub(r"\[/\S+\] ", "", errors[0]).partition(". ")[0]
            words += "; another rank: " if hang else ""
            words += error[:110].replace("|", "/").replace("`", "")
        return words or f"fails: {lines[0][:110]}"
    return "right, by luck" if found == right else "wrong values, silently"


def main() -> None:
    import torch

    start_nursery()
    found = {}
    for number, (name, broken) in enumerate(BROKEN.items()):
        start = time.monotonic()
        found[name] = outcome(broken)
        print(
            f"[{number + 1}/{len(BROKEN)}] {name}: {found[name]} ({time.monotonic() - start:.1f} s)",
            flush=True,
        )
    (HERE / "gloo.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    rows = [
        f"| **{name.replace('_', ' ')}** {(broken.program.__doc__ or '').strip()} | `{broken.error.__name__}` "
        f"| {found[name]} |\n"
        for name, broken in BROKEN.items()
    ]
    text = INTRODUCTION.format(version=torch.__version__, seconds=SECONDS) + "".join(rows)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
