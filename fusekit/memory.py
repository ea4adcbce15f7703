"""How much memory this process has held."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_memory() -> int:
    """The largest resident set of this program in bytes.

    Linux keeps it per program; what `getrusage` says begins with the memory of the process that
    started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
