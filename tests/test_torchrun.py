"""The same bodies under torchrun as on virtual ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "under_torchrun.py"


@pytest.mark.torchrun
def test_four_processes_under_torchrun_equal_four_virtual_ranks():
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "4",
        str(SCRIPT),
    ]
    environment = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(4):
        assert f"rank {rank} of 4: 5 cases equal to the bit" in done.stdout
