"""Recipe files as YAML documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusekit.errors import RecipeError
from fusekit.recipe.documents import read_documents


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_key_that_occurs_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "merge_method: linear\nmodels: []\nmerge_method: ties\n")
    with pytest.raises(RecipeError, match=r"line 3: .*'merge_method' occurs twice"):
        read_documents(path)


def test_a_key_may_occur_in_several_mappings_and_be_overridden_by_merge_keys(
    tmp_path: Path,
) -> None:
    text = "a: &d {weight: 1}\nb: {<<: *d, weight: 2}\nc: {<<: *d}\n"
    (document,) = read_documents(written(tmp_path, text))
    assert document["b"] == {"weight": 2}
    assert document["c"] == {"weight": 1}


def test_aliases_that_expand_without_bound_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(RecipeError, match="aliases expand"):
        read_documents(written(tmp_path, "\n".join(lines)))


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("-2E3", -2000.0), ("1.5e-3", 0.0015), ("'1e-5'", "1e-5"), ("1e5x", "1e5x")],
)
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, text: str, value: object) -> None:
    (tmp_path / "r.yml").write_text(f"tol: {text}\n")
    assert read_documents(tmp_path / "r.yml") == [{"tol": value}]
