"""The command line. torch is imported inside the commands, so that `seqpar --help` is quick."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

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
    first = os.environ.get("RANK", "0") == "0"
    if first:
        print("importing torch ...", flush=True)
    from rich.console import Console

    from . import demo as demo_module
    from . import demo_processes
    from .errors import SeqparError

    console = Console(quiet=not first)
    code = 0
    try:
        if ranks is None:
            ranks = demo_module.started_processes(otherwise=4)
        options = demo_module.Options(ranks, tokens, backend, text, model, out)
        demo_module.check_options(options)
        if backend == "virtual":
            demo_module.run_virtual(options, console)
        else:
            demo_processes.check_device(options)
            code = demo_processes.run(options, console)
    except SeqparError as error:
        code = 1
        if first:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
    raise typer.Exit(code)


def main() -> None:
    """The console script `seqpar`."""
    app()


if __name__ == "__main__":
    main()
