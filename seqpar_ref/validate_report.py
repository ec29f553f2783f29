"""What `validate` found, as tables for people and as JSON for machines."""

import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .errors import ArgumentError
from .validate_errors import Errors
from .validate_judge import Row
from .validate_times import Sizes, Time

WIDTH = 140
UNFINISHED = "validate has not come to its end: it is running, or was killed"


@dataclass
class Report:
    """Filled while the command runs; what is there can be written at any time.

    Args:
        path: of the JSON; None for none, and on all ranks but the first.
        expected: how many cases there are to be.
        doing: what the command does now, for `stop`.
        error: why the command came to no end; None if it did.
        began: when, on the clock of time.perf_counter, in seconds.
    """

    path: Path | None
    environment: dict[str, Any] = field(default_factory=dict)
    expected: int = 0
    rows: list[Row] = field(default_factory=list)
    sizes: Sizes | None = None
    times: list[Time] = field(default_factory=list)
    doing: str = ""
    error: str | None = UNFINISHED
    began: float = field(default_factory=time.perf_counter)

    @property
    def passed(self) -> bool:
        """Every case ran and passed."""
        complete = len(self.rows) == self.expected and self.error is None
        return complete and all(row.passed for row in self.rows)

    def stop(self, error: BaseException) -> None:
        """Note why the command came to no end."""
        words = (self.doing, type(error).__name__, str(error))
        self.error = ": ".join(word for word in words if word)

    def write(self) -> None:
        """Write the JSON, if it is asked for. Its fields are described in docs/formats.md.

        Raises:
            ArgumentError: the file cannot be written.
        """
        if self.path is None:
            return
        fields = {
            "passed": self.passed,
            "error": self.error,
            "seconds": time.perf_counter() - self.began,
            "environment": self.environment,
            "cases_expected": self.expected,
            "cases": [_row_fields(row) for row in self.rows],
            "times_of": None if self.sizes is None else str(self.sizes),
            "times": [_time_fields(time) for time in self.times],
        }
        try:
            self.path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            with suppress(OSError):  # rather nothing than a part, which may look like a good result
                self.path.write_text("")
            raise ArgumentError(
                f"cannot write {self.path}: {error}.", "Name another file with --json."
            ) from error

    def show_environment(self, console: Console) -> None:
        """Print the block for reports of defects."""
        for name, value in self.environment.items():
            console.print(f"{name:>10}  {value}", highlight=False, soft_wrap=True, markup=False)

    def show_cases(self, console: Console) -> None:
        """Print the table, and below it what does not hold."""
        _print_wide(console, _case_table(self.rows))
        for row in self.rows:
            for problem in row.problems:
                console.print(f"FAILED {row.case}: {problem}", highlight=False, soft_wrap=True, markup=False)
        passed = sum(row.passed for row in self.rows)
        console.print(f"{passed} of {self.expected} cases passed.", highlight=False)

    def show_times(self, console: Console) -> None:
        """Print the timing table."""
        _print_wide(console, _time_table(self.times, self.sizes))


def _print_wide(console: Console, table: Table) -> None:
    """All columns whole: a narrower terminal folds the lines itself."""
    console.width = max(WIDTH, console.width)
    console.print(table)


def _case_table(rows: list[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column("case", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    for name in ("output\ndevice", "error\nfloat64", "gradient\ndevice", "error\nfloat64", "bytes\nsent"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("as\nplanned", "same\nbits", "virtual\nbits", ""):
        table.add_column(name, no_wrap=True)
    kind = None
    for row in rows:
        if row.case.kind != kind:
            kind = row.case.kind
            table.add_row(f"{kind}: {', '.join(row.variants)}", style="bold")
        table.add_row(
            f"  {row.case.name}",
            row.case.dtype_name,
            *_errors(row.forward),
            *_errors(row.gradient),
            f"{row.bytes_sent:,}",
            _word(row.bytes_equal),
            "yes" if row.variant_bits else "NO" if row.problems else "no",
            _word(row.virtual_bits),
            "pass" if row.passed else "FAIL",
        )
    return table


def _errors(errors: Errors) -> tuple[str, str]:
    mark = "" if errors.small else "!"
    device, float64 = (f"{error:.1e}" if error else "0" for error in (errors.device, errors.float64))
    return mark + device, mark + float64


def _word(holds: bool | None) -> str:
    return {None: "-", True: "yes", False: "NO"}[holds]


def _time_table(times: list[Time], sizes: Sizes | None) -> Table:
    table = Table(title=str(sizes), box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column("part", no_wrap=True)
    for name in ("ms", "GB/s", "hidden", "at most"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in times:
        bandwidth, hidden, bound = one.gigabytes_per_second, one.hidden, one.bound
        table.add_row(
            one.part,
            f"{1000 * one.seconds:.2f}",
            "" if bandwidth is None else f"{bandwidth:.2f}",
            "" if hidden is None else f"{hidden:.0%}",
            "" if bound is None else f"{bound:.0%}",
        )
    return table


def _row_fields(row: Row) -> dict[str, Any]:
    case = row.case
    return {
        "name": case.name,
        "kind": case.kind,
        "dtype": row.case.dtype_name,
        "layout": case.layout,
        "tokens": list(case.tokens),
        "heads": case.heads,
        "kv_heads": case.kv_heads,
        "groups": [list(members) for members in case.groups],
        "output": _error_fields(row.forward),
        "gradient": _error_fields(row.gradient),
        "bytes_sent": row.bytes_sent,
        "bytes_planned": row.bytes_planned,
        "bytes_equal": row.bytes_equal,
        "variants": list(row.variants),
        "variant_bits": row.variant_bits,
        "virtual_bits": row.virtual_bits,
        "passed": row.passed,
        "problems": list(row.problems),
    }


def _error_fields(errors: Errors) -> dict[str, float | None]:
    values = {"device": errors.device, "float64": errors.float64, "tolerance": errors.tolerance}
    return {name: value if value < float("inf") else None for name, value in values.items()}


def _time_fields(time: Time) -> dict[str, Any]:
    return {
        "part": time.part,
        "seconds": time.seconds,
        "bytes_sent": time.bytes_sent,
        "gigabytes_per_second": time.gigabytes_per_second,
        "hidden": time.hidden,
        "bound": time.bound,
    }
