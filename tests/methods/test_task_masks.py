"""Masks per task: EMR, TALL masks, consensus, and the experts rebuilt from them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import fusekit
from fusekit import merge_state_dicts
from fusekit.engine.manifest import verify
from fusekit.engine.reconstruct import tasks_of
from fusekit.errors import CheckpointError, FusekitError, RecipeError
from tests.vectors import Case, assert_close, read_case

State = dict[str, np.ndarray]
SIDE = "task_masks.safetensors"


def write(folder: Path, state: State) -> Path:
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))
    return folder


def merge(
    where: Path, models: list[State], base: State, method: str, threads: int = 2, **options: Any
) -> Path:
    """Folders of the inputs, merged into `where/merged`."""
    names = options.pop("names", [f"task{i}" for i in range(len(models))])
    extra = options.pop("recipe", {})
    each = options.pop("each", [{} for _ in models])
    paths = [write(where / name, state) for name, state in zip(names, models, strict=True)]
    recipe = {
        "merge_method": method,
        "base_model": str(write(where / "base", base)),
        "models": [
            {"model": str(path), "parameters": own} for path, own in zip(paths, each, strict=True)
        ],
        "parameters": options,
        **extra,
    }
    fusekit.merge(recipe, where / "merged", threads=threads)
    return where / "merged"


def masks_of(merged: Path, shapes: State) -> list[State]:
    """Every task's mask, unpacked."""
    side = load_file(merged / SIDE)
    tasks = len(tasks_of(merged))
    return [
        {
            name: np.unpackbits(side[f"masks.{name}"][task], bitorder="little")[
                : like.size
            ].reshape(like.shape)
            for name, like in shapes.items()
        }
        for task in range(tasks)
    ]


def expert(merged: Path, task: str) -> State:
    report = fusekit.reconstruct(merged, task)
    return load_file(report.out / "model.safetensors")


def setting(seed: int, count: int, size: int = 20_000) -> tuple[list[State], State]:
    rng = np.random.default_rng(seed)
    base = {"w": rng.normal(size=(size // 10, 10)), "b": rng.normal(size=7), "s": np.array(0.5)}
    base = {name: np.asarray(values, "f4") for name, values in base.items()}
    models = [
        {k: np.asarray(v + 0.1 * rng.normal(size=v.shape), "f4") for k, v in base.items()}
        for _ in range(count)
    ]
    return models, base


# -- EMR -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["case0", "case1"])
@pytest.mark.parametrize(
    ("rescale", "group"), [("code", "rescaler"), ("global", "rescaler_global")]
)
def test_emr_equals_the_authors_program(
    tmp_path: Path, name: str, rescale: str, group: str
) -> None:
    case = read_case("emr", name)
    base = case.group("in/base")
    merged = merge(tmp_path, case.models, base, "emr", rescale=rescale)
    unified = load_file(merged / "model.safetensors")
    update = {key: unified[key] - base[key] for key in base}
    assert_close(update, case.group("out/unified"), 1e-6)
    for found, expected in zip(masks_of(merged, base), case.numbered("out/mask"), strict=True):
        assert_close(found, expected, 0.0)
    side = load_file(merged / SIDE)
    for key in base:
        np.testing.assert_allclose(side[f"scales.{key}"], case.group("out")[group], rtol=1e-5)
    if rescale == "code":
        for k, expected in enumerate(case.numbered("out/reconstructed")):
            assert_close(expert(merged, f"task{k}"), expected, 1e-6, 1e-5)


@pytest.mark.parametrize("rescale", ["code", "global", "per_tensor"])
@pytest.mark.parametrize("copies", [1, 3])
def test_emr_returns_one_model_and_identical_models(
    tmp_path: Path, rescale: str, copies: int
) -> None:
    (model,), base = setting(0, 1)
    merged = merge(tmp_path, [model] * copies, base, "emr", rescale=rescale)
    assert_close(expert(merged, "task0"), model, 1e-6)


def test_emr_rescaled_updates_have_the_experts_l1_norms(tmp_path: Path) -> None:
    models, base = setting(1, 3)
    for rescale in ("global", "per_tensor"):
        merged = merge(tmp_path / rescale, models, base, "emr", rescale=rescale)
        for k, model in enumerate(models):
            rebuilt = expert(merged, f"task{k}")
            norms = np.array(
                [
                    [np.abs(state[name] - base[name]).sum() for name in base]
                    for state in (model, rebuilt)
                ]
            )
            if rescale == "global":
                norms = norms.sum(axis=1)
            np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)


def test_emr_masks_agree_in_sign_with_every_task(tmp_path: Path) -> None:
    models, base = setting(2, 3)
    models[1]["w"][:5] = base["w"][:5]
    merged = merge(tmp_path, models, base, "emr")
    unified = load_file(merged / "model.safetensors")["w"] - base["w"]
    for model, mask in zip(models, masks_of(merged, base), strict=True):
        delta = model["w"] - base["w"]
        assert (np.sign(delta * unified)[mask["w"] == 1] == 1).all()
        assert (delta * unified)[mask["w"] == 0].max() <= 0


def test_emr_does_not_depend_on_the_order_of_the_models(tmp_path: Path) -> None:
    models, base = setting(3, 3)
    one = merge(tmp_path / "one", models, base, "emr", names=["a", "b", "c"])
    two = merge(tmp_path / "two", models[::-1], base, "emr", names=["c", "b", "a"])
    assert_close(load_file(one / "model.safetensors"), load_file(two / "model.safetensors"), 0.0)
    assert_close(expert(one, "a"), expert(two, "a"), 1e-7)


def test_emr_equalized_experts_vote_alike_however_large_their_updates_are(tmp_path: Path) -> None:
    models, base = setting(9, 3)
    louder = {k: np.asarray(base[k] + 8 * (models[2][k] - base[k])) for k in base}
    mixed = [*models[:2], louder]
    plain = merge(tmp_path / "plain", mixed, base, "emr", rescale="global")
    quiet = merge(tmp_path / "quiet", models, base, "emr", rescale="global", equalize=True)
    loud = merge(tmp_path / "loud", mixed, base, "emr", rescale="global", equalize=True)
    changed = [
        np.mean(one["w"] != other["w"])
        for one, other in zip(masks_of(quiet, base), masks_of(loud, base), strict=True)
    ]
    assert max(changed) < 1e-3
    kept_plain, kept_loud = (masks_of(merged, base)[0]["w"].mean() for merged in (plain, loud))
    assert kept_loud > kept_plain + 0.05  # the loud expert no longer outvotes the others
    norms = [
        sum(np.abs(state[name] - base[name]).sum() for name in base)
        for state in (expert(loud, "task2"), louder)
    ]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-3)


def test_emr_a_task_that_did_not_change_stays_the_base(tmp_path: Path) -> None:
    models, base = setting(4, 2)
    merged = merge(tmp_path, [models[0], base], base, "emr", rescale="per_tensor")
    assert_close(expert(merged, "task1"), base, 0.0)
    assert (load_file(merged / SIDE)["scales.w"][1]) == 1.0


def test_emr_of_opposite_models_keeps_each_ones_negative_half(tmp_path: Path) -> None:
    base = {"w": np.zeros(4, "f4")}
    delta = np.array([1, -2, 3, -4], "f4")
    merged = merge(tmp_path, [{"w": delta}, {"w": -delta}], base, "emr", rescale="per_tensor")
    first, second = (mask["w"] for mask in masks_of(merged, base))
    np.testing.assert_array_equal(first, [0, 1, 0, 1])
    np.testing.assert_array_equal(second, [1, 0, 1, 0])


def test_emr_keeps_bfloat16_experts_bit_for_bit_where_nothing_conflicts(tmp_path: Path) -> None:
    models, base = setting(5, 2)
    models[1] = {name: values.copy() for name, values in base.items()}
    narrow = [
        {name: values.astype(ml_dtypes.bfloat16) for name, values in state.items()}
        for state in (base, *models)
    ]
    merged = merge(tmp_path, narrow[1:], narrow[0], "emr")
    rebuilt = expert(merged, "task0")
    for name, values in narrow[1].items():
        assert rebuilt[name].tobytes() == values.tobytes()


# -- TALL masks and consensus --------------------------------------------------------------------


def flat(case: Case) -> tuple[State, float]:
    return case.group("in/base"), case.about["tall_lambda"]


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_tall_masks_equal_the_authors_program(tmp_path: Path, name: str) -> None:
    case = read_case("tall-mask", name)
    base, ratio = flat(case)
    merged = merge(tmp_path, case.models, base, "tall_masks", tall_lambda=ratio)
    unified = load_file(merged / "model.safetensors")
    update = {key: unified[key] - base[key] for key in base}
    assert_close(update, case.group("out/multi_task_vector"), 1e-6, 1e-5)
    for found, expected in zip(masks_of(merged, base), case.numbered("out/mask"), strict=True):
        assert_close(found, expected, 0.0)
    for k, expected in enumerate(case.numbered("out/reconstructed")):
        assert_close(expert(merged, f"task{k}"), expected, 1e-6, 1e-5)


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_consensus_equals_the_authors_program(name: str) -> None:
    case = read_case("tall-mask", name)
    base, ratio = flat(case)
    options = {
        "tall_lambda": ratio,
        "k": case.about["consensus_k"],
        "alpha": case.about["alpha"],
    }
    merged = merge_state_dicts(case.models, method="consensus", base=base, parameters=options)
    assert_close(merged, case.merged, 1e-6, 1e-5)


def consensus(models: list[State], base: State, **options: Any) -> State:
    return merge_state_dicts(models, method="consensus", base=base, parameters=options)


@pytest.mark.parametrize(("vector", "method"), [("ta", "task_arithmetic"), ("ties", "ties")])
def test_consensus_of_nobody_is_the_whole_vector(vector: str, method: str) -> None:
    models, base = setting(6, 3)
    found = consensus(models, base, k=0, alpha=1.0, vector=vector)
    options = {"density": 0.2, "rule": "threshold", "merge": "sum"} if method == "ties" else {}
    expected = merge_state_dicts(models, method=method, base=base, parameters=options)
    assert_close(found, expected, 1e-6)


def test_consensus_does_not_depend_on_the_order_of_the_models() -> None:
    models, base = setting(7, 4)
    assert_close(consensus(models, base), consensus(models[::-1], base), 1e-7)


def test_consensus_of_more_tasks_than_models_is_the_base() -> None:
    models, base = setting(8, 2)
    assert_close(consensus(models, base, k=3), base, 0.0)


def test_smaller_lambda_keeps_more(tmp_path: Path) -> None:
    models, base = setting(9, 3)
    kept = []
    for ratio in (0.2, 0.4, 0.6):
        merged = merge(tmp_path / str(ratio), models, base, "tall_masks", tall_lambda=ratio)
        kept.append(masks_of(merged, base))
    for more, fewer in itertools.pairwise(kept):
        for one, two in zip(more, fewer, strict=True):
            assert (one["w"] >= two["w"]).all()
            assert one["w"].sum() > two["w"].sum()


def test_lambda_may_differ_by_task(tmp_path: Path) -> None:
    models, base = setting(10, 2)
    each = [{"tall_lambda": 0.2}, {"tall_lambda": 5.0}]
    merged = merge(tmp_path, models, base, "tall_masks", each=each)
    first, second = masks_of(merged, base)
    assert first["w"].mean() > 2 * second["w"].mean()


def test_disjoint_updates_are_recovered_exactly(tmp_path: Path) -> None:
    base = {"w": np.zeros(1000, "f4")}
    rng = np.random.default_rng(11)
    models = [{"w": np.zeros(1000, "f4")} for _ in range(3)]
    for k, model in enumerate(models):
        model["w"][k::3] = rng.normal(size=model["w"][k::3].size)
    merged = merge(tmp_path, models, base, "tall_masks")
    for k, model in enumerate(models):
        assert_close(expert(merged, f"task{k}"), model, 0.0)


# -- the mechanism -------------------------------------------------------------------------------


def test_side_data_is_a_bit_per_weight_and_no_part_of_the_model(tmp_path: Path) -> None:
    models, base = setting(12, 3)
    merged = merge(tmp_path, models, base, "emr")
    side = load_file(merged / SIDE)
    assert {name: array.shape for name, array in side.items() if name.startswith("masks")} == {
        "masks.w": (3, 2500),
        "masks.b": (3, 1),
        "masks.s": (3, 1),
    }
    assert set(load_file(merged / "model.safetensors")) == set(base)
    with safe_open(merged / SIDE, "np") as file:
        assert json.loads(file.metadata()["tasks"]) == ["task0", "task1", "task2"]
    again = {
        "merge_method": "passthrough",
        "models": [{"model": str(merged)}],
    }
    fusekit.merge(again, tmp_path / "again")
    assert not (tmp_path / "again" / SIDE).exists()


@pytest.mark.parametrize("rescale", ["code", "per_tensor"])
def test_threads_do_not_change_masks_or_scales(tmp_path: Path, rescale: str) -> None:
    models, base = setting(13, 2, size=2_500_000)
    for state in (*models, base):
        state["w"] = state["w"].reshape(-1)[:-3].copy()
    sides = []
    for threads in (1, 4):
        merged = merge(tmp_path / str(threads), models, base, "emr", threads, rescale=rescale)
        sides.append((merged / SIDE).read_bytes())
    assert sides[0] == sides[1]
    (first, _), delta = masks_of(merged, base), models[0]["w"] - base["w"]
    unified = load_file(merged / "model.safetensors")["w"] - base["w"]
    np.testing.assert_array_equal(first["w"], delta * unified > 0)


def test_verify_checks_the_side_file(tmp_path: Path) -> None:
    models, base = setting(14, 2)
    merged = merge(tmp_path, models, base, "emr")
    assert verify(merged).ok
    assert verify(merged).tensors == 9
    side = merged / SIDE
    content = bytearray(side.read_bytes())
    content[-1] ^= 1
    side.write_bytes(content)
    assert any("the bytes differ" in problem for problem in verify(merged).problems)
    side.unlink()
    assert not verify(merged).ok


def test_an_expert_is_a_verified_checkpoint_with_the_bases_config(tmp_path: Path) -> None:
    models, base = setting(15, 2)
    merged = merge(tmp_path, models, base, "emr")
    report = fusekit.reconstruct(merged, "task1", tmp_path / "expert")
    assert report.out == tmp_path / "expert"
    assert verify(report.out).ok
    assert json.loads((report.out / "config.json").read_text())["model_type"] == "toy"


def test_integer_tensors_are_the_bases(tmp_path: Path) -> None:
    models, base = setting(16, 2)
    for i, state in enumerate((base, *models)):
        state["steps"] = np.array([i], np.int64)
    merged = merge(tmp_path, models, base, "emr")
    assert load_file(merged / "model.safetensors")["steps"] == 0
    assert expert(merged, "task1")["steps"] == 0


def test_tasks_can_be_named_in_the_recipe(tmp_path: Path) -> None:
    models, base = setting(17, 2)
    each = [{"task": "maths"}, {"task": "code"}]
    merged = merge(tmp_path, models, base, "tall_masks", each=each)
    assert tasks_of(merged) == ["maths", "code"]
    assert fusekit.reconstruct(merged, "code").out.name == "merged-code"


def test_refuses_two_tasks_of_one_name(tmp_path: Path) -> None:
    models, base = setting(18, 2)
    with pytest.raises(RecipeError, match="two models' tasks are called 'maths'"):
        merge(tmp_path, models, base, "emr", task="maths")


def test_refuses_an_unknown_task_and_lists_the_known_ones(tmp_path: Path) -> None:
    models, base = setting(19, 2)
    merged = merge(tmp_path, models, base, "emr")
    with pytest.raises(FusekitError, match=r"no task 'taks1', expected one of 'task0', 'task1'"):
        fusekit.reconstruct(merged, "taks1")


def test_refuses_a_folder_without_masks(tmp_path: Path) -> None:
    _, base = setting(20, 1)
    with pytest.raises(CheckpointError, match="not found, expected a folder written by a method"):
        fusekit.reconstruct(write(tmp_path / "plain", base), "task0")


def test_refuses_a_base_that_changed_and_takes_the_one_it_is_given(tmp_path: Path) -> None:
    models, base = setting(21, 2)
    merged = merge(tmp_path, models, base, "emr")
    right = expert(merged, "task0")
    moved = tmp_path / "elsewhere"
    (tmp_path / "base").rename(moved)
    write(tmp_path / "base", models[1])
    with pytest.raises(CheckpointError, match="the base model has changed since"):
        fusekit.reconstruct(merged, "task0", tmp_path / "other")
    fusekit.reconstruct(merged, "task0", tmp_path / "other", base=str(moved))
    assert_close(load_file(tmp_path / "other" / "model.safetensors"), right, 0.0)


def test_refuses_a_base_of_another_shape(tmp_path: Path) -> None:
    models, base = setting(22, 2)
    merged = merge(tmp_path, models, base, "emr")
    small = write(tmp_path / "small", {**base, "w": base["w"][:10].copy()})
    with pytest.raises(CheckpointError, match=r"'masks.w' is U8 \[2, 2500\], which fits no tensor"):
        fusekit.reconstruct(merged, "task0", base=str(small))


def test_a_resumed_merge_has_all_masks(tmp_path: Path) -> None:
    models, base = setting(23, 2)
    merged = merge(tmp_path, models, base, "emr", rescale="per_tensor")
    expected = (merged / SIDE).read_bytes()
    code = f"""
import os, fusekit, fusekit.engine.journal as journal
from fusekit.checkpoint.writer import CheckpointWriter
done = journal.Journal.finished
def finished(self, name, checksum):
    done(self, name, checksum)
    self.sync()
    os._exit(9)
journal.Journal.finished = finished
recipe = {{"merge_method": "emr", "base_model": r"{tmp_path / "base"}",
          "models": [{{"model": r"{tmp_path / "task0"}"}}, {{"model": r"{tmp_path / "task1"}"}}],
          "parameters": {{"rescale": "per_tensor"}}}}
fusekit.merge(recipe, r"{tmp_path / "second"}", threads=1)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    recipe = {
        "merge_method": "emr",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "task0")}, {"model": str(tmp_path / "task1")}],
        "parameters": {"rescale": "per_tensor"},
    }
    report = fusekit.merge(recipe, tmp_path / "second")
    assert report.resumed == 1
    assert (tmp_path / "second" / SIDE).read_bytes() == expected
    assert verify(tmp_path / "second").ok


def test_the_command_line_rebuilds_an_expert(tmp_path: Path) -> None:
    models, base = setting(24, 2)
    merged = merge(tmp_path, models, base, "emr")
    command = [sys.executable, "-m", "fusekit", "reconstruct", str(merged), "--task"]
    done = subprocess.run([*command, "task1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "merged-task1: 3 tensors" in done.stdout
    wrong = subprocess.run([*command, "task9"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "expected one of 'task0', 'task1'" in wrong.stderr
