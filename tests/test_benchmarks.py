"""The benchmarks of the exchange and of overlap run, and what they measure is right; no time is judged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


ON_LINK = [str(BENCHMARKS / "on_link.sh"), "200mbit"]


def why_no_link() -> str | None:
    """Why loopback cannot be made slow here, or None if it can."""
    if shutil.which("unshare") is None:
        return "needs unshare (Debian: apt-get install util-linux)"
    tried = subprocess.run([*ON_LINK, "true"], capture_output=True, text=True, check=False, timeout=20)
    return None if tried.returncode == 0 else f"loopback cannot be made slow here: {tried.stderr.strip()}"


NO_LINK = why_no_link()


def results_of(
    script: str, folder: Path, *arguments: str, before: tuple[str, ...] = ()
) -> tuple[str, list[dict[str, Any]]]:
    """What the script prints, and the results that it writes. `before` is what runs the command."""
    command = [*before, sys.executable, str(BENCHMARKS / script), "--rounds", "1", "--seconds", "0.0001"]
    command += [*arguments, "--json", str(folder / "found.json")]
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
    assert [result["sleeps"] is not None for result in results] == [True, True, False, False]
    bounds = {name: row["bound"] for row in (results[0]["table"], results[1]["table"]) for name, row in row.items()
              if "bound" in row}  # fmt: skip
    # 8 heads on 2 ranks: 8 chunks are 4
    chunks = {"2 chunks": 0.5, "4 chunks": 0.75, "8 chunks": 0.75, "8 by hand": 0.75}
    assert bounds == {"plain": 0, "projections": 0.625, **chunks}
    assert all(len(seconds) == 1 for result in results for seconds in result["seconds"].values())


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.skipif(NO_LINK is not None, reason=str(NO_LINK))
def test_the_overlap_benchmark_on_a_slow_link(tmp_path: Path) -> None:
    """What travels takes at least as long as the link needs for the bytes, but for the 256 kB that it lets through."""
    sizes = ("--ranks", "2", "--heads", "8", "--dim", "64", "--tokens", "256", "--compute", "0.1")
    kinds = ("--against", "stand-in", "--kinds", "chunks")
    _, (result,) = results_of("overlap.py", tmp_path, *sizes, *kinds, before=tuple(ON_LINK))
    sent = 8 * 2 * (4 * 128 * 4 * 64)  # 8 exchanges, 2 ranks, half of each one's 8 heads
    for row in result["table"].values():
        assert row["alone"] > 8 * (sent - 256 * 1024) / 200e6
