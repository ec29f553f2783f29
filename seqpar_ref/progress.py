"""What a command shows while it works: nothing that takes longer than a moment goes without a word."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


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
