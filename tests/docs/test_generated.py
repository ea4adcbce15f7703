"""Generated pages are current, links lead somewhere, and examples in the text are right."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import fusekit
from fusekit.adapters import plan_adapters, write_adapter
from fusekit.checkpoint.statistics import save_statistics
from fusekit.errors import CheckpointError
from fusekit.evaluate import digits
from fusekit.methods import available
from scripts import make_docs
from tests.adapters.support import random_adapter
from tests.docs.markdown import PAGES, ROOT, anchors, blocks, includes, label, links

every_page = pytest.mark.parametrize("page", PAGES, ids=label)
WRITTEN = [page for page in PAGES if page.parent != make_docs.PAGES]
"""Pages that people wrote."""

DIGITS_WEIGHTS = digits.base() / "model.safetensors"

TOKENIZING = [ROOT / "tests/vectors/mergekit_e2e/inputs" / name for name in ("tok_a", "tok_b")]
"""Two tiny models with vocabularies of their own."""


def test_every_method_has_a_current_page() -> None:
    stale = [label(path) for path in make_docs.outdated()]
    assert not stale, "run python scripts/make_docs.py"


def test_a_changed_description_makes_its_page_outdated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_docs, "PAGES", tmp_path)
    monkeypatch.setattr(make_docs, "COMMANDS", tmp_path / "cli.md")
    for path, text in make_docs.pages().items():
        path.write_text(text, encoding="utf-8")
    assert make_docs.outdated() == []
    (tmp_path / "linear.md").write_text("something else")
    (tmp_path / "gone.md").write_text("a method that is no more")
    assert make_docs.outdated() == [tmp_path / "linear.md", tmp_path / "gone.md"]


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("left at granularity: model", "left at `granularity: model`"),
        ("see weights_in_election", "see `weights_in_election`"),
        ("merge: sum adds", "`merge: sum` adds"),
        ("a scale per task: identical models", "a scale per task: identical models"),
        ("with mask_rate: nothing", "with `mask_rate`: nothing"),
    ],
)
def test_settings_are_told_from_words_before_a_colon(text: str, marked: str) -> None:
    assert make_docs.mark(text) == marked


@pytest.mark.parametrize("name", sorted(available()))
def test_a_minimal_recipe_can_be_planned(name: str, tmp_path: Path) -> None:
    recipe = yaml.safe_load(make_docs.minimal_recipe(available()[name]))
    folder = make_docs.RECIPES
    for entry in recipe["models"]:
        entry["model"] = str(folder / entry["model"])
    if "base_model" in recipe:
        recipe["base_model"] = str(folder / recipe["base_model"])
    if available()[name].statistic is None:
        fusekit.plan(recipe).close()
    else:
        with pytest.raises(CheckpointError, match=r"statistics\.safetensors: cannot be opened"):
            fusekit.plan(recipe)


@every_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("https://", "http://")):
            continue
        target, _, anchor = link.partition("#")
        file = page if not target else page.parent / target
        assert file.exists(), f"{label(page)}: {link}"
        if anchor and not anchor.startswith("fusekit."):
            assert anchor in anchors(file), f"{label(page)}: {link}"


@every_page
def test_included_files_exist(page: Path) -> None:
    for name in includes(page):
        assert (ROOT / name).is_file(), f"{label(page)}: {name}"


@pytest.mark.parametrize("page", WRITTEN, ids=label)
def test_interactive_examples_give_what_they_show(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    session = "\n".join(blocks(page, "pycon"))
    examples = doctest.DocTestParser().get_doctest(session, {}, label(page), str(page), 0)
    out: list[str] = []
    doctest.DocTestRunner(verbose=False).run(examples, out=out.append)
    assert not out, "".join(out)


@pytest.mark.parametrize("page", WRITTEN, ids=label)
def test_python_blocks_compile(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, label(page), "exec")


@pytest.mark.parametrize("page", WRITTEN, ids=label)
def test_recipes_in_the_text_can_be_planned(page: Path, tmp_path: Path) -> None:
    for text in blocks(page, "yaml"):
        documents = list(yaml.safe_load_all(text))
        if "merge_method" in documents[0]:
            recipe = tmp_path / "recipe.yml"
            names = [entry["model"] for entry in documents[0].get("models", [])]
            if names and all(name.startswith("./adapter") for name in names):
                for name in names:
                    write_adapter(random_adapter(0, {"m.q.weight": (4, 4)}), tmp_path / name)
                recipe.write_text(text)
                plan_adapters(fusekit.load_recipe(recipe))
                continue
            for entry in documents[0].get("models", []):
                if "statistics" in entry.get("parameters", {}):
                    write_grams(tmp_path / entry["parameters"]["statistics"])
            recipe.write_text(yaml.safe_dump_all(on_digits(documents)))
            fusekit.plan(recipe).close()


def write_grams(path: Path) -> None:
    """Gram matrices for every layer of a digit expert."""
    shapes = {name: value.shape for name, value in load_file(DIGITS_WEIGHTS).items()}
    grams = {
        f"{name.removesuffix('.weight')}/gram": np.eye(shape[1], dtype=np.float32)
        for name, shape in shapes.items()
        if len(shape) == 2
    }
    save_statistics(path, grams, {})


def on_digits(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Recipes with their models (`./name`) exchanged for the digit experts, name by name."""
    folders = iter(TOKENIZING if "tokenizer" in documents[0] else digits.experts().values())
    experts: dict[str, str] = {}

    def exchanged(value: Any) -> Any:
        if isinstance(value, list):
            return [exchanged(item) for item in value]
        if isinstance(value, dict):
            return {key: exchanged(item) for key, item in value.items()}
        if isinstance(value, str) and value.startswith("./"):
            if value not in experts:
                experts[value] = str(next(folders))
            return experts[value]
        return value

    changed: list[dict[str, Any]] = exchanged(documents)
    return changed
