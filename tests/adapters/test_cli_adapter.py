from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from fusekit.adapters import load_adapter, write_adapter
from fusekit.adapters.merge import METHODS
from fusekit.cli import adapter as command
from fusekit.errors import FusekitError

from .support import random_adapter

SHAPES = {"m.q.weight": (9, 7), "m.v.weight": (6, 8)}


def run(*arguments):
    return (
        CliRunner().invoke(command.app, [str(a) for a in arguments], catch_exceptions=False).output
    )


@pytest.fixture
def folders(tmp_path):
    return [
        write_adapter(random_adapter(i, SHAPES, rank=3, scaling=0.5), tmp_path / f"task{i}")
        for i in range(3)
    ]


def test_every_method_is_offered():
    assert {method.value for method in command.Method} == set(METHODS)


def test_merge_writes_what_the_library_computes(folders, tmp_path):
    weights = [0.5, 1.0, -0.25]
    options = [o for w in weights for o in ("--weight", w)]
    output = run("merge", *folders, tmp_path / "out", "--method", "cat", *options)
    assert "cat of 3 adapters, 4 tensors, 1.08 kB" in output
    merged = load_adapter(tmp_path / "out")
    for name in SHAPES:
        expected = sum(
            w * load_adapter(f).modules[name].delta() for w, f in zip(weights, folders, strict=True)
        )
        np.testing.assert_allclose(merged.modules[name].delta(), expected, atol=1e-5)


def test_refusals_reach_the_caller(folders, tmp_path):
    with pytest.raises(FusekitError, match="needs a density"):
        run("merge", *folders, tmp_path / "out", "--method", "ties")
    assert not (tmp_path / "out").exists()


def test_extract_reports_and_writes(tmp_path):
    rng = np.random.default_rng(0)
    for name, shift in (("base", 0.0), ("model", 1.0)):
        (tmp_path / name).mkdir()
        rng = np.random.default_rng(0)
        weight = rng.standard_normal((8, 6)).astype("f4")
        save_file(
            {
                "model.q.weight": weight + np.float32(shift),
                "model.norm.weight": weight[0] + np.float32(shift),
            },
            tmp_path / name / "model.safetensors",
        )
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    output = run(
        "extract",
        tmp_path / "base",
        tmp_path / "model",
        tmp_path / "out",
        "--rank",
        1,
        "--others",
        "skip",
    )
    assert "1 modules, 0.00% of their difference missed" in output
    assert "note: model.norm.weight differs but is not in the adapter" in output
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["task_type"] == "CAUSAL_LM"
    assert written["base_model_name_or_path"] == str(tmp_path / "base")
    delta = load_adapter(tmp_path / "out").modules["model.q.weight"].delta()
    np.testing.assert_allclose(delta, 1, atol=1e-5)


def test_extracting_from_an_adapter_is_refused(folders, tmp_path):
    with pytest.raises(FusekitError, match="task0: is an adapter, expected a model"):
        run("extract", tmp_path / "base", folders[0], tmp_path / "out")


def test_packing_adding_and_unpacking(folders, tmp_path):
    output = run("pack", *folders[:2], tmp_path / "pack", "--directions", 1)
    assert "recommended: keep the adapters" in output
    assert "task2: added, relative error" in run("pack", folders[2], tmp_path / "pack", "--add")
    run("unpack", tmp_path / "pack", tmp_path / "again", "--task", "task0")
    for name, module in load_adapter(folders[0]).modules.items():
        again = load_adapter(tmp_path / "again").modules[name]
        np.testing.assert_allclose(again.delta(), module.delta(), atol=1e-4)


def test_info_prints_modules_and_overlaps(folders):
    output = run("info", *folders[:2], "--modules")
    assert "2 modules, 90 parameters, rank 3, scaling 0.5" in output
    assert "m.q.weight  linear [9, 7]  rank 3" in output
    assert "cosine" in output
    assert "1.000" in output


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from fusekit.cli.adapter import app; "
        "r = CliRunner().invoke(app, ['--help']); assert r.exit_code == 0; "
        "print([m for m in ('numpy', 'torch', 'numba', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
