from __future__ import annotations

import dataclasses
import json
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import fusekit
from fusekit.adapters import load_adapter, write_adapter
from fusekit.adapters import reversible as reversible_module
from fusekit.adapters.reversible import (
    align_gauges,
    directions_for,
    fit_side,
    open_pack,
    pack_adapters,
    storage_ratio,
    truncate_adapter,
)
from fusekit.cli import adapter as command
from fusekit.errors import CheckpointError, FusekitError

from .support import load_vectors, make_adapter, make_module, random_adapter, under

SHAPES = {"a.weight": (9, 7), "b.weight": (6, 8)}


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_golden_reconstruction(case):
    tensors, cases = load_vectors("rmm")
    meta, tensors = cases[case], under(tensors, f"{case}/")
    tasks = range(meta["n_models"])
    for factor, turn in (("lora_B", lambda x: x), ("lora_A", lambda x: x.T)):
        vectors = np.stack([turn(tensors[f"in/model{i}/{factor}"]) for i in tasks])
        side, coefficients = fit_side(vectors, meta["p"])
        np.testing.assert_allclose(side.mean, turn(tensors[f"out/mean/{factor}"]), atol=1e-4)
        rebuilt = np.stack([side.rebuild(c) for c in coefficients])
        for i in tasks:
            expected = turn(tensors[f"out/recon{i}/{factor}"])
            np.testing.assert_allclose(rebuilt[i], expected, atol=1e-4)
        energy = np.square(vectors - rebuilt).sum(axis=(0, 2))
        wanted = tensors[f"out/residual_energy_{factor[-1]}"]
        np.testing.assert_allclose(energy, wanted, atol=1e-4)
    ratio = storage_ratio(meta["p"], meta["r"], meta["n_models"])
    assert ratio == pytest.approx(meta["storage_ratio"])


def relative_error(rebuilt, original):
    missed = sum(
        np.linalg.norm(rebuilt.modules[n].delta() - m.delta()) ** 2
        for n, m in original.modules.items()
    )
    wanted = sum(np.linalg.norm(m.delta()) ** 2 for m in original.modules.values())
    return np.sqrt(missed / wanted)


def tasks_of(count, rank=4, dtype=np.float32, **fields):
    return {
        f"task{i}": random_adapter(i, SHAPES, rank=rank, scaling=0.5, dtype=dtype)
        for i in range(count)
    }


@pytest.mark.parametrize("align", [False, True])
def test_enough_directions_rebuild_every_task_exactly(align, tmp_path):
    adapters = tasks_of(3)
    report = pack_adapters(adapters, tmp_path / "pack", directions=9, align=align)
    assert report.directions == 2
    pack = open_pack(tmp_path / "pack")
    for task, adapter in adapters.items():
        assert relative_error(pack.unpack(task), adapter) < 1e-5


def test_reported_errors_and_sizes_are_the_real_ones(tmp_path):
    adapters = tasks_of(5)
    report = pack_adapters(adapters, tmp_path / "pack", directions=1)
    pack = open_pack(tmp_path / "pack")
    stored = sum(
        np.prod(info.shape)
        for path in (tmp_path / "pack").glob("*.safetensors")
        for info in type(pack.basis)(path).tensors.values()
    )
    original = sum(m.A.size + m.B.size for a in adapters.values() for m in a.modules.values())
    assert report.ratio == pytest.approx(stored / original)
    assert report.ratio == pytest.approx(storage_ratio(1, 4, 5))
    assert report.truncated_rank == 2
    for error in report.errors:
        packed = relative_error(pack.unpack(error.task), adapters[error.task])
        assert error.packed == pytest.approx(packed, rel=1e-4)
        cut = truncate_adapter(adapters[error.task], int(report.truncated_rank))
        assert error.truncated == pytest.approx(relative_error(cut, adapters[error.task]), rel=1e-4)


def test_more_directions_never_hurt():
    vectors = np.random.default_rng(0).standard_normal((6, 10, 4))
    errors = []
    for directions in range(5):
        side, coefficients = fit_side(vectors, directions)
        rebuilt = np.stack([side.rebuild(c) for c in coefficients])
        errors.append(np.square(vectors - rebuilt).sum())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), shift=st.floats(-5, 5))
def test_a_common_shift_moves_the_mean_alone(seed, shift):
    vectors = np.random.default_rng(seed).standard_normal((4, 5, 3))
    side, coefficients = fit_side(vectors, 2)
    moved, same = fit_side(vectors + shift, 2)
    np.testing.assert_allclose(moved.mean, side.mean + shift, atol=1e-5)
    np.testing.assert_allclose(same, coefficients, atol=1e-4)


def test_the_order_of_tasks_permutes_coefficients_alone():
    vectors = np.random.default_rng(1).standard_normal((4, 5, 3))
    order = [2, 0, 3, 1]
    side, coefficients = fit_side(vectors, 2)
    other, permuted = fit_side(vectors[order], 2)
    np.testing.assert_allclose(other.basis, side.basis, atol=1e-5)
    np.testing.assert_allclose(permuted, coefficients[order], atol=1e-5)


def test_identical_adapters_need_no_directions(tmp_path):
    adapter = random_adapter(1, SHAPES)
    report = pack_adapters({"x": adapter, "y": adapter}, tmp_path / "pack", directions=0)
    assert max(error.packed for error in report.errors) < 1e-6
    assert report.recommended == "reversible merging"


def test_alignment_undoes_a_rotation_of_the_rank_space(tmp_path):
    adapter = random_adapter(1, SHAPES)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0].astype("f4")
    turned = make_adapter(
        *(dataclasses.replace(m, A=turn.T @ m.A, B=m.B @ turn) for m in adapter.modules.values())
    )
    both = {"x": adapter, "y": turned}
    plain = pack_adapters(both, tmp_path / "plain", directions=0)
    aligned = pack_adapters(both, tmp_path / "aligned", directions=0, align=True)
    assert min(error.packed for error in plain.errors) > 0.1
    assert max(error.packed for error in aligned.errors) < 1e-4


def test_alignment_settles_what_equal_singular_values_leave_open(tmp_path):
    rng = np.random.default_rng(0)
    A = np.linalg.qr(rng.standard_normal((9, 3)))[0].T
    B = np.linalg.qr(rng.standard_normal((8, 3)))[0]
    tasks = {}
    for i in range(4):
        noisy = [(x + 1e-3 * rng.standard_normal(x.shape)).astype("f4") for x in (A, B)]
        tasks[f"task{i}"] = make_adapter(make_module("m.weight", *noisy))
    report = pack_adapters(tasks, tmp_path / "pack", directions=0, align=True)
    assert max(error.packed for error in report.errors) < 0.02


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_alignment_changes_no_update(seed):
    adapters = [random_adapter(seed + i, {"m.weight": (8, 6)}) for i in range(3)]
    factors = [(a.modules["m.weight"].A, a.modules["m.weight"].B) for a in adapters]
    for (A, B), (A_new, B_new) in zip(factors, align_gauges(factors), strict=True):
        np.testing.assert_allclose(B_new @ A_new, B @ A, atol=1e-4)


def test_a_task_can_be_added_without_touching_the_others(tmp_path):
    adapters = tasks_of(3)
    pack_adapters(adapters, tmp_path / "pack", directions=2)
    before = open_pack(tmp_path / "pack").unpack("task0")
    known = open_pack(tmp_path / "pack").add("again", adapters["task1"])
    assert known < 1e-5
    fresh = random_adapter(77, SHAPES)
    error = open_pack(tmp_path / "pack").add("fresh", fresh)
    pack = open_pack(tmp_path / "pack")
    assert pack.tasks == ("task0", "task1", "task2", "again", "fresh")
    assert relative_error(pack.unpack("fresh"), fresh) == pytest.approx(error, rel=1e-4)
    assert relative_error(pack.unpack("task0"), before) < 1e-7


def test_an_added_task_may_come_in_another_gauge(tmp_path):
    adapters = tasks_of(2)
    pack_adapters(
        {"x": adapters["task0"], "y": adapters["task0"]},
        tmp_path / "pack",
        directions=0,
        align=True,
    )
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0].astype("f4")
    modules = adapters["task0"].modules.values()
    turned = make_adapter(*(dataclasses.replace(m, A=turn.T @ m.A, B=m.B @ turn) for m in modules))
    assert open_pack(tmp_path / "pack").add("turned", turned) < 1e-4


def test_ranks_and_modules_may_differ(tmp_path):
    adapters = {
        "x": random_adapter(1, SHAPES, rank=2),
        "y": random_adapter(2, {"a.weight": (9, 7)}, rank=3),
    }
    pack_adapters(adapters, tmp_path / "pack", directions=1)
    pack = open_pack(tmp_path / "pack")
    for task, adapter in adapters.items():
        assert set(pack.unpack(task).modules) == set(adapter.modules)
        assert relative_error(pack.unpack(task), adapter) < 1e-5


def test_half_precision_packs_take_half_the_bytes(tmp_path):
    for name, dtype in (("half", ml_dtypes.bfloat16), ("full", np.float32)):
        pack_adapters(tasks_of(4, dtype=dtype), tmp_path / name, directions=1)
    sizes = [
        sum(i.nbytes for i in open_pack(tmp_path / name).basis.tensors.values())
        for name in ("half", "full")
    ]
    assert sizes[0] * 2 == sizes[1]


@pytest.mark.parametrize(("ratio", "rank", "tasks"), [(0.35, 16, 8), (0.7, 16, 8), (0.9, 8, 20)])
def test_a_ratio_is_used_up_but_not_exceeded(ratio, rank, tasks):
    directions = directions_for(ratio, rank, tasks)
    assert storage_ratio(directions, rank, tasks) <= ratio + 1e-9
    assert storage_ratio(directions + 1, rank, tasks) > ratio


def test_the_honest_comparator_wins_on_unrelated_tasks(tmp_path):
    report = pack_adapters(tasks_of(8), tmp_path / "unrelated", ratio=0.75)
    assert report.recommended == "rank truncation"
    swollen = pack_adapters(tasks_of(3), tmp_path / "swollen", directions=2)
    assert swollen.ratio >= 1
    assert swollen.recommended == "keep the adapters"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give either directions or ratio"),
        ({"directions": 1, "ratio": 0.5}, "give either directions or ratio"),
    ],
)
def test_a_pack_needs_one_budget(fields, message, tmp_path):
    with pytest.raises(FusekitError, match=message):
        pack_adapters(tasks_of(2), tmp_path / "pack", **fields)


def test_what_a_pack_cannot_hold_is_named(tmp_path):
    expert = make_module("x", np.ones((4, 3), "f4"), np.ones((5, 4), "f4"), kind="parameter")
    experts = make_adapter(dataclasses.replace(expert, experts=2))
    with pytest.raises(CheckpointError, match="module 'x' has several experts, which a pack"):
        pack_adapters({"x": experts}, tmp_path / "pack", directions=1)
    module = random_adapter(1, SHAPES).modules["a.weight"]
    turned = dataclasses.replace(module, magnitude=np.ones(7, "f4"), magnitude_axis="input")
    with pytest.raises(CheckpointError, match=r"'a\.weight' has DoRA over its input features"):
        pack_adapters({"x": make_adapter(turned)}, tmp_path / "pack", directions=1)
    pack_adapters(tasks_of(2), tmp_path / "pack", directions=1)
    pack = open_pack(tmp_path / "pack")
    with pytest.raises(FusekitError, match="no task 'nope'"):
        pack.unpack("nope")
    with pytest.raises(FusekitError, match="'task0' exists already"):
        pack.add("task0", random_adapter(1, SHAPES))
    with pytest.raises(CheckpointError, match=r"rank 9, in 7.*the pack holds rank 4"):
        pack.add("big", random_adapter(1, {"a.weight": (9, 7)}, rank=9))
    with pytest.raises(CheckpointError, match=re.escape("not a pack of adapters")):
        open_pack(tmp_path)


def with_more(adapter, seed):
    """An adapter with DoRA magnitudes, biases and a tensor saved whole."""
    rng = np.random.default_rng(seed)
    modules = {
        name: dataclasses.replace(
            module,
            magnitude=rng.random(module.B.shape[0], "f4") + 1,
            bias=rng.standard_normal(module.B.shape[0]).astype("f4"),
        )
        for name, module in adapter.modules.items()
    }
    whole = {"head.weight": rng.standard_normal((2, 3)).astype("f4")}
    config = {"modules_to_save": ["head"]}
    return dataclasses.replace(adapter, modules=modules, replacements=whole, config=config)


def test_what_is_not_of_low_rank_stays_with_its_task(tmp_path):
    adapters = {task: with_more(a, i) for i, (task, a) in enumerate(tasks_of(3).items())}
    first = dict(list(adapters.items())[:2])
    pack_adapters(first, tmp_path / "pack", directions=3)
    open_pack(tmp_path / "pack").add("task0again", adapters["task0"])
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape).astype("f4") for name, shape in SHAPES.items()}
    base |= {name.replace("weight", "bias"): np.ones(len(w), "f4") for name, w in base.items()}
    base["head.weight"] = np.zeros((2, 3), "f4")
    for task, original in [*first.items(), ("task0again", adapters["task0"])]:
        write_adapter(open_pack(tmp_path / "pack").unpack(task), tmp_path / task)
        rebuilt = load_adapter(tmp_path / task)
        assert rebuilt.config["modules_to_save"] == ["head"]
        for name, weight in base.items():
            expected = original.apply(name, weight)
            assert np.abs(expected - weight).max() > 0.1
            np.testing.assert_allclose(rebuilt.apply(name, weight), expected, atol=1e-4)


def packed_on_the_command_line(tmp_path, *options):
    for task, adapter in tasks_of(3).items():
        write_adapter(adapter, tmp_path / task)
    tasks = [str(tmp_path / task) for task in sorted(tasks_of(3))]
    arguments = ["pack", *tasks[:2], str(tmp_path / "pack"), *options]
    result = CliRunner().invoke(command.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return tasks, tmp_path / "pack"


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_pack_has_a_manifest_that_grows_with_it(tmp_path):
    tasks, pack = packed_on_the_command_line(tmp_path)
    content = json.loads((pack / "manifest.json").read_text())
    assert content["packed"]["directions"] == 1
    assert [entry["reference"] for entry in content["inputs"]] == tasks[:2]
    before = fusekit.verify(pack)
    assert before.ok
    arguments = ["pack", tasks[2], str(pack), "--add"]
    assert CliRunner().invoke(command.app, arguments, catch_exceptions=False).exit_code == 0
    after = fusekit.verify(pack)
    assert after.ok
    assert after.tensors > before.tensors
    assert len(json.loads((pack / "manifest.json").read_text())["inputs"]) == 3


@pytest.mark.parametrize("damage", ["basis.safetensors", "task1.safetensors", "removed"])
def test_a_damaged_pack_is_found(damage, tmp_path):
    _, pack = packed_on_the_command_line(tmp_path)
    if damage == "removed":
        (pack / "task0.safetensors").unlink()
    else:
        flip_last_byte(pack / damage)
    result = fusekit.verify(pack)
    assert not result.ok
    assert any("task0" in p if damage == "removed" else "differ" in p for p in result.problems)


def test_an_addition_that_was_interrupted_can_be_made_again(tmp_path, monkeypatch):
    tasks, pack = packed_on_the_command_line(tmp_path)
    adapter = load_adapter(tasks[2])
    whole = reversible_module._write_json

    def interrupted(path, facts):
        if path.name == "pack.json":
            raise KeyboardInterrupt
        whole(path, facts)

    monkeypatch.setattr(reversible_module, "_write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_pack(pack).add("task2", adapter)
    assert open_pack(pack).tasks == ("task0", "task1")
    assert fusekit.verify(pack).ok
    monkeypatch.undo()
    open_pack(pack).add("task2", adapter)
    assert open_pack(pack).tasks == ("task0", "task1", "task2")
    assert fusekit.verify(pack).ok


@pytest.mark.parametrize("task", ["basis", "..", "a/b", ".hidden", ""])
def test_task_names_that_are_no_file_names_of_their_own_are_refused(task, tmp_path):
    adapters = tasks_of(2)
    with pytest.raises(FusekitError, match=f"task name {task!r}: expected a plain file name"):
        pack_adapters({**adapters, task: adapters["task0"]}, tmp_path / "new", directions=1)
    assert not (tmp_path / "new").exists()
    pack_adapters(adapters, tmp_path / "pack", directions=1)
    with pytest.raises(FusekitError, match="expected a plain file name"):
        open_pack(tmp_path / "pack").add(task, adapters["task0"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: facts.pop("tasks"), "does not describe the tensors of basis"),
        (lambda facts: facts.update(tasks=["../other"]), "does not describe"),
        (lambda facts: facts.update(tasks=3), "does not describe"),
        (lambda facts: facts["modules"]["a.weight"].update(rank=99), "does not describe"),
        (lambda facts: facts["modules"]["a.weight"].update(kind="dense"), "does not describe"),
        (lambda facts: facts["modules"].update(b=None), "does not describe"),
        (lambda facts: facts.update(format="other"), "format is 'other', expected 'fusekit-rev"),
    ],
)
def test_descriptions_that_do_not_fit_the_pack_are_refused(change, message, tmp_path):
    adapter = random_adapter(0, {"a.weight": (5, 4)})
    pack_adapters({"one": adapter}, tmp_path / "pack", directions=0)
    path = tmp_path / "pack" / "pack.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=message):
        open_pack(tmp_path / "pack")


def test_coefficients_of_another_pack_are_refused(tmp_path):
    adapters = tasks_of(3)
    for directions in (1, 2):
        pack_adapters(adapters, tmp_path / str(directions), directions=directions)
    name = "task1.safetensors"
    (tmp_path / "2" / name).replace(tmp_path / "1" / name)
    with pytest.raises(CheckpointError, match=r"task1.*is of shape .*, expected \["):
        open_pack(tmp_path / "1").unpack("task1")
