"""The pages of the command line and of the errors, made from the code: `python docs/make_reference.py` writes both."""

import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from seqpar_ref.cli import app

FOLDER = Path(__file__).parent
PACKAGES = ("seqpar_ref", "simulator")

MENDS: dict[str, str] = tomllib.loads((FOLDER / "mends.toml").read_text(encoding="utf-8"))
"""What to do about each error."""


def errors() -> dict[str, list[type[Exception]]]:
    """Every exception class, by package; those of errors.py come first."""
    found: dict[str, list[type[Exception]]] = {package: [] for package in PACKAGES}
    for package in PACKAGES:
        for name in sorted(_with_errors(package), key=lambda name: (name != "errors", name)):
            module = importlib.import_module(f"{package}.{name}")
            own = (
                value
                for value in vars(module).values()
                if getattr(value, "__module__", "") == module.__name__
            )
            found[package] += [
                value for value in own if inspect.isclass(value) and issubclass(value, Exception)
            ]
    return found


def _with_errors(package: str) -> list[str]:
    """Files that define an exception class."""
    files = (FOLDER.parent / package).glob("*.py")
    return [
        file.stem for file in files if re.search(r"^class \w+Error\(", file.read_text("utf-8"), re.MULTILINE)
    ]


def errors_page() -> str:
    """Cause and mend of each error."""
    lines = [
        "# Errors",
        "",
        "Every error says what is wrong, with the numbers, and in its last line what to change. Each class also",
        "derives from the built-in exception in brackets, so `except ValueError` works. (Made from the classes by",
        "`python docs/make_reference.py`.)",
    ]
    for package, classes in errors().items():
        lines += ["", f"## {package}"]
        for error in classes:
            cause = inspect.cleandoc(error.__doc__ or "").split("\n\n")[0].replace("\n", " ")
            built_in = next(base.__name__ for base in error.__mro__ if base.__module__ == "builtins")
            lines += ["", f"### {error.__name__}", "", f"(`{built_in}`) {cause}", ""]
            lines += [f"*What to change:* {MENDS[error.__name__]}"]
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    """Every command with its arguments and options."""
    command: Any = typer.main.get_command(app)
    lines = [
        "# Command line",
        "",
        "`seqpar COMMAND --help` prints this. `python -m seqpar_ref.cli` is the same command, and",
        "`python -m seqpar_ref.validate` is `seqpar validate`; these two forms can stand behind `torchrun`. (Made from",
        "the commands by `python docs/make_reference.py`.)",
    ]
    for name, sub in command.commands.items():
        lines += ["", f"## seqpar {name}", "", inspect.cleandoc(sub.help), ""]
        lines += ["| | default | |", "|---|---|---|", *_rows(sub)]
    return "\n".join(lines) + "\n"


def _rows(command: Any) -> Iterator[str]:
    for parameter in command.params:
        if parameter.name == "help":
            continue
        is_argument = parameter.param_type_name == "argument"
        names = [parameter.name.upper()] if is_argument else [*parameter.opts, *parameter.secondary_opts]
        is_none = parameter.default is None or parameter.default is False or parameter.default == ""
        default = "" if is_none else f"`{parameter.default}`"
        if is_argument and parameter.required:
            default = "needed"
        shown = ", ".join(f"`{name}`" for name in names)
        yield f"| {shown} | {default} | {parameter.help} |"


PAGES = {"errors.md": errors_page, "commands.md": commands_page}

if __name__ == "__main__":
    for page, made in PAGES.items():
        (FOLDER / page).write_text(made(), encoding="utf-8")
        print(FOLDER / page)
