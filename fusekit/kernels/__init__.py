"""Numba kernels on rows of float32 or float64: no files, no threads, nothing else of fusekit.

Every kernel is single-threaded, releases the GIL and is cached on disk. Sums that feed decisions
are taken per granule with a fixed association, so that results do not depend on block size, thread
count or vector width. Submodules load on first use: importing this package does not import Numba.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import shutil
import tempfile
from typing import Any

GRANULE = 8192
"""Elements per partial sum. Blocks start at multiples of it."""

_SUBMODULES = (
    "aligned",
    "ballot",
    "codecs",
    "columns",
    "columnwise",
    "compete",
    "direct",
    "divergence",
    "elect",
    "factors",
    "floats",
    "gram",
    "linear",
    "lanes",
    "lottery",
    "lowrank",
    "masks",
    "needed",
    "norms",
    "order",
    "overlap",
    "packed",
    "pairs",
    "random",
    "ranks",
    "selected",
    "statistics",
    "stitch",
    "thin",
    "tiles",
    "trimmed",
    "vectors",
)

_WITHOUT_NUMBA = ("packed",)


@functools.cache
def are_kept() -> bool:
    """Whether compiled kernels are there for the next process.

    Numba keeps them beside the source, in the user's cache or in `NUMBA_CACHE_DIR`. Where it can
    write to none of these it would refuse to work: a temporary folder then has to do.
    """
    from numba import config, njit

    try:
        njit(cache=True)(_probe)
    except RuntimeError:
        folder = tempfile.mkdtemp(prefix="fusekit-kernels-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        config.CACHE_DIR = folder  # type: ignore[attr-defined]
        return False
    return True


def _probe() -> None:
    """Never called: Numba is asked for a place to keep it."""


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        if name not in _WITHOUT_NUMBA:
            are_kept()
        return importlib.import_module(f"fusekit.kernels.{name}")
    raise AttributeError(f"module 'fusekit.kernels' has no attribute {name!r}")
