"""What the explorer takes from the Python packages: the lines that it shows, bounds, and the colours of the figures.

`python explorer/from_python.py` writes explorer/from_python.json. A test compares it with what it would write.
"""

import ast
import json
import textwrap
from pathlib import Path

from seqpar_ref.plan import MOST_RANKS
from seqpar_ref.routes import FUSED_UP_TO
from simulator.pictures import colours_of, readable_on

FOLDER = Path(__file__).parent
DRAWN_RANKS = 16

# What is shown: the file, the function, and how its first and its last line begin.
SHOWN = {
    "shards": (
        "attention.py",
        "DistributedAttention.exchange_and_attend",
        "qkv = unchecked_qkv_to_heads(",
    ),
    "pack in order": ("wire.py", "Cut.pack", "return self._without_kept("),
    "pack strided": ("wire.py", "Cut.pack", "block.in_buffer(buffer"),
    "pack ragged": ("ragged.py", "RaggedRows.write", "write_rows("),
    "in flight": ("direct.py", "exchange", "work = group.all_to_all_single("),
    "kept": ("routes.py", "Route.copy_kept", "for tensor, result", "block_there.in_tensor("),
    "arrived": ("direct.py", "exchange", "work.wait()"),
    "unpack in order": ("wire.py", "Cut.unpack", "if self.in_order", "return tensors"),
    "unpack strided": ("wire.py", "Cut.unpack", "for blocks in self.blocks", "block.in_tensor("),
    "unpack ragged": ("ragged.py", "RaggedRows.read", "torch.index_select("),
    "attention": (
        "attention.py",
        "DistributedAttention.exchange_and_attend",
        "result = attend(*qkv, own)",
    ),
    "uses": ("own_heads.py", "own_heads", "kv_of_query ="),
    "expand": ("own_heads.py", "OwnAttention.__call__", "if own.expand", "key, value ="),
    "no heads": ("own_heads.py", "OwnAttention.__call__", "if not own.query", "return connected("),
    "back": (
        "attention.py",
        "DistributedAttention.exchange_and_attend",
        "return unchecked_heads_to_sequence(result",
    ),
}


def shown_lines(name: str, function: str, first: str, last: str | None = None) -> dict[str, object]:
    """The lines of a function of seqpar_ref, from one that begins with `first` to the next with `last`."""
    source = (FOLDER.parent / "seqpar_ref" / name).read_text(encoding="utf-8")
    lines = source_of(source, function).splitlines()
    begins = [line.strip() for line in lines]
    start = next(i for i, line in enumerate(begins) if line.startswith(first))
    end = next(i for i, line in enumerate(begins[start:], start) if line.startswith(last or first))
    shown = textwrap.dedent("\n".join(lines[start : end + 1])).splitlines()
    return {"file": f"seqpar_ref/{name}", "function": function, "lines": shown}


def source_of(source: str, function: str) -> str:
    """The text of a function, or of a method, named as in `Class.method`."""
    node: ast.AST = ast.parse(source)
    for part in function.split("."):
        node = next(child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == part)
    segment = ast.get_source_segment(source, node, padded=True)
    if segment is None:
        raise LookupError(f"no source of {function}")
    return segment


def collected() -> str:
    """The text of from_python.json."""
    colours = {
        ranks: [[colour, readable_on(colour)] for colour in colours_of(ranks)]
        for ranks in range(1, DRAWN_RANKS + 1)
    }
    lines = {name: shown_lines(*where) for name, where in SHOWN.items()}
    bounds = {"fusedUpTo": FUSED_UP_TO, "mostRanks": MOST_RANKS, "drawnRanks": DRAWN_RANKS}
    return json.dumps({"lines": lines, "bounds": bounds, "colours": colours}, indent=1) + "\n"


if __name__ == "__main__":
    (FOLDER / "from_python.json").write_text(collected(), encoding="utf-8")
