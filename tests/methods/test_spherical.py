"""SLERP and its relatives against their definitions, and at the edges of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit import RecipeError, merge_state_dicts

Array = np.ndarray[Any, np.dtype[Any]]


def merged(
    models: Sequence[Array], method: str, base: Array | None = None, **options: Any
) -> Array:
    """The merge of single tensors, in float64."""
    out: Array = merge_state_dicts(
        [{"w": np.asarray(model, np.float64)} for model in models],
        method=method,
        base=None if base is None else {"w": np.asarray(base, np.float64)},
        **options,
    )["w"]
    return out


def weighted(*weights: float) -> dict[str, Any]:
    return {"model_parameters": [{"weight": weight} for weight in weights]}


def on_the_arc(a: Array, b: Array, t: float) -> Array:
    angle = math.acos(float(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)))
    return np.asarray(math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def gaussians(n: int, *shape: int, seed: int = 0) -> list[Array]:
    return list(np.random.default_rng(seed).standard_normal((n, *shape)))


# -- slerp ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [-0.5, 0.25, 1.0, 1.75])
def test_slerp_follows_the_arc_and_beyond(t: float) -> None:
    a, b = gaussians(2, 50)
    np.testing.assert_allclose(merged([a, b], "slerp", parameters={"t": t}), on_the_arc(a, b, t))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_slerp_goes_straight_between_nearly_parallel_and_nearly_opposite_tensors(
    sign: float,
) -> None:
    a = np.array([1.0, 0.0])
    for cosine, straight in ((0.9996, True), (0.9994, False)):
        b = sign * 3.0 * np.array([cosine, math.sqrt(1 - cosine**2)])
        expected = 0.75 * a + 0.25 * b if straight else on_the_arc(a, b, 0.25)
        np.testing.assert_allclose(merged([a, b], "slerp", parameters={"t": 0.25}), expected)


def test_slerp_scales_by_a_sine_where_the_other_tensor_is_zero() -> None:
    (a,) = gaussians(1, 9)
    out = merged([a, np.zeros(9)], "slerp", parameters={"t": 0.25})
    np.testing.assert_allclose(out, math.sin(0.75 * math.pi / 2) * a)


def test_slerp_leaves_norms_below_1e_8_undivided() -> None:
    a, b = 1e-9 * np.array([1.0, 0.0]), 1e-9 * np.array([0.8, 0.6])
    out = merged([a, b], "slerp", parameters={"t": 0.5})
    np.testing.assert_allclose(out, math.sin(math.pi / 4) * (a + b))  # as at a right angle


def test_slerp_of_the_base_alone_is_the_base() -> None:
    (a,) = gaussians(1, 9)
    np.testing.assert_array_equal(merged([a], "slerp", parameters={"t": 0.7}), a)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-1, 2), st.floats(0.01, 100))
def test_slerp_may_be_walked_backwards_and_scales_with_its_ends(
    seed: int, t: float, scale: float
) -> None:
    a, b = gaussians(2, 12, seed=seed)
    out = merged([a, b], "slerp", parameters={"t": t})
    back = merged([b, a], "slerp", parameters={"t": 1 - t})
    np.testing.assert_allclose(back, out, rtol=1e-9, atol=1e-9)
    larger = merged([scale * a, scale * b], "slerp", parameters={"t": t})
    np.testing.assert_allclose(larger, scale * out, rtol=1e-9, atol=1e-9 * scale)


# -- nuslerp --------------------------------------------------------------------------------------


def test_nuslerp_is_slerp_with_weights() -> None:
    a, b = gaussians(2, 5, 7)
    out = merged([a, b], "nuslerp", **weighted(1.5, 0.5))
    expected = on_the_arc(a.ravel(), b.ravel(), 0.25).reshape(5, 7)
    np.testing.assert_allclose(out, expected)


def test_nuslerp_with_weights_that_cancel_meets_in_the_middle() -> None:
    a, b = gaussians(2, 9)
    out = merged([a, b], "nuslerp", **weighted(0.7, -0.7))
    np.testing.assert_allclose(out, on_the_arc(a, b, 0.5))


@pytest.mark.parametrize("row_wise", [False, True])
@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 5)])
def test_nuslerp_without_flattening_has_an_angle_per_vector(
    shape: tuple[int, ...], row_wise: bool
) -> None:
    base, a, b = gaussians(3, *shape)
    options = {"nuslerp_flatten": False, "nuslerp_row_wise": row_wise}
    out = merged([a, b], "nuslerp", base, parameters=options, **weighted(0.6, 0.4))
    axis = 0 if row_wise else -1
    u, v, w = (np.moveaxis(x, axis, -1).reshape(-1, shape[axis]) for x in (a - base, b - base, out))
    expected = [on_the_arc(x, y, 0.4) for x, y in zip(u, v, strict=True)]
    origin = np.moveaxis(base, axis, -1).reshape(-1, shape[axis])
    np.testing.assert_allclose(w, origin + expected)


def test_nuslerp_of_opposite_vectors_goes_straight() -> None:
    for a in gaussians(20, 9):  # the cosines of some are not quite -1
        out = merged([a, -3 * a], "nuslerp", **weighted(7, 1))
        np.testing.assert_allclose(out, 0.5 * a)


# -- multi-SLERP ----------------------------------------------------------------------------------


def test_multislerp_takes_the_mean_direction_at_the_mean_length() -> None:
    base, *models = gaussians(4, 40)
    weights = np.array([0.5, 0.2, 0.3])
    out = merged(models, "multislerp", base, **weighted(*(5 * weights)))
    deltas = np.stack(models) - base
    lengths = np.linalg.norm(deltas, axis=1)
    direction = weights / lengths @ deltas
    expected = base + weights @ lengths * direction / np.linalg.norm(direction)
    np.testing.assert_allclose(out, expected, rtol=1e-7)


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_a_model_that_is_the_base_only_lowers_the_scale_of_multislerp(eps: float) -> None:
    base, a, b = gaussians(3, 1000)
    base *= 100.0  # whose rounding a huge coefficient of the unchanged model would magnify
    options = {"parameters": {"eps": eps}, **weighted(1, 1, 2)}
    out = merged([base + a, base + b, base], "multislerp", base, **options)
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    direction = a / lengths[0] + b / lengths[1]
    expected = base + sum(lengths) / 4 * direction / np.linalg.norm(direction)
    np.testing.assert_allclose(out, expected, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_multislerp_keeps_a_tensor_that_no_model_changed(n: int) -> None:
    (base,) = gaussians(1, 30)
    out = merged([base] * n, "multislerp", base, parameters={"weight": 1.0})
    np.testing.assert_array_equal(out, base)


def test_multislerp_of_opposite_models() -> None:
    (a,) = gaussians(1, 9)
    out = merged([a, -a], "multislerp", **weighted(1.0, 1.0))
    np.testing.assert_allclose(out, np.zeros(9), atol=1e-15)
    with pytest.raises(RecipeError, match="directions of tensor 'w' cancel out"):
        merged([a, -a, a, -a], "multislerp", parameters={"weight": 1.0})


@pytest.mark.parametrize("method", ["linear", "multislerp"])
def test_weights_that_cancel_but_for_rounding_are_refused(method: str) -> None:
    with pytest.raises(RecipeError, match="sum to 0 and cannot be normalised"):
        merged(gaussians(3, 4), method, **weighted(0.1, 0.2, -0.3))


# -- Karcher mean ---------------------------------------------------------------------------------


def arc_lengths(u: Array, units: Sequence[Array]) -> list[float]:
    return [math.acos(float(np.clip(u @ v, -1, 1))) for v in units]


def test_the_karcher_mean_is_nearer_to_all_than_the_plain_mean() -> None:
    models = [np.abs(model) for model in gaussians(4, 5, seed=3)]
    models[0] = np.array([9.0, 0.1, 0.1, 0.1, 0.1])
    units = [model / np.linalg.norm(model) for model in models]
    out = merged(models, "karcher", parameters={"max_iter": 100, "tol": 1e-12})
    length = np.linalg.norm(out)
    assert length == pytest.approx(np.mean([np.linalg.norm(model) for model in models]))
    plain = sum(units) / np.linalg.norm(sum(units))
    squares = [sum(np.square(arc_lengths(u, units))) for u in (out / length, plain)]
    assert squares[0] < squares[1] - 1e-3
    pull = sum(
        angle / math.sin(angle) * (v - math.cos(angle) * out / length)
        for v, angle in zip(units, arc_lengths(out / length, units), strict=True)
    )
    np.testing.assert_allclose(pull, 0, atol=1e-9)


def test_the_karcher_mean_of_two_is_the_middle_of_the_arc() -> None:
    a, b = gaussians(2, 20)
    out = merged([a, 3 * b], "karcher")
    u, v = a / np.linalg.norm(a), b / np.linalg.norm(b)
    length = (np.linalg.norm(a) + 3 * np.linalg.norm(b)) / 2
    np.testing.assert_allclose(out, length * on_the_arc(u, v, 0.5))


def test_zero_tensors_only_lower_the_scale_of_the_karcher_mean() -> None:
    a, b = gaussians(2, 20)
    out = merged([a, np.zeros(20), b], "karcher")
    np.testing.assert_allclose(out, 2 / 3 * merged([a, b], "karcher"))
    np.testing.assert_array_equal(merged([np.zeros(3)] * 2, "karcher"), np.zeros(3))


def test_the_karcher_mean_is_zero_where_only_zero_tensors_have_a_share() -> None:
    (a,) = gaussians(1, 20)
    np.testing.assert_array_equal(
        merged([a, np.zeros(20)], "karcher", **weighted(0.0, 1.0)), np.zeros(20)
    )


def test_tensors_shorter_than_the_tolerance_have_no_direction() -> None:
    a, b = gaussians(2, 20)
    short = 1e-6 * b / np.linalg.norm(b)
    np.testing.assert_allclose(
        merged([a, short], "karcher"), (1 + 1e-6 / np.linalg.norm(a)) / 2 * a
    )
    finer = merged([a, short], "karcher", parameters={"tol": 1e-8})
    assert abs(finer @ b) > 0.1 * np.linalg.norm(finer) * np.linalg.norm(b)
    np.testing.assert_array_equal(merged([short, short], "karcher"), np.zeros(20))


def test_of_two_opposite_tensors_the_karcher_mean_takes_the_firsts_direction() -> None:
    for a in gaussians(20, 9):  # the cosines of some are not quite -1
        with pytest.warns(UserWarning, match="opposite directions have no mean"):
            out = merged([a, -3 * a], "karcher")
        np.testing.assert_allclose(out, 2 * a)
