"""The package of kernels names what it has."""

from __future__ import annotations

import pkgutil

from fusekit import kernels


def test_every_module_loads_by_its_name_on_first_use() -> None:
    names = {module.name for module in pkgutil.iter_modules(kernels.__path__)}
    assert names == set(kernels._SUBMODULES)
    assert all(getattr(kernels, name).__name__ == f"fusekit.kernels.{name}" for name in names)
