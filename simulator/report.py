"""What a run has recorded, as files in a folder: tables, a trace for Perfetto, figures.

Source: this package's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .hazards import Hazard
from .ledger import Ledger
from .trace import Trace

FILES = {
    "ledger.txt": "bytes by kind, source line and rank",
    "hazards.txt": "what touched memory in flight",
    "bytes.png": "who sent how much to whom, and from which line",
    "trace.json": "the timeline for ui.perfetto.dev or chrome://tracing",
    "timeline.png": "the same as a figure",
}
"""What can be written, and what it is."""


def write_report(
    folder: Path, ledger: Ledger, hazards: Sequence[Hazard], trace: Trace | None = None
) -> list[Path]:
    """Write all files of `FILES` for which there is something to say, and remove what an earlier report has left.

    Returns:
        the files that were written.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    (folder / "ledger.txt").write_text(f"{ledger}\n")
    (folder / "hazards.txt").write_text(f"{hazards_text(hazards)}\n")
    ledger.draw().savefig(folder / "bytes.png")
    if trace is not None and trace.spans:
        trace.save(folder / "trace.json")
        trace.draw().savefig(folder / "timeline.png")
    return [folder / name for name in FILES if (folder / name).exists()]


def hazards_text(hazards: Sequence[Hazard]) -> str:
    """Each hazard with its lines and what to add, once for all ranks that have it; or that there is none."""
    alike: dict[Any, list[Hazard]] = {}
    for hazard in hazards:
        alike.setdefault((type(hazard.error), hazard.where[:1], hazard.issued[:1]), []).append(hazard)
    texts = []
    for first, *others in alike.values():
        ranks = ", ".join(str(other.rank) for other in others)
        texts.append(
            f"{first}" + (f"\n  The same on {'ranks' if others[1:] else 'rank'} {ranks}." if others else "")
        )
    return "\n\n".join(texts) or "no hazards found"
