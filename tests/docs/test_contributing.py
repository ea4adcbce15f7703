"""The method that CONTRIBUTING.md builds works as it says, and its test passes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from fusekit.methods import registry
from tests.docs.markdown import ROOT, blocks

METHOD, TEST = blocks(ROOT / "CONTRIBUTING.md", "python")[:2]


def executed(code: str, name: str) -> dict[str, Any]:
    """The names a module of that code would have."""
    module = ModuleType(name)
    sys.modules[name] = module
    exec(compile(code, name, "exec"), module.__dict__)
    return module.__dict__


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "fusekit.methods.magmax", ModuleType("magmax"))
    executed(METHOD, "fusekit.methods.magmax")
    monkeypatch.setattr(registry, "_FAMILIES", (*registry._FAMILIES, "magmax"))
    registry.available.cache_clear()
    yield
    registry.available.cache_clear()


def documented_tests() -> dict[str, Callable[[], None]]:
    names = executed(TEST, "documented_test_magmax")
    return {name: test for name, test in names.items() if name.startswith("test_")}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", sorted(documented_tests()))
def test_the_documented_test_passes(name: str) -> None:
    documented_tests()[name]()
