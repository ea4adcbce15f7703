"""Merging whole matrices holds no more memory than the plan states."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import fusekit

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

SHAPE, MODELS = (500, 1500), 3

MERGE = """
import json, re, sys
import numpy
from fusekit import merge, merge_state_dicts
recipe, out = json.loads(sys.argv[1])
# The kernel's figure for this program alone: rusage begins with that of the process it forked from.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
warm = [{"w": numpy.eye(300, 310, dtype="f4") * (i + 1)} for i in range(3)]
merge_state_dicts(warm[1:], base=warm[0], method=recipe["merge_method"], threads=1)
before = peak()
merge(recipe, out, threads=1)
print(peak() - before)
"""


@pytest.mark.parametrize("method", ["iso_cts", "opcm", "wudi"])
def test_the_stated_memory_is_not_exceeded(method: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(MODELS + 1):
        tensors = {f"layers.{j}.w": rng.normal(size=SHAPE).astype("f4") for j in range(2)}
        save_file(tensors, tmp_path / f"m{i}.safetensors")
    recipe = {
        "merge_method": method,
        "base_model": str(tmp_path / "m0.safetensors"),
        "models": [{"model": str(tmp_path / f"m{i}.safetensors")} for i in range(1, MODELS + 1)],
    }
    stated = fusekit.plan(recipe).whole_bytes
    given = json.dumps([recipe, str(tmp_path / "out")])
    done = subprocess.run(
        [sys.executable, "-c", MERGE, given], capture_output=True, text=True, check=True
    )
    grown = int(done.stdout.splitlines()[-1])
    assert 0.2 * stated <= grown <= stated
