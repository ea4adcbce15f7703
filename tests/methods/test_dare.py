"""DARE's drops: their statistics, their variants and their limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fusekit import FusekitError, merge_state_dicts

State = dict[str, np.ndarray]


def dare(models: list[State], base: State, method: str = "dare_linear", **options: Any) -> State:
    names = ("seed", "masks", "model_parameters")
    settings = {name: options.pop(name) for name in names if name in options}
    return merge_state_dicts(models, method=method, base=base, parameters=options, **settings)


@pytest.fixture
def states() -> tuple[list[State], State]:
    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal((40, 50)), "b": rng.standard_normal(1000)}
    models = [
        {name: x + 0.01 * rng.standard_normal(x.shape) for name, x in base.items()} for _ in "abc"
    ]
    return models, base


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_entries_are_dropped_evenly_and_the_rest_is_unbiased(density: float) -> None:
    base, model = {"w": np.zeros(40_000)}, {"w": np.ones(40_000)}
    out = dare([model], base, density=density, rescale="inverse")["w"]
    kept = out != 0
    np.testing.assert_allclose(out[kept], 1 / density)
    sigma = (density * (1 - density) / 40_000) ** 0.5
    assert abs(kept.mean() - density) < 4 * sigma


def test_models_and_tensors_are_dropped_independently() -> None:
    base = {name: np.zeros(20_000) for name in "ab"}
    model = {name: np.ones(20_000) for name in "ab"}
    weights = [{"weight": 1.0}, {"weight": 2.0}]
    out = dare([model, model], base, density=0.5, rescale="none", model_parameters=weights)
    for values in out.values():  # 0, 1, 2 and 3: none, the first, the second, both
        np.testing.assert_allclose(np.bincount(values.astype(int)) / 20_000, 0.25, atol=0.015)
    assert abs((out["a"] == out["b"]).mean() - 0.25) < 0.015


def test_the_seed_alone_decides(states: tuple[list[State], State]) -> None:
    models, base = states
    out = dare(models, base, density=0.5, seed=3)
    turned = [{name: model[name] for name in reversed(model)} for model in models]
    again = dare(turned, base, density=0.5, seed=3)
    other = dare(models, base, density=0.5, seed=4)
    for name, values in out.items():
        np.testing.assert_array_equal(values, again[name])
        assert (values != other[name]).mean() > 0.5


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", ["none", "inverse", "l1"])
def test_keeping_nothing_leaves_the_base(
    states: tuple[list[State], State], method: str, rescale: str
) -> None:
    models, base = states
    out = dare(models, base, method, density=0.0, rescale=rescale)
    for name, values in base.items():
        np.testing.assert_array_equal(out[name], values)


def expected_of_one(base: np.ndarray, left: np.ndarray, whole: np.ndarray, rescale: str) -> Any:
    """base plus what is left of the 20 % that were dropped, rescaled."""
    factor = {
        "none": 1.0,
        "inverse": 1.25,
        "l1": np.abs(whole).sum() / np.abs(left).sum(),
    }[rescale]
    return base + factor * left


@pytest.mark.parametrize("rescale", ["none", "inverse", "l1"])
def test_the_smallest_updates_are_dropped_by_magnitude(
    states: tuple[list[State], State], rescale: str
) -> None:
    (model, *_), base = states
    out = dare([model], base, density=0.8, strategy="magnitude", rescale=rescale)
    for name, origin in base.items():
        update = model[name] - origin
        smallest = np.sort(np.abs(update), axis=None)[origin.size // 5 - 1]
        left = np.where(np.abs(update) > smallest, update, 0)
        np.testing.assert_allclose(out[name], expected_of_one(origin, left, update, rescale))


def test_a_tenth_of_the_entries_is_a_tenth(states: tuple[list[State], State]) -> None:
    (model, *_), base = states
    out = dare([model], base, density=0.9, strategy="magnitude", rescale="none")
    assert [int((out[name] == base[name]).sum()) for name in base] == [200, 100]


@pytest.mark.parametrize("strategy", ["random", "magnitude"])
@pytest.mark.parametrize("rescale", ["none", "inverse", "l1"])
def test_the_control_drops_the_fine_tuned_weights_themselves(
    states: tuple[list[State], State], strategy: str, rescale: str
) -> None:
    (model, *_), base = states
    masks = None
    if strategy == "random":
        rng = np.random.default_rng(1)
        masks = [{name: (rng.random(x.shape) < 0.8) * 1.0 for name, x in model.items()}]
    options = {"density": 0.8, "strategy": strategy, "rescale": rescale, "masks": masks}
    out = dare([model], base, weight_format="finetuned", **options)
    for name, weights in model.items():
        smallest = np.sort(np.abs(weights), axis=None)[weights.size // 5 - 1]
        keep = np.abs(weights) > smallest if masks is None else masks[0][name] == 1
        left = np.where(keep, weights, 0)
        expected = expected_of_one(np.zeros(left.shape), left, weights, rescale)
        np.testing.assert_allclose(out[name], expected, rtol=1e-9, atol=1e-12)


def test_vectors_may_be_spared(states: tuple[list[State], State]) -> None:
    (model, *_), base = states
    out = dare([model], base, density=0.5, only_2d=True)
    np.testing.assert_allclose(out["b"], model["b"])
    assert 0.4 < (out["w"] == base["w"]).mean() < 0.6


def test_trimming_acts_on_what_the_drops_leave(states: tuple[list[State], State]) -> None:
    (model, *_), base = states
    rng = np.random.default_rng(2)
    masks = [{name: (rng.random(x.shape) < 0.5) * 1.0 for name, x in model.items()}]
    options = {"density": 0.5, "rescale": "inverse", "masks": masks}
    out = dare([model], base, "dare_ties", mask_rate=0.8, **options)
    for name, origin in base.items():
        left = 2 * masks[0][name] * (model[name] - origin)
        cut = np.sort(np.abs(left), axis=None)[int(0.8 * left.size) - 1]
        np.testing.assert_allclose(out[name], origin + np.where(np.abs(left) >= cut, left, 0))
    plain = dare([model], base, "dare_ties", **options)
    idle = dare([model], base, "dare_ties", mask_rate=0.3, **options)  # less than was dropped
    for name, values in plain.items():
        np.testing.assert_array_equal(values, idle[name])


@pytest.mark.parametrize(
    ("mask", "message"),
    [(np.ones(3), "shape"), (np.full((40, 50), 0.5), "0 and 1|0 or 1")],
)
def test_masks_must_fit(states: tuple[list[State], State], mask: np.ndarray, message: str) -> None:
    (model, *_), base = states
    with pytest.raises(FusekitError, match=message):
        dare([model], base, density=0.5, masks=[{"w": mask, "b": np.ones(1000)}])
