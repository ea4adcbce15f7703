from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.adapters.info import compare_adapters, describe_adapter
from fusekit.errors import FusekitError

from .support import make_adapter, make_module, random_adapter

SHAPES = {"a.weight": (9, 7), "b.weight": (6, 8)}


def test_sizes_and_norms_are_those_of_the_dense_update():
    adapter = random_adapter(1, SHAPES, rank=3, scaling=-0.5)
    info = describe_adapter(adapter)
    assert info.parameters == 3 * (9 + 7 + 6 + 8)
    for module in info.modules:
        delta = adapter.modules[module.name].delta()
        assert module.rank == 3
        assert module.scaling == -0.5
        assert module.shape == SHAPES[module.name]
        assert module.norm == pytest.approx(np.linalg.norm(delta), rel=1e-5)
        assert module.spectral == pytest.approx(np.linalg.norm(delta, 2), rel=1e-5)
        assert module.stable_rank == pytest.approx((module.norm / module.spectral) ** 2)
    assert info.norm == pytest.approx(np.hypot(*(m.norm for m in info.modules)))


def test_experts_count_together():
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((6, 5)).astype("f4"), rng.standard_normal((4, 6)).astype("f4")
    module = make_module("x.up", A, B, kind="parameter", experts=3)
    info = describe_adapter(make_adapter(module)).modules[0]
    assert info.rank == 2
    assert info.norm == pytest.approx(np.linalg.norm(module.delta()), rel=1e-5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), scaling=st.floats(0.1, 10))
def test_cosines_are_those_of_the_flattened_updates(seed, scaling):
    adapters = [random_adapter(seed, SHAPES), random_adapter(seed + 1, SHAPES, 2, scaling)]
    flat = [np.concatenate([m.delta().ravel() for m in a.modules.values()]) for a in adapters]
    expected = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    overlap = compare_adapters(adapters)
    assert overlap.cosine[0, 1] == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(np.diag(overlap.cosine), 1)
    np.testing.assert_allclose(overlap.cosine, overlap.cosine.T, atol=1e-12)


def test_spaces_that_hold_each_other_overlap_fully():
    adapter = random_adapter(1, SHAPES, rank=4)
    smaller = make_adapter(
        *(
            dataclasses.replace(m, A=m.A[:2], B=m.B[:, :2], alpha=2.0)
            for m in adapter.modules.values()
        )
    )
    overlap = compare_adapters([adapter, smaller])
    np.testing.assert_allclose(overlap.output, 1, atol=1e-5)
    np.testing.assert_allclose(overlap.input, 1, atol=1e-5)


def test_orthogonal_spaces_do_not_overlap():
    eye = np.eye(6, dtype=np.float32)
    one = make_adapter(make_module("m.weight", eye[:2], eye[:, :2]))
    other = make_adapter(make_module("m.weight", eye[:2], eye[:, 2:4]))
    overlap = compare_adapters([one, other])
    assert overlap.output[0, 1] == pytest.approx(0, abs=1e-12)
    assert overlap.input[0, 1] == pytest.approx(1)
    assert overlap.cosine[0, 1] == pytest.approx(0, abs=1e-12)


def test_a_rank_without_effect_spans_nothing():
    eye = np.eye(6, dtype=np.float32)
    half = eye[:, :2].copy()
    half[:, 1] = 0
    one = make_adapter(make_module("m.weight", eye[:2], half))
    other = make_adapter(make_module("m.weight", eye[1:2], eye[:, :1]))
    assert compare_adapters([one, other]).input[0, 1] == pytest.approx(0, abs=1e-12)


def test_spaces_are_those_of_the_product_not_of_its_factors():
    eye = np.eye(6, dtype=np.float32)
    A = np.stack([0 * eye[0], eye[0], eye[1]])
    B = np.stack([eye[0], eye[1], 0 * eye[0]], axis=1)
    one = make_adapter(make_module("m.weight", A, B))
    other = make_adapter(make_module("m.weight", eye[2:3], eye[:, :1]))
    overlap = compare_adapters([one, other])
    assert overlap.output[0, 1] == pytest.approx(0, abs=1e-12)


def test_pairs_without_common_modules_are_counted_as_such():
    overlap = compare_adapters(
        [random_adapter(1, {"a.weight": (3, 4)}), random_adapter(2, {"b.weight": (3, 4)})]
    )
    assert overlap.shared.tolist() == [[1, 0], [0, 1]]
    assert overlap.cosine[0, 1] == 0


def test_different_bases_are_refused():
    adapters = [random_adapter(1, {"a.weight": (3, 4)}), random_adapter(2, {"a.weight": (3, 5)})]
    with pytest.raises(FusekitError, match=r"\[3, 5\] in adapter2, \[3, 4\] in adapter1"):
        compare_adapters(adapters)
