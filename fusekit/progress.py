"""How far a merge is, for whoever shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Bytes of the output, or of merged adapters: how many of how many, after how many seconds."""

    written: int
    total: int
    seconds: float
