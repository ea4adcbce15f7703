"""Merging files end to end: what is written, when it appears, and what survives a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import fusekit
from fusekit import CheckpointError, FusekitError, RecipeError
from fusekit.checkpoint.writer import PartialFolder
from fusekit.engine.run import Progress
from tests.engine.support import Array, random_models, write_model

SHAPES = {
    "model.embed_tokens.weight": (50, 16),
    **{
        f"model.layers.{i}.{name}": shape
        for i in range(6)
        for name, shape in {"q.weight": (64, 50), "mlp.weight": (100, 64), "norm": (64,)}.items()
    },
    "model.norm.weight": (16,),
}


class Inputs(NamedTuple):
    """Two models around a base, on disk, and a TIES recipe for them."""

    folder: Path
    base: dict[str, Array]
    models: list[dict[str, Array]]
    recipe: Path


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    base, models = random_models(SHAPES, 2)
    config = {"model_type": "toy", "torch_dtype": "float32", "hidden_size": 16}
    for name, tensors in {"base": base, "a": models[0], "b": models[1]}.items():
        folder = write_model(tmp_path / name, tensors, {**config, "owner": name})
        (folder / "tokenizer.json").write_text(f'{{"of": "{name}"}}')
        (folder / "vocab.txt").write_text(name)
        (folder / "pytorch_model.bin").write_bytes(b"weights in another format")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        "merge_method: ties\nbase_model: base\nmodels:\n  - model: a\n  - model: b\n"
        "parameters:\n  density: 0.4\n"
    )
    return Inputs(tmp_path, base, models, recipe)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name; the manifest's inputs name paths and times, so not that."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"
    }


def expected_merge(inputs: Inputs) -> dict[str, Array]:
    merged: dict[str, Array] = fusekit.merge_state_dicts(
        inputs.models, method="ties", base=inputs.base, parameters={"density": 0.4}
    )
    return merged


def tensors_of(folder: Path) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(load_file(file))
    return tensors


# -- a finished output ----------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_a_merge_of_files_equals_that_of_state_dicts(inputs: Inputs, threads: int) -> None:
    out = inputs.folder / "out"
    report = fusekit.merge(inputs.recipe, out, threads=threads)
    found = tensors_of(out)
    expected = expected_merge(inputs)
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    size = sum(values.nbytes for values in expected.values())
    assert (report.tensors, report.resumed, report.bytes_written) == (len(SHAPES), 0, size)
    assert report.bytes_read >= 3 * size
    assert report.out == out


def test_the_output_holds_config_tokenizer_and_weights_and_nothing_else(inputs: Inputs) -> None:
    out = inputs.folder / "out"
    fusekit.merge(inputs.recipe, out)
    assert set(contents(out)) | {"manifest.json"} == {
        "README.md",
        "config.json",
        "tokenizer.json",
        "vocab.txt",
        "model.safetensors",
        "manifest.json",
    }
    assert json.loads((out / "tokenizer.json").read_text()) == {"of": "base"}
    assert json.loads((out / "config.json").read_text())["owner"] == "base"
    assert not (inputs.folder / "out.partial").exists()


def test_without_a_base_companions_come_from_the_first_model(inputs: Inputs) -> None:
    out = inputs.folder / "out"
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(inputs.folder / name)} for name in "ba"],
        "parameters": {"weight": 1.0},
    }
    fusekit.merge(recipe, out)
    assert (out / "vocab.txt").read_text() == "b"


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
@pytest.mark.parametrize("config_key", ["torch_dtype", "dtype"])
def test_the_config_says_the_new_dtype_under_the_key_it_uses(
    inputs: Inputs, key: str, config_key: str
) -> None:
    (inputs.folder / "base/config.json").write_text(json.dumps({config_key: "float32", "x": 1}))
    inputs.recipe.write_text(inputs.recipe.read_text() + f"{key}: bfloat16\n")
    out = inputs.folder / "out"
    fusekit.merge(inputs.recipe, out)
    assert json.loads((out / "config.json").read_text()) == {config_key: "bfloat16", "x": 1}
    with safe_open(out / "model.safetensors", "np") as file:
        assert file.get_slice("model.norm.weight").get_dtype() == "BF16"


def test_shards_are_filled_to_the_limit_and_indexed(inputs: Inputs) -> None:
    out = inputs.folder / "out"
    fusekit.merge(inputs.recipe, out, out_shard_size=60_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "np") as shard:
            assert name in shard.keys()  # noqa: SIM118
    assert set(index["weight_map"]) == set(SHAPES)
    found, expected = tensors_of(out), expected_merge(inputs)
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in expected.values())
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    for file in files:
        assert sum(v.nbytes for v in load_file(out / file).values()) <= 60_000


def test_sharded_inputs_are_read_through_their_index(inputs: Inputs) -> None:
    first, second = inputs.folder / "first", inputs.folder / "second"
    fusekit.merge(inputs.recipe, first, out_shard_size=60_000)
    copy = {"merge_method": "passthrough", "models": [{"model": str(first)}]}
    fusekit.merge(copy, second)
    found, expected = tensors_of(second), tensors_of(first)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_models_are_found_beside_the_recipe(inputs: Inputs, monkeypatch: Any) -> None:
    (inputs.folder / "elsewhere").mkdir()
    monkeypatch.chdir(inputs.folder / "elsewhere")
    fusekit.merge(inputs.recipe, "out")
    assert (inputs.folder / "elsewhere/out/model.safetensors").is_file()


def test_the_same_merge_writes_the_same_bytes(inputs: Inputs) -> None:
    one, two = inputs.folder / "one", inputs.folder / "two"
    fusekit.merge(inputs.recipe, one, threads=1)
    fusekit.merge(inputs.recipe, two, threads=3)
    assert contents(one) == contents(two)
    assert (one / "manifest.json").read_bytes() == (two / "manifest.json").read_bytes()


def test_nonfinite_values_are_reported_when_allowed(inputs: Inputs) -> None:
    bad = {**inputs.models[0], "model.norm.weight": np.full(16, np.nan, np.float32)}
    write_model(inputs.folder / "a", bad)
    report = fusekit.merge(inputs.recipe, inputs.folder / "out", allow_nonfinite=True)
    (found,) = report.nonfinite
    assert (found.tensor, found.model, found.count) == ("model.norm.weight", "a", 16)


def test_progress_ends_at_the_total(inputs: Inputs) -> None:
    seen: list[Any] = []
    fusekit.merge(inputs.recipe, inputs.folder / "out", on_progress=seen.append)
    assert seen[-1].written == seen[-1].total == sum(v.nbytes for v in inputs.base.values())
    assert [at.written for at in seen] == sorted(at.written for at in seen)


# -- nothing under the target's name on failure ---------------------------------------------------


def bad_value(inputs: Inputs) -> None:
    bad = {**inputs.models[1]}
    bad["model.layers.3.norm"] = np.full(64, np.inf, np.float32)
    write_model(inputs.folder / "b", bad)


def test_a_failed_merge_leaves_nothing_under_the_targets_name(inputs: Inputs) -> None:
    bad_value(inputs)
    with pytest.raises(CheckpointError, match=r"layers\.3\.norm' has 64 NaN or infinite"):
        fusekit.merge(inputs.recipe, inputs.folder / "out")
    assert not (inputs.folder / "out").exists()


BAD_INPUT: dict[str, Callable[[Inputs], object]] = {
    "missing model": lambda i: shutil.rmtree(i.folder / "b"),
    "other shape": lambda i: write_model(i.folder / "b", {"model.norm.weight": np.zeros(3, "f4")}),
    "truncated": lambda i: os.truncate(i.folder / "b/model.safetensors", 5000),
    "misspelt parameter": lambda i: i.recipe.write_text(
        i.recipe.read_text().replace("density", "densty")
    ),
    "no such method": lambda i: i.recipe.write_text(i.recipe.read_text().replace("ties", "tise")),
    "no base": lambda i: i.recipe.write_text(
        i.recipe.read_text().replace("base_model: base\n", "")
    ),
}


@pytest.mark.parametrize("spoil", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_refused_before_anything_is_written(
    inputs: Inputs, spoil: Callable[[Inputs], object]
) -> None:
    spoil(inputs)
    before = sorted(inputs.folder.iterdir())
    with pytest.raises((RecipeError, CheckpointError)) as caught:
        fusekit.merge(inputs.recipe, inputs.folder / "out")
    assert "\n" not in str(caught.value)
    assert sorted(inputs.folder.iterdir()) == before


def test_an_existing_target_is_refused_and_kept(inputs: Inputs) -> None:
    out = inputs.folder / "out"
    out.mkdir()
    (out / "precious").write_text("keep me")
    with pytest.raises(FusekitError, match="already exists"):
        fusekit.merge(inputs.recipe, out)
    assert (out / "precious").read_text() == "keep me"
    assert not (inputs.folder / "out.partial").exists()


def test_overwriting_replaces_the_whole_output(inputs: Inputs) -> None:
    out = inputs.folder / "out"
    fusekit.merge({"merge_method": "passthrough", "models": [{"model": f"{out.parent}/a"}]}, out)
    (out / "stale.json").write_text("{}")
    fusekit.merge(inputs.recipe, out, overwrite=True)
    assert not (out / "stale.json").exists()
    assert fusekit.verify(out).ok
    assert {p.name for p in inputs.folder.iterdir()} == {"base", "a", "b", "recipe.yml", "out"}


def test_overwriting_keeps_the_old_output_when_the_merge_fails(inputs: Inputs) -> None:
    out = inputs.folder / "out"
    fusekit.merge(inputs.recipe, out)
    before = contents(out)
    bad_value(inputs)
    with pytest.raises(CheckpointError, match="NaN"):
        fusekit.merge(inputs.recipe, out, overwrite=True)
    assert contents(out) == before


def test_overwriting_spares_what_is_no_output(inputs: Inputs) -> None:
    before = contents(inputs.folder / "a")
    with pytest.raises(FusekitError, match=r"a: holds no manifest.json, so it is no output"):
        fusekit.merge(inputs.recipe, inputs.folder / "a", overwrite=True)
    with pytest.raises(FusekitError, match=r"holds no manifest.json"):
        fusekit.merge(inputs.recipe, inputs.folder, overwrite=True)
    assert contents(inputs.folder / "a") == before


def test_an_output_that_is_merged_is_not_overwritten(inputs: Inputs) -> None:
    out = inputs.folder / "out"
    fusekit.merge(inputs.recipe, out)
    before = contents(out)
    again = {"merge_method": "passthrough", "models": [{"model": str(out)}]}
    with pytest.raises(FusekitError, match=r"out: holds .*model.safetensors, which this merge"):
        fusekit.merge(again, out, overwrite=True)
    assert contents(out) == before
    assert not (inputs.folder / "out.partial").exists()


def test_two_merges_do_not_write_the_same_output(inputs: Inputs) -> None:
    out = inputs.folder / "out"
    other = PartialFolder(out)
    with pytest.raises(FusekitError, match="another process is writing this output"):
        fusekit.merge(inputs.recipe, out)
    other.close()
    fusekit.merge(inputs.recipe, out)
    assert fusekit.verify(out).ok


def test_an_output_that_appears_meanwhile_is_kept(inputs: Inputs) -> None:
    out = inputs.folder / "out"

    def appears(progress: Progress) -> None:
        out.mkdir(exist_ok=True)
        (out / "precious").write_text("keep me")

    with pytest.raises(FusekitError, match="Directory not empty"):
        fusekit.merge(inputs.recipe, out, on_progress=appears)
    assert (out / "precious").read_text() == "keep me"


def test_unfinished_outputs_are_no_models(inputs: Inputs) -> None:
    bad_value(inputs)
    with pytest.raises(CheckpointError, match="NaN"):
        fusekit.merge(inputs.recipe, inputs.folder / "out")
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{inputs.folder}/out.partial"}]}
    with pytest.raises(CheckpointError, match=r"out\.partial: an unfinished output"):
        fusekit.plan(recipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads: found 0, expected at least 1"),
        ({"threads": 1.5}, "threads: found 1.5, expected at least 1"),
        ({"out_shard_size": 0}, "size 0: expected more than 0 bytes"),
        ({"out_shard_size": "big"}, "size 'big': expected a number"),
        ({"device": "cuda"}, "device: found 'cuda', but ties merges in blocks"),
    ],
)
def test_wrong_options_leave_nothing_behind(
    inputs: Inputs, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(FusekitError, match=message):
        fusekit.merge(inputs.recipe, inputs.folder / "out", **options)
    assert not list(inputs.folder.glob("out*"))


def test_shard_sizes_may_be_texts(inputs: Inputs) -> None:
    plan = fusekit.plan(inputs.recipe, out_shard_size="60kB")
    plan.close()
    assert len(plan.layout.shards) > 1
    fusekit.merge(inputs.recipe, inputs.folder / "out", out_shard_size="60kB")
    written = {path.name for path in (inputs.folder / "out").glob("*.safetensors")}
    assert written == {shard.file_name for shard in plan.layout.shards}


def test_models_without_tensors_are_refused(inputs: Inputs) -> None:
    for name in ("a", "b"):
        write_model(inputs.folder / name, {})
    models = [{"model": str(inputs.folder / name)} for name in ("a", "b")]
    with pytest.raises(CheckpointError, match="safetensors: holds no tensors"):
        fusekit.plan({"merge_method": "linear", "models": models, "parameters": {"weight": 1.0}})


def test_an_empty_name_is_no_target(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    (inputs.folder / "here").mkdir()
    monkeypatch.chdir(inputs.folder / "here")
    with pytest.raises(FusekitError, match="out is missing"):
        fusekit.merge(inputs.recipe, "")


def test_a_tilde_is_the_home_folder(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(inputs.folder))
    report = fusekit.merge("~/recipe.yml", "~/out")
    assert report.out == inputs.folder / "out"
    assert fusekit.verify(inputs.folder / "out").ok


def test_paths_need_not_be_text(inputs: Inputs) -> None:
    """On Linux a name is bytes: this one is no UTF-8."""
    folder = inputs.folder / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for name in ("base", "a", "b", "recipe.yml"):
        (inputs.folder / name).rename(folder / name)
    fusekit.merge(folder / "recipe.yml", folder / "out")
    assert fusekit.verify(folder / "out").ok
    assert (folder / "out" / "README.md").read_text(encoding="utf-8")


def test_an_empty_target_folder_is_used(inputs: Inputs) -> None:
    out = inputs.folder / "out"
    out.mkdir()
    fusekit.merge(inputs.recipe, out)
    assert fusekit.verify(out).ok


def test_a_place_that_is_no_folder_is_refused(inputs: Inputs) -> None:
    with pytest.raises(FusekitError, match="not a writable folder") as caught:
        fusekit.merge(inputs.recipe, inputs.recipe / "out")
    assert str(caught.value).startswith(str(inputs.recipe))


def test_too_little_disk_space_is_refused_before_work(inputs: Inputs, monkeypatch: Any) -> None:
    usage = shutil.disk_usage(inputs.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=10_000))
    with pytest.raises(FusekitError, match=r"0\.01 MB free, the output needs 0\.\d\d MB") as caught:
        fusekit.merge(inputs.recipe, inputs.folder / "out")
    assert str(inputs.folder) in str(caught.value)
    assert not list(inputs.folder.glob("out*"))


# -- resuming -------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import fusekit
from fusekit.engine.journal import Journal

finished = Journal.finished

def killed_half_way(self, name, checksum):
    finished(self, name, checksum)
    if len(self.checksums) == 10:
        self.sync()
        os.kill(os.getpid(), signal.SIGKILL)

Journal.finished = killed_half_way
fusekit.merge(sys.argv[1], sys.argv[2], threads=2)
"""


def kill_half_way(inputs: Inputs, out: Path) -> None:
    """Run the merge in another process that is killed when half of it is written."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(inputs.recipe), str(out)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    assert (out.parent / f"{out.name}.partial").is_dir()


@pytest.mark.parametrize("granularity", ["tensor", "model"])
def test_a_killed_merge_continues_and_ends_in_the_same_bytes(
    inputs: Inputs, granularity: str
) -> None:
    inputs.recipe.write_text(inputs.recipe.read_text() + f"granularity: {granularity}\n")
    whole, out = inputs.folder / "whole", inputs.folder / "out"
    fusekit.merge(inputs.recipe, whole)
    kill_half_way(inputs, out)
    report = fusekit.merge(inputs.recipe, out)
    assert 0 < report.resumed < len(SHAPES)
    assert report.bytes_written < sum(values.nbytes for values in inputs.base.values())
    assert contents(out) == contents(whole)
    assert (out / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()
    assert not (inputs.folder / "out.partial").exists()


@pytest.fixture
def half_done(inputs: Inputs) -> Inputs:
    """Inputs whose merge into `out` was killed half way."""
    kill_half_way(inputs, inputs.folder / "out")
    return inputs


def test_a_journal_cut_short_by_the_kill_is_read_as_far_as_it_goes(half_done: Inputs) -> None:
    journal = half_done.folder / "out.partial/journal.jsonl"
    text = journal.read_bytes()
    journal.write_bytes(text[:-20])
    report = fusekit.merge(half_done.recipe, half_done.folder / "out")
    assert report.resumed > 0
    assert fusekit.verify(half_done.folder / "out").ok


@pytest.mark.parametrize(
    "damage",
    [b"\xff\xfe\x00", b'{"tensor": "ghost", "checksum": "0"}\n', b'{"tensor": [3]}\n', b"[]\n7\n"],
)
def test_a_damaged_journal_is_read_as_far_as_it_makes_sense(
    half_done: Inputs, damage: bytes
) -> None:
    with (half_done.folder / "out.partial/journal.jsonl").open("ab") as journal:
        journal.write(damage)
    report = fusekit.merge(half_done.recipe, half_done.folder / "out")
    assert report.resumed > 0
    assert fusekit.verify(half_done.folder / "out").ok


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 5000), Path.unlink])
def test_tensors_of_damaged_files_are_merged_again(
    half_done: Inputs, damage: Callable[[Path], None]
) -> None:
    damage(half_done.folder / "out.partial/model.safetensors")
    fusekit.merge(half_done.recipe, half_done.folder / "out")
    assert fusekit.verify(half_done.folder / "out").ok


def test_finished_tensors_whose_bytes_have_changed_are_merged_again(half_done: Inputs) -> None:
    fusekit.merge(half_done.recipe, half_done.folder / "whole")
    partial = half_done.folder / "out.partial"
    lines = (partial / "journal.jsonl").read_text().splitlines()[1:]
    finished = [json.loads(line)["tensor"] for line in lines]
    spoilt = finished[::4]
    weights = partial / "model.safetensors"
    content = bytearray(weights.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name in spoilt:
        content[8 + length + header[name]["data_offsets"][1] - 1] ^= 1
    weights.write_bytes(content)
    report = fusekit.merge(half_done.recipe, half_done.folder / "out")
    assert report.resumed == len(finished) - len(spoilt) > 0
    assert any(
        "the bytes had changed since" in remark and f"and {len(spoilt) - 1} more" in remark
        for remark in report.warnings
    )
    assert contents(half_done.folder / "out") == contents(half_done.folder / "whole")
    assert fusekit.verify(half_done.folder / "out").ok


def test_starting_over_ignores_what_is_there(half_done: Inputs) -> None:
    report = fusekit.merge(half_done.recipe, half_done.folder / "out", resume=False)
    assert report.resumed == 0
    assert fusekit.verify(half_done.folder / "out").ok


def test_another_recipe_does_not_continue_the_merge(half_done: Inputs) -> None:
    half_done.recipe.write_text(half_done.recipe.read_text().replace("0.4", "0.5"))
    with pytest.raises(FusekitError, match="another recipe; pass --no-resume"):
        fusekit.merge(half_done.recipe, half_done.folder / "out")
    assert not (half_done.folder / "out").exists()


def test_another_layout_does_not_continue_the_merge(half_done: Inputs) -> None:
    with pytest.raises(FusekitError, match="--out-shard-size"):
        fusekit.merge(half_done.recipe, half_done.folder / "out", out_shard_size=60_000)


def test_a_changed_input_does_not_continue_the_merge(half_done: Inputs) -> None:
    write_model(half_done.folder / "b", half_done.models[0])
    with pytest.raises(FusekitError, match="has changed since this merge was begun") as caught:
        fusekit.merge(half_done.recipe, half_done.folder / "out")
    assert str(half_done.folder / "b/model.safetensors") in str(caught.value)


def test_a_recipe_corrected_before_anything_was_written_needs_no_starting_over(
    inputs: Inputs,
) -> None:
    content = {
        "merge_method": "linear",
        "models": [{"model": str(inputs.folder / name)} for name in "ab"],
        "parameters": {"weight": 1.0, "normalize": True},
    }
    weights = [{"parameters": {"weight": weight}} for weight in (1.0, -1.0)]
    wrong = {
        **content,
        "models": [{**m, **w} for m, w in zip(content["models"], weights, strict=True)],
    }
    with pytest.raises(RecipeError, match="sum to 0"):
        fusekit.merge(wrong, inputs.folder / "out")
    fusekit.merge(content, inputs.folder / "out")
    assert fusekit.verify(inputs.folder / "out").ok


def test_an_input_that_changes_while_it_is_read_is_noticed(inputs: Inputs) -> None:
    path = inputs.folder / "b/model.safetensors"

    def touch(_at: object) -> None:
        os.utime(path, ns=(0, 0))

    with pytest.raises(FusekitError, match="changed while it was being read") as caught:
        fusekit.merge(inputs.recipe, inputs.folder / "out", on_progress=touch)
    assert str(path) in str(caught.value)
    assert not (inputs.folder / "out").exists()


# -- manifest and verification -------------------------------------------------------------------


def test_the_manifest_names_recipe_inputs_and_tensors(inputs: Inputs) -> None:
    out = inputs.folder / "out"
    fusekit.merge(inputs.recipe, out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["fusekit"] == fusekit.__version__
    assert manifest["recipe"]["parameters"] == {"density": 0.4}
    assert [i["reference"] for i in manifest["inputs"]] == ["base", "a", "b"]
    for entry in manifest["inputs"]:
        assert entry["size"] == Path(entry["path"]).stat().st_size
    assert set(manifest["tensors"]) == set(SHAPES)
    entry = manifest["tensors"]["model.norm.weight"]
    assert (entry["file"], entry["dtype"], entry["shape"]) == ("model.safetensors", "F32", [16])


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_verify_names_the_tensor_of_a_flipped_byte(inputs: Inputs) -> None:
    out = inputs.folder / "out"
    fusekit.merge(inputs.recipe, out, out_shard_size=60_000)
    good = fusekit.verify(out)
    assert good.ok
    assert good.tensors == len(SHAPES)
    assert good.nbytes == sum(values.nbytes for values in inputs.base.values())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shard = out / index["weight_map"]["model.layers.3.norm"]
    data = shard.read_bytes()
    position = data.rindex(load_file(shard)["model.layers.3.norm"].tobytes())
    flip(shard, position + 17)
    (problem,) = fusekit.verify(out).problems
    assert problem == "model.layers.3.norm: the bytes differ from those that were written"


def test_verify_names_small_files_that_changed_or_are_gone(inputs: Inputs) -> None:
    out = inputs.folder / "out"
    fusekit.merge(inputs.recipe, out, out_shard_size=60_000)
    flip(out / "tokenizer.json", 3)
    (out / "config.json").unlink()
    (out / "README.md").write_text("my own words")
    assert set(fusekit.verify(out).problems) == {
        "tokenizer.json: differs from what was written",
        "config.json: missing",
    }


@pytest.mark.parametrize("name", ["../base/config.json", "/etc/passwd", "a/../../b", 3])
def test_verify_reads_no_file_outside_of_the_output(inputs: Inputs, name: object) -> None:
    out = inputs.folder / "out"
    fusekit.merge(inputs.recipe, out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["companions"] = [name] if name == 3 else {name: ""}
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="not a fusekit manifest"):
        fusekit.verify(out)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight: missing"),
        (lambda t: t.update(new=np.zeros(1, "f4")), "new: not in the manifest"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(15, "f4")}),
            "model.norm.weight: is F32 [15], expected F32 [16]",
        ),
    ],
)
def test_verify_names_missing_new_and_reshaped_tensors(
    inputs: Inputs, change: Callable[[dict[str, Array]], object], problem: str
) -> None:
    out = inputs.folder / "out"
    fusekit.merge(inputs.recipe, out)
    tensors = tensors_of(out)
    change(tensors)
    write_model(out, tensors)
    assert fusekit.verify(out).problems == (problem,)


@pytest.mark.parametrize(
    "content",
    [None, "not JSON", "[]", "{}", '{"tensors": []}', '{"tensors": {"w": 3}}', '{"tensors": {}}'],
)
def test_verify_refuses_a_folder_without_a_manifest(inputs: Inputs, content: str | None) -> None:
    out = inputs.folder / "out"
    fusekit.merge(inputs.recipe, out)
    path = out / "manifest.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError) as caught:
        fusekit.verify(out)
    assert str(path) in str(caught.value)
