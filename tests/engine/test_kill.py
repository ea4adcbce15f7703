"""A merge killed at random points, again and again, ends in the bytes of one that was not.

FUSEKIT_KILLS sets the number of kills (`make soak` takes 500).
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import fusekit
from fusekit.engine import run

KILLS = int(os.environ.get("FUSEKIT_KILLS", "50"))
TENSORS = 40

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")


def merge_and_die(recipe: Path, out: Path, delay: float) -> bool:
    """Merge in a child that is killed after `delay` seconds; whether it was still at work."""
    child = os.fork()
    if child == 0:
        try:
            fusekit.merge(recipe, out, threads=2, out_shard_size=20_000)
        except BaseException:
            os._exit(1)
        os._exit(0)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the merge itself failed"
    return os.WIFSIGNALED(status)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a process with threads
def test_kills_at_random_points_do_not_change_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for name in ("base", "a", "b"):
        tensors = {f"layers.{i}.w": rng.standard_normal((16, 32)) for i in range(TENSORS)}
        (tmp_path / name).mkdir()
        save_file(
            {key: values.astype(np.float32) for key, values in tensors.items()},
            tmp_path / name / "model.safetensors",
        )
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {density: 0.4}\n"
    )
    monkeypatch.setattr(run, "SYNC_SECONDS", 0.0)
    fusekit.merge(recipe, tmp_path / "whole", threads=2, out_shard_size=20_000)
    begun = time.monotonic()
    fusekit.merge(recipe, tmp_path / "timed", threads=2, out_shard_size=20_000)
    usual = time.monotonic() - begun
    expected = contents(tmp_path / "whole")

    out, partial = tmp_path / "out", tmp_path / "out.partial"
    chance = random.Random(1)
    killed = interrupted = 0
    while killed < KILLS:
        if merge_and_die(recipe, out, chance.uniform(0.0, 1.3) * usual):
            killed += 1
            interrupted += partial.exists()
        if out.exists():
            assert contents(out) == expected
            assert fusekit.verify(out).ok
            assert not partial.exists()
            for path in (*out.iterdir(), out):
                path.rmdir() if path.is_dir() else path.unlink()
    fusekit.merge(recipe, out, threads=2, out_shard_size=20_000)
    assert contents(out) == expected
    assert interrupted > KILLS / 2, "most kills came too early or too late"
