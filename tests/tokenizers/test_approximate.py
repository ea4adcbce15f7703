import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fusekit.errors import FusekitError
from fusekit.tokenizers.approximate import (
    common_interpolation,
    landmark_rotation,
    nearest_rows,
    omp,
    poorly_trained,
    row_distribution,
    subword_rows,
)
from tests.tokenizers.support import VECTORS


def _normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def _plain_omp(x, X, k):
    """One target, one pick at a time, least squares anew at every step."""
    picked, residual = [], x
    for _ in range(k):
        scores = np.abs(X @ residual)
        scores[picked] = -1
        picked.append(int(scores.argmax()))
        weights = np.linalg.lstsq(X[picked].T, x, rcond=None)[0]
        residual = x - weights @ X[picked]
    return picked, weights


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_matches_the_reference_vectors(case):
    with safe_open(VECTORS / "tokensurgeon.safetensors", "np") as file:
        settings_ = json.loads(file.metadata()[case])
        tensors = {
            name: file.get_tensor(f"{case}/{name}")
            for name in (
                "in/targets_donor",
                "in/shared_donor",
                "in/shared_orig",
                "out/indices",
                "out/coeffs",
                "out/new_rows",
            )
        }
    targets, X = tensors["in/targets_donor"], tensors["in/shared_donor"]
    if settings_["kind"] == "omp":
        code = omp(targets, X, settings_["k"])
    else:
        code = common_interpolation(
            targets,
            X,
            settings_["k"],
            cosine=settings_["metric"] == "cosine",
            scheme=settings_["scheme"],
        )
    np.testing.assert_array_equal(code.indices, tensors["out/indices"])
    np.testing.assert_allclose(code.coefficients, tensors["out/coeffs"], atol=1e-4)
    rows = code.read_in(tensors["in/shared_orig"])
    np.testing.assert_allclose(rows, tensors["out/new_rows"], atol=1e-4)
    assert rows.dtype == np.float32


# --- orthogonal matching pursuit


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 6))
def test_omp_equals_a_plain_reference(seed, k, batch):
    X, targets = _normal((30, 12), seed), _normal((batch, 12), seed + 1)
    code = omp(targets, X, k)
    for row in range(batch):
        picked, weights = _plain_omp(targets[row], X, k)
        assert code.indices[row].tolist() == picked
        np.testing.assert_allclose(code.coefficients[row], weights, atol=1e-9)


def test_omp_finds_a_target_that_is_a_row_and_stops_there():
    X = np.eye(6)[:5] * 2.0
    code = omp(X[3:4] / 4, X, 4)
    assert code.indices.tolist() == [[3, -1, -1, -1]]
    np.testing.assert_allclose(code.coefficients, [[0.25, 0, 0, 0]])
    np.testing.assert_allclose(code.read_in(X), X[3:4] / 4)


def test_omp_with_duplicate_rows_uses_one_of_them():
    row = _normal(8)
    code = omp((row + 0.01 * _normal(8, 1))[None], np.stack([row, row]), 2)
    assert code.indices.tolist() == [[0, -1]]
    assert np.isfinite(code.coefficients).all()


def test_omp_never_picks_a_row_twice_however_long_it_is():
    X = _normal((20, 12)).astype(np.float32)
    X[3] *= 1e9
    indices = omp(_normal((5, 12), 1).astype(np.float32), X, 8).indices
    assert all(len(set(row)) == 8 and min(row) >= 0 for row in indices.tolist())


def test_omp_stays_exact_with_nearly_parallel_rows():
    X = _normal(16) + 1e-4 * _normal((40, 16), 1)
    target = _normal((1, 16), 2)
    code = omp(target, X, 10)
    residual = target[0] - code.read_in(X)[0]
    assert np.abs(X[code.indices[0]] @ residual).max() < 1e-10


def test_omp_of_a_zero_target_is_zero():
    code = omp(np.zeros((2, 4)), _normal((5, 4)), 3)
    assert (code.indices == -1).all()
    assert (code.read_in(_normal((5, 7))) == 0).all()


@pytest.mark.parametrize("k", [0, 6])
def test_k_outside_the_shared_tokens_is_refused(k):
    for method in (omp, common_interpolation):
        with pytest.raises(FusekitError, match=f"k is {k}, expected 1 to 5"):
            method(_normal((1, 4)), _normal((5, 4)), k)


def test_omp_beats_the_nearest_row_which_beats_the_mean_on_a_shared_structure():
    generator = np.random.default_rng(3)
    latent = generator.standard_normal((500, 10)) @ generator.standard_normal((10, 24))
    rotation = np.linalg.qr(generator.standard_normal((24, 24)))[0]
    X = latent + 0.05 * generator.standard_normal(latent.shape)
    Y = latent @ rotation + 0.05 * generator.standard_normal(latent.shape)
    targets, truth = X[400:], Y[400:]
    X, Y = X[:400], Y[:400]

    def error(rows):
        return np.linalg.norm(rows - truth) / np.linalg.norm(truth)

    sparse = error(omp(targets, X, 10).read_in(Y))
    nearest = error(common_interpolation(targets, X, 1).read_in(Y))
    assert sparse < 0.5 * nearest < nearest < error(Y.mean(axis=0))
    assert error(landmark_rotation(X, Y).carry(targets)) < 0.16


# --- interpolation


def test_nearest_rows_are_ordered_by_distance_then_index():
    X = np.array([[3.0, 0], [1, 0], [0, 1], [-1, 0]])
    indices, distances = nearest_rows(np.array([[0.0, 0.0]]), X, 3)
    assert indices.tolist() == [[1, 2, 3]]
    np.testing.assert_allclose(distances, [[1, 1, 1]])
    indices, distances = nearest_rows(np.array([[2.0, 0.0]]), X, 4, cosine=True)
    assert indices.tolist() == [[0, 1, 2, 3]]
    np.testing.assert_allclose(distances, [[0, 0, 1, 2]], atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_distance_weights_are_inverse_distances_of_sum_one(seed, cosine):
    X, targets = np.abs(_normal((20, 6), seed)), np.abs(_normal((4, 6), seed + 1))
    code = common_interpolation(targets, X, 5, cosine=cosine)
    np.testing.assert_allclose(code.coefficients.sum(axis=1), 1, atol=1e-12)
    for row, x in enumerate(targets):
        near = X[code.indices[row]]
        if cosine:
            weights = near @ x / np.linalg.norm(near, axis=1) / np.linalg.norm(x)
        else:
            weights = 1 / np.linalg.norm(near - x, axis=1)
        np.testing.assert_allclose(code.coefficients[row], weights / weights.sum(), atol=1e-9)


def test_a_target_among_the_rows_is_reproduced():
    X = _normal((20, 6))
    for scheme in ("distance_proportional", "barycentric", "least_squares"):
        code = common_interpolation(X[7:8], X, 4, scheme=scheme)
        np.testing.assert_allclose(code.read_in(X), X[7:8], atol=1e-4)


def test_barycentric_weights_are_the_best_of_sum_one():
    X, targets = _normal((30, 8)), _normal((3, 8), 1)
    code = common_interpolation(targets, X, 4, scheme="barycentric")
    np.testing.assert_allclose(code.coefficients.sum(axis=1), 1)
    for row, x in enumerate(targets):
        near = X[code.indices[row]]
        edges = near[:3] - near[3]
        best = np.linalg.lstsq(edges.T, x - near[3], rcond=None)[0]
        np.testing.assert_allclose(code.coefficients[row, :3], best, atol=1e-9)


def test_least_squares_weights_solve_the_normal_equations():
    X, targets = _normal((30, 8)), _normal((3, 8), 1)
    code = common_interpolation(targets, X, 4, scheme="least_squares")
    for row, x in enumerate(targets):
        near = X[code.indices[row]]
        np.testing.assert_allclose(
            code.coefficients[row], np.linalg.lstsq(near.T, x, rcond=None)[0], atol=1e-9
        )


def test_unknown_schemes_and_rules_name_the_nearest():
    with pytest.raises(FusekitError, match="did you mean 'barycentric'"):
        common_interpolation(_normal((1, 4)), _normal((5, 4)), 2, scheme="barycentrc")
    with pytest.raises(FusekitError, match="did you mean 'first_last'"):
        subword_rows(_normal((3, 4)), [[0]], "firstlast")


# --- the others


@pytest.mark.parametrize(("donor", "model"), [(8, 8), (8, 5), (5, 8)])
def test_landmark_rotation_undoes_a_rotation_and_a_shift(donor, model):
    inner = min(donor, model)
    latent = _normal((60, inner))
    into = np.linalg.qr(_normal((max(donor, model), inner), 1))[0]
    X = (latent @ into.T if donor > inner else latent) + 3.0
    Y = (latent @ into.T if model > inner else latent) - 1.0
    rotation = landmark_rotation(X[:40], Y[:40])
    np.testing.assert_allclose(rotation.carry(X[40:]), Y[40:], atol=1e-9)


def test_row_distribution_has_the_rows_mean_and_covariance():
    matrix = _normal((200, 3)) @ np.array([[1.0, 2, 0], [0, 1, 1], [0, 0, 0.5]]) + 5
    distribution = row_distribution(matrix)
    covariance = distribution.factor @ distribution.factor.T
    np.testing.assert_allclose(covariance, np.cov(matrix.T, bias=True), atol=1e-9)
    draws = distribution.draw(20_000, np.random.default_rng(0))
    np.testing.assert_allclose(draws.mean(axis=0), matrix.mean(axis=0), atol=0.1)
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.2)


@pytest.mark.parametrize(
    ("rule", "head", "weights"),
    [
        ("mean", False, [1 / 3, 1 / 3, 1 / 3]),
        ("sum", False, [1, 1, 1]),
        ("weighted_mean", False, [1 / 6, 2 / 6, 3 / 6]),
        ("weighted_mean", True, [3 / 6, 2 / 6, 1 / 6]),
        ("first_last", False, [0, 0, 1]),
        ("first_last", True, [1, 0, 0]),
    ],
)
def test_subword_rules(rule, head, weights):
    matrix = _normal((6, 4))
    rows = subword_rows(matrix, [[4, 1, 2], [3], []], rule, head=head)
    np.testing.assert_allclose(rows[0], np.array(weights) @ matrix[[4, 1, 2]])
    np.testing.assert_allclose(rows[1], matrix[3])
    np.testing.assert_allclose(rows[2], matrix.mean(axis=0))


def test_poorly_trained_rows_are_the_short_ones_and_those_like_unused_ones():
    rows = _normal((400, 32))
    rows[7] *= 1e-3
    junk = _normal(32, 1)
    rows[390:] = junk + 0.05 * _normal((10, 32), 2)
    rows[100] = junk
    poor = poorly_trained(rows, np.arange(390, 400))
    assert poor[7] and poor[100]
    assert poor.sum() < 12
    assert not poorly_trained(rows, np.array([], np.int64))[100]
