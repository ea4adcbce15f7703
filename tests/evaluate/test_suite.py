"""Suites: read from YAML, run, resumed, and the same table from the same seed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusekit.errors import FusekitError, RecipeError
from fusekit.evaluate import digits
from fusekit.evaluate.cells import Cells, Reported
from fusekit.evaluate.configurations import candidates, choose_methods, default_parameters
from fusekit.evaluate.result import SuiteResult, read_result
from fusekit.evaluate.runner import run_suite
from fusekit.evaluate.suite import Suite, load_suite
from fusekit.evaluate.table import markdown
from fusekit.methods import find

METHODS = ["linear", "task_arithmetic"]


class CountingEvaluator:
    """Scores digits and remembers which checkpoints it was shown."""

    identity = "counting"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, checkpoint: Path, split: Any, tasks: Any) -> Any:
        self.calls += 1
        return digits.correct(checkpoint, split, tasks)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Suite, Path, SuiteResult]:
    suite = dataclasses.replace(load_suite("digits"), evaluator=CountingEvaluator())
    out = tmp_path_factory.mktemp("suite")
    return suite, out, run_suite(suite, METHODS, out, budget=3, resamples=200)


def without_costs(result: SuiteResult) -> list[Any]:
    cost = {"merge_cpu_seconds", "merge_peak_bytes", "tuning_seconds", "measuring_seconds"}
    return [
        {k: v for k, v in dataclasses.asdict(row).items() if k not in cost} for row in result.rows
    ]


def test_scores_are_those_of_the_merged_checkpoint(ran: tuple[Suite, Path, SuiteResult]) -> None:
    import fusekit

    _, _, result = ran
    row = next(row for row in result.rows if row.method == "linear")
    base = {"base_model": str(digits.base())} if find("linear").base else {}
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(path)} for path in digits.experts().values()],
        "parameters": {"weight": 1.0},
        **base,
    }
    out = ran[1] / "by-hand"
    fusekit.merge(recipe, out)
    expected = digits.evaluate(out)
    assert {task: row.scores[task] for task in digits.TASKS} == expected
    ratios = digits.normalised(expected, digits.expert_scores())
    assert row.normalised == pytest.approx(np.mean(list(ratios.values())))
    assert row.normalised_interval[0] < row.normalised < row.normalised_interval[1]
    forgotten = digits.evaluate(out, tasks=["digit"])["digit"]
    kept = forgotten / digits.evaluate(digits.base(), tasks=["digit"])["digit"]
    assert row.retained == pytest.approx(kept)


def test_tuning_is_at_least_as_good_as_the_default_on_validation(
    ran: tuple[Suite, Path, SuiteResult],
) -> None:
    _, _, result = ran
    variants = [(row.method, row.variant, row.tried) for row in result.rows]
    assert variants == [
        ("linear", "default", 1),
        ("task_arithmetic", "default", 1),
        ("task_arithmetic", "tuned", 3),
    ]
    default, tuned = result.rows[1:]
    assert tuned.normalised > default.normalised
    assert result.rows[0].difference is None
    assert tuned.difference == pytest.approx(tuned.normalised - result.rows[0].normalised)
    low, high = tuned.difference_interval or (0.0, 0.0)
    assert low < (tuned.difference or 0.0) < high


def test_costs_are_measured(ran: tuple[Suite, Path, SuiteResult]) -> None:
    for row in ran[2].rows:
        assert 0 < row.merge_cpu_seconds < 60
        assert 1e5 < row.merge_peak_bytes < 1e9


def test_a_second_run_computes_nothing_and_repeats_the_table(
    ran: tuple[Suite, Path, SuiteResult],
) -> None:
    suite, out, first = ran
    assert isinstance(suite.evaluator, CountingEvaluator)
    before, computed = suite.evaluator.calls, []
    again = run_suite(suite, METHODS, out, budget=3, resamples=200, on_progress=computed.append)
    assert computed == []
    assert suite.evaluator.calls == before
    assert again == first


def test_an_interrupted_run_continues_where_it_stopped(
    ran: tuple[Suite, Path, SuiteResult], tmp_path: Path
) -> None:
    suite, out, first = ran
    cells = sorted((out / "cells").iterdir())
    (tmp_path / "cells").mkdir()
    for cell in cells[: len(cells) // 2]:
        (tmp_path / "cells" / cell.name).write_bytes(cell.read_bytes())
    (tmp_path / "cells" / f"{cells[-1].name}.partial").write_text("{", encoding="utf-8")
    computed: list[str] = []
    again = run_suite(
        suite, METHODS, tmp_path, budget=3, resamples=200, on_progress=computed.append
    )
    assert len(computed) == len(cells) - len(cells) // 2
    assert without_costs(again) == without_costs(first)


def test_the_same_seed_gives_the_same_table_from_scratch(
    ran: tuple[Suite, Path, SuiteResult], tmp_path: Path
) -> None:
    suite, _, first = ran
    again = run_suite(suite, METHODS, tmp_path, budget=3, resamples=200)
    assert without_costs(again) == without_costs(first)


def test_results_are_saved_as_json_and_markdown(ran: tuple[Suite, Path, SuiteResult]) -> None:
    _, out, result = ran
    saved = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert saved == json.loads(json.dumps(result.to_dict()))
    text = (out / "results.md").read_text(encoding="utf-8")
    assert text == markdown(result)
    assert "| task_arithmetic, tuned (lambda " in text
    assert "best of at most 3 configurations on validation data" in text


def test_saved_results_are_read_back_as_they_were(
    ran: tuple[Suite, Path, SuiteResult], tmp_path: Path
) -> None:
    _, out, result = ran
    assert read_result(out / "results.json") == result
    (tmp_path / "other.json").write_text('{"schema": "fusekit-study/1"}')
    with pytest.raises(FusekitError, match="schema 'fusekit-study/1', expected 'fusekit-suite/2'"):
        read_result(tmp_path / "other.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(FusekitError, match="schema None, expected"):
        read_result(tmp_path / "list.json")


def test_all_and_single_methods_that_need_data_can_be_named_together() -> None:
    pytest.importorskip("torch")
    runs, skipped = choose_methods(["fisher", "all"], 6, calibrates=True)
    names = [method.name for method in runs]
    assert names[0] == "fisher"
    assert len(names) == len(set(names)) > 20
    assert {skip.method for skip in skipped} >= {"regmean", "slerp"}


def test_methods_that_look_at_data_are_named_where_they_cannot_run() -> None:
    _, skipped = choose_methods(["regmean_plus_plus", "fisher"], 6, calibrates=False)
    assert {skip.method: skip.reason for skip in skipped} == {
        "regmean_plus_plus": "needs training examples, which this suite does not have",
        "fisher": "needs statistics",
    }
    with pytest.raises(RecipeError, match="did you mean 'regmean_plus_plus'"):
        choose_methods(["regmean_plusplus"], 6)


def scores_of_the_base(self: Cells, method: Any, name: str, parameters: Any) -> Reported:
    """In place of `Cells.reported`: no merge, no cost."""
    return Reported(self.outcomes("base", self.suite.base), 1.0, 1)


def test_a_method_that_fails_is_listed_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Cells, method: Any, name: str, parameters: Any) -> Reported:
        if method.name == "ties":
            raise FusekitError("no")
        return scores_of_the_base(self, method, name, parameters)

    monkeypatch.setattr(Cells, "reported", refuse)
    result = run_suite(load_suite("digits"), ["ties", "linear"], tmp_path, budget=1, resamples=50)
    assert result.failed == {"ties": "no"}
    assert [row.method for row in result.rows] == ["linear"]
    assert "Failed: ties (no)." in markdown(result)


def test_methods_that_cannot_run_say_why() -> None:
    runs, skipped = choose_methods(["all"], 6)
    assert {"linear", "ties", "task_arithmetic"} <= {method.name for method in runs}
    reasons = {skip.method: skip.reason for skip in skipped}
    assert reasons["slerp"] == "does not merge 6 models"
    with pytest.raises(RecipeError, match="did you mean 'ties'"):
        choose_methods(["tiess"], 6)


def test_tuning_candidates_start_with_the_default_and_do_not_repeat() -> None:
    method = find("ties")
    tried = candidates(method, 12, seed=3)
    assert tried[0] == default_parameters(method)
    assert len({json.dumps(each, sort_keys=True) for each in tried}) == 12
    assert tried == candidates(method, 12, seed=3)
    assert tried != candidates(method, 12, seed=4)
    assert candidates(method, 1, seed=3) == [default_parameters(method)]
    for each in tried:
        for name, value in each.items():
            parameter = method.parameter(name)
            assert parameter is not None
            parameter.check(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a mapping with the keys name, evaluator, base, experts"),
        ("name: x\nexpert: {}\n", "unknown key 'expert' (did you mean 'experts'?)"),
        ("name: x\nevaluator: digits\nbase: b\n", "experts is missing"),
        ("name: 3\n", "name: found 3, expected text"),
        ("name: x\nevaluator: digit\nbase: .\nexperts: {a: .}\n", "did you mean 'digits'?"),
        ("name: x\nevaluator: digits\nbase: nowhere\nexperts: {a: .}\n", "model 'nowhere'"),
        ("a: [", "not valid YAML"),
        (
            "name: x\nevaluator: digits\nbase: .\nexperts: {a: .}\nsettings: {size: 3}\n",
            "settings: unknown setting 'size'",
        ),
        (
            "name: x\nevaluator: digits\nbase: .\nexperts: {a: .}\naverage: geometrik\n",
            "unknown average 'geometrik' (did you mean 'geometric'?)",
        ),
    ],
)
def test_malformed_suites_are_refused_in_one_sentence(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "suite.yml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FusekitError) as error:
        load_suite(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_suites_that_must_be_built_say_how() -> None:
    with pytest.raises(FusekitError, match="build it first: fusekit suite build vision OUT"):
        load_suite("vision")


def test_unknown_suites_are_refused() -> None:
    with pytest.raises(FusekitError, match="did you mean 'digits'"):
        load_suite("digit")


def test_the_command_prints_the_table_and_writes_a_report(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="needs the [report] extra")
    html = tmp_path / "report.html"
    command = [sys.executable, "-m", "fusekit", "suite", "run", "digits", "--methods", "linear"]
    command += ["--budget", "1", "--out", str(tmp_path / "out"), "--html", str(html)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("linear, default"))
    assert " 0.536 [0." in line
    assert max(map(len, done.stdout.partition("\n\n")[0].splitlines())) <= 120
    page = html.read_text(encoding="utf-8")
    assert "Share of the experts" in page
    assert "For comparison: base 0.312, multitask 1.004." in page


def test_refused_combinations_do_not_end_the_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cells, "reported", scores_of_the_base)
    result = run_suite(load_suite("digits"), ["della"], tmp_path, budget=8, resamples=50)
    tuned = next(row for row in result.rows if row.variant == "tuned")
    assert result.failed == {}
    assert 1 < tuned.tried < 8
    computed: list[str] = []
    run_suite(
        load_suite("digits"),
        ["della"],
        tmp_path,
        budget=8,
        resamples=50,
        on_progress=computed.append,
    )
    assert computed == []


class Planned:
    """An evaluator of made-up models: `scores[model][dataset]` of ten examples are hits."""

    identity = "planned"

    def __init__(self, scores: dict[str, dict[str, int]]) -> None:
        self.scores = scores

    def __call__(self, checkpoint: Path, split: Any, tasks: Any) -> Any:
        own = self.scores[checkpoint.name]
        return {task: np.arange(10) < own[task] for task in tasks}


def test_tasks_of_several_datasets_count_alike_and_what_scores_nothing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {
        "base": {"a": 2, "b1": 2, "b2": 2, "b3": 0, "kept": 8, "lost": 0},
        "expert_parity": {"a": 8, "b1": 1, "b2": 1, "b3": 1, "kept": 6, "lost": 0},
        "expert_halved": {"a": 1, "b1": 5, "b2": 10, "b3": 0, "kept": 6, "lost": 0},
        "merged": {"a": 4, "b1": 5, "b2": 5, "b3": 3, "kept": 4, "lost": 3},
        "multitask": {"a": 8, "b1": 5, "b2": 10, "b3": 1, "kept": 8, "lost": 0},
    }
    root = digits.base().parent
    suite = Suite(
        "planned",
        root / "base",
        {"a": root / "expert_parity", "b": root / "expert_halved"},
        Planned(scores),
        datasets={"b": ("b1", "b2", "b3")},
        forgetting=("kept", "lost"),
        references={"multitask": root / "multitask"},
    )

    def reported(self: Cells, method: Any, name: str, parameters: Any) -> Reported:
        found = suite.evaluator(Path("merged"), "test", suite.scored)
        return Reported({n: x.astype(float) for n, x in found.items()}, 1.0, 1)

    monkeypatch.setattr(Cells, "reported", reported)
    result = run_suite(suite, ["linear"], tmp_path, budget=1, resamples=400)
    row = result.rows[0]
    assert row.by_task == {"a": pytest.approx(0.5), "b": pytest.approx((1.0 + 0.5) / 2)}
    assert row.normalised == pytest.approx((0.5 + 0.75) / 2)
    assert row.normalised_interval[0] < row.normalised < row.normalised_interval[1]
    assert row.retained == pytest.approx(0.5)
    assert result.dropped == ("b/b3", "forgetting/lost")
    assert result.references["base"].retained == 1.0
    assert result.references["multitask"].normalised == pytest.approx(1.0)
    text = markdown(result)
    assert "| linear, default | 0.500 | 0.750 |" in text
    assert "No ratio counts b/b3: nothing is scored there." in text
    assert "| b | 10.0 | 50.0 | 100.0 | 0.0 | 60.0 | 0.0 |" in text
