"""Numba kernels on rows of float32 or float64: no files, no threads, nothing else of fusekit.

Every kernel is single-threaded, releases the GIL and is cached on disk. Sums that feed decisions
are taken per granule with a fixed association, so that results do not depend on block size, thread
count or vector width. Submodules load on first use: importing this package does not import Numba.
"""

from __future__ import annotations

import importlib
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


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"fusekit.kernels.{name}")
    raise AttributeError(f"module 'fusekit.kernels' has no attribute {name!r}")
