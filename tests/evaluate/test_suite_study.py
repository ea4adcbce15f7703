"""The number of experts as a variable: paired subsets, scores, and what one expert alone scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fusekit.errors import FusekitError
from fusekit.evaluate import digits
from fusekit.evaluate.study import (
    StudyCell,
    curves,
    draw_subsets,
    markdown,
    run_study,
    slopes,
)
from fusekit.evaluate.suite import load_suite


def test_subsets_are_distinct_seeded_and_in_task_order() -> None:
    drawn = draw_subsets(digits.TASKS, 3, 5, seed=1)
    assert len(set(drawn)) == 5
    assert all(list(s) == sorted(s, key=digits.TASKS.index) and len(s) == 3 for s in drawn)
    assert drawn == draw_subsets(digits.TASKS, 3, 5, seed=1)
    assert drawn != draw_subsets(digits.TASKS, 3, 5, seed=2)
    assert draw_subsets(digits.TASKS, 6, 3, seed=0) == [digits.TASKS]
    with pytest.raises(FusekitError, match="count 7: expected between 1 and the suite's 6 tasks"):
        draw_subsets(digits.TASKS, 7, 1, seed=0)


def test_one_expert_keeps_everything_and_many_keep_less(tmp_path: Path) -> None:
    suite = load_suite("digits")
    cells = run_study(suite, ["linear"], [1, 2, 6], tmp_path, subsets=2)
    assert [cell.count for cell in cells] == [1, 1, 2, 2, 6]
    by_count = {curve.count: curve for curve in curves(cells)}
    assert by_count[1].held_in == pytest.approx(1.0)
    assert 1.0 > by_count[2].held_in > by_count[6].held_in
    assert slopes(cells)["linear"] < 0
    assert all(cell.held_out is not None and cell.held_out <= 1.1 for cell in cells)
    computed: list[str] = []
    again = run_study(
        suite, ["linear"], [1, 2, 6], tmp_path, subsets=2, on_progress=computed.append
    )
    assert again == cells
    assert computed == []


def test_methods_that_cannot_merge_a_count_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FusekitError, match="slerp"):
        run_study(load_suite("digits"), ["slerp"], [3], tmp_path, subsets=1)


def test_curves_and_slopes_are_means_and_least_squares() -> None:
    cells = [
        StudyCell("a", count, ("x",), value, None)
        for count, value in ((2, 0.9), (2, 0.7), (4, 0.6), (4, 0.4))
    ]
    first, second = curves(cells)
    assert (first.held_in, second.held_in) == (pytest.approx(0.8), pytest.approx(0.5))
    assert first.held_in_std == pytest.approx(0.1)
    assert first.held_out is None
    assert "| a | 0.800 ± 0.100 | 0.500 ± 0.100 | -0.150 |" in markdown(cells)
    assert slopes(cells)["a"] == pytest.approx(-0.15)
    assert np.isnan(slopes(cells[:2])["a"])
