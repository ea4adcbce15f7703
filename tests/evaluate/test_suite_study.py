"""The number of experts as a variable: paired subsets, scores, and what one expert alone scores."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusekit.errors import FusekitError
from fusekit.evaluate import digits
from fusekit.evaluate.findings import findings
from fusekit.evaluate.study import (
    Study,
    StudyCell,
    curves,
    draw_subsets,
    run_study,
    slopes,
)
from fusekit.evaluate.study_table import markdown
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
    study = run_study([suite], ["linear"], [1, 2, 6], tmp_path, subsets=2)
    assert [cell.count for cell in study.cells] == [1, 1, 2, 2, 6]
    by_count = {curve.count: curve for curve in curves(study.cells)}
    assert by_count[1].held_in == pytest.approx(1.0)
    assert 1.0 > by_count[2].held_in > by_count[6].held_in
    assert slopes(study.cells)["digits", "linear"] < 0
    assert all(cell.held_out is not None and cell.held_out <= 1.1 for cell in study.cells)
    assert json.loads((tmp_path / "study.json").read_text()) == json.loads(
        json.dumps(study.to_dict())
    )
    computed: list[str] = []
    again = run_study(
        [suite], ["linear"], [1, 2, 6], tmp_path, subsets=2, on_progress=computed.append
    )
    assert again == study
    assert computed == []


def test_methods_that_cannot_merge_a_count_are_listed(tmp_path: Path) -> None:
    study = run_study([load_suite("digits")], ["linear", "slerp"], [3], tmp_path, subsets=1)
    assert [cell.method for cell in study.cells] == ["linear"]
    assert study.failed == {"digits, slerp, 3 experts": "does not merge 3 models"}
    assert "Not computed: digits, slerp, 3 experts" in markdown(study)
    with pytest.raises(FusekitError, match="slerp does not merge 3 models"):
        run_study([load_suite("digits")], ["slerp"], [3], tmp_path, subsets=1)


def test_suites_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FusekitError, match="2 are called 'digits'; rename them"):
        run_study([load_suite("digits")] * 2, ["linear"], [2], tmp_path)


def cell(suite: str, count: int, held_in: float, held_out: float | None = None, **more: Any) -> Any:
    axes = more.pop("axes", {})
    method = more.pop("method", "a")
    return StudyCell(suite, axes, method, count, ("x",) * count, held_in, held_out, **more)


def test_curves_and_slopes_are_means_and_least_squares() -> None:
    values = ((2, 0.9), (2, 0.7), (4, 0.6), (4, 0.4))
    cells = [cell("s", count, value) for count, value in values]
    first, second = curves(cells)
    assert (first.held_in, second.held_in) == (pytest.approx(0.8), pytest.approx(0.5))
    assert first.held_in_std == pytest.approx(0.1)
    assert first.held_out is None
    table = markdown(Study(tuple(cells), {}, 0))
    assert "| s | a | 0.800 ± 0.100 | 0.500 ± 0.100 | -0.150 |" in table
    assert slopes(cells)["s", "a"] == pytest.approx(-0.15)
    assert np.isnan(slopes(cells[:2])["s", "a"])


def grid(held_in: Callable[[float, float, int, str], float]) -> list[StudyCell]:
    """Two sizes, two base qualities, three counts, two methods."""
    return [
        cell(
            f"{size}-{quality}",
            count,
            held_in(size, quality, count, method),
            1.1,
            multitask_held_out=1.0,
            axes={"size": size, "base_quality": quality},
            method=method,
        )
        for size, quality, count, method in itertools.product(
            (10.0, 20.0), (1.0, 2.0), (2, 4, 6), "ab"
        )
    ]


def test_planted_findings_are_found() -> None:
    def held_in(size: float, quality: float, count: int, method: str) -> float:
        cost = 0.1 / quality - 0.001 * size
        return 1 + 0.01 * size - cost * count - (0.2 / size if method == "b" else 0.0)

    found = {each.statement: each for each in findings(grid(held_in))}
    for statement in (
        "a better base: more held-in",
        "a larger model: more held-in",
        "merges beat the base held-out",
        "a better base: experts cost less",
        "a larger model: experts cost less",
        "a larger model (best base): methods differ less",
    ):
        assert found[statement].verdict == "pass", statement
    assert found["a better base: more held-in"].pairs == 2 * 3 * 2
    best = found["the most experts on the best and largest base beat multitask training held-out"]
    assert (best.pairs, best.holding) == (2, 2)
    assert found["a larger model: more held-out"].verdict == "undecided"


def test_suites_of_another_seed_are_further_pairs_compared_among_themselves() -> None:
    def held_in(size: float, quality: float, count: int, method: str) -> float:
        return 1 + 0.01 * size - 0.1 * count

    cells = [
        dataclasses.replace(
            each,
            suite=f"{each.suite}-{seed}",
            axes={**each.axes, "seed": seed},
            held_in=each.held_in + 5 * seed,
        )
        for seed in (0.0, 1.0)
        for each in grid(held_in)
    ]
    found = {each.statement: each for each in findings(cells)}["a larger model: more held-in"]
    assert (found.verdict, found.pairs) == ("pass", 2 * 2 * 3 * 2)
    assert found.effect == pytest.approx(0.1)


def test_reversed_findings_fail_and_noise_is_undecided() -> None:
    reversed_ = {e.statement: e for e in findings(grid(lambda s, q, c, m: 2 - q / 2 - s / 100))}
    assert reversed_["a better base: more held-in"].verdict == "fail"
    assert reversed_["a larger model: more held-in"].verdict == "fail"
    generator = np.random.default_rng(0)
    noise = {e.statement: e for e in findings(grid(lambda *_: float(generator.normal())))}
    assert noise["a better base: more held-in"].verdict == "undecided"


def test_one_suite_without_axes_tests_only_what_it_can() -> None:
    statements = [each.statement for each in findings([cell("s", 2, 0.9), cell("s", 4, 0.8)])]
    assert statements == ["every further expert costs held-in"]
