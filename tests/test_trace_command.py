"""`seqpar trace`: three scripts in the manner of public examples, scripts that are wrong, and what a script finds."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from seqpar_ref import cli
from simulator import VirtualWorld
from simulator.errors import ScriptError
from simulator.report import FILES
from simulator.script import Script

SCRIPTS = Path(__file__).parent / "scripts"
PNG = b"\x89PNG"
BEGIN = "import os, sys, torch, torch.distributed as dist\ndist.init_process_group('nccl')\nrank = dist.get_rank()\n"


def run(script: Path, out: Path, *options: str):
    """The command, and the rows of its ledger by their first word."""
    done = CliRunner().invoke(cli.app, ["trace", str(script), "--out", str(out), *options])
    ledger = out / "ledger.txt"
    rows = [line.split() for line in ledger.read_text().splitlines()] if ledger.exists() else []
    return done, {row[0]: row[1:] for row in rows if row}


def run_text(folder: Path, text: str, *options: str):
    """The same for a script that begins as scripts do and goes on with `text`."""
    script = folder / "script.py"
    script.write_text(BEGIN + text)
    return run(script, folder / "out", *options)


def check_all_is_written(done, out: Path, ranks: int) -> None:
    assert done.exit_code == 0, done.output
    assert {file.name for file in out.iterdir()} == set(FILES)
    assert (out / "hazards.txt").read_text() == "no hazards found\n"
    assert "no hazards found" in done.output
    assert all(str(out / name) in done.output for name in FILES)
    assert (out / "bytes.png").read_bytes().startswith(PNG)
    assert (out / "timeline.png").read_bytes().startswith(PNG)
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events if event["ph"] == "X"} == set(range(ranks))


def test_a_ddp_training_loop_written_for_gpus(tmp_path):
    numbers = 20 * 32 + 32 + 32 * 4 + 4
    arguments = ("--", "2", "--batch-size", "8", "--snapshot", str(tmp_path / "snapshot.pt"))
    done, ledger = run(SCRIPTS / "train_ddp.py", tmp_path / "out", "--ranks", "4", *arguments)
    check_all_is_written(done, tmp_path / "out", 4)
    steps = 2 * 128 // 4 // 8
    assert ledger["all_reduce"] == [str(steps), f"{steps * 2 * 3 * numbers * 4:,}"]
    assert "[GPU3] Epoch 1 | Batchsize: 8 | Steps: 4" in done.output
    again, _ = run(SCRIPTS / "train_ddp.py", tmp_path / "out", "--ranks", "2", *arguments)
    assert again.exit_code == 0, again.output
    assert again.output.count("Loading snapshot") == 2  # map_location="cuda:1"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no thread to a core")
def test_processes_that_a_script_starts_may_use_all_cores(tmp_path):
    cores = os.sched_getaffinity(0)
    text = f"assert os.sched_getaffinity(0) == {cores}\ndist.barrier()\nassert os.sched_getaffinity(0) == {cores}\n"
    done, _ = run_text(tmp_path, text, "--ranks", "3")
    assert done.exit_code == 0, done.output
    assert os.sched_getaffinity(0) == cores


def test_a_pipeline_of_send_and_recv(tmp_path):
    done, ledger = run(
        SCRIPTS / "pipeline.py", tmp_path, "--ranks", "3", "--seed", "5", "--", "--microbatches", "5"
    )
    check_all_is_written(done, tmp_path, 3)
    messages = 2 * 2 * 5 * 2  # links, ways, microbatches, steps
    assert ledger["send"] == [str(messages), f"{messages * 8 * 64 * 4:,}"]


@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")
def test_fsdp2_training_with_mixed_precision_written_for_gpus(tmp_path):
    layer = 96 * 32 + 96 + 32 * 32 + 32 + 64 * 32 + 64 + 32 * 64 + 32 + 4 * 32
    numbers = 3 * layer + 2 * 128 * 32
    done, ledger = run(SCRIPTS / "train_fsdp2.py", tmp_path, "--ranks", "8", "--", "--mixed-precision")
    check_all_is_written(done, tmp_path, 8)
    assert ledger["reduce_scatter_single"][1] == f"{2 * 7 * numbers * 4:,}"
    in_a_step = 7 * (numbers + 3 * layer) * 2  # bfloat16; layers are gathered again in backward
    assert ledger["all_gather_single"][1] == f"{2 * in_a_step + 7 * numbers * 4:,}"
    assert f"{numbers} numbers" in done.output


@pytest.mark.torchrun
def test_the_pipeline_is_an_ordinary_script(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    real = subprocess.run(
        [*command, str(SCRIPTS / "pipeline.py")], capture_output=True, text=True, timeout=110, env=environment
    )
    assert real.returncode == 0, real.stderr[-4000:]
    virtual, _ = run(SCRIPTS / "pipeline.py", tmp_path, "--ranks", "2")
    norms = re.compile(r"norms of the stages: \S+ \S+")
    assert norms.findall(virtual.output) == norms.findall(real.stdout) != []


def test_a_missing_wait_is_listed_with_its_line_once_for_all_ranks(tmp_path):
    text = "x = torch.ones(3)\nwork = dist.all_reduce(x, async_op=True)\nprint(x.sum())\nwork.wait()\n"
    done, ledger = run_text(tmp_path, text, "--ranks", "3")
    assert done.exit_code == 2, done.output
    hazards = (tmp_path / "out" / "hazards.txt").read_text()
    assert hazards.count("EarlyAccessError: rank 0") == 1
    assert "script.py:5 in <module>" in hazards
    assert "script.py:6 in <module>" in hazards
    assert "The same on ranks 1, 2." in hazards
    assert hazards in done.output
    assert ledger["all_reduce"][0] == "1"  # the run went on
    done, ledger = run_text(tmp_path, text, "--hazards", "raise")
    assert done.exit_code == 1
    assert "EarlyAccessError: rank 0" in done.stderr


def test_an_error_on_one_rank_is_shown_with_the_lines_of_the_script_only(tmp_path):
    text = """
def load(rank):
    return torch.nn.Linear(2, 2)(torch.ones([2, 2, 3][rank]))

dist.barrier()
dist.all_reduce(torch.ones(2))
load(rank)
"""
    done, ledger = run_text(tmp_path, text, "--ranks", "3")
    assert done.exit_code == 1
    assert "RuntimeError: mat1 and mat2 shapes cannot be multiplied" in done.stderr
    assert "\nraised on virtual rank 2\n" in done.stderr
    lines = (BEGIN + text).splitlines()
    expected = [("script.py", str(1 + lines.index(line))) for line in ("load(rank)", text.splitlines()[2])]
    assert re.findall(r'File ".*?([^/]+)", line (\d+)', done.stderr) == expected
    assert ledger["all_reduce"][0] == "1"
    assert (tmp_path / "out" / "timeline.png").exists()


def test_a_collective_in_a_branch_of_one_rank_is_explained(tmp_path):
    done, _ = run_text(tmp_path, "x = torch.ones(2)\nif rank == 0:\n    dist.all_reduce(x)\n")
    assert done.exit_code == 1
    assert "DeadlockError" in done.stderr
    assert "script.py:6 in <module>" in done.stderr
    assert "rank 3: has returned" in done.stderr


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("sys.exit(0)", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(3)", 1, "ScriptError: rank 0 called sys.exit(3)."),
        ("sys.exit('no data' if rank else 0)", 1, "ScriptError: rank 1 called sys.exit('no data')."),
    ],
)
def test_exit_codes(tmp_path, text, code, message):
    done, _ = run_text(tmp_path, text)
    assert done.exit_code == code, done.output
    assert message in done.stderr


def test_each_rank_has_its_own_main_modules_arguments_and_path(tmp_path):
    (tmp_path / "parallel_state.py").write_text(
        "import torch.distributed as dist\ndist.barrier()\nGROUP = None\n"
    )
    (tmp_path / "package" / "inner").mkdir(parents=True)
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "inner" / "__init__.py").write_text("RANK = None\n")
    before = sys.modules["__main__"], sys.argv, list(sys.path), list(sys.meta_path), torch.load, signal.signal
    done, _ = run_text(
        tmp_path,
        """
import json, pickle, signal, __main__, parallel_state, package.inner
signal.signal(signal.SIGTERM, lambda *event: None)
assert __name__ == "__main__" and __main__.rank == rank and os.path.samefile(__file__, sys.argv[0])
assert sys.argv[1:] == ["--steps", "3"] and sys.path[0] == os.path.dirname(__file__)
class Thing:
    rank = rank
assert pickle.loads(pickle.dumps(Thing())).rank == rank
things = [None] * 3
dist.all_gather_object(things, Thing())
assert {type(thing) for thing in things} == {Thing}
assert parallel_state.GROUP is None and package.inner.RANK is None
parallel_state.GROUP, package.inner.RANK, json.of_all_ranks = dist.new_group([0, 1, 2]), rank, True
sys.argv.append("own"), sys.path.append("own")
dist.all_reduce(torch.ones(2), group=parallel_state.GROUP)
import package.inner as again
assert again.RANK == rank and sys.argv.count("own") == sys.path.count("own") == 1
""",
        *("--ranks", "3", "--", "--steps", "3"),
    )
    assert done.exit_code == 0, done.output
    assert (sys.modules["__main__"], sys.argv, sys.path, sys.meta_path, torch.load, signal.signal) == before
    assert "parallel_state" not in sys.modules
    del json.of_all_ranks  # a module that is installed, or was there before, is shared


def test_compiled_functions_of_the_script(tmp_path):
    text = """
@torch.compile(backend="eager")
def twice(x):
    return 2 * x
assert torch.equal(twice(torch.full((2,), rank)), torch.full((2,), 2 * rank))
"""
    done, _ = run_text(tmp_path, text, "--ranks", "2")
    assert done.exit_code == 0, done.output


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
@pytest.mark.parametrize("options", [(), ("--cuda",)])
def test_cuda_is_the_cpu(tmp_path, options):
    done, _ = run_text(
        tmp_path,
        f"""
assert torch.cuda.is_available() == torch.accelerator.is_available() == {bool(options)}
assert torch.cuda.amp.common.amp_definitely_not_available()  # what torch itself hears
assert torch.cuda.device_count() == torch.accelerator.device_count() == 2
assert torch.cuda.current_device() == 0
torch.cuda.set_device(rank)
assert torch.cuda.current_device() == torch.accelerator.current_device_index() == rank
device = torch.device("cuda", rank)
with torch.cuda.device(1 - rank):
    assert torch.cuda.current_device() == 1 - rank
assert torch.cuda.current_device() == rank
torch.cuda.get_device_properties(device).total_memory, torch.cuda.memory_allocated(), torch.cuda.empty_cache()
made = [torch.ones(3, device=device), torch.ones(3, device="cuda"), torch.ones(3, device=rank), torch.ones(3).to(rank)]
made += [torch.ones(3).cuda(), torch.ones(3).to("cuda:0"), torch.ones(3).to(device=device), torch.ones(3).pin_memory()]
made += [torch.empty(3, pin_memory=True).fill_(1), torch.ones(3).new_ones(3, device="cuda")]
with device:
    made += [torch.ones(3)]
torch.set_default_device("cuda")
made += [torch.ones(3)]
torch.set_default_device(None)
for tensor in made:
    assert tensor.device.type == "cpu" and tensor.sum() == 3
layer = torch.nn.Linear(2, 2, device="cuda").to(rank).to(device).cuda(rank)
with torch.autocast("cuda", dtype=torch.bfloat16):
    assert layer(torch.ones(1, 2)).dtype == torch.bfloat16
with torch.autocast("cuda"):
    assert layer(torch.ones(1, 2)).dtype == torch.float16
scaler = torch.amp.GradScaler()
scaler.scale(layer(torch.ones(1, 2)).sum()).backward()
assert layer.bias.grad[0] == scaler.get_scale() > 1
torch.optim.Adam(layer.parameters()).step()
generator = torch.Generator(device="cuda").manual_seed(0)
assert isinstance(generator, torch.Generator)
torch.randn(3, generator=generator, device="cuda")
class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x
    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.full((1,), 2.0, device="cuda")
x = torch.ones(3, device="cuda", requires_grad=True)
again = lambda x: Double.apply(x) * torch.ones(1, device=device)
torch.utils.checkpoint.checkpoint(again, x, use_reentrant=True).sum().backward()
assert torch.equal(x.grad, torch.full((3,), 2.0))
torch.manual_seed(1)
first = torch.rand(1)
torch.cuda.manual_seed_all(1)
assert torch.equal(torch.rand(1, device="cuda"), first)
with torch.cuda.stream(torch.cuda.Stream()):
    torch.cuda.nvtx.range_push("work")
torch.cuda.synchronize()
mesh = torch.distributed.device_mesh.init_device_mesh("cuda", (2,))
assert mesh.size() == 2
batches = torch.utils.data.DataLoader(torch.arange(4), batch_size=2, pin_memory=True)
assert [batch.tolist() for batch in batches] == [[0, 1], [2, 3]]
dist.barrier(device_ids=[rank])
""",
        *("--ranks", "2", *options),
    )
    assert done.exit_code == 0, done.output
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(1, device="cuda:99")


def test_no_clock(tmp_path):
    run_text(tmp_path, "dist.barrier()")
    assert (tmp_path / "out" / "trace.json").exists()
    done, _ = run_text(tmp_path, "dist.barrier()", "--cluster", "none")
    assert done.exit_code == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"ledger.txt", "hazards.txt", "bytes.png"}


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (
            "nowhere.py",
            (),
            "ScriptError: nowhere.py cannot be read: No such file or directory.\n  Give the path",
        ),
        (str(SCRIPTS), (), "cannot be read: Is a directory.\n"),
        (str(SCRIPTS.parent.parent / "README.md"), (), "README.md is no Python: "),
        (
            "pipeline.py",
            ("--ranks", "0"),
            "ArgumentError: --ranks 0 is no number of ranks.\n  Use at least 1.\n",
        ),
        (
            "pipeline.py",
            ("--cluster", "b300"),
            "ClusterError: cluster='b300' is no cluster.\n  Use one of a100-node",
        ),
        ("pipeline.py", ("--ranks", "9", "--cluster", "h100-node"), "ClusterError: 9 ranks do not fit"),
        ("pipeline.py", ("--hazards", "ignore"), "WorldError: hazards='ignore' is no policy.\n  Use 'raise'"),
        ("pipeline.py", ("--out", __file__), "is no folder: File exists.\n  Name another one.\n"),
    ],
)
def test_bad_input_is_named_without_a_traceback(tmp_path, script, options, message):
    path = SCRIPTS / script if script == "pipeline.py" else Path(script)
    done, _ = run(path, tmp_path / "out", *options)
    assert done.exit_code == 1
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


def test_in_python(tmp_path):
    script = Script(SCRIPTS / "pipeline.py", ["--steps", "1"])
    world = VirtualWorld(2, singletons=script.singletons)
    script.run(world)
    world.ledger.expect(2 * 4 * 8 * 64 * 4, kind="send", calls=8)
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(ScriptError, match=r"broken\.py is no Python: invalid syntax"):
        Script(tmp_path / "broken.py")


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "seqpar_ref.cli", "trace", "--help"]
    environment = dict(os.environ, COLUMNS="200", NO_COLOR="1", TERM="dumb")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    for option in ("--ranks", "--cluster", "--out", "--seed", "--hazards", "--cuda"):
        assert option in done.stdout
