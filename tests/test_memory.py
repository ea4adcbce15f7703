"""The peak of this program, not of the one that started it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from fusekit.memory import peak_memory

CHILD = "from fusekit.memory import peak_memory; print(peak_memory())"


def test_the_peak_grows_with_what_is_held() -> None:
    before = peak_memory()
    held = np.ones(max(before, 1 << 26), np.uint8)
    assert peak_memory() > before
    assert held.all()


def test_a_small_program_started_by_a_large_one_is_small() -> None:
    held = np.ones(1 << 28, np.uint8)
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert 1 << 22 < int(done.stdout) < held.nbytes // 2
