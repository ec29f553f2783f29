"""Runs `validate` on real processes while something goes wrong, and prints what each rank said and how it ended.

A script of its own, so that PyTorch is imported once: python tests/validate_faults.py FOLDER. Every scenario has
three ranks, forked from here and started by the environment variables alone, without torchrun. The scenarios run at
the same time, because they wait most of the time. They start one after the other: where many processes start at once, a
thread of one may wait for a core for seconds, and nobody can tell it from one that is stopped.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch._dynamo  # imported before the first operation in a mode
import torch.distributed as dist
import torch.distributed.nn.functional  # binds group.WORLD when it is imported, so before any group is there

from seqpar_ref import cli, validate_ranks

TIMEOUT = 12.0
APART = 1.0  # seconds from the start of one scenario to that of the next
RANKS = 3
CASE = "kv heads < ranks"
Ends = dict[str, dict[int, tuple[int, float]]]  # exit code and seconds, by scenario and rank
SCENARIOS = {
    "fine": None,
    "raises": 2,
    "raises in a collective": 2,
    "killed": 2,
    "stopped": 2,
    "hangs": 2,
    "first is killed": 0,
    "first is stopped": 0,
    "never comes": 2,
    "first never comes": 0,
    "another program listens": 0,
    "told to stop": 2,
    "first cannot print": 2,
    "all print late, first is killed": 0,
    "all print late, killed": 2,
}


def break_in(scenario: str) -> None:
    """On the rank that goes wrong: replace what it runs for the case.

    A rank that raises does so after a first exchange of this case, in which all have left the case before behind.
    """
    run = validate_ranks.run_variant
    variants = validate_ranks.VARIANTS

    def wrong(case, variant, device):
        together = scenario.startswith("raises") and variant == variants[case.kind][0]
        if case.name != CASE or together:
            return run(case, variant, device)
        if scenario == "raises":
            raise ValueError("this rank has a defect")
        if scenario == "raises in a collective":
            dist.all_to_all_single(torch.empty(7), torch.empty(5))
        if scenario.endswith(("killed", "cannot print")):
            os.kill(os.getpid(), signal.SIGKILL)
        if scenario.endswith("stopped"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if scenario == "told to stop":
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1000)

    validate_ranks.run_variant = wrong


def stop_reading() -> None:
    """From the case on, whatever this rank prints waits for ever, as on a terminal that is stopped."""
    run = validate_ranks.run_variant
    _, full = os.pipe()
    os.set_blocking(full, False)
    try:
        while True:
            os.write(full, bytes(4096))
    except BlockingIOError:
        os.set_blocking(full, True)

    def silent(case, *args):
        if case.name == CASE:
            os.dup2(full, 1)
            os.dup2(full, 2)
        return run(case, *args)

    validate_ranks.run_variant = silent


def print_late() -> None:
    """This rank's last word takes a while, as on a disk that is busy: longer than the ranks wait for one another."""
    stopped = validate_ranks.Ranks._stopped

    def late(self, verdict):
        time.sleep(self.watch.grace + 1)
        stopped(self, verdict)

    validate_ranks.Ranks._stopped = late


def start_rank(scenario: str, rank: int, port: int, folder: Path) -> int:
    """Fork one rank. Returns its process id."""
    process = os.fork()
    if process:
        return process
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    if SCENARIOS[scenario] == rank:
        break_in(scenario)
    if scenario == "first cannot print" and rank == 0:
        stop_reading()
    if scenario.startswith("all print late"):
        print_late()
    arguments = ["--timeout", str(TIMEOUT), "--only", "heads", "--no-times", "--json", str(folder / "json")]
    code = 99
    try:
        cli.app(["validate", "--backend", "gloo", *arguments])
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def note_ends(running: dict[int, tuple[str, int]], began: dict[str, float], ends: Ends, until: float) -> None:
    """Until then, note how each rank ends and when. Leave earlier if only those run that were stopped."""
    while time.monotonic() < until and not all(
        scenario.endswith("stopped") and SCENARIOS[scenario] == rank for scenario, rank in running.values()
    ):
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            scenario, rank = running.pop(process)
            seconds = time.monotonic() - began[scenario]
            ends[scenario][rank] = os.waitstatus_to_exitcode(status), seconds
        else:
            time.sleep(0.05)


def free_ports() -> Iterator[int]:
    """Ports that nobody uses now, that Linux gives to nobody who does not ask for one, and that no other process
    which runs this script takes: rank 0 takes its port seconds later.
    """
    first = 20_000 + 20 * (os.getpid() % 600)
    for port in range(first, first + 20):
        with suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            listener.close()
            yield port


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    running, began, ends = {}, {}, {scenario: {} for scenario in SCENARIOS}
    ports = free_ports()
    for scenario, victim in SCENARIOS.items():
        began[scenario] = time.monotonic()
        own = folder / scenario
        own.mkdir()
        port = next(ports)
        if scenario == "another program listens":
            mute = socket.create_server(("127.0.0.1", port))
        for rank in range(RANKS):
            if not (scenario.endswith(("never comes", "listens")) and rank == victim):
                running[start_rank(scenario, rank, port, own)] = scenario, rank
        note_ends(running, began, ends, began[scenario] + APART)
    note_ends(running, began, ends, time.monotonic() + 5 * TIMEOUT)
    for process in running:  # the stopped ones, and any that hangs
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    mute.close()
    print(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
