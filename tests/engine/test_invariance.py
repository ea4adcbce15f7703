"""What holds for every registered method, whatever it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.methods import Method, available
from tests.engine.support import (
    assert_same_bytes,
    execute,
    random_models,
)

Array = np.ndarray[Any, np.dtype[Any]]
StateDict = dict[str, Array]


@dataclass(frozen=True)
class Setup:
    """How a method is tried: parameters beyond the required ones, and what it promises.

    `identical` are the parameters under which any number of equal models give that model (None:
    never). `symmetric` says whether the order of the models is without meaning (None: unless the
    first of them is the base), `order_tolerance` how far another order may move a value, relative
    to the largest operand, where a method's scores are float32. `interpolates` says whether one
    model alone gives that model. `scaled` are parameters under which a common factor on all weights
    cancels (None: it does not).
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    symmetric: bool | None = None
    order_tolerance: float = 0.0
    interpolates: bool = False
    identical: Mapping[str, Any] | None = None
    scaled: Mapping[str, Any] | None = None


SETUPS = {
    "linear": Setup(interpolates=True, identical={}, scaled={}),
    "slerp": Setup(interpolates=True, identical={}),
    "nuslerp": Setup(interpolates=True, identical={}, scaled={}),
    "multislerp": Setup(interpolates=True, identical={}, scaled={}),
    "karcher": Setup(interpolates=True, identical={}, scaled={}),
    "passthrough": Setup(interpolates=True, identical={}),
    "task_arithmetic": Setup(identical={"normalize": True}, scaled={"normalize": True}),
    "ties": Setup(identical={"density": 1.0}, scaled={"density": 0.4}),
    "pcb": Setup(order_tolerance=1e-6),
    "dare_linear": Setup(
        {"density": 0.5, "rescale": "inverse"},
        symmetric=False,
        identical={"density": 1.0, "normalize": True},
        scaled={"density": 0.5, "normalize": True},
    ),
    "dare_ties": Setup(
        {"density": 0.5, "mask_rate": 0.3},
        symmetric=False,
        identical={"density": 1.0, "normalize": True},
        scaled={"density": 0.5, "normalize": True},
    ),
}

NAMES = [
    name
    for name, method in sorted(available().items())
    if method.statistic is None and not method.continual
]
"""Methods that need nothing but weights and one run of the engine."""

every_method = pytest.mark.parametrize("name", NAMES)
SHAPES = {
    "model.embed.weight": (40, 33),
    "model.layers.0.weight": (130, 70),
    "model.layers.0.bias": (130,),
    "model.layers.1.weight": (9000,),
    "model.layers.1.scale": (),
}


def setup_of(name: str) -> Setup:
    """The table's entry, or the bare defaults for a method that it does not know."""
    return SETUPS.get(name, Setup())


def is_symmetric(name: str) -> bool:
    """Whether the order of the models is without meaning."""
    symmetric = setup_of(name).symmetric
    return available()[name].base != "first" if symmetric is None else symmetric


def required_values(method: Method) -> dict[str, Any]:
    """A value in range for every required parameter that is not a weight."""
    values = {}
    for parameter in method.parameters:
        if parameter.required and parameter.name != "weight":
            value: Any = parameter.choices[0] if parameter.choices else 0.4
            values[parameter.name] = parameter.check(value)
    return values


def operands(
    method: Method, n: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, seed: int = 0
) -> tuple[StateDict | None, list[StateDict]]:
    """As many models as the method takes, up to `n`, and a base if it can use one."""
    count = max(method.min_models, min(n, method.max_models or n))
    base, models = random_models(shapes, count, seed)
    return base if method.base == "origin" else None, models


def weights_of(method: Method, count: int, factor: float = 1.0) -> list[dict[str, Any]]:
    """A different weight per model, for methods that have weights.

    No signs make them add up to zero: in one-element tensors directions are nothing but signs.
    """
    if method.parameter("weight") is None:
        return [{} for _ in range(count)]
    return [{"weight": factor * weight} for weight in (0.5, 0.8, 1.1, 1.7, 0.3)[:count]]


def run(
    name: str,
    models: list[StateDict],
    base: StateDict | None,
    *,
    parameters: Mapping[str, Any] | None = None,
    weights: list[dict[str, Any]] | None = None,
    **options: Any,
) -> tuple[StateDict, dict[str, str]]:
    """Merged tensors and their checksums."""
    method = available()[name]
    chosen = setup_of(name).parameters if parameters is None else parameters
    merged, _, checksums = execute(
        models,
        name,
        base,
        parameters={**required_values(method), **chosen},
        model_parameters=weights or weights_of(method, len(models)),
        **options,
    )
    return merged, checksums


def merge(name: str, models: list[StateDict], base: StateDict | None, **options: Any) -> StateDict:
    """Merged tensors."""
    return run(name, models, base, **options)[0]


def with_ties(models: list[StateDict], base: StateDict | None, kind: Any) -> list[StateDict]:
    """16-bit models (the base last) whose updates are whole steps: many are of equal size."""
    origin = base or models[0]
    rounded = [
        {
            key: (
                origin[key].astype(kind).astype(np.float32)
                + np.round((value - origin[key]) * 32) / 32
            ).astype(kind)
            for key, value in model.items()
        }
        for model in models
    ]
    return rounded if base is None else [*rounded, {k: v.astype(kind) for k, v in base.items()}]


@every_method
@pytest.mark.parametrize("granularity", ["tensor", "model"])
@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_threads_blocks_and_residency_do_not_change_a_bit(
    name: str, granularity: str, kind: Any
) -> None:
    shapes = {**SHAPES, "model.layers.2.weight": (1031, 1100)}  # more than one chunk
    base, models = operands(available()[name], 3, shapes)
    if kind is not np.float32:
        models = with_ties(models, base, kind)
        base = models.pop() if base is not None else None
    engines = [
        {"threads": 1},
        {"threads": 2, "resident_bytes": 0},
        {"threads": 3, "block_elements": 8192, "resident_bytes": 0},
        {"threads": 2, "block_elements": 1 << 21, "resident_bytes": 1 << 40},
    ]
    first, *others = [
        run(name, models, base, granularity=granularity, engine=engine) for engine in engines
    ]
    for other in others:
        assert_same_bytes(other[0], first[0])
        assert other[1] == first[1]


@every_method
@settings(max_examples=5, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    threads=st.integers(1, 4),
    blocks=st.integers(1, 40_000),
    resident=st.sampled_from([0, 1 << 40]),
    granularity=st.sampled_from(["tensor", "layer", "model"]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_any_engine_setting_gives_the_same_bits(
    name: str,
    rows: int,
    columns: int,
    threads: int,
    blocks: int,
    resident: int,
    granularity: str,
    seed: int,
) -> None:
    shapes = {"h.0.w": (rows, columns), "h.0.b": (rows,), "h.1.w": (columns, rows), "s": ()}
    base, models = operands(available()[name], 3, shapes, seed)
    expected = merge(name, models, base, granularity=granularity, engine={"threads": 1})
    engine = {"threads": threads, "block_elements": blocks, "resident_bytes": resident}
    found = merge(name, models, base, granularity=granularity, engine=engine)
    assert_same_bytes(found, expected)


@every_method
def test_the_result_is_finite_and_of_the_inputs_shapes_and_dtypes(name: str) -> None:
    base, models = operands(available()[name], 3)
    merged = merge(name, models, base)
    assert {k: v.shape for k, v in merged.items()} == SHAPES
    assert all(v.dtype == np.float32 and np.isfinite(v).all() for v in merged.values())


@pytest.mark.parametrize("name", [n for n in NAMES if is_symmetric(n)])
@settings(max_examples=4, deadline=None)
@given(order=st.permutations(range(4)), seed=st.integers(0, 1000))
def test_the_order_of_the_models_does_not_matter(name: str, order: list[int], seed: int) -> None:
    method = available()[name]
    base, models = operands(method, 4, seed=seed)
    weights = weights_of(method, len(models))
    order = [i for i in order if i < len(models)]
    expected = merge(name, models, base, weights=weights)
    found = merge(name, [models[i] for i in order], base, weights=[weights[i] for i in order])
    for tensor, values in expected.items():
        largest = np.max([np.abs(model[tensor]) for model in models], axis=0)
        allowed = np.maximum(np.spacing(np.abs(values)), setup_of(name).order_tolerance * largest)
        assert (np.abs(found[tensor] - values) <= allowed).all(), tensor


@pytest.mark.parametrize("name", [n for n in NAMES if setup_of(n).identical is not None])
@settings(max_examples=4, deadline=None)
@given(n=st.integers(1, 5), seed=st.integers(0, 1000))
def test_identical_models_merge_into_that_model(name: str, n: int, seed: int) -> None:
    base, (model, *_) = operands(available()[name], 1, seed=seed)
    count = max(1, min(n, available()[name].max_models or n))
    copies = [dict(model) for _ in range(count)]
    merged = merge(name, copies, base, parameters=setup_of(name).identical)
    for tensor, values in model.items():
        np.testing.assert_allclose(merged[tensor], values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if available()[n].min_models <= 1])
def test_one_model_can_be_merged(name: str) -> None:
    base, models = operands(available()[name], 1)
    merged = merge(name, models, base)
    assert set(merged) == set(SHAPES)
    if setup_of(name).interpolates:
        for tensor, values in models[0].items():
            np.testing.assert_allclose(merged[tensor], values, rtol=1e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if setup_of(n).scaled is not None])
@pytest.mark.parametrize("factor", [4.0, 3.7])
def test_a_common_factor_on_normalised_weights_cancels(name: str, factor: float) -> None:
    method = available()[name]
    base, models = operands(method, 3)
    merged = [
        merge(
            name,
            models,
            base,
            parameters=setup_of(name).scaled,
            weights=weights_of(method, len(models), scale),
        )
        for scale in (1.0, factor)
    ]
    for tensor in SHAPES:
        np.testing.assert_allclose(merged[1][tensor], merged[0][tensor], rtol=1e-5, atol=1e-6)


@every_method
def test_the_same_merge_twice_gives_the_same_bits(name: str) -> None:
    base, models = operands(available()[name], 3)
    first, second = (merge(name, models, base, seed=7) for _ in range(2))
    assert_same_bytes(second, first)


@every_method
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16"])
def test_the_output_type_only_rounds_the_result(name: str, out_dtype: str) -> None:
    base, models = operands(available()[name], 3)
    exact = merge(name, models, base)
    narrow = merge(name, models, base, out_dtype=out_dtype)
    for tensor, values in exact.items():
        assert narrow[tensor].dtype.name == out_dtype
        np.testing.assert_array_equal(narrow[tensor], values.astype(narrow[tensor].dtype))


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_another_seed_drops_other_entries(name: str) -> None:
    base, models = operands(available()[name], 3)
    first, second = (merge(name, models, base, seed=seed) for seed in (1, 2))
    for tensor in ("model.layers.0.weight", "model.layers.1.weight"):
        assert (first[tensor] != second[tensor]).mean() > 0.3


def test_the_table_of_setups_names_only_methods_that_exist() -> None:
    assert set(SETUPS) <= set(available())
