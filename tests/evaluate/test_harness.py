"""Suites scored by the lm-evaluation-harness: local tasks, no network, one number per example."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusekit.errors import FusekitError, MissingExtraError
from fusekit.evaluate.harness import evaluator, example_scores
from tests.evaluate.tiny_text import WORDS, sentence, tiny_llama, write_tokenizer

SAMPLES = [
    {"doc_id": 1, "filter": "none", "metrics": ["acc"], "acc": 0.0},
    {"doc_id": 0, "filter": "none", "metrics": ["acc"], "acc": 1.0},
    {"doc_id": 0, "filter": "loose", "metrics": ["acc"], "acc": 0.5},
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


def test_examples_are_in_order_and_of_one_filter() -> None:
    assert example_scores(SAMPLES, "acc", "task") == [1.0, 0.0]
    assert example_scores(SAMPLES, "acc,loose", "task") == [0.5]


def test_metrics_and_filters_that_do_not_exist_are_named() -> None:
    with pytest.raises(FusekitError, match=r"'task' has no metric 'accc' \(did you mean 'acc'"):
        example_scores(SAMPLES, "accc", "task")
    with pytest.raises(FusekitError, match=r"'task' has no filter 'loos' \(did you mean 'loose'"):
        example_scores(SAMPLES, "acc,loos", "task")
    pairs = [{"doc_id": 0, "filter": "none", "metrics": ["ppl"], "ppl": (1.0, 2)}]
    with pytest.raises(FusekitError, match="'ppl' is not one number per example"):
        example_scores(pairs, "ppl", "task")


def test_the_missing_harness_is_named_by_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs the \[evaluate\] extra"):
        evaluator({"tasks": {"a": "b"}}, tmp_path)


def test_settings_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    for settings, message in (
        ({}, "tasks: found None, expected suite tasks"),
        ({"tasks": {"a": 3}}, "tasks: 'a': found 3, expected a harness task"),
        ({"tasks": {"a": "b"}, "limits": 3}, r"unknown setting 'limits' \(did you mean 'limit'"),
        ({"tasks": {"a": "b"}, "limit": 0}, "limit: found 0, expected a whole number from 1"),
        ({"tasks": {"a": "b"}, "metric": 1}, "metric: found 1, expected a name"),
        ({"tasks": {"a": "b"}, "include": "none"}, "none is no folder of task files"),
    ):
        with pytest.raises(FusekitError, match=message):
            evaluator(settings, tmp_path)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two local tasks, a model and a suite of one expert."""
    for name in ("torch", "transformers", "lm_eval"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("suite")
    rng = np.random.default_rng(0)
    (folder / "tasks").mkdir()
    for name in ("next_word", "held_word"):
        records = [
            {
                "prompt": sentence(rng, 6),
                "choices": [str(word) for word in rng.choice(WORDS, 3, replace=False)],
                "answer": int(rng.integers(3)),
            }
            for _ in range(12)
        ]
        data = folder / "tasks" / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        text = TASK.format(name=name, data=data)
        (folder / "tasks" / f"{name}.yaml").write_text(text, encoding="utf-8")
    for seed, name in enumerate(("base", "expert")):
        tiny_llama(seed).save_pretrained(folder / name)
        write_tokenizer(folder / name)
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No connection can be made, and data sets are cached in a folder of the test."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr("socket.socket.connect", refuse)
    # Reading the harness's own thousands of tasks takes many seconds.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "none" / "manager.py"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    if "datasets" in sys.modules:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def settings(**more: Any) -> dict[str, Any]:
    return {"tasks": {"words": {"test": "next_word", "validation": "held_word"}}, **more}


@pytest.mark.torch
@pytest.mark.usefixtures("offline")
def test_local_tasks_score_as_a_plain_loop_does(suite: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = evaluator(settings(include="tasks"), suite)(suite / "expert", "test", ["words"])
    model = AutoModelForCausalLM.from_pretrained(suite / "expert")
    tokenizer = AutoTokenizer.from_pretrained(suite / "expert")
    expected = []
    for line in (suite / "tasks" / "next_word.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        with torch.no_grad():
            last = model(**tokenizer(record["prompt"], return_tensors="pt")).logits[0, -1]
        scores = [last[tokenizer(choice).input_ids[0]].item() for choice in record["choices"]]
        expected.append(float(np.argmax(scores) == record["answer"]))
    assert 0 < sum(expected) < 12
    np.testing.assert_array_equal(found["words"], expected)


@pytest.mark.torch
@pytest.mark.usefixtures("offline")
def test_a_suite_runs_on_harness_tasks_from_yaml_to_table(suite: Path, tmp_path: Path) -> None:
    import yaml

    from fusekit.evaluate.runner import run_suite
    from fusekit.evaluate.suite import load_suite

    content = {
        "name": "words",
        "evaluator": "harness",
        "base": "base",
        "experts": {"words": "expert"},
        "settings": settings(include="tasks", metric="acc", limit=8),
    }
    (suite / "suite.yml").write_text(yaml.safe_dump(content), encoding="utf-8")
    result = run_suite(load_suite(suite / "suite.yml"), ["linear"], tmp_path / "out", budget=1)
    (row,) = result.rows
    assert row.normalised == pytest.approx(1.0)  # one expert, averaged alone


@pytest.mark.torch
@pytest.mark.usefixtures("offline")
def test_what_the_harness_cannot_score_is_named(suite: Path, tmp_path: Path) -> None:
    def score(given: dict[str, Any], split: str = "test", model: str = "expert") -> None:
        evaluator({"include": "tasks", **given}, suite)(suite / model, split, ["words"])

    with pytest.raises(FusekitError, match="no task of the harness for the split 'validation'"):
        score({"tasks": {"words": "next_word"}}, "validation")
    with pytest.raises(FusekitError, match="nothing is said of the suite's task 'words'"):
        score({"tasks": {"word": "next_word"}})
    with pytest.raises(FusekitError, match=r"no task 'next_wrod' \(did you mean 'next_word'"):
        score({"tasks": {"words": "next_wrod"}})
    with pytest.raises(FusekitError, match="has no metric 'f2'"):
        score(settings(metric="f2"))
    (suite / "bare").mkdir(exist_ok=True)
    tiny_llama().save_pretrained(suite / "bare")
    with pytest.raises(FusekitError, match="bare: no tokenizer can be loaded"):
        score(settings(), model="bare")


def test_changed_tasks_are_not_answered_from_the_cache(suite: Path, tmp_path: Path) -> None:
    first = evaluator(settings(include="tasks"), suite).identity
    assert evaluator(settings(include="tasks"), suite).identity == first
    assert evaluator(settings(include="tasks", limit=3), suite).identity != first
    (suite / "tasks" / "more.txt").write_text("x", encoding="utf-8")
    assert evaluator(settings(include="tasks"), suite).identity != first
