"""Folders that say how they were made: manifest, model card, and nothing half-written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from typer.testing import CliRunner

import fusekit
from fusekit.adapters import load_adapter, pack_adapters, write_adapter
from fusekit.adapters.merge import METHODS
from fusekit.adapters.peft_writer import AdapterWriter
from fusekit.adapters.provenance import Provenance, merge_citations, merge_method_text
from fusekit.cli import adapter as command
from fusekit.errors import FusekitError

from .support import random_adapter

SHAPES = {"m.q.weight": (9, 7), "m.v.weight": (6, 8)}


@pytest.fixture
def folder(tmp_path):
    for i in range(2):
        write_adapter(random_adapter(i, SHAPES, rank=3), tmp_path / f"task{i}")
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(command.app, [str(a) for a in arguments], catch_exceptions=False)


def merge(folder, *options):
    return run("merge", folder / "task0", folder / "task1", folder / "out", *options)


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def assert_whole(folder):
    """Every tensor is as the manifest says, and a changed one is found."""
    assert fusekit.verify(folder).ok
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert not fusekit.verify(folder).ok


def test_merges_on_the_command_line_are_those_of_the_recipe_in_the_manifest(folder):
    merge(folder, "--method", "dare_ties_svd", "--density", 0.5, "--weight", 1, "--weight", 0.3,
          "--rank", 2, "--seed", 7)  # fmt: skip
    recipe = json.loads((folder / "out/manifest.json").read_text())["recipe"]
    fusekit.merge(recipe, folder / "again")
    for name in SHAPES:
        np.testing.assert_array_equal(
            load_adapter(folder / "out").modules[name].delta(),
            load_adapter(folder / "again").modules[name].delta(),
        )
    assert_whole(folder / "out")


def test_the_card_names_models_method_recipe_and_publications(folder):
    merge(folder, "--method", "knots_ties", "--density", 0.5)
    card = (folder / "out/README.md").read_text()
    matter = front_matter(card)
    assert matter == {"library_name": "peft", "tags": ["lora", "fusekit", "merge", "knots_ties"]}
    assert "# Merge of task0 and task1" in card
    assert f"- `{folder / 'task0'}`" in card
    assert "merge_method: knots_ties" in card
    assert "2410.19735" in card and "2306.01708" in card
    assert card.endswith("\n") and not card.endswith("\n\n")


@pytest.mark.parametrize(
    ("base", "named"), [("org/model", True), ("/data/model", False), (None, False)]
)
def test_a_base_on_the_hub_is_in_the_cards_front_matter(base, named):
    card = Provenance("T", "text", {"recipe": {}}, []).card(base)
    assert front_matter(card).get("base_model") == (base if named else None)
    assert (f"A LoRA adapter for `{base}`, made" in card) == (base is not None)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_sentence_and_a_publication(method):
    assert merge_method_text(method).endswith(".")
    assert merge_citations(method)


def test_extracted_adapters_say_what_was_missed(folder):
    rng = np.random.default_rng(0)
    for name in ("base", "model"):
        (folder / name).mkdir()
        tensors = {"m.q.weight": rng.standard_normal((9, 7)).astype("f4")}
        save_file(tensors, folder / name / "model.safetensors")
    run("extract", folder / "base", folder / "model", folder / "out", "--rank", 2)
    card = (folder / "out/README.md").read_text()
    manifest = json.loads((folder / "out/manifest.json").read_text())
    assert manifest["extraction"] == {"rank": 2}
    assert [len(each["header_xxh3"]) for each in manifest["inputs"]] == [32, 32]
    assert "of its norm is missed" in card
    assert_whole(folder / "out")


def test_unpacked_adapters_name_their_pack(folder):
    pack_adapters(
        {f"task{i}": load_adapter(folder / f"task{i}") for i in range(2)},
        folder / "pack",
        directions=1,
    )
    run("unpack", folder / "pack", folder / "out", "--task", "task1")
    manifest = json.loads((folder / "out/manifest.json").read_text())
    assert manifest["unpacked"] == {"task": "task1"}
    assert set(manifest["inputs"][0]["files"]) == {
        "pack.json",
        "basis.safetensors",
        "task1.safetensors",
    }
    assert_whole(folder / "out")


def test_a_second_run_is_refused_unless_it_may_replace_the_first(folder):
    merge(folder, "--method", "cat")
    with pytest.raises(FusekitError, match="already exists; choose another output or pass --over"):
        merge(folder)
    assert load_adapter(folder / "out").modules["m.q.weight"].rank == 6
    merge(folder, "--overwrite")
    assert load_adapter(folder / "out").modules["m.q.weight"].rank == 3
    assert sorted(p.name for p in folder.iterdir()) == ["out", "task0", "task1"]


def test_a_file_is_never_replaced_by_a_folder(folder):
    (folder / "out").write_text("kept")
    with pytest.raises(FusekitError, match="out: is a file, expected a folder or nothing"):
        merge(folder, "--overwrite")
    assert (folder / "out").read_text() == "kept"


def test_what_a_killed_run_left_is_replaced(folder):
    (folder / "out.partial").mkdir()
    (folder / "out.partial/stale.safetensors").write_bytes(b"half")
    merge(folder, "--method", "cat")
    assert sorted(p.name for p in folder.iterdir()) == ["out", "task0", "task1"]
    assert sorted(p.name for p in (folder / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weight", 1], "1 weights for 2 adapters"),
        (["--majority-sign", "total"], "svd of adapters has no parameter 'majority_sign_method'"),
        (["--method", "cat", "--restarts", 3], "cat of adapters has no parameter 'restarts'"),
        (["--method", "ties", "--density", 2], "density: found 2.0, expected a number in"),
        (["--rank", 2, "--parameter-budget", 9], "rank and parameter_budget exclude each other"),
        (["--component", "unet"], "no component 'unet'"),
    ],
)
def test_options_that_would_be_ignored_or_do_not_fit_are_refused(options, message, folder):
    with pytest.raises(FusekitError, match=message):
        merge(folder, *options)
    assert not (folder / "out").exists()


def test_two_writers_of_one_adapter_do_not_meet(tmp_path):
    out = tmp_path / "out"
    with AdapterWriter(out) as writer:
        writer.add(next(iter(random_adapter(1, {"q.weight": (3, 3)}).modules.values())))
        with pytest.raises(FusekitError, match="another process is writing this output"):
            AdapterWriter(out)
    assert load_adapter(out).modules
    assert not (tmp_path / "out.partial").exists()


def test_only_adapters_and_outputs_are_overwritten(tmp_path):
    adapter = random_adapter(1, {"q.weight": (3, 3)})
    out = tmp_path / "out"
    for _ in range(2):
        write_adapter(adapter, out, overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"kept")
    with pytest.raises(FusekitError, match=r"photos: holds no manifest.json"):
        write_adapter(adapter, tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "one.jpg").read_bytes() == b"kept"
