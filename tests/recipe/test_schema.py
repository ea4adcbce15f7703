"""Recipes as written: what is accepted, and the one sentence about what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusekit import Recipe, RecipeError, load_recipe

GOOD: dict[str, Any] = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}


def refused(source: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_recipe_from_a_mapping_has_defaults() -> None:
    recipe = load_recipe(GOOD)
    assert [entry.model for entry in recipe.models] == ["a", "b"]
    assert (recipe.base_model, recipe.dtype, recipe.out_dtype) == (None, None, None)
    assert (recipe.granularity, recipe.seed, recipe.parameters) == ("tensor", 0, {})
    assert load_recipe(recipe) is recipe


def test_a_recipe_from_a_file_knows_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_text(
        "# a comment\n"
        "merge_method: ties\n"
        "base_model: base\n"
        "models:\n"
        "  - model: a\n"
        "    parameters: {weight: 0.5, density: [0.2, 0.8]}\n"
        "  - model: b\n"
        "parameters:\n"
        "  lambda: 0.7\n"
        "dtype: float32\n"
        "out_dtype: torch.bfloat16\n"
        "granularity: layer\n"
        "seed: 42\n"
    )
    recipe = load_recipe(path)
    assert recipe == load_recipe(str(path))
    assert recipe.folder == tmp_path
    assert recipe.models[0].parameters == {"weight": 0.5, "density": [0.2, 0.8]}
    assert (recipe.dtype, recipe.out_dtype) == ("float32", "bfloat16")
    assert (recipe.granularity, recipe.seed) == ("layer", 42)


def test_empty_parameters_are_none() -> None:
    recipe = load_recipe(
        {**GOOD, "models": [{"model": "a", "parameters": None}], "parameters": None}
    )
    assert recipe.parameters == recipe.models[0].parameters == {}


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_dtypes_have_torchs_names(name: str) -> None:
    assert load_recipe({**GOOD, "dtype": name}).dtype == name
    assert load_recipe({**GOOD, "dtype": f"torch.{name}"}).dtype == name


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no method": ({"merge_method": None}, "merge_method: found None, expected a text"),
    "method a number": ({"merge_method": 1}, "merge_method: found 1, expected a text"),
    "no models": ({"models": []}, "models: found [], expected at least one"),
    "models a mapping": ({"models": {}}, "models: found {}, expected a list"),
    "model a text": ({"models": ["a"]}, "models[0]: found 'a', expected a mapping with a model"),
    "model a number": ({"models": [{"model": 3}]}, "models[0].model: found 3, expected a text"),
    "model missing": (
        {"models": [{"model": "a"}, {"parameters": {}}]},
        "models[1].model is missing",
    ),
    "parameters a list": ({"parameters": [1]}, "parameters: found [1], expected a mapping"),
    "parameter a number": ({"parameters": {1: 2}}, "parameters[1]: found 1, expected a text"),
    "key a number": ({1: 2}, "[1]: found 1, expected a text"),
    "misspelt key": ({"parmeters": {}}, "unknown key 'parmeters' (did you mean 'parameters'?)"),
    "misspelt key of a model": (
        {"models": [{"model": "a", "paramters": {}}]},
        "unknown key 'models[0].paramters' (did you mean 'parameters'?)",
    ),
    "unknown key": ({"zzz": 1}, "unknown key 'zzz' (known: base_model, chat_template, dtype, "),
    "key of our own": ({"folder": "/etc"}, "unknown key 'folder'"),
    "misspelt dtype": (
        {"dtype": "bfloat61"},
        "dtype: found 'bfloat61', expected a floating-point type (did you mean 'bfloat16'?)",
    ),
    "integer dtype": ({"out_dtype": "int8"}, "out_dtype: found 'int8', expected a floating-point"),
    "dtype a number": ({"dtype": 16}, "dtype: found 16, expected a text"),
    "granularity": ({"granularity": "layr"}, "granularity: found 'layr', expected 'tensor', "),
    "negative seed": ({"seed": -1}, "seed: found -1, expected greater than or equal to 0"),
    "seed too large": ({"seed": 2**64}, f"seed: found {2**64}, expected less than {2**64}"),
    "seed a fraction": ({"seed": 1.5}, "seed: found 1.5, expected a valid integer"),
    "seed a text": ({"seed": "5"}, "seed: found '5', expected a valid integer"),
    "seed a boolean": ({"seed": True}, "seed: found True, expected a valid integer"),
    "model empty": ({"models": [{"model": ""}]}, "models[0].model: found '', expected a path or"),
    "base blank": ({"base_model": " "}, "base_model: found ' ', expected a path or the id of"),
    "name a path": (
        {"name": "a/b"},
        "name: found 'a/b', expected letters, digits, '-', '_' and '.', a letter or digit first",
    ),
    "base a list": ({"base_model": ["a"]}, "base_model: found ['a'], expected a text"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_recipes_are_refused_with_place_found_and_expected(
    change: dict[str, Any], message: str
) -> None:
    assert refused({**GOOD, **change}).startswith(f"recipe: {message}")


def test_a_module_or_slice_that_is_no_mapping_says_what_stands_there() -> None:
    module = refused({"merge_method": "linear", "modules": {"mlp": 3}})
    assert module == "recipe: modules.mlp: found 3, expected a mapping with models or slices"
    part = refused({"merge_method": "linear", "slices": [3]})
    assert part == "recipe: slices[0]: found 3, expected a mapping with sources"


def test_mappings_may_hold_paths_tuples_and_numpys_numbers() -> None:
    recipe = load_recipe(
        {
            "merge_method": "linear",
            "models": ({"model": Path("a"), "parameters": {"weight": np.float32(0.5)}},),
            "parameters": {"t": np.array([0.0, 1.0]), "u": (1, 2)},
            "seed": np.int64(3),
        }
    )
    assert recipe == load_recipe(
        {
            "merge_method": "linear",
            "models": [{"model": "a", "parameters": {"weight": 0.5}}],
            "parameters": {"t": [0.0, 1.0], "u": [1, 2]},
            "seed": 3,
        }
    )
    assert type(recipe.seed) is int


@pytest.mark.parametrize("key", ["merge_method", "models"])
def test_required_keys(key: str) -> None:
    message = refused({k: v for k, v in GOOD.items() if k != key})
    assert message.startswith(f"recipe: {key} is missing")


BAD_TEXT = {
    "empty": (b"", ": expected a mapping with merge_method and models, found nothing"),
    "a list": (b"- merge_method: linear", ": expected a mapping"),
    "a word": (b"linear", ": expected a mapping with merge_method and models, found str"),
    "open bracket": (b"merge_method: linear\nmodels: [", ", line 2: not valid YAML"),
    "tab": (b"models:\n\t- model: a", ", line 2: not valid YAML"),
    "no date": (b"a: 1\nb: 2026-00-01", ", line 2: not valid YAML: '2026-00-01' is no timestamp"),
    "no boolean": (b"a: !!bool maybe", ", line 1: not valid YAML: 'maybe' is no bool"),
    "no number": (b"a: " + b"9" * 5000, f", line 1: not valid YAML: '{'9' * 40}' is no int"),
    "a tag": (b"a: !!python/object/apply:os.system [ls]", ", line 1: not valid YAML"),
    "control characters": (
        b"a: \x00",
        ": not valid YAML: special characters are not allowed",
    ),
    "not UTF-8": (b"a: \xff\xfe", ": the recipe cannot be read: not UTF-8 text"),
    "nested": (b"[" * 20_000, ": not valid YAML: nested too deeply"),
    "unhashable key": (b"{[1]: 2}", ", line 1: not valid YAML"),
    "wrong key": (b"merge_method: linear\nmodels: [{modell: a}]", ": "),
}


@pytest.mark.parametrize(("text", "message"), BAD_TEXT.values(), ids=BAD_TEXT.keys())
def test_files_that_are_no_recipe_are_named(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "r.yml"
    path.write_bytes(text)
    assert refused(path).startswith(f"{path}{message}")


def test_no_tag_in_a_recipe_runs_anything(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "r.yml"
    path.write_text(f"a: !!python/object/apply:os.system ['touch {marker}']")
    refused(path)
    assert not marker.exists()


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "none.yml"
    assert refused(path) == f"{path}: the recipe cannot be read: No such file or directory"
    assert refused(tmp_path) == f"{tmp_path}: the recipe cannot be read: Is a directory"


def test_the_docstring_example() -> None:
    assert Recipe.model_validate({"merge_method": "linear", "models": [{"model": "a"}]}).seed == 0
