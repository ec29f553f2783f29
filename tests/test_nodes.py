"""Two hosts: network namespaces that are joined by a cable of their own. Needs root and iproute2, on Linux.

The addresses exist inside of the namespaces only. Everything that a test makes is removed again, also if it fails.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seqpar_ref.validate_cases import cases_for

HOSTS = {f"seqpar-{os.getpid()}-{host}": f"10.77.0.{host}" for host in (1, 2)}
FIRST = "10.77.0.1"
CABLE = "cable"


def ip(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, timeout=20)


def why_not() -> str | None:
    """Why namespaces cannot be made here, or None if they can."""
    if shutil.which("ip") is None:
        return "needs iproute2 (Debian: apt-get install iproute2)"
    made = ip("netns", "add", f"seqpar-{os.getpid()}")
    if made.returncode != 0:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    inside = ip("-n", f"seqpar-{os.getpid()}", "link", "add", "one", "type", "veth", "peer", "name", "two")
    ip("netns", "delete", f"seqpar-{os.getpid()}")
    return (
        f"cables between namespaces cannot be made here: {inside.stderr.strip()}"
        if inside.returncode
        else None
    )


NOT_HERE = why_not()
pytestmark = [
    pytest.mark.torchrun,
    pytest.mark.slow,
    pytest.mark.skipif(NOT_HERE is not None, reason=str(NOT_HERE)),
]


@pytest.fixture
def hosts():
    """The names of the two hosts. Each has an interface CABLE and its address of HOSTS."""
    first, second = HOSTS
    with contextlib.ExitStack() as undo:
        for host in HOSTS:
            assert ip("netns", "add", host).returncode == 0
            undo.callback(ip, "netns", "delete", host)
        made = ip("-n", first, "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", second)
        assert made.returncode == 0, made.stderr
        for host, address in HOSTS.items():
            for arguments in (
                ("address", "add", f"{address}/24", "dev", CABLE),
                ("link", "set", "lo", "up"),
                ("link", "set", CABLE, "up"),
            ):
                assert ip("-n", host, *arguments).returncode == 0
        yield first, second


@contextlib.contextmanager
def started(commands: dict[str, tuple[str, list[str], dict[str, str]]], folder: Path):
    """Processes on hosts, by name: (host, Python's arguments, environment). What they print is in `folder`."""
    processes = {}
    with contextlib.ExitStack() as files:
        try:
            for name, (host, arguments, variables) in commands.items():
                out = files.enter_context((folder / name).open("w"))
                variables = {"GLOO_SOCKET_IFNAME": CABLE, "OMP_NUM_THREADS": "1", **variables}
                processes[name] = subprocess.Popen(
                    ["ip", "netns", "exec", host, sys.executable, "-m", *arguments],
                    stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **variables},
                )  # fmt: skip
            yield processes
        finally:
            for process in processes.values():
                process.kill()
                process.wait()


def test_torchrun_on_two_hosts(hosts, tmp_path):
    arguments = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    arguments += ["--rdzv-id", "seqpar", "--rdzv-endpoint", f"{FIRST}:29500"]
    validate = ["-m", "seqpar_ref.validate", "--backend", "gloo", "--only", "kv heads < ranks", "--no-times"]
    validate += ["--json", str(tmp_path / "json")]
    commands = {}
    for host, address in HOSTS.items():  # both have the same host name here, so torchrun is told who is first
        own = ["--local-addr", address, "--rdzv-conf", f"is_host={address == FIRST}"]
        commands[host] = host, [*arguments, *own, *validate], {}
    with started(commands, tmp_path) as processes:
        codes = [process.wait(timeout=90) for process in processes.values()]
    printed = {host: (tmp_path / host).read_text() for host in hosts}
    assert codes == [0, 0], printed
    found = json.loads((tmp_path / "json").read_text())
    expected = [case for case in cases_for(4) if case.name == "kv heads < ranks"]
    assert found["passed"] and len(found["cases"]) == len(expected) == 5
    assert all(row["virtual_bits"] for row in found["cases"])
    assert "5 of 5 cases passed" in printed[hosts[0]]
    assert "cases" not in printed[hosts[1]]  # rank 0 alone prints


def test_the_cable_is_pulled(hosts, tmp_path):
    """Four ranks, two on each host, started by their environment alone."""
    timeout = 10
    commands = {}
    for rank in range(4):
        variables = {"RANK": str(rank), "WORLD_SIZE": "4", "MASTER_ADDR": FIRST, "MASTER_PORT": "29500"}
        arguments = ["seqpar_ref.validate", "--backend", "gloo", "--timeout", str(timeout), "--no-times"]
        commands[str(rank)] = hosts[rank // 2], arguments, variables
    with started(commands, tmp_path) as processes:
        wait_for(tmp_path / "0", "checking 58 cases", seconds=60)
        time.sleep(1)
        assert ip("-n", hosts[0], "link", "set", CABLE, "down").returncode == 0
        pulled = time.monotonic()
        codes = [process.wait(timeout=3 * timeout) for process in processes.values()]
        took = time.monotonic() - pulled
    said = [(tmp_path / str(rank)).read_text() for rank in range(4)]
    assert codes == [1, 1, 1, 1], said
    assert took < 2 * timeout
    for rank in (0, 1):
        assert re.search(rf"^rank {rank}: validate stopped: rank [23] \(.*\) is missing", said[rank], re.M), (
            said[rank]
        )
        for other in (2, 3):
            assert f"rank {other} (host" in said[rank]
    for rank in (2, 3):
        assert (
            f"rank {rank}: validate stopped: rank 0 ({FIRST}, port 29500), which keeps the store"
            in said[rank]
        )


def wait_for(file: Path, text: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while text not in file.read_text():
        assert time.monotonic() < deadline, file.read_text()
        time.sleep(0.1)
