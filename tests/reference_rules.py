"""What the API reference lists, and what the docstring of each of its names has to say.

A name is public where a page in docs/api lists it, or its module, and it has no leading underscore. Its docstring says

- shapes: `[batch, tokens]`, or the word "shape", where the annotations have a tensor or an array;
- units: each int and float among the arguments has an entry or stands in backticks; a number that is returned comes
  with a word such as "bytes", "seconds" or "ranks";
- errors: every class that it raises, by itself or through a function of the packages that it calls by name;
- a source: "Source: ..." in the docstring of its module, its class or itself.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
ENTRY = re.compile(r"^::: (\S+)\n((?:    .*\n)*)", re.MULTILINE)
UNITS = re.compile(
    r"\b(bytes|seconds|milliseconds|elements?|tokens?|(kv )?heads?|ranks?|rows|vectors|positions?|chunks|stages?|"
    r"dims?|number|how many|how often|FLOP/s|nodes?|cards?|parts?|places?|reasons?|True|False)\b",
    re.IGNORECASE,
)
SOURCE = re.compile(r"^(Source: |Sources?\n-+$)|\bSources: ", re.MULTILINE)
NEVER = {"seqpar_ref.huggingface.register": {"LayoutError"}}
"""Raised by what the function calls, but not with what it passes."""


@dataclass(frozen=True)
class Entry:
    """A class, function, method or property of the reference."""

    module: ModuleType
    name: str
    object: Any
    owner: type | None = None

    @property
    def address(self) -> str:
        """The anchor on its page."""
        return f"{self.module.__name__}.{self.name}"

    @cached_property
    def text(self) -> str:
        """Its docstring; of a method that says what another class means by it, that class's."""
        return inspect.getdoc(self.object) or ""

    @cached_property
    def annotations(self) -> dict[str, str]:
        """The annotation of each argument, and of "return", as they are written."""
        tree = _tree_of(self.module.__name__)
        return _written(tree.get(f"{self.name}.__init__") or tree[self.name])

    def faults(self) -> Iterator[str]:
        """What the docstring lacks."""
        if not self.text:
            yield "has no docstring"
            return
        around = self.text + (inspect.getdoc(self.owner) or "" if self.owner else "")
        tensors = [a for a in self.annotations.values() if re.search(r"\b(Tensor|ndarray)\b", a)]
        if any(_is_unnamed(a) for a in tensors) and not re.search(r"\[[^\]]+\]|\bshapes?\b", around):
            yield "does not say the shapes of its tensors"
        for name, annotation in self.annotations.items():
            if not re.fullmatch(r"(int|float)( \| None)?", annotation):
                continue
            if name == "return" and not UNITS.search(self.text):
                yield "does not say the unit of what it returns"
            elif name != "return" and not re.search(
                rf"^ *[\w, ]*\b{name}\b[\w, ]*: |`[^`]*\b{name}\b", around, re.M
            ):
                yield f"does not say what {name} counts"
        said = self.text.partition("Raises:")[2]
        raised = _errors_of(self) - NEVER.get(self.address, set())
        missing = sorted(error for error in raised if error not in said)
        if missing and "SeqparError" not in said:
            yield f"does not say that it raises {', '.join(missing)}"
        if not SOURCE.search((self.module.__doc__ or "") + around):
            yield "has no source"


def entries() -> list[Entry]:
    """Everything that the pages list."""
    found = []
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for target, options in ENTRY.findall(page.read_text(encoding="utf-8")):
            module = importlib.import_module(target)
            listed = re.search(r"members: \[(.*)\]", options)
            names = re.split(r",\s*", listed[1]) if listed else _own_names(module)
            for name in names:
                found += _with_members(Entry(module, name, getattr(module, name)))
    return found


def _own_names(module: ModuleType) -> list[str]:
    """What is public in a module and made there."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]


def _with_members(entry: Entry) -> Iterator[Entry]:
    if not inspect.isclass(entry.object) and not inspect.isfunction(entry.object):
        return  # a constant
    yield entry
    if not inspect.isclass(entry.object) or issubclass(entry.object, torch.autograd.Function):
        return
    for name, value in vars(entry.object).items():
        function = (
            getattr(value, "fget", None) or getattr(value, "func", None) or getattr(value, "__func__", value)
        )
        inherited = getattr(function, "__doc__", None) is None and inspect.getdoc(function)
        if inherited or not inspect.isfunction(function):
            continue  # the page of the base class says it
        if name == "__call__" or not name.startswith("_"):
            yield Entry(entry.module, f"{entry.name}.{name}", function, entry.object)


def _written(node: Any) -> dict[str, str]:
    if isinstance(node, ast.ClassDef):
        return {
            field.target.id: ast.unparse(field.annotation)
            for field in node.body
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        }
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    written = {a.arg: ast.unparse(a.annotation) for a in arguments if a.annotation}
    return {**written, "return": ast.unparse(node.returns)} if node.returns else written


@cache
def _tree_of(module: str) -> dict[str, Any]:
    """Functions, classes and methods of a module, by qualified name."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    found: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{own.name}": own for own in node.body if isinstance(own, ast.FunctionDef)}
    return found


def _is_unnamed(annotation: str) -> bool:
    """Whether a shape is left open: no jaxtyping, or one in which a dim has no name."""
    shape = re.search(r"\[Tensor, '([^']*)'\]", annotation)
    return shape is None or "_" in shape[1].split() or "..." in shape[1]


def _errors_of(entry: Entry) -> set[str]:
    module = entry.module.__name__
    if inspect.isclass(entry.object):
        made = [f"{entry.name}.{name}" for name in ("__init__", "__post_init__")]
        return set().union(*[_raised(module, name) for name in made if name in _tree_of(module)])
    return _raised(module, entry.name) if entry.name in _tree_of(module) else set()


@cache
def _raised(module: str, name: str) -> frozenset[str]:
    """Classes of the packages' errors that a function raises, itself or through those that it calls."""
    found: set[str] = set()
    pending, seen = [(module, name)], set()
    while pending:
        place = pending.pop()
        if place in seen:
            continue
        seen.add(place)
        own, called = _raises_and_calls(*place)
        found |= own
        pending += called
    return frozenset(found)


def _raises_and_calls(module: str, name: str) -> tuple[set[str], list[tuple[str, str]]]:
    owner = name.split(".")[0]
    raised, called = set(), []
    for node in ast.walk(_tree_of(module)[name]):
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            raised |= _error_names(module, error)
        if isinstance(node, ast.Call):
            called += _places(module, owner, node.func)
    return raised, called


def _error_names(module: str, error: ast.expr) -> set[str]:
    """The class that is raised: named, or what a function that makes it says that it returns."""
    if not isinstance(error, ast.Name):
        return set()
    value = getattr(importlib.import_module(module), error.id, None)
    if inspect.isfunction(value):
        return {_tree_of(value.__module__)[value.__qualname__].returns.id}
    ours = inspect.isclass(value) and value.__module__.split(".")[0] in ("seqpar_ref", "simulator")
    return {error.id} if ours else set()


def _places(module: str, owner: str, called: ast.expr) -> list[tuple[str, str]]:
    """Where a function of the packages that is called by name, or as a method of self, is written."""
    if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "self":
        name = f"{owner}.{called.attr}"
        return [(module, name)] if name in _tree_of(module) else []
    if not isinstance(called, ast.Name):
        return []
    value = inspect.unwrap(getattr(importlib.import_module(module), called.id, None) or object)
    home = getattr(value, "__module__", "")
    if home != module and home.split(".")[0] not in ("seqpar_ref", "simulator"):
        return []
    names = [value.__qualname__] if inspect.isfunction(value) else [f"{value.__qualname__}.__init__"]
    names += [f"{value.__qualname__}.__post_init__"]
    return [(home, name) for name in names if name in _tree_of(home)]
