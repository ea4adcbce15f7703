"""Matrix methods in the engine against plain float64 NumPy, for matrices of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from fusekit import merge_state_dicts  # noqa: E402

Matrix = NDArray[np.float64]
EPS = float(np.finfo(np.float32).eps)


def triples(matrix: Matrix, count: int | None = None) -> tuple[Matrix, Matrix, Matrix]:
    """Leading singular triples above float32's noise."""
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    rank = int((EPS * max(matrix.shape) * S[:1] < S).sum())
    rank = rank if count is None else min(rank, count)
    return U[:, :rank], S[:rank], Vh[:rank].T


def polar(columns: Matrix) -> Matrix:
    P, s, Qh = np.linalg.svd(columns, full_matrices=False)
    keep = s > EPS * max(columns.shape) * s[:1]
    return P[:, keep] @ Qh[keep]


def tsv(deltas: list[Matrix], fraction: float | None = None) -> Matrix:
    smaller = min(deltas[0].shape)
    kept = max(1, smaller // len(deltas) if fraction is None else int(smaller * fraction))
    parts = [triples(delta, kept) for delta in deltas]
    U, S, V = (np.concatenate([part[i] for part in parts], axis=-1) for i in range(3))
    return polar(U) @ np.diag(S) @ polar(V).T


def iso_c(deltas: list[Matrix]) -> Matrix:
    U, S, Vh = np.linalg.svd(sum(deltas), full_matrices=False)
    return S.mean() * U @ Vh


def iso_c_numerical(deltas: list[Matrix]) -> Matrix:
    U, S, V = triples(np.asarray(sum(deltas)))
    return (S.mean() if len(S) else 0.0) * U @ V.T


def iso_cts(deltas: list[Matrix], fraction: float = 0.8) -> Matrix:
    rank, count = min(deltas[0].shape), len(deltas)
    own = min(round((rank - int(rank * fraction)) / count), rank // count)
    if own == 0:
        return iso_c(deltas)
    U, S, Vh = np.linalg.svd(sum(deltas), full_matrices=False)
    common = rank - own * count
    lefts, rights, values = [], [], []
    for delta in deltas:
        left, strengths, right = np.linalg.svd(
            delta - U[:, :common] @ (U[:, :common].T @ delta), full_matrices=False
        )
        lefts.append(left[:, :own])
        values.append(strengths[:own])
        rights.append(right[:own].T)
    sigma = np.concatenate([*values, S[:common]]).mean()
    left = polar(np.concatenate([*lefts, U[:, :common]], axis=1))
    return sigma * left @ polar(np.concatenate([*rights, Vh[:common].T], axis=1)).T


def opcm_update(deltas: list[Matrix], alpha: float = 0.5) -> Matrix:
    N = deltas[0]
    for T in deltas[1:]:
        U, S, V = triples(N)
        rank = int((np.cumsum(S) / S.sum() <= alpha).sum()) if len(S) else 0
        A = U.T @ T @ V
        kept = A.copy()
        np.fill_diagonal(kept, 0.0)
        kept[:rank, :rank] = 0.0
        N = N + T - U @ (A - kept) @ V.T
    return N


def wudi(deltas: list[Matrix], time: float = 300.0) -> Matrix:
    used = [delta for delta in deltas if np.square(delta).sum() >= 1e-12]
    start = np.asarray(sum(deltas))
    if not used:
        return start / len(deltas)
    norms = [np.square(delta).sum() for delta in used]
    C = sum(d.T @ d / a for d, a in zip(used, norms, strict=True))
    D = sum(d @ d.T @ d / a for d, a in zip(used, norms, strict=True))
    values, E = np.linalg.eigh(C)
    values = np.maximum(values, 1e-8)
    f = 1.0 - np.exp(-values * time)
    return start - start @ E @ np.diag(f) @ E.T + D @ E @ np.diag(f / values) @ E.T


def optmerge(deltas: list[Matrix], variant: str, steps: int, lr: float) -> Matrix:
    """The published recipes on the loss as it is defined, with its gradient written out."""
    used = [delta for delta in deltas if np.square(delta).sum() >= 1e-12]
    average = np.asarray(sum(deltas)) / len(deltas)
    if not used:
        return average
    rank = max(1, min(deltas[0].shape) // (5 if variant == "modality" else len(deltas)))
    norms = [np.square(delta).sum() for delta in used]
    cut = [triples(delta, rank) for delta in used]
    targets = [U * S @ V.T for U, S, V in cut]
    projectors = used if variant == "modality" else [np.diag(S) @ V.T for _, S, V in cut]
    if variant == "full":
        centre = np.asarray(sum(used)) / len(used)
        centred = [triples(delta - centre, rank) for delta in used]
        targets = [U * S @ V.T + centre for U, S, V in centred]
    m = np.asarray(sum(deltas)) if variant == "full" else average
    first, second = np.zeros_like(m), np.zeros_like(m)
    for step in range(1, steps + 1):
        gradient = sum(
            2.0 * (m - G) @ P.T @ P / a for G, P, a in zip(targets, projectors, norms, strict=True)
        )
        if variant == "full":
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            size = np.sqrt(second / (1 - 0.999**step)) + 1e-8
            m = m - lr * first / (1 - 0.9**step) / size
        else:
            first = 0.9 * first + gradient
            m = m - lr * first
    return m


METHODS: dict[str, tuple[str, dict[str, Any], Callable[[list[Matrix]], Matrix]]] = {
    "tsv": ("tsv", {}, tsv),
    "tsv_few": ("tsv", {"rank_fraction": 0.2}, lambda d: tsv(d, 0.2)),
    "tsv_all": ("tsv", {"rank_fraction": 1.0}, lambda d: tsv(d, 1.0)),
    "iso_c": ("iso_c", {}, iso_c),
    "iso_c_numerical": ("iso_c", {"rank": "numerical"}, iso_c_numerical),
    "iso_cts": ("iso_cts", {"common_space_fraction": 0.5}, lambda d: iso_cts(d, 0.5)),
    "wudi": ("wudi", {}, wudi),
    "wudi_time": ("wudi", {"time": 5.0}, lambda d: wudi(d, 5.0)),
}
AMBIGUOUS = {"iso_c", "iso_cts"}
"""Give directions without strength the strength of the others: which ones, nothing says."""

SHAPES = {"wide": (9, 23), "tall": (31, 8), "square": (12, 12), "row": (1, 7), "column": (9, 1)}


def deltas_of(kind: str, shape: tuple[int, int], count: int = 3) -> list[Matrix]:
    rng = np.random.default_rng(sum(map(ord, kind)) + shape[0])
    own = [0.05 * rng.normal(size=shape) for _ in range(count)]
    if kind == "low rank":
        rank = max(1, min(shape) // 4)
        own = [
            0.05 * rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
            for _ in range(count)
        ]
    elif kind == "identical":
        own = [own[0]] * count
    elif kind == "one is zero":
        own[1] = np.zeros(shape)
    elif kind == "all are zero":
        own = [np.zeros(shape)] * count
    elif kind == "unequal":
        own = [delta * 10.0**-i for i, delta in enumerate(own)]
    elif kind == "decaying":
        own = [_with_decaying_strengths(delta) for delta in own]
    return own


def _with_decaying_strengths(matrix: Matrix) -> Matrix:
    """Singular values over three decades, as those of fine-tuned layers."""
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    return (U * S[0] * np.logspace(0, -3, len(S))) @ Vh


KINDS = ("dense", "low rank", "identical", "one is zero", "all are zero", "unequal", "decaying")


def merged_update(
    method: str, deltas: list[Matrix], base: Matrix, **parameters: Any
) -> tuple[Matrix, list[Matrix]]:
    """The engine's update from float32 models, and the task vectors as those models hold them."""
    stored = base.astype(np.float32)
    models = [{"w": (stored + delta).astype(np.float32)} for delta in deltas]
    merged = merge_state_dicts(
        models, base={"w": stored}, method=method, parameters=parameters, threads=1
    )
    held = [model["w"].astype(float) - stored for model in models]
    return merged["w"].astype(float) - stored, held


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("name", METHODS)
def test_updates_are_those_of_plain_arithmetic(
    name: str, shape: tuple[int, int], kind: str
) -> None:
    method, parameters, reference = METHODS[name]
    if name in AMBIGUOUS and kind in {"low rank", "all are zero"}:
        pytest.skip("the published rule does not determine the result")
    if name == "iso_cts" and kind in {"identical", "one is zero", "unequal"} and min(shape) > 1:
        pytest.skip("residuals without strength have no directions of their own")
    base = np.zeros(shape)  # task vectors are then exactly what was drawn, rank included
    found, held = merged_update(method, deltas_of(kind, shape), base, **parameters)
    expected = reference(held)
    scale = max(1e-6, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, atol=2e-4 * scale, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_continual_updates_are_those_of_plain_arithmetic(shape: tuple[int, int], kind: str) -> None:
    found, held = merged_update("opcm", deltas_of(kind, shape), np.zeros(shape))
    update = opcm_update(held)
    norms = [np.linalg.norm(delta) for delta in held]
    length = np.linalg.norm(update)
    expected = update * (np.mean(norms) / length) if length > 0 else update
    scale = max(1e-6, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, atol=2e-4 * scale, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("variant", "lr"), [("full", 1e-4), ("lora", 1e-2), ("modality", 5e-2)])
def test_optmerge_descends_as_published(
    variant: str, lr: float, shape: tuple[int, int], kind: str
) -> None:
    chosen = {"variant": variant, "steps": 25, "lr": lr}
    found, held = merged_update("optmerge", deltas_of(kind, shape), np.zeros(shape), **chosen)
    expected = optmerge(held, variant, 25, lr)
    scale = max(1e-6, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, atol=2e-4 * scale, rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "iso_cts"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_number_of_models(name: str, count: int) -> None:
    method, parameters, reference = METHODS[name]
    deltas = deltas_of("dense", (10, 14), count)
    found, held = merged_update(method, deltas, np.zeros((10, 14)), **parameters)
    np.testing.assert_allclose(found, reference(held), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_models_are_merged_in_float32(name: str) -> None:
    method, parameters, reference = METHODS[name]
    rng = np.random.default_rng(1)
    base = rng.normal(size=(16, 20)).astype(ml_dtypes.bfloat16)
    models = [
        {"w": (base.astype(float) + delta).astype(ml_dtypes.bfloat16)}
        for delta in deltas_of("dense", (16, 20))
    ]
    merged = merge_state_dicts(
        models, base={"w": base}, method=method, parameters=parameters, threads=1
    )
    assert merged["w"].dtype == ml_dtypes.bfloat16
    held = [model["w"].astype(float) - base.astype(float) for model in models]
    expected = base.astype(float) + reference(held)
    np.testing.assert_allclose(merged["w"].astype(float), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts", "wudi", "knots", "optmerge"])
def test_what_is_no_matrix_gets_the_mean(method: str) -> None:
    rng = np.random.default_rng(2)
    shapes = {
        "norm.weight": (7,),
        "conv.weight": (4, 3, 2, 2),
        "experts.down_proj": (2, 5, 3),
        "scale": (),
        "none.weight": (0, 4),
    }
    drawn = [{name: rng.normal(size=shape) for name, shape in shapes.items()} for _ in range(4)]
    base, *models = [
        {name: value.astype(np.float32) for name, value in own.items()} for own in map(dict, drawn)
    ]
    merged = merge_state_dicts(
        models, base=base, method=method, parameters={"lambda": 0.5}, threads=1
    )
    for name in shapes:
        mean = np.mean([model[name].astype(float) for model in models], axis=0)
        expected = base[name] + 0.5 * (mean - base[name])
        np.testing.assert_allclose(merged[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts", "wudi", "knots", "optmerge", "opcm"])
def test_integers_are_the_bases(method: str) -> None:
    base, *models = (
        {"w.weight": np.full((3, 3), i, np.float32), "norm.num_batches_tracked": np.array(i)}
        for i in range(3)
    )
    merged = merge_state_dicts(models, base=base, method=method, threads=1)
    assert merged["norm.num_batches_tracked"] == 0


@pytest.mark.parametrize(
    ("method", "mean"), [("tsv", False), ("iso_c", False), ("wudi", True), ("knots", True)]
)
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "transformer.wte.weight", "shared.weight"]
)
def test_embeddings_are_matrices_only_where_the_authors_say_so(
    method: str, mean: bool, name: str
) -> None:
    rng = np.random.default_rng(3)
    base, *models = [{name: rng.normal(size=(12, 6)).astype(np.float32)} for _ in range(4)]
    merged = merge_state_dicts(models, base=base, method=method, threads=1)
    average = np.mean([model[name] for model in models], axis=0)
    assert np.allclose(merged[name], average, atol=1e-5) is mean
