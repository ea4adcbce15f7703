"""Recipes whose models are adapters, from files to a folder, in Python and on the command line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import fusekit
from fusekit.adapters import MergeOptions, load_adapter, merge_adapters, write_adapter
from fusekit.adapters.merge import METHODS
from fusekit.adapters.recipe import parameters_of, plan_adapters
from fusekit.errors import CheckpointError, FusekitError, RecipeError
from fusekit.recipe.schema import load_recipe

from .support import random_adapter

SHAPES = {"m.q.weight": (9, 7), "m.v.weight": (6, 8)}


@pytest.fixture
def folder(tmp_path):
    for i in range(2):
        write_adapter(random_adapter(i, SHAPES, rank=3, scaling=0.5), tmp_path / f"task{i}")
    (tmp_path / "full").mkdir()
    save_file({n: np.ones(s, "f4") for n, s in SHAPES.items()}, tmp_path / "full/x.safetensors")
    return tmp_path


def recipe_of(folder, method, *models, **keys):
    names = models or ("task0", "task1")
    entries = [{"model": str(folder / m)} if isinstance(m, str) else m for m in names]
    return {"merge_method": method, "models": entries, **keys}


def weighted(folder, *values, name="weight"):
    return [
        {"model": str(folder / f"task{i}"), "parameters": {name: value}}
        for i, value in enumerate(values)
    ]


def assert_same(merged, expected):
    assert list(merged.modules) == list(expected.modules)
    for name, module in expected.modules.items():
        np.testing.assert_array_equal(merged.modules[name].delta(), module.delta())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_from_a_recipe_as_from_python(method, folder):
    needs = "density" in {parameter.name for parameter in parameters_of(method)}
    parameters = {"density": 0.6} if needs else {}
    models = weighted(folder, 0.7, -0.2)
    fusekit.merge(recipe_of(folder, method, *models, parameters=parameters, seed=3), folder / "out")
    options = MergeOptions(density=0.6 if needs else None, seed=3)
    adapters = [load_adapter(folder / f"task{i}") for i in range(2)]
    assert_same(
        load_adapter(folder / "out"), merge_adapters(adapters, method, [0.7, -0.2], options)
    )


def test_task_arithmetic_is_the_exact_weighted_sum_times_lambda(folder):
    models = weighted(folder, 0.5, 1.5)
    recipe = recipe_of(folder, "task_arithmetic", *models, parameters={"lambda": 0.4})
    fusekit.merge(recipe, folder / "out")
    merged = load_adapter(folder / "out")
    for name in SHAPES:
        deltas = [load_adapter(folder / f"task{i}").modules[name].delta() for i in range(2)]
        expected = 0.4 * (0.5 * deltas[0] + 1.5 * deltas[1])
        np.testing.assert_allclose(merged.modules[name].delta(), expected, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_lambda_scales_the_merged_update(method, folder):
    needs = "density" in {parameter.name for parameter in parameters_of(method)}
    parameters = {"density": 0.6} if needs else {}
    fusekit.merge(recipe_of(folder, method, parameters=parameters), folder / "one")
    parameters |= {"lambda": 0.25}
    fusekit.merge(recipe_of(folder, method, parameters=parameters), folder / "quarter")
    for name, module in load_adapter(folder / "one").modules.items():
        quarter = load_adapter(folder / "quarter").modules[name].delta()
        np.testing.assert_allclose(quarter, 0.25 * module.delta(), atol=1e-5)


@pytest.mark.parametrize("parameters", [{}, {"parameter_budget": 60}])
def test_what_a_method_has_to_say_is_in_the_report(parameters, folder):
    """Every module of the two adapters cancels."""
    one = random_adapter(0, SHAPES, rank=1)
    write_adapter(one, folder / "one")
    modules = {
        name: dataclasses.replace(module, A=-0.99 * module.A, B=-0.99 * module.B)
        for name, module in one.modules.items()
    }
    write_adapter(dataclasses.replace(one, modules=modules), folder / "opposite")
    recipe = recipe_of(folder, "lora_lego", "one", "opposite", parameters=parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fusekit.merge(recipe, folder / "out")
    assert [remark.partition(" (")[2] for remark in report.warnings] == [
        "tensor 'm.q.weight' and 1 more)"
    ]
    assert fusekit.merge(recipe_of(folder, "lora_lego"), folder / "plain").warnings == ()


def test_parameters_reach_the_merge(folder):
    parameters = {"rank": 2, "convention": "peft", "normalize": True, "svd": "exact"}
    recipe = recipe_of(folder, "svd", *weighted(folder, 1, 3), parameters=parameters)
    plan = plan_adapters(load_recipe({**recipe, "out_dtype": "bfloat16", "seed": 5}))
    assert plan.weights == (0.25, 0.75)
    assert plan.options == MergeOptions(
        rank=2, convention="peft", svd="exact", dtype="bfloat16", seed=5
    )
    fusekit.merge({**recipe, "out_dtype": "bfloat16"}, folder / "out")
    module = load_adapter(folder / "out").modules["m.q.weight"]
    assert (module.rank, module.A.dtype.name) == (2, "bfloat16")


def test_models_have_densities_of_their_own(folder):
    recipe = recipe_of(folder, "ties", *weighted(folder, 0.3, 0.8, name="density"))
    assert plan_adapters(load_recipe(recipe)).options.density == [0.3, 0.8]
    lego = {"restarts": 4, "canonicalize": True}
    recipe = recipe_of(folder, "lora_lego", parameters=lego)
    assert plan_adapters(load_recipe(recipe)).options.lego.restarts == 4


LAYERS = {f"m.layers.{i}.{part}.weight": (9, 7) for i in range(3) for part in ("q", "up")}


@pytest.fixture
def deep(tmp_path):
    for i in range(2):
        write_adapter(random_adapter(i, LAYERS, rank=3), tmp_path / f"task{i}")
    return tmp_path


def weight_of_layer(name, values):
    return values[int(name.split(".")[2])]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ([0.0, 1.0], lambda name: weight_of_layer(name, [0.0, 0.5, 1.0])),
        ([0.2, 0.4, 1.0], lambda name: weight_of_layer(name, [0.2, 0.4, 1.0])),
        (
            [{"filter": ".q.", "value": 0.3}, {"value": 2}],
            lambda name: 0.3 if ".q." in name else 2,
        ),
        (
            [{"filter": "q", "value": [0.0, 1.0]}, {"filter": "*", "value": -1}],
            lambda name: weight_of_layer(name, [0.0, 0.5, 1.0]) if ".q." in name else -1,
        ),
    ],
)
@pytest.mark.parametrize("where", ["model", "all", "lambda"])
def test_values_may_follow_depth_and_names_as_in_recipes_of_models(deep, setting, expected, where):
    models, parameters = weighted(deep, setting, 1), {}
    if where == "all":
        models, parameters = weighted(deep, setting, setting), {}
    elif where == "lambda":
        models, parameters = weighted(deep, 1, 1), {"lambda": setting}
    fusekit.merge(recipe_of(deep, "cat", *models, parameters=parameters), deep / "out")
    merged = load_adapter(deep / "out")
    adapters = [load_adapter(deep / f"task{i}") for i in range(2)]
    for name in LAYERS:
        weights = expected(name), 1.0 if where == "model" else expected(name)
        deltas = [adapter.modules[name].delta() for adapter in adapters]
        wanted = weights[0] * deltas[0] + weights[1] * deltas[1]
        np.testing.assert_allclose(merged.modules[name].delta(), wanted, atol=1e-5)


def test_the_depth_is_the_base_models_where_it_is_known(deep):
    base = {f"m.layers.{i}.q.weight": np.ones((9, 7), "f4") for i in range(5)}
    (deep / "base").mkdir()
    save_file(base, deep / "base/model.safetensors")
    models = weighted(deep, [0.0, 1.0], 0)
    plan = plan_adapters(
        load_recipe(recipe_of(deep, "cat", *models, base_model=str(deep / "base")))
    )
    assert plan.settings("m.layers.2.q.weight")[0] == (0.5, 0.0)
    alone = plan_adapters(load_recipe(recipe_of(deep, "cat", *models)))
    assert alone.settings("m.layers.2.q.weight")[0] == (1.0, 0.0)


def test_ranks_densities_and_words_may_follow_names(deep):
    parameters = {
        "rank": [{"filter": ".q.", "value": 2}, {"value": 1}],
        "density": [{"filter": ".up.", "value": 1.0}, {"value": 0.5}],
        "majority_sign_method": [{"filter": ".up.", "value": "frequency"}, {"value": "total"}],
        "normalize": [{"filter": "layers.0", "value": True}],
    }
    models = weighted(deep, 1, 3)
    recipe = recipe_of(deep, "ties_svd", *models, parameters=parameters, seed=4)
    fusekit.merge(recipe, deep / "out")
    merged = load_adapter(deep / "out")
    adapters = [load_adapter(deep / f"task{i}") for i in range(2)]
    for name in LAYERS:
        up = ".up." in name
        weights = [0.25, 0.75] if "layers.0" in name else [1, 3]
        options = MergeOptions(
            rank=1 if up else 2,
            density=1.0 if up else 0.5,
            majority_sign_method="frequency" if up else "total",
            seed=4,
        )
        alone = merge_adapters(adapters, "ties_svd", weights, options).modules[name]
        assert merged.modules[name].rank == options.rank
        np.testing.assert_array_equal(merged.modules[name].delta(), alone.delta())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_weights_that_follow_depth(method, deep):
    needs = "density" in {parameter.name for parameter in parameters_of(method)}
    parameters = {"density": 0.6} if needs else {}
    models = weighted(deep, [0.5, 1.5], 1)
    fusekit.merge(recipe_of(deep, method, *models, parameters=parameters), deep / "out")
    adapters = [load_adapter(deep / f"task{i}") for i in range(2)]
    options = MergeOptions(density=0.6 if needs else None)
    for layer, weight in enumerate([0.5, 1.0, 1.5]):
        expected = merge_adapters(adapters, method, [weight, 1], options)
        for name in (name for name in LAYERS if f"layers.{layer}." in name):
            found = load_adapter(deep / "out").modules[name].delta()
            np.testing.assert_array_equal(found, expected.modules[name].delta())


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("knots_ties", {"density": [0.2, 0.8]}, r"parameters\.density: holds for the whole merge"),
        (
            "svd",
            {"parameter_budget": [{"filter": "q", "value": 9}]},
            r"parameters\.parameter_budget: holds for the whole merge, expected a single value",
        ),
        ("svd", {"rank": [1, 2]}, r"parameters\.rank: found \[1, 2\], expected an integer"),
        ("ties", {"density": [0.5, 1.5]}, r"parameters\.density\[1\]: found 1\.5, expected a numb"),
        ("ties", {"density": [{"filter": "q", "value": 1}]}, r"'m.*up.*': .* needs a density"),
        ("cat", {"lambda": [{"filtr": "q", "value": 1}]}, r"unknown key 'filtr' \(did you mean"),
    ],
)
def test_values_that_cannot_differ_or_do_not_fit_are_refused(method, parameters, message, deep):
    with pytest.raises(FusekitError, match=message):
        fusekit.merge(recipe_of(deep, method, parameters=parameters), deep / "out")
    assert not (deep / "out").exists()


def test_a_weight_for_some_tensors_alone_is_refused(deep):
    models = weighted(deep, [{"filter": ".q.", "value": 1}], 1)
    with pytest.raises(RecipeError, match=r"models\[0\]: has no weight .*in tensor 'm.*up.weight'"):
        fusekit.merge(recipe_of(deep, "cat", *models), deep / "out")


def test_the_output_verifies_and_names_its_inputs(folder):
    fusekit.merge(recipe_of(folder, "cat"), folder / "out")
    assert fusekit.verify(folder / "out").ok
    manifest = json.loads((folder / "out/manifest.json").read_text())
    assert manifest["recipe"]["merge_method"] == "cat"
    files = manifest["inputs"][0]["files"]
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    path = folder / "out/adapter_model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert not fusekit.verify(folder / "out").ok


def test_an_existing_folder_is_kept_unless_asked_otherwise(folder):
    fusekit.merge(recipe_of(folder, "cat"), folder / "out")
    before = load_adapter(folder / "out").modules["m.q.weight"].rank
    with pytest.raises(FusekitError, match="already exists"):
        fusekit.merge(recipe_of(folder, "svd"), folder / "out")
    fusekit.merge(recipe_of(folder, "svd"), folder / "out", overwrite=True)
    assert (before, load_adapter(folder / "out").modules["m.q.weight"].rank) == (6, 3)
    assert sorted(p.name for p in folder.iterdir()) == ["full", "out", "task0", "task1"]


def test_a_failed_merge_leaves_the_old_folder_and_nothing_else(folder):
    fusekit.merge(recipe_of(folder, "cat"), folder / "out")
    bad = random_adapter(7, SHAPES)
    bad.modules["m.v.weight"].B[0, 0] = np.nan
    write_adapter(bad, folder / "bad")
    with pytest.raises(FusekitError, match="NaN or Inf"):
        fusekit.merge(recipe_of(folder, "cat", "task0", "bad"), folder / "out", overwrite=True)
    assert fusekit.verify(folder / "out").ok
    assert sorted(p.name for p in folder.iterdir()) == ["bad", "full", "out", "task0", "task1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": {"densty": 1}}, r"parameters\.densty: ties .*did you mean 'density'"),
        ({"parameters": {"rank": 0, "density": 1}}, r"parameters\.rank: found 0, expected an int"),
        ({"parameters": {}}, "needs a density"),
        ({"merge_method": "slerp"}, r"'slerp' does not merge adapters"),
        ({"merge_method": "knots_tie"}, r"does not merge adapters \(did you mean 'knots_ties'"),
        ({"granularity": "layer"}, "granularity: does not apply to adapters"),
        ({"layer_scaling": {"beta": 1}}, "layer_scaling: does not apply to adapters"),
    ],
)
def test_what_adapters_cannot_have_is_refused(changes, message, folder):
    recipe = recipe_of(folder, "ties", parameters={"density": 0.5}) | changes
    with pytest.raises(FusekitError, match=message):
        fusekit.merge(recipe, folder / "out")
    assert not (folder / "out").exists()


def test_parameters_of_models_are_checked_too(folder):
    wrong = [{"model": str(folder / "task0"), "parameters": {"rank": 3}}, "task1"]
    with pytest.raises(RecipeError, match=r"models\[0\]\.parameters\.rank: belongs to the whole"):
        fusekit.merge(recipe_of(folder, "svd", *wrong), folder / "out")
    some = [*weighted(folder, 0.5), "task1"]
    with pytest.raises(RecipeError, match=r"models\[1\]: has no weight while others have one"):
        fusekit.merge(recipe_of(folder, "svd", *some), folder / "out")
    nothing = recipe_of(folder, "cat", *weighted(folder, 1, -1), parameters={"normalize": True})
    with pytest.raises(RecipeError, match="the weights sum to 0"):
        fusekit.merge(nothing, folder / "out")


def test_adapters_and_models_do_not_mix(folder):
    with pytest.raises(RecipeError, match=r"models\[1\]: .*full' is a full model, but .*task0' is"):
        fusekit.merge(recipe_of(folder, "linear", "task0", "full"), folder / "out")
    with pytest.raises(RecipeError, match="merge_method 'lora_lego' merges adapters"):
        fusekit.merge(recipe_of(folder, "lora_lego", "full", "full"), folder / "out")
    folded = recipe_of(folder, "linear", {"model": f"{folder / 'full'}+{folder / 'task0'}"})
    folded["models"][0]["parameters"] = {"weight": 1.0}
    fusekit.merge(folded, folder / "out")  # a model with an adapter folded in is a model
    assert not (folder / "out/adapter_config.json").exists()


def test_lora_files_are_told_from_models_by_their_tensors(folder):
    rng = np.random.default_rng(0)
    for i in range(2):
        parts = {
            "lora_unet_m_q.lora_down.weight": rng.standard_normal((2, 7)).astype("f4"),
            "lora_unet_m_q.lora_up.weight": rng.standard_normal((9, 2)).astype("f4"),
        }
        save_file(parts, folder / f"kohya{i}.safetensors")
    files = [f"kohya{i}.safetensors" for i in range(2)]
    with pytest.raises(FusekitError, match="expected a base"):
        fusekit.merge(recipe_of(folder, "linear", *files), folder / "out")
    recipe = recipe_of(folder, "linear", *files, base_model=str(folder / "full"))
    fusekit.merge(recipe, folder / "out")
    assert list(load_adapter(folder / "out").modules) == ["m.q.weight"]
    with pytest.raises(RecipeError, match="is a full model, but"):
        mixed = recipe_of(folder, "linear", files[0], "full/x.safetensors")
        fusekit.merge(mixed, folder / "other")


def test_dora_needs_a_base_and_a_method_before_anything_is_written(folder):
    path = folder / "task1/adapter_model.safetensors"
    config = json.loads((folder / "task1/adapter_config.json").read_text()) | {"use_dora": True}
    (folder / "task1/adapter_config.json").write_text(json.dumps(config))
    magnitudes = {
        f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector": np.ones(
            rows, "f4"
        )
        for name, (rows, _) in SHAPES.items()
    }
    with pytest.raises(CheckpointError, match=r"module 'm\.q' has no lora_magnitude_vector"):
        fusekit.merge(recipe_of(folder, "svd"), folder / "out")
    save_file(load_file(path) | magnitudes, path)
    with pytest.raises(CheckpointError, match=r"task1: uses DoRA.*needs the base model"):
        fusekit.merge(recipe_of(folder, "svd"), folder / "out")
    recipe = recipe_of(folder, "cat", base_model=str(folder / "full"))
    with pytest.raises(CheckpointError, match=r"task1: uses DoRA.* merge it with svd or one"):
        fusekit.merge(recipe, folder / "out")
    adapters = [load_adapter(folder / f"task{i}") for i in range(2)]
    with pytest.raises(CheckpointError, match=r"task1: uses DoRA.* needs the base model"):
        merge_adapters(adapters, "svd")
    assert not (folder / "out").exists() and not (folder / "out.partial").exists()
    fusekit.merge({**recipe, "merge_method": "svd"}, folder / "out")
    assert load_adapter(folder / "out").modules["m.q.weight"].magnitude is None


def test_a_recipe_of_adapters_stands_alone(folder):
    documents = [
        recipe_of(folder, "cat", name="first"),
        {"merge_method": "linear", "models": [{"model": "first", "parameters": {"weight": 1}}]},
    ]
    (folder / "r.yml").write_text(yaml.safe_dump_all(documents))
    with pytest.raises(RecipeError, match="document 'first' merges adapters"):
        fusekit.merge(folder / "r.yml", folder / "out")


def test_options_without_meaning_for_adapters_are_refused(folder):
    for options in ({"device": "cuda"}, {"allow_nonfinite": True}):
        with pytest.raises(FusekitError, match=f"{next(iter(options))}: .*adapters"):
            fusekit.merge(recipe_of(folder, "cat"), folder / "out", **options)
    with pytest.raises(RecipeError, match="plan_adapters"):
        fusekit.plan(recipe_of(folder, "cat"))


def command(*arguments, cwd):
    code = "from fusekit.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd
    )


def test_from_the_command_line(folder):
    parameters = {"density": 0.5, "rank": 2}
    recipe = recipe_of(folder, "dare_ties_svd", parameters=parameters)
    for entry, name in zip(recipe["models"], ("task0", "task1"), strict=True):
        entry["model"] = f"./{name}"  # relative to the recipe's folder
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    planned = command("plan", str(folder / "recipe.yml"), "--tensors", cwd="/")
    assert planned.returncode == 0, planned.stderr
    assert "dare_ties_svd: adapters are merged into one adapter" in planned.stdout
    assert "weight 1, density 0.5" in planned.stdout
    assert "2 merged, to rank 2" in planned.stdout
    done = command("merge", str(folder / "recipe.yml"), str(folder / "out"), cwd="/")
    assert done.returncode == 0, done.stderr
    assert "4 tensors" in done.stdout
    assert load_adapter(folder / "out").modules["m.q.weight"].rank == 2
    assert command("verify", str(folder / "out"), cwd="/").returncode == 0
    recipe["models"][0]["parameters"] = {"weight": [{"filter": "q", "value": 0.5}, {"value": 2}]}
    recipe["models"][1]["parameters"] = {"weight": 1}
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    planned = command("plan", str(folder / "recipe.yml"), "--tensors", cwd="/")
    assert "weight 0.5 to 2, density 0.5" in planned.stdout
    assert "m.q.weight  rank 2  ./task0 (weight 0.5), ./task1 (weight 1)" in planned.stdout
    recipe["parameters"]["rnk"] = 1
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    refused = command("merge", str(folder / "recipe.yml"), str(folder / "out2"), cwd="/")
    assert refused.returncode != 0
    assert "did you mean 'rank'?" in refused.stderr


def other_base(folder):
    write_adapter(random_adapter(2, {**SHAPES, "m.q.weight": (10, 7)}), folder / "task1b")
    return "task1b", {}, r"\[10, 7\] in .*task1b, but linear of shape \[9, 7\] in .*: they are for"


def other_rank(folder):
    write_adapter(random_adapter(2, SHAPES, rank=2), folder / "task1b")
    return "task1b", {"convention": "peft"}, r"has ranks \[\d, 2\]: combining factors needs equal"


@pytest.mark.parametrize("case", [other_base, other_rank])
def test_adapters_that_do_not_fit_are_refused_before_anything_is_read(case, folder, monkeypatch):
    name, parameters, message = case(folder)
    recipe = recipe_of(folder, "linear", parameters=parameters)
    recipe["models"][1] = {**recipe["models"][1], "model": str(folder / name)}
    monkeypatch.setattr("fusekit.adapters.peft_format.read_array", None)
    with pytest.raises(FusekitError, match=message):
        plan_adapters(fusekit.load_recipe(recipe))


def test_a_missing_adapter_is_named_with_what_is_near(folder):
    recipe = recipe_of(folder, "linear")
    recipe["models"][1] = {**recipe["models"][1], "model": str(folder / "taks1")}
    with pytest.raises(FusekitError, match=r"adapter '.*taks1': no such.*mean 'task1'"):
        fusekit.merge(recipe, folder / "out")


@pytest.mark.parametrize("method", ["linear", "cat", "svd", "lora_lego"])
def test_methods_without_kernels_do_not_import_their_compiler(method, folder):
    arguments = ["merge", *(str(folder / name) for name in ("task0", "task1", "out"))]
    code = (
        "import sys; from typer.testing import CliRunner; from fusekit.cli.adapter import app; "
        f"r = CliRunner().invoke(app, {[*arguments, '--method', method]!r}); "
        "assert r.exit_code == 0, r.output; "
        "print([m for m in ('numba', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("method", ["svd", "cat", "knots_ties"])
def test_progress_is_told_after_every_module_in_bytes_of_the_adapters(tmp_path, method):
    shapes = {"big.weight": (40, 30), "small.weight": (8, 6)}
    for i in range(2):
        write_adapter(random_adapter(i, shapes), tmp_path / f"task{i}")
    seen = []
    models = [{"model": str(tmp_path / f"task{i}")} for i in range(2)]
    parameters = {"density": 0.5} if method == "knots_ties" else {}
    fusekit.merge(
        {"merge_method": method, "models": models, "parameters": parameters},
        tmp_path / "out",
        on_progress=seen.append,
    )
    factors = [load_file(tmp_path / f"task{i}" / "adapter_model.safetensors") for i in range(2)]
    sizes = [
        sum(x.nbytes for own in factors for name, x in own.items() if module in name)
        for module in ("big", "small")
    ]
    assert [at.written for at in seen] == [sizes[0], sum(sizes)]
    assert {at.total for at in seen} == {sum(sizes)}
    assert all(at.seconds > 0 for at in seen)
