"""Every public name is in the API reference, and its docstring has shapes, units, errors and a source."""

import importlib
from types import ModuleType

import pytest

from tests.reference_rules import Entry, entries

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
