"""The benchmarks of the exchange and of overlap run, and what they measure is right; no time is judged."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def results_of(script: str, folder: Path, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
    """What the script prints, and the results that it writes."""
    command = [sys.executable, str(BENCHMARKS / script), "--rounds", "1", "--seconds", "0.0001", *arguments]
    command += ["--json", str(folder / "found.json")]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "found.json").read_text())["results"]


@pytest.mark.gloo
@pytest.mark.slow
def test_the_exchange_benchmark(tmp_path: Path) -> None:
    """Each variant's values are compared with one device's before anything is timed: the script would fail."""
    sizes = ("--ranks", "2", "--tokens", "16", "--kv-heads", "4")
    printed, results = results_of("exchange.py", tmp_path, *sizes)
    assert "not measured" not in printed
    assert [result["what"] for result in results] == ["exchange", "step"]
    for result in results:
        assert set(result["seconds"]) == set(result["table"])
        assert {"DeepSpeed", "yunchang", "by hand: fused", "ours: auto"} <= set(result["seconds"])
        for name, table in result["table"].items():
            assert len(result["seconds"][name]) == 1
            assert table["DeepSpeed"] > 0 and table["best by hand"] > 0 and table["yunchang"] > 0


@pytest.mark.gloo
@pytest.mark.slow
def test_the_overlap_benchmark(tmp_path: Path) -> None:
    sizes = ("--ranks", "2", "--heads", "8", "--dim", "4", "--compute", "1")
    sizes += ("--tokens", "32", "--cpu-tokens", "32")
    _, results = results_of("overlap.py", tmp_path, *sizes)
    kinds = [f"{kind}, {what}" for what in ("stand-in x1", "cpu") for kind in ("projections", "chunks")]
    assert [result["what"] for result in results] == kinds
    bounds = {name: row["bound"] for row in (results[0]["table"], results[1]["table"]) for name, row in row.items()
              if "bound" in row}  # fmt: skip
    # 8 heads on 2 ranks: 8 chunks are 4
    assert bounds == {"plain": 0, "projections": 0.625, "2 chunks": 0.5, "4 chunks": 0.75, "8 chunks": 0.75}
    assert all(len(seconds) == 1 for result in results for seconds in result["seconds"].values())
