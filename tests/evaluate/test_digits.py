"""The embedded digits suite: its models, its scores, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fusekit.checkpoint.layers import infer_layers
from fusekit.errors import CheckpointError, FusekitError
from fusekit.evaluate import digits

State = dict[str, np.ndarray]


@pytest.fixture
def state() -> State:
    return load_file(digits.base() / "model.safetensors")


def test_every_expert_masters_its_own_task_and_no_other() -> None:
    for task, path in digits.experts().items():
        scores = digits.evaluate(path)
        assert scores[task] > 0.96
        assert max(score for other, score in scores.items() if other != task) < 0.85


def test_base_knows_the_digits_but_not_the_tasks() -> None:
    assert digits.evaluate(digits.base(), tasks=[digits.PRETRAINING_TASK])["digit"] > 0.95
    assert np.mean(list(digits.evaluate(digits.base()).values())) < 0.4


def test_experts_forget_some_of_the_digits() -> None:
    before = digits.evaluate(digits.base(), tasks=["digit"])["digit"]
    after = [digits.evaluate(path, tasks=["digit"])["digit"] for path in digits.experts().values()]
    assert max(after) < before
    assert np.mean(after) < before - 0.05


def test_task_arithmetic_lies_between_averaging_and_the_experts(state: State) -> None:
    experts = [load_file(path / "model.safetensors") for path in digits.experts().values()]

    def merged_with(weight: float) -> State:
        return {
            name: base + weight * sum(expert[name] - base for expert in experts)
            for name, base in state.items()
        }

    averaged, summed = (
        np.mean(list(digits.evaluate(merged_with(weight)).values())) for weight in (1 / 6, 0.4)
    )
    base = np.mean(list(digits.evaluate(digits.base()).values()))
    reference = np.mean(list(digits.expert_scores().values()))
    assert base + 0.15 < averaged < summed - 0.15
    assert summed < reference - 0.1


def test_experts_are_fine_tuned_in_every_tensor_and_stay_near_the_base(state: State) -> None:
    for path in digits.experts().values():
        expert = load_file(path / "model.safetensors")
        assert list(expert) == list(state)
        assert all(np.any(expert[name] != base) for name, base in state.items())
        flat, flat_base = (
            np.concatenate([s[name].ravel() for name in state]) for s in (expert, state)
        )
        assert 0.01 < np.linalg.norm(flat - flat_base) / np.linalg.norm(flat_base) < 0.1


def test_splits_have_the_stated_sizes_and_share_no_image() -> None:
    sizes = {split: len(digits.examples(split).images) for split in ("train", "validation", "test")}
    assert sizes == {"train": 1000, "validation": 297, "test": 500}
    images = np.concatenate(
        [digits.examples(split).images for split in ("train", "validation", "test")]
    )
    assert images.min() == 0
    assert images.max() == 1
    assert len(np.unique(images, axis=0)) == 1797


def test_labels_are_the_stated_groupings_of_the_digits() -> None:
    labels = digits.examples("test").labels
    digit = labels["digit"].astype(int)
    assert set(digit) == set(range(10))
    expected = {
        "parity": digit % 2,
        "modulo_3": digit % 3,
        "modulo_5": digit % 5,
        "halved": digit // 2,
        "thirded": digit // 3,
        "mirrored": np.minimum(digit, 9 - digit),
    }
    assert set(expected) == set(digits.TASKS)
    for task, classes in expected.items():
        np.testing.assert_array_equal(labels[task], classes)


def test_heads_have_a_unit_row_times_four_per_class() -> None:
    for task in (*digits.TASKS, digits.PRETRAINING_TASK):
        weight = digits.head(task)
        assert len(weight) == digits.examples().labels[task].max() + 1
        np.testing.assert_allclose(np.linalg.norm(weight, axis=1), 4.0, rtol=1e-6)


def test_layers_are_inferred_from_the_names(state: State) -> None:
    layers = infer_layers(state)
    ranks = {layer.index for layer in layers.values() if layer is not None}
    assert ranks == set(range(6))
    assert {name.split(".")[0] for name, layer in layers.items() if layer is None} == {"embeddings"}


def test_folders_have_the_hugging_face_layout() -> None:
    for path in (digits.base(), *digits.experts().values()):
        config = json.loads((path / "config.json").read_text())
        assert config["num_hidden_layers"] == 6
        assert (path / "model.safetensors").is_file()


def test_data_are_small_and_name_their_origin_and_licence() -> None:
    folder = digits.base().parent
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 4_000_000
    with safe_open(folder / "suite.safetensors", "numpy") as suite:
        about = json.loads(suite.metadata()["about"])
    assert "load_digits" in about["origin"]
    assert about["licence"] == "CC BY 4.0"


def test_correct_agrees_with_the_accuracies_and_is_deterministic() -> None:
    path = digits.experts()["parity"]
    hits = digits.correct(path, "validation")
    again = digits.correct(path, "validation")
    scores = digits.evaluate(path, "validation")
    assert set(hits) == set(digits.TASKS)
    for task, correct in hits.items():
        assert correct.dtype == np.bool_
        np.testing.assert_array_equal(correct, again[task])
        assert scores[task] == pytest.approx(correct.sum() / 297, abs=1e-12)


def test_folder_file_and_arrays_give_the_same_scores(state: State) -> None:
    folder = digits.evaluate(digits.base())
    assert digits.evaluate(digits.base() / "model.safetensors") == folder
    assert digits.evaluate(str(digits.base())) == folder
    assert digits.evaluate(state) == folder


def test_sharded_folder_gives_the_same_scores(tmp_path: Path, state: State) -> None:
    shards = {f"model-0000{i + 1}-of-00002.safetensors": list(state)[i::2] for i in range(2)}
    for file, names in shards.items():
        save_file({name: state[name] for name in names}, tmp_path / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert digits.evaluate(tmp_path) == digits.evaluate(digits.base())


def test_bfloat16_expert_keeps_its_accuracy() -> None:
    path = digits.experts()["halved"]
    rounded = {
        name: values.astype(ml_dtypes.bfloat16)
        for name, values in load_file(path / "model.safetensors").items()
    }
    exact = digits.evaluate(path, tasks=["halved"])["halved"]
    assert digits.evaluate(rounded, tasks=["halved"])["halved"] == pytest.approx(exact, abs=0.01)


def test_normalised_divides_by_the_reference() -> None:
    assert digits.normalised({"parity": 0.6}, {"parity": 0.8, "halved": 0.9}) == {
        "parity": pytest.approx(0.75)
    }
    reference = digits.expert_scores()
    assert set(digits.normalised(reference, reference).values()) == {1.0}


def test_normalised_refuses_a_reference_without_the_task_or_not_positive() -> None:
    with pytest.raises(FusekitError, match=r"no score for task 'parity'"):
        digits.normalised({"parity": 0.6}, {"halved": 0.9})
    with pytest.raises(FusekitError, match=r"'parity' is 0\.0, expected more than 0"):
        digits.normalised({"parity": 0.6}, {"parity": 0.0})


def test_folder_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"lm_head.weight": np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as refusal:
        digits.evaluate(tmp_path)
    assert str(tmp_path) in str(refusal.value)
    assert "not an encoder of the digits suite" in str(refusal.value)
    assert "is missing" in str(refusal.value)


def test_extra_tensor_is_refused(state: State) -> None:
    state["encoder.layers.6.mlp.up_proj.bias"] = np.zeros(128, np.float32)
    with pytest.raises(CheckpointError, match=r"'encoder\.layers\.6\.mlp\.up_proj\.bias' is not"):
        digits.evaluate(state)


def test_wrong_shape_is_refused(state: State) -> None:
    state["embeddings.projection.bias"] = np.zeros(32, np.float32)
    with pytest.raises(CheckpointError, match=r"bias' has shape \[32\], expected \[64\]"):
        digits.evaluate(state)


def test_integer_tensor_is_refused(state: State) -> None:
    state["embeddings.projection.bias"] = np.zeros(64, np.int32)
    with pytest.raises(CheckpointError, match=r"bias' is I32, expected floating point"):
        digits.evaluate(state)


def test_nan_is_refused_with_its_count(state: State) -> None:
    state["embeddings.projection.bias"][[3, 5]] = np.nan, np.inf
    with pytest.raises(CheckpointError, match=r"projection\.bias' holds 2 NaN or Inf"):
        digits.evaluate(state)


def test_unknown_split_and_task_are_refused() -> None:
    with pytest.raises(FusekitError, match=r"no split 'tests' \(did you mean 'test'\?\)"):
        digits.evaluate(digits.base(), split="tests")  # type: ignore[arg-type]
    with pytest.raises(FusekitError, match=r"no task 'halve' \(did you mean 'halved'\?\)"):
        digits.evaluate(digits.base(), tasks=["halve"])
