"""The package of kernels names what it has."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

from fusekit import kernels

RUN = """
import numpy as np
from fusekit import kernels
out = np.empty(3, np.float32)
kernels.linear.weighted_sum(np.ones((2, 3), np.float32), np.ones(2), out[:0], 0.0, out)
print(kernels.are_kept(), out.sum())
"""


def test_every_module_loads_by_its_name_on_first_use() -> None:
    names = {module.name for module in pkgutil.iter_modules(kernels.__path__)}
    assert names == set(kernels._SUBMODULES)
    assert all(getattr(kernels, name).__name__ == f"fusekit.kernels.{name}" for name in names)


def run(environment: dict[str, str]) -> str:
    own = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        env={**own, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_without_a_writable_place_kernels_are_kept_until_the_process_ends(tmp_path: Path) -> None:
    # Numba then looks at NUMBA_CACHE_DIR alone, as if all other places were read-only.
    nowhere = {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator", "TMPDIR": str(tmp_path)}
    assert run(nowhere) == "False 6.0"
    assert not any(tmp_path.iterdir())
    given = tmp_path / "given"
    given.mkdir()
    assert run({**nowhere, "NUMBA_CACHE_DIR": str(given)}) == "True 6.0"
    assert any(given.iterdir())
