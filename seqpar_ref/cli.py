"""The command line. What takes long to import is imported inside the commands."""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from .progress import Output
from .torchrun import is_first

app = typer.Typer(
    help="Sequence-parallel attention, to read, to step through and to run.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def commands() -> None:
    """Sequence-parallel attention, to read, to step through and to run."""


@app.command()
def demo(
    ranks: Annotated[
        int | None,
        typer.Option(help="Ranks that share the text. [4, or what torchrun started]", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to read, at most 8192.")] = 4096,
    backend: Annotated[
        str,
        typer.Option(
            help="virtual: ranks in this process. gloo, nccl: real processes, by torchrun or started here."
        ),
    ] = "virtual",
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text. [the US Constitution]", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option(help="smollm2, or tiny: random, needs no extra package.")] = "smollm2",
    out: Annotated[Path, typer.Option(help="Folder for the figure.")] = Path("seqpar-demo"),
) -> None:
    """A language model reads a text that is split over ranks; its logits and bytes are checked and drawn."""
    console = Output(quiet=not is_first())
    with suppress(OSError):  # a full disk; whoever needs what is printed later hears of it
        console.print("importing torch ...")
    from . import demo as demo_module
    from . import demo_processes
    from .errors import SeqparError
    from .torchrun import started_processes

    code = 0
    try:
        if ranks is None:
            ranks = started_processes(otherwise=4)
        options = demo_module.Options(ranks, tokens, backend, text, model, out)
        demo_module.check_options(options)
        if backend == "virtual":
            demo_module.run_virtual(options, console)
        else:
            demo_processes.run(options, console)
    except SeqparError as error:
        code = 1
        if is_first():
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
    raise typer.Exit(code)


@app.command()
def validate(
    ranks: Annotated[
        int | None, typer.Option(help="Ranks. [what torchrun started, else 4]", show_default=False)
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="virtual: ranks in this process. gloo, nccl: real processes, by torchrun or started here. "
            "[virtual; under torchrun that of the devices]",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds after which a missing rank is an error.")] = 30.0,
    json: Annotated[
        Path | None, typer.Option(help="Write what was found to this file, too.", show_default=False)
    ] = None,
    only: Annotated[str, typer.Option(help="Only the cases with this in their name.")] = "",
    times: Annotated[bool, typer.Option(help="Time the parts of a step.")] = True,
    schedules: Annotated[
        int, typer.Option(help="On virtual ranks: other orders of the ranks to try as well.")
    ] = 0,
) -> None:
    """Does all of it hold here? Errors against one device, bytes against the plan, bits, times.

    Exit code: 0 only if everything passed on every rank.
    """
    console = Output(quiet=not is_first())
    with suppress(OSError):
        console.print("importing torch ...")
    from . import validate as validate_module
    from .errors import SeqparError

    try:
        options = validate_module.Options(backend, ranks, timeout, json, only, schedules, times)
        passed = validate_module.run(options, console)
    except SeqparError as error:
        passed, rank = False, os.environ.get("RANK")
        prefix = "" if rank is None else f"rank {rank}: "
        print(f"{prefix}{type(error).__name__}: {error}", file=sys.stderr)
    raise typer.Exit(0 if passed else 1)


@app.command()
def trace(
    script: Annotated[Path, typer.Argument(help="A script that torchrun could start.", show_default=False)],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="What the script gets: write -- before it.", show_default=False)
    ] = None,
    ranks: Annotated[int, typer.Option(help="Virtual ranks, as torchrun's --nproc-per-node.")] = 4,
    cluster: Annotated[
        str,
        typer.Option(
            help="Hardware whose time is kept: a100-node, h100-node, a100-nodes, h100-nodes, pcie-node, or none."
        ),
    ] = "h100-nodes",
    out: Annotated[Path, typer.Option(help="Folder for what is written.")] = Path("seqpar-trace"),
    seed: Annotated[
        int | None,
        typer.Option(help="Draw another order of the ranks. [one fixed order]", show_default=False),
    ] = None,
    hazards: Annotated[
        str, typer.Option(help="record: go on and list them. raise: stop at the first. off: do not look.")
    ] = "record",
    cuda: Annotated[bool, typer.Option("--cuda", help="torch.cuda.is_available() says yes.")] = False,
) -> None:
    """Run a torchrun script on virtual ranks: who sends what to whom, from which line, when, and what is a race.

    Exit code: 0, or 1 if the script failed or no rank could go on, or 2 if hazards were found.
    """
    print("importing torch ...", flush=True)
    from simulator.errors import SimulatorError
    from simulator.report import FILES, hazards_text, write_report
    from simulator.script import Script, describe_failure
    from simulator.world import VirtualWorld

    from .errors import ArgumentError, SeqparError

    try:
        if ranks < 1:
            raise ArgumentError(f"--ranks {ranks} is no number of ranks.", "Use at least 1.")
        program = Script(script, arguments or [])
        keeps_time = cluster != "none"
        world = VirtualWorld(
            ranks,
            seed=seed,
            hazards=hazards,  # type: ignore[arg-type]
            cluster=cluster if keeps_time else None,
            singletons=program.singletons,
        )
        out.mkdir(parents=True, exist_ok=True)
    except (SeqparError, SimulatorError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except OSError as error:
        print(
            f"ArgumentError: --out {out} is no folder: {error.strerror}.\n  Name another one.",
            file=sys.stderr,
        )
        raise typer.Exit(1) from None

    print(f"running {script} on {ranks} virtual ranks ...", flush=True)
    start, failed = time.perf_counter(), False
    try:
        program.run(world, has_cuda=cuda)
    except (Exception, KeyboardInterrupt) as error:
        failed = True
        print(f"\n{describe_failure(error)}\n", file=sys.stderr, flush=True)
    ended = "stopped after" if failed else "done in"
    print(f"running {script}: {ended} {time.perf_counter() - start:.1f} s; writing {out} ...\n", flush=True)
    times = world.trace if keeps_time else None
    files = write_report(out, world.ledger, world.hazards, times)
    print(f"{world.ledger}\n\n{hazards_text(world.hazards)}\n")
    if times is not None:
        print(f"{times}\n")
    for file in files:
        print(f"{file}: {FILES[file.name]}")
    raise typer.Exit(1 if failed else 2 if world.hazards else 0)


def main(arguments: list[str] | None = None, name: str = "seqpar") -> None:
    """The console script `seqpar`. A command that failed ends the process at once.

    It may leave threads behind, in a collective or a backward pass, and PyTorch aborts a process whose interpreter
    closes while one of them comes back.
    """
    try:
        app(arguments, prog_name=name)
    except SystemExit as end:
        if end.code in (None, 0):
            raise
        code = end.code if isinstance(end.code, int) else 1
    except Exception as error:
        code = 1
        sys.excepthook(type(error), error, error.__traceback__)
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
