"""How much memory this process holds and has held."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np

LARGEST_REUSED = 31 << 20
"""Blocks up to this many bytes, which is nearly as far as glibc lets itself be taught."""


def peak_memory() -> int:
    """The largest resident set of this program in bytes.

    Linux keeps it per program; what `getrusage` says begins with the memory of the process that
    started this one.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status_bytes("VmHWM") or (peak if sys.platform == "darwin" else peak * 1024)


def resident_memory() -> int:
    """The resident set of this program in bytes; its peak where the system tells no more."""
    return _status_bytes("VmRSS") or peak_memory()


def reuse_freed_blocks() -> None:
    """Let the allocator keep freed blocks of megabytes for the next ones of that size.

    A block that goes back to the system costs a page fault for every 4 KiB when it is needed again,
    more than most things done with it. glibc raises its limits to the largest block freed so far;
    this frees one that was never touched. Other allocators take no notice.
    """
    np.empty(LARGEST_REUSED, np.uint8)


def _status_bytes(field: str) -> int:
    """A field of Linux's account of this process, 0 elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)
