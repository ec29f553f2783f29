"""Every public name is in the API reference, and its docstring has shapes, units, errors and a source."""

import importlib
import importlib.util
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from simulator import VirtualWorld
from tests.reference_rules import ROOT, Entry, entries

PACKAGES = ("seqpar_ref", "simulator")
POOR = '''
"""A module."""

from seqpar_ref.errors import PlanError
from torch import Tensor


def undocumented(): ...


def poor(x: Tensor, rank: int) -> int:
    """Something."""
    return _checked(rank)


def _checked(rank):
    raise PlanError("none", "none")


def good(x: Tensor, rank: int) -> int:
    """Something.

    Args:
        x: [batch, tokens].
        rank: from 0.

    Returns:
        Bytes.

    Raises:
        PlanError: always.

    Source: this one.
    """
    return _checked(rank)
'''


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_on_its_page(package, site):
    page = (site / "api" / f"{package}.html").read_text(encoding="utf-8")
    module = importlib.import_module(package)
    wanted = [entry.address for entry in entries() if entry.address.startswith(f"{package}.")]
    for name in module.__all__:
        value = getattr(module, name)
        is_module = isinstance(value, ModuleType)
        wanted.append(value.__name__ if is_module else f"{value.__module__}.{value.__qualname__}")
    missing = [address for address in wanted if f'id="{address}"' not in page]
    assert not missing, f"docs/api/{package}.md does not list {missing}"
    assert len(wanted) > 50


def test_every_docstring_has_shapes_units_errors_and_a_source():
    faults = [f"{entry.address} {fault}" for entry in entries() for fault in entry.faults()]
    assert not faults, "\n".join(faults)


def test_what_a_docstring_lacks_is_found(tmp_path, monkeypatch):
    (tmp_path / "poor_module.py").write_text(POOR, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("poor_module")
    names = ("undocumented", "poor", "good")
    found = {name: list(Entry(module, name, getattr(module, name)).faults()) for name in names}
    assert found == {
        "undocumented": ["has no docstring"],
        "poor": [
            "does not say the shapes of its tensors",
            "does not say what rank counts",
            "does not say the unit of what it returns",
            "does not say that it raises PlanError",
            "has no source",
        ],
        "good": [],
    }


def made_pages():
    path = ROOT / "docs" / "make_reference.py"
    specification = importlib.util.spec_from_file_location("make_reference", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_pages_of_commands_and_errors_are_made_from_the_code():
    made = made_pages()
    for name, page in made.PAGES.items():
        stored = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert page() == stored, f"docs/{name} is stale: run python docs/make_reference.py"


def test_every_error_has_a_mend():
    made = made_pages()
    names = [error.__name__ for errors in made.errors().values() for error in errors]
    assert sorted(names) == sorted(made.MENDS)
    for package in PACKAGES:
        module = importlib.import_module(f"{package}.errors")
        assert {name for name in vars(module) if name.endswith("Error")} <= set(names)


def test_the_fields_of_a_trace_are_on_the_page_of_file_formats():
    def program():
        x = torch.ones(64, 64)
        work = dist.all_reduce(x.clone(), async_op=True)
        x @ x
        work.wait()

    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    world = VirtualWorld(2, cluster="h100-node")
    world.run(program)
    trace = world.trace.as_json()
    fields = {*trace, *trace["otherData"]}
    for event in trace["traceEvents"]:
        fields |= {*event, *event.get("args", ())}
    assert not [field for field in sorted(fields) if f"`{field}`" not in page]
    for header in ("kind", "source line", "rank", "calls of a rank", "bytes sent", "bytes received"):
        assert header in str(world.ledger) and f"`{header}`" in page
