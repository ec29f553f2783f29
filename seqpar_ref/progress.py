"""What a command shows while it works: nothing that takes longer than a moment goes without a word."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

from rich.console import Console

Item = TypeVar("Item")
SECONDS = 2.0  # between two lines where there is no terminal


class Output(Console):
    """Standard output. Where nobody reads it any more, as behind `| head`, a command goes on to its exit code."""

    def on_broken_pipe(self) -> None:
        """Called by rich, which would leave the program here."""
        with suppress(SystemExit):
            super().on_broken_pipe()


class Steps:
    """Says what is being done and how long it took: a spinner on a terminal, lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def step(self, doing: str) -> Iterator[None]:
        """Show `doing` while the body of the with statement runs, and its seconds afterwards."""
        start = time.perf_counter()
        if self.console.is_terminal:
            with self.console.status(f"{doing} ..."):
                yield
        else:
            self.console.print(f"{doing} ...")
            yield
        self.console.print(f"{doing}: done in {time.perf_counter() - start:.1f} s", highlight=False)

    def each(self, items: Sequence[Item], doing: str) -> Iterator[Item]:
        """The items one by one; shows `doing` and how many are done."""
        start = shown = time.perf_counter()
        with self.console.status(f"{doing} ...") as status:
            if not self.console.is_terminal:
                self.console.print(f"{doing} ...", highlight=False)
            for number, item in enumerate(items):
                if self.console.is_terminal:
                    status.update(f"{doing}: {number} of {len(items)}")
                elif time.perf_counter() - shown > SECONDS:
                    shown = time.perf_counter()
                    self.console.print(f"{doing}: {number} of {len(items)}", highlight=False)
                yield item
        self.console.print(f"{doing}: done in {time.perf_counter() - start:.1f} s", highlight=False)
