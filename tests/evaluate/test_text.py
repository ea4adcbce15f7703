"""The text suite: features, heads, matching, and experts trained from tiny corpora."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fusekit.errors import CheckpointError, FusekitError
from fusekit.evaluate.text import PADDING, Head, classify, matched
from tests.evaluate.tiny_text import tiny_encoder, write_sentences

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.torch

from fusekit.evaluate import text, text_building  # noqa: E402
from fusekit.evaluate.pretrained import quiet  # noqa: E402

SIZE = {
    "examples": 32,
    "validation": 16,
    "test": 20,
    "epochs": 2,
    "lora_epochs": 2,
    "rank": 2,
    "tokens": 12,
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a buffer that older libraries stored and newer ones do not."""
    folder = tiny_encoder(tmp_path_factory.mktemp("encoder"))
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.position_ids"] = np.arange(40)[None]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentences(tmp_path_factory.mktemp("data") / "text")


@pytest.fixture(scope="module")
def built(encoder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("suite")
    settings = {**SIZE, "model": str(encoder)}
    text_building.build(out, data=data, seed=0, settings=settings, on_progress=print)
    return out


def model_of(folder: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder).eval()


def test_features_are_means_over_tokens_whatever_shares_the_batch(encoder: Path) -> None:
    model = model_of(encoder)
    tokens = np.random.default_rng(0).integers(2, 20, (70, 9))
    lengths = np.random.default_rng(1).integers(2, 10, 70)
    tokens[np.arange(9) >= lengths[:, None]] = PADDING
    found = text.features(model, tokens)
    for row, length, own in zip(tokens, lengths, found, strict=True):
        with torch.no_grad():
            hidden = model(input_ids=torch.from_numpy(row[None, :length])).last_hidden_state
        mean = hidden[0].numpy().mean(axis=0)
        np.testing.assert_allclose(own, mean / np.linalg.norm(mean), atol=2e-6)


def test_heads_fitted_to_separable_features_make_no_mistake() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    encoded = (np.eye(3, 8)[labels] + 0.1 * rng.standard_normal((60, 8))).astype(np.float32)
    head = text_building.fit_head(encoded, labels, 3)
    np.testing.assert_array_equal(classify(encoded, head), labels)


def test_classes_are_argmax_of_weights_and_bias() -> None:
    head = Head(np.eye(2, dtype=np.float32), np.array([0.0, 0.5], np.float32))
    encoded = np.array([[1.0, 0.0], [0.6, 0.3], [0.0, 1.0]], np.float32)
    np.testing.assert_array_equal(classify(encoded, head), [0, 1, 1])


def test_halves_match_their_own_and_no_other() -> None:
    first = np.eye(4, dtype=np.float32)
    second = first[[0, 1, 3, 2]]
    np.testing.assert_array_equal(matched(np.concatenate([first, second])), [1, 1, 0, 0])


def test_halves_compete_with_their_neighbours_only() -> None:
    first = np.eye(text.CANDIDATES, dtype=np.float32)
    twice = np.concatenate([first, first, first[:3]])
    assert matched(np.concatenate([twice, twice])).all()


def test_training_moves_the_encoder_to_where_the_head_is_right(encoder: Path) -> None:
    model = model_of(encoder)
    rng = np.random.default_rng(0)
    examples = text.Examples(rng.integers(2, 20, (64, 4)), rng.integers(0, 3, 64))

    def accuracy() -> float:
        return float(
            (classify(text.features(model, examples.tokens), head) == examples.labels).mean()
        )

    head = text_building.fit_head(text.features(model, examples.tokens), examples.labels, 3)
    before = accuracy()
    text_building.fit(model, [(examples, head)], epochs=30, rate=1e-3, seed=0)
    assert accuracy() > before + 0.05


def test_a_built_suite_scores_every_task_with_every_encoder(built: Path) -> None:
    evaluator = text.evaluator({"data": "data.safetensors"}, built)
    tasks = (*text_building.FILES, text_building.HALVES)
    for model in ("base", "sst2", "lora/mpqa"):
        found = evaluator(built / model, "test", tasks)
        assert {task: len(hits) for task, hits in found.items()} == dict.fromkeys(tasks, 20)
    with pytest.raises(FusekitError, match=r"no examples 'test.tre' \(did you mean 'test.trec'"):
        evaluator(built / "base", "test", ["tre"])


@pytest.mark.parametrize("folder", [".", "lora"])
def test_full_and_lora_experts_merge(built: Path, folder: str, tmp_path: Path) -> None:
    from fusekit.evaluate.runner import run_suite
    from fusekit.evaluate.suite import load_suite

    suite = load_suite(built / folder / "suite.yml")
    result = run_suite(suite, ["task_arithmetic"], tmp_path, budget=1, resamples=20)
    assert result.failed == {}
    assert set(result.rows[0].scores) == {*text_building.FILES, text_building.HALVES}


def test_methods_that_need_data_run_on_training_examples(built: Path, tmp_path: Path) -> None:
    from fusekit.evaluate.runner import run_suite
    from fusekit.evaluate.suite import load_suite

    suite = load_suite(built / "suite.yml")
    methods = ["fisher", "regmean", "regmean_plus_plus", "localize_and_stitch_learned"]
    result = run_suite(suite, methods, tmp_path, budget=1, resamples=20)
    assert result.failed == {}
    assert [row.method for row in result.rows] == methods
    assert all(row.measuring_seconds > 0 for row in result.rows)


def test_a_suite_without_training_examples_says_to_build_it_again(
    built: Path, tmp_path: Path
) -> None:
    tensors = load_file(built / "data.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.startswith("train.")}
    save_file(kept, tmp_path / "data.safetensors")
    evaluator = text.evaluator({"data": "data.safetensors"}, tmp_path)
    with pytest.raises(FusekitError, match=r"no training examples of 'sst2'.*build the suite"):
        evaluator.calibration(built / "sst2", "sst2")


def test_calibration_gives_logits_of_the_head_on_examples_that_were_trained_on(
    built: Path, data: Path
) -> None:
    evaluator = text.evaluator({"data": "data.safetensors"}, built)
    known = evaluator.calibration(built / "sst2", "sst2")
    sentences = text_building.read_sentences(data, 0, SIZE)["sst2"]
    assert sum(len(batch["labels"]) for batch in known.batches) == len(sentences["train"])
    trained = evaluator.examples("train", "sst2").tokens
    for split in ("validation", "test"):
        assert not {*map(tuple, trained)} & {*map(tuple, evaluator.examples(split, "sst2").tokens)}
    batch = {key: value for key, value in known.batches[0].items() if key != "labels"}
    with torch.no_grad():
        found = known.module(**batch).argmax(dim=1)
    tokens = np.where(batch["attention_mask"] > 0, batch["input_ids"], PADDING)
    encoded = text.features(model_of(built / "sst2"), tokens)
    np.testing.assert_array_equal(found, classify(encoded, evaluator.head("sst2")))


def test_a_model_trained_on_all_tasks_is_a_reference_of_both_suites(built: Path) -> None:
    from fusekit.evaluate.suite import load_suite

    for folder in (built, built / "lora"):
        references = load_suite(folder / "suite.yml").references
        assert {name: path.resolve() for name, path in references.items()} == {
            "multitask": (built / "multitask").resolve()
        }
    base, trained = (
        load_file(built / name / "model.safetensors") for name in ("base", "multitask")
    )
    assert not all(np.array_equal(base[name], trained[name]) for name in base)


def test_training_on_several_tasks_sees_every_example_of_each_once_an_epoch() -> None:
    tasks = [
        text.Examples(np.zeros((count, 4), np.int64), np.zeros(count, np.int64))
        for count in (70, 33)
    ]
    batches = text_building._epoch(tasks, np.random.default_rng(0))
    for number, examples in enumerate(tasks):
        seen = np.concatenate([chosen for task, chosen in batches if task == number])
        assert sorted(seen.tolist()) == list(range(len(examples.tokens)))
    order = [task for task, _ in batches]
    assert order != sorted(order) or len(order) < 3


def test_folded_adapters_are_what_peft_merges(built: Path) -> None:
    from peft import PeftModel

    with quiet():
        merged = PeftModel.from_pretrained(
            model_of(built / "base"), built / "lora" / "adapters" / "sst2"
        ).merge_and_unload()
    folded = load_file(built / "lora" / "sst2" / "model.safetensors")
    base = load_file(built / "base" / "model.safetensors")
    moved = 0
    for name, values in merged.state_dict().items():
        np.testing.assert_allclose(folded[name], values.numpy(), atol=1e-6)
        moved += int(not np.array_equal(folded[name], base[name]))
    assert moved == 12  # six projections in each of two layers


def test_a_second_build_trains_nothing(built: Path, encoder: Path, data: Path) -> None:
    lines: list[str] = []
    settings = {**SIZE, "model": str(encoder)}
    text_building.build(built, data=data, seed=0, settings=settings, on_progress=lines.append)
    assert lines == []


def test_examples_of_different_splits_differ(data: Path) -> None:
    found = text_building.read_sentences(data, 0, SIZE)
    for splits in found.values():
        own = {split: {sentence for _, sentence in each} for split, each in splits.items()}
        assert len(own["test"]) == 20 and len(own["validation"]) == 16
        assert not own["validation"] & (own["test"] | own.get("train", set()))
    assert "train" not in found[text_building.HALVES]


def test_unusable_data_and_settings_are_refused(data: Path, encoder: Path, tmp_path: Path) -> None:
    def build(folder: Path | None, **settings: Any) -> None:
        given = {**SIZE, "model": str(encoder), **settings}
        text_building.build(
            tmp_path / "out", data=folder, seed=0, settings=given, on_progress=print
        )

    with pytest.raises(FusekitError, match=r"needs data: --data with a folder of TREC.train.all"):
        build(None)
    with pytest.raises(FusekitError, match=r"TREC.train.all: no such file"):
        build(tmp_path)
    with pytest.raises(FusekitError, match=r"unknown setting 'epoch' \(did you mean 'epochs'"):
        build(data, epoch=1)
    with pytest.raises(FusekitError, match=r"has no config.json, expected an encoder"):
        build(data, model=str(tmp_path))
    with pytest.raises(FusekitError, match=r"81 different sentences, expected at least 2000"):
        build(data, test=2000)
    copy = write_sentences(tmp_path / "copy")
    (copy / "subj.all").write_text("0 a b\none c d\n", encoding="latin-1")
    with pytest.raises(FusekitError, match=r"subj.all, line 2: expected a class number"):
        build(copy)


def test_what_cannot_be_scored_is_named(built: Path, encoder: Path, tmp_path: Path) -> None:
    evaluator = text.evaluator({"data": "data.safetensors"}, built)
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        evaluator(tmp_path, "test", ["sst2"])
    with pytest.raises(FusekitError, match="data: found 3, expected a file"):
        text.evaluator({"data": 3}, built)
    broken = tmp_path / "broken"
    model_of(encoder).save_pretrained(broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["encoder.layer.1.output.LayerNorm.bias"][0] = np.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="features hold NaN"):
        evaluator(broken, "test", ["sst2"])
