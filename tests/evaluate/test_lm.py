"""The lm suite: perplexities as transformers has them, models trained from tiny corpora."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fusekit.errors import CheckpointError, FusekitError
from tests.evaluate.tiny_text import WORDS, tiny_llama, write_lm_data

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

from fusekit.evaluate import lm, lm_building  # noqa: E402

SMALL = {
    "hidden_size": 32,
    "layers": 1,
    "vocabulary": 300,
    "pretraining_steps": 8,
    "fine_tuning_steps": 2,
}
WINDOWS = np.random.default_rng(0).integers(2, len(WORDS) + 2, (40, 12))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lm_data(tmp_path_factory.mktemp("data") / "lm")


@pytest.fixture(scope="module")
def built(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("suite")
    lm_building.build(out, data=data, seed=0, settings=SMALL, on_progress=print)
    return out


def windows_file(folder: Path, windows: np.ndarray = WINDOWS) -> Path:
    save_file({"test.words": windows.astype(np.int32)}, folder / "windows.safetensors")
    return folder / "windows.safetensors"


def saved(folder: Path, model: object) -> Path:
    model.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


def test_the_geometric_mean_of_scores_is_one_over_the_perplexity() -> None:
    model = tiny_llama()
    tokens = torch.from_numpy(WINDOWS)
    with torch.no_grad():
        loss = float(model(input_ids=tokens, labels=tokens).loss)
    found = lm.scores(model, WINDOWS)
    assert found.shape == (40,)
    assert math.exp(np.log(found).mean()) == pytest.approx(math.exp(-loss), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    evaluator = lm.evaluator({"windows": windows_file(tmp_path).name}, tmp_path)
    found = evaluator(saved(tmp_path / "model", model), "test", ["words"])["words"]
    np.testing.assert_allclose(1 / found, len(WORDS) + 2, rtol=1e-5)


def test_training_lowers_the_perplexity_of_what_is_trained_on() -> None:
    model = tiny_llama()
    stream = np.tile(np.arange(2, 12), 100)
    held = stream[:240].reshape(20, 12)
    before = lm.scores(model, held).mean()
    lm_building.fit(model, [stream], steps=40, rate=1e-2, seed=0)
    assert lm.scores(model, held).mean() > 5 * before


def test_a_built_suite_holds_models_tokenizers_and_windows(built: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    windows = load_file(built / "windows.safetensors")
    domains = (*lm_building.DOMAINS, lm_building.HELD_BACK)
    splits = ("train", "validation", "test")
    assert set(windows) == {f"{split}.{domain}" for split in splits for domain in domains}
    assert all(each.shape[1] == lm_building.WINDOW for each in windows.values())
    for name in ("base", *lm_building.DOMAINS, "multitask"):
        model = AutoModelForCausalLM.from_pretrained(built / name)
        tokenizer = AutoTokenizer.from_pretrained(built / name)
        assert model.config.hidden_size == 32
        assert tokenizer.decode(tokenizer("banmus lox").input_ids) == "banmus lox"
    evaluator = lm.evaluator({"windows": "windows.safetensors"}, built)
    found = evaluator(built / "plays", "validation", domains)
    assert all(((each > 0) & (each < 1)).all() for each in found.values())


def test_a_built_suite_runs_and_gives_the_same_table_again(built: Path, tmp_path: Path) -> None:
    from fusekit.evaluate.runner import run_suite
    from fusekit.evaluate.suite import load_suite

    suite = load_suite(built / "suite.yml")
    first, again = (
        run_suite(suite, ["linear"], tmp_path / name, budget=1, resamples=50)
        for name in ("first", "again")
    )
    (row,) = first.rows
    assert set(row.scores) == {*lm_building.DOMAINS, lm_building.HELD_BACK}
    assert row.normalised_interval[0] < row.normalised < row.normalised_interval[1]
    assert row.retained is not None and 0 < row.retained < 2
    assert (row.scores, row.normalised_interval) == (
        again.rows[0].scores,
        again.rows[0].normalised_interval,
    )


def test_methods_that_need_data_run_on_training_windows(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusekit.evaluate.runner import run_suite
    from fusekit.evaluate.suite import load_suite

    suite = load_suite(built / "suite.yml")
    windows = suite.evaluator._windows  # type: ignore[attr-defined]
    for domain in lm_building.DOMAINS:
        monkeypatch.setitem(windows, f"train.{domain}", windows[f"train.{domain}"][:4])
    methods = ["fisher", "regmean", "regmean_plus_plus", "localize_and_stitch_learned"]
    result = run_suite(suite, methods, tmp_path, budget=1, resamples=20)
    assert result.failed == {}
    assert [row.method for row in result.rows] == methods
    assert all(row.measuring_seconds > 0 for row in result.rows)
    assert set(result.references) == {"base", "multitask"}


def test_a_suite_without_training_windows_says_to_build_it_again(tmp_path: Path) -> None:
    evaluator = lm.evaluator({"windows": windows_file(tmp_path).name}, tmp_path)
    with pytest.raises(FusekitError, match=r"no training examples of 'words'.*build the suite"):
        evaluator.calibration(tmp_path, "words")


def test_windows_to_measure_on_are_of_the_training_split(data: Path, built: Path) -> None:
    from tokenizers import Tokenizer

    windows = load_file(built / "windows.safetensors")["train.solutions"]
    tokenizer = Tokenizer.from_file(str(built / "tokenizer" / "tokenizer.json"))
    documents = lm_building.split_documents(lm_building.read_documents(data), seed=0)
    text = "".join(tokenizer.decode_batch(windows.tolist()))
    first = documents["train"]["solutions"][0]
    assert text.startswith(first)
    assert not any(held in text for held in documents["test"]["solutions"])


def test_documents_of_the_test_split_are_not_trained_on(data: Path) -> None:
    splits = lm_building.split_documents(lm_building.read_documents(data), seed=3)
    for domain in (*lm_building.DOMAINS, lm_building.HELD_BACK):
        train, rest = set(splits["train"][domain]), set(splits["test"][domain])
        assert rest and not train & rest
        assert not set(splits["validation"][domain]) & (train | rest)


def test_the_same_seed_trains_the_same_models(data: Path, built: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    lm_building.build(tmp_path, data=data, seed=0, settings=SMALL, on_progress=lines.append)
    assert len(lines) == 6
    for name in ("base", "plays", "programs", "multitask"):
        again = load_file(tmp_path / name / "model.safetensors")
        for tensor, values in load_file(built / name / "model.safetensors").items():
            np.testing.assert_array_equal(values, again[tensor])
    lines.clear()
    lm_building.build(tmp_path, data=data, seed=0, settings=SMALL, on_progress=lines.append)
    assert lines == []


def test_unusable_data_is_refused_before_training(data: Path, tmp_path: Path) -> None:
    def build(folder: Path | None, settings: dict[str, int] = SMALL) -> None:
        lm_building.build(tmp_path, data=folder, seed=0, settings=settings, on_progress=print)

    with pytest.raises(FusekitError, match="needs data: --data with a folder of tinyshakesp"):
        build(None)
    with pytest.raises(FusekitError, match=r"tinyshakespeare.txt: no such file"):
        build(tmp_path)
    with pytest.raises(FusekitError, match="unknown setting 'layer' \\(did you mean 'layers'"):
        build(data, {"layer": 2})
    with pytest.raises(FusekitError, match="'layers': found 0, expected a whole number"):
        build(data, {"layers": 0})
    copy = tmp_path / "copy"
    write_lm_data(copy)
    (copy / "mbpp.jsonl").write_text('{"text": "a", "code": "b"}\n{"text": 1}', encoding="utf-8")
    with pytest.raises(FusekitError, match=r"mbpp.jsonl, line 2: expected .* 'text' and 'code'"):
        build(copy)


def test_what_cannot_be_scored_is_named(tmp_path: Path) -> None:
    path = windows_file(tmp_path, np.full((2, 8), 500))
    model = saved(tmp_path / "model", tiny_llama())
    with pytest.raises(CheckpointError, match=r"vocabulary of 27 tokens, but .* holds token 500"):
        lm.PerplexityEvaluator(path)(model, "test", ["words"])
    with pytest.raises(FusekitError, match=r"no windows 'test.word' \(did you mean 'test.words'"):
        lm.PerplexityEvaluator(path)(model, "test", ["word"])
    with pytest.raises(FusekitError, match="found None, expected a file"):
        lm.evaluator({}, tmp_path)
    with pytest.raises(FusekitError, match=r"none.safetensors: no such file"):
        lm.evaluator({"windows": "none.safetensors"}, tmp_path)
    save_file({"test.words": np.zeros((2, 8), np.float32)}, tmp_path / "floats.safetensors")
    with pytest.raises(FusekitError, match=r"'test.words' is float32 .*, expected token numbers"):
        lm.PerplexityEvaluator(tmp_path / "floats.safetensors")
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(CheckpointError, match="its predictions hold NaN"):
        lm.PerplexityEvaluator(windows_file(tmp_path))(
            saved(tmp_path / "broken", broken), "test", ["words"]
        )
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights .* missing, the first is 'model.norm"):
        lm.PerplexityEvaluator(windows_file(tmp_path))(model, "test", ["words"])
