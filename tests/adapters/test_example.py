"""The example that trains two adapters and merges them by recipes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

pytestmark = pytest.mark.torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_adapters.py"


def test_every_merge_of_trained_adapters_is_better_than_the_base_on_both_tasks(tmp_path):
    spec = importlib.util.spec_from_file_location("train_adapters", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    table = example.run(tmp_path)
    base = table.pop("base")
    adapters = {task: table.pop(f"adapter {task}") for task in example.TASKS}
    for task, other in (("up", "down"), ("down", "up")):
        alone = adapters[task]
        assert alone[task] < 0.2 * base[task]
        assert alone[other] > base[other]  # an adapter alone harms the other task
        for method, losses in table.items():
            assert alone[task] < losses[task] < 0.9 * base[task], method
    assert set(table) == set(example.MERGES)
