"""Imports a package that `make test` installs and `pip install -e '.[dev]'` does not."""

import contextlib
import importlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from types import ModuleType

INSTALL = {
    "yunchang": "pip install -c constraints.txt --no-deps yunchang",
    "deepspeed": "DS_BUILD_OPS=0 pip install -c constraints.txt --no-deps --no-build-isolation "
    "deepspeed hjson msgpack py-cpuinfo",
}


def load(name: str) -> ModuleType:
    """The module `name`. Its imports may warn: torch has deprecated what they use.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to do so.
    """
    package = name.partition(".")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"the tests of {package} need it ({error}).\n  Run `make test`, or: {INSTALL[package]}"
            ) from error


@contextlib.contextmanager
def standing_in(modules: Mapping[str, ModuleType]) -> Iterator[None]:
    """While this is open, these are imported under their names; afterwards nobody finds them."""
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
