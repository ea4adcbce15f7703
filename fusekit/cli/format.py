"""Numbers as people read them."""

from __future__ import annotations


def size(nbytes: int) -> str:
    """Bytes in the largest unit that leaves a number of at least 1; units are powers of 1000.

    >>> size(913_400_000)
    '913 MB'
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            value = nbytes / scale
            return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{nbytes} bytes"
