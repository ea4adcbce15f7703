"""The peak of this program, not of the one that started it."""

from __future__ import annotations

import platform
import subprocess
import sys

import numpy as np
import pytest

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


BLOCKS = """
import resource
import numpy as np
from fusekit.memory import reuse_freed_blocks

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        [np.ones(1 << 20, np.uint8) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
first = faults()
reuse_freed_blocks()
faults()
print(first, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc's allocator does")
def test_freed_blocks_are_used_again_instead_of_fetched_anew() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS], capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert after < before / 10
