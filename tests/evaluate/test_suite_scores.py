"""Relative scores against golden values, and their invariants."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open

from fusekit.errors import FusekitError
from fusekit.evaluate.bootstrap import interval, resample
from fusekit.evaluate.scores import average_score, relative_score
from tests.vectors import FOLDER

Table = dict[str, dict[str, float]]

GROUPS = {"t": ["t"]}


def by_task(matrix: np.ndarray, names: list[int] | None = None) -> Table:
    rows = range(len(matrix)) if names is None else names
    return {
        str(name): {str(d): float(x) for d, x in enumerate(row)}
        for name, row in zip(rows, np.atleast_2d(matrix), strict=True)
    }


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_mergebench_scores(case: str) -> None:
    with safe_open(FOLDER / "mergebench.safetensors", "np") as file:

        def read(name: str) -> np.ndarray:
            return np.asarray(file.get_tensor(f"{case}/{name}"))

        merged, specialist = by_task(read("in/merged_score")), by_task(read("in/specialist_score"))
        found = relative_score(merged, specialist)
        np.testing.assert_allclose(found.value, read("out/normalized_performance"), atol=1e-5)
        np.testing.assert_allclose(
            list(found.by_task.values()), read("out/normalized_per_domain"), atol=1e-5
        )
        general = by_task(read("in/general_merged")[:, None])
        kept = relative_score(general, by_task(read("in/general_base")[:, None]))
        np.testing.assert_allclose(kept.value, read("out/normalized_generalization"), atol=1e-5)


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_held_in_and_held_out_scores(case: str) -> None:
    with safe_open(FOLDER / "what-matters-at-scale.safetensors", "np") as file:
        about = json.loads(file.metadata()[case])

        def read(name: str) -> np.ndarray:
            return np.asarray(file.get_tensor(f"{case}/{name}"))

        experts, base = by_task(read("in/expert_heldin")), by_task(read("in/base_heldout"))
        for count in about["counts"]:
            for i, subset in enumerate(about["subsets"][str(count)]):
                held_in = by_task(read(f"in/merged_heldin/{count}_{i}"), subset)
                held_out = by_task(read(f"in/merged_heldout/{count}_{i}"))
                tasks = [str(task) for task in subset]
                inside = relative_score(held_in, experts, tasks).value
                outside = relative_score(held_out, base).value
                np.testing.assert_allclose(inside, read(f"out/heldin/{count}")[i], atol=1e-6)
                np.testing.assert_allclose(outside, read(f"out/heldout/{count}")[i], atol=1e-6)
        for split, reference in (("heldin", experts), ("heldout", base)):
            multitask = relative_score(by_task(read(f"in/multitask_{split}")), reference).value
            np.testing.assert_allclose(multitask, read(f"out/multitask_{split}"), atol=1e-6)


def test_an_expert_on_its_own_task_scores_one() -> None:
    scores = {"a": {"x": 0.3, "y": 0.9}, "b": {"z": 0.5}}
    assert relative_score(scores, scores).value == 1.0


def test_the_order_of_tasks_does_not_matter() -> None:
    scores, reference = by_task(np.arange(1, 7.0).reshape(3, 2)), by_task(np.full((3, 2), 7.0))
    backwards = dict(reversed(scores.items()))
    assert relative_score(scores, reference).value == relative_score(backwards, reference).value


def test_datasets_without_a_positive_reference_are_dropped_and_listed() -> None:
    found = relative_score(
        {"a": {"x": 0.5, "y": 0.5}, "b": {"z": 0.2}, "c": {"w": 0.1}},
        {"a": {"x": 1.0, "y": 0.0}, "b": {"z": 0.4}},
    )
    assert found.value == pytest.approx(0.5)
    assert found.by_task == {"a": 0.5, "b": 0.5}
    assert found.dropped == ("a/y", "c/w")


def test_what_cannot_be_normalised_is_refused() -> None:
    with pytest.raises(FusekitError, match="nothing to normalise by"):
        relative_score({"a": {"x": 0.5}}, {"a": {"x": 0.0}})
    with pytest.raises(FusekitError, match="task 'a': dataset 'x' has no score"):
        relative_score({}, {"a": {"x": 0.5}}, ["a"])


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(120):
        hits = {"t": (rng.random(300) < 0.7).astype(float)}
        drawn = resample({"t": 300}, 400, trial, shared=False)
        low, high = interval(drawn.ratios(hits, {"t": np.ones(300)}, GROUPS))
        covered += low <= 0.7 <= high
    assert 0.9 <= covered / 120 <= 0.99


def test_paired_differences_are_surer_than_unpaired_ones() -> None:
    rng = np.random.default_rng(1)
    first = (rng.random(400) < 0.6).astype(float)
    second = np.where(rng.random(400) < 0.05, 1 - first, first)
    reference = {"t": np.ones(400)}
    drawn = resample({"t": 400}, 1000, 0, shared=False)
    a, b = (
        drawn.ratios({"t": first}, reference, GROUPS),
        drawn.ratios({"t": second}, reference, GROUPS),
    )
    other = resample({"t": 400}, 1000, 1, shared=False).ratios({"t": second}, reference, GROUPS)
    assert np.std(a - b) < 0.6 * np.std(a - other)


def test_tasks_on_the_same_examples_are_resampled_together() -> None:
    together = resample({"a": 50, "b": 50}, 10, 0, shared=True)
    apart = resample({"a": 50, "b": 50}, 10, 0, shared=False)
    assert together.counts["a"] is together.counts["b"]
    assert not np.array_equal(apart.counts["a"], apart.counts["b"])
    assert (together.counts["a"].sum(axis=1) == 50).all()


def test_geometric_means_make_ratios_of_perplexities() -> None:
    generator = np.random.default_rng(0)
    merged, expert = generator.uniform(1, 4, 40), generator.uniform(1, 3, 40)  # nats per token
    scores = [average_score(np.exp(-nats), "geometric") for nats in (merged, expert)]
    perplexities = [float(np.exp(nats.mean())) for nats in (merged, expert)]
    assert scores[0] / scores[1] == pytest.approx(perplexities[1] / perplexities[0])
    drawn = resample({"t": 40}, 500, 0, shared=False, average="geometric")
    low, high = interval(drawn.ratios({"t": np.exp(-merged)}, {"t": np.exp(-expert)}, GROUPS))
    assert low < scores[0] / scores[1] < high


def test_geometric_means_of_scores_that_are_not_positive_are_refused() -> None:
    with pytest.raises(FusekitError, match=r"an example scored 0\.0, expected more than 0"):
        average_score(np.array([0.5, 0.0]), "geometric")
