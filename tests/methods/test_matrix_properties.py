"""What must hold of the matrix methods whatever the numbers: exact cases, invariances, optima."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fusekit.methods.matrix import (  # noqa: E402
    fisher,
    iso,
    knots,
    linalg,
    opcm,
    optmerge,
    quadratic,
    regmean,
    tsv,
)

shapes = st.tuples(st.integers(4, 12), st.integers(4, 12))
seeds = st.integers(0, 10**6)
few = settings(max_examples=25, deadline=None)

Merge = object
MERGES = {
    "tsv": tsv.merge,
    "iso": lambda deltas: iso.common(deltas).update,
    "iso_cts": lambda deltas: iso.common_and_specific(deltas, 0.5).update,
    "wudi": lambda deltas: quadratic.wudi_closed(deltas, quadratic.Spectral(time=3.0)),
    "optmerge": lambda deltas: optmerge.merge(deltas, "lora", lr=1e-3, steps=50),
}
each_merge = pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES.keys())


def draw(seed: int, shape: tuple[int, int], count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def rotation(seed: int, size: int) -> torch.Tensor:
    return torch.linalg.qr(draw(seed, (size, size), 1)[0].double()).Q


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    scale = max(1.0, float(expected.abs().max()))
    assert float((found - expected).abs().max()) <= tolerance * scale


@each_merge
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_task_vectors_stay_as_they_are(merge: Merge, dtype: torch.dtype) -> None:
    deltas = [delta.to(dtype) for delta in draw(1, (9, 6))]
    before = [delta.clone() for delta in deltas]
    first = merge(deltas)
    assert all(torch.equal(a, b) for a, b in zip(deltas, before, strict=True))
    assert first.dtype == dtype
    assert_near(first, merge([delta.double() for delta in deltas]), 1e-4)


def test_ill_conditioned_directions_lose_no_precision() -> None:
    deltas = draw(4, (9, 9))  # the tasks' directions have a condition of 15,000
    merged = iso.common_and_specific(deltas, 0.5).update
    wide = iso.common_and_specific([delta.double() for delta in deltas], 0.5).update
    assert_near(merged, wide, 1e-6)


@each_merge
@few
@given(seed=seeds, shape=shapes)
def test_order_of_models_does_not_matter(merge: Merge, seed: int, shape: tuple[int, int]) -> None:
    deltas = draw(seed, shape)
    assert_near(merge([deltas[2], deltas[0], deltas[1]]), merge(deltas))


@each_merge
@few
@given(seed=seeds, shape=shapes)
def test_rotating_both_sides_rotates_the_result(
    merge: Merge, seed: int, shape: tuple[int, int]
) -> None:
    deltas = [delta.double() for delta in draw(seed, shape)]
    left, right = rotation(seed + 1, shape[0]), rotation(seed + 2, shape[1])
    rotated = merge([left @ delta @ right for delta in deltas])
    assert_near(rotated, left @ merge(deltas) @ right, 3e-4)


@each_merge
def test_zero_task_vectors_merge_to_zero(merge: Merge) -> None:
    assert not merge([torch.zeros(5, 4)] * 3).any()


@pytest.mark.parametrize("merge", [tsv.merge, quadratic.wudi_adam, optmerge.merge])
def test_one_model_comes_back(merge: Merge) -> None:
    (delta,) = draw(3, (7, 5), 1)
    assert_near(merge([delta]), delta, 1e-6)


@few
@given(seed=seeds, shape=shapes)
def test_leading_triples_are_those_of_lapack(seed: int, shape: tuple[int, int]) -> None:
    (matrix,) = draw(seed, shape, 1)
    found = linalg.triples(matrix, 2)
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    torch.testing.assert_close(found.S, S[:2], rtol=1e-9, atol=0)
    torch.testing.assert_close(found.product(), (U[:, :2] * S[:2]) @ Vh[:2], rtol=0, atol=1e-6)


def test_triples_leave_out_rounding_noise() -> None:
    left, right = draw(5, (40, 3), 2)
    found = linalg.triples(left @ right.T)
    assert len(found.S) == 3
    assert_near(found.product().float(), left @ right.T, 1e-6)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (3, 900_000), (300, 7)])
def test_a_gram_matrix_is_that_of_the_product(shape: tuple[int, int]) -> None:
    (matrix,) = draw(6, shape, 1)
    expected = matrix.double() @ matrix.double().T
    for rows in (matrix, matrix.T.contiguous().T):
        torch.testing.assert_close(linalg.gram(rows), expected, rtol=1e-12, atol=1e-9)


@few
@given(seed=seeds, shape=shapes, numerical=st.booleans())
def test_triples_of_a_residual_need_no_residual(
    seed: int, shape: tuple[int, int], numerical: bool
) -> None:
    matrix, other = draw(seed, shape, 2)
    parts = linalg.split(linalg.short_side(other), 2, numerical)
    basis = parts.leading.U
    found = linalg.residual_triples(matrix, parts, 2, numerical)
    wide = matrix.double()
    U, S, Vh = torch.linalg.svd(wide - basis @ (basis.T @ wide), full_matrices=False)
    torch.testing.assert_close(found.S, S[:2], rtol=1e-6, atol=1e-6)
    if float(S[1] - S[2]) > 1e-3:
        torch.testing.assert_close(found.product(), (U[:, :2] * S[:2]) @ Vh[:2], rtol=0, atol=1e-5)
    assert float((basis.T @ found.U).abs().max()) < 1e-6


@pytest.mark.parametrize("shape", [(20, 8), (8, 20)])
@pytest.mark.parametrize("numerical", [True, False])
def test_a_residual_without_strength_has_orthonormal_directions_or_none(
    shape: tuple[int, int], numerical: bool
) -> None:
    left, right = draw(7, (shape[0], 2), 1)[0], draw(8, (shape[1], 2), 1)[0]
    matrix = left @ right.T
    parts = linalg.split(linalg.short_side(matrix), 2, numerical)
    found = linalg.residual_triples(matrix, parts, 3, numerical)
    if numerical:
        assert float(found.S.sum()) < 1e-4
    else:
        identity = torch.eye(3, dtype=torch.float64)
        torch.testing.assert_close(found.U.T @ found.U, identity, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(300, 700), (700, 300), (300, 300)])
def test_large_matrices_have_the_factors_that_lapack_finds(shape: tuple[int, int]) -> None:
    (matrix,) = draw(9, shape, 1)
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    found = linalg.triples(matrix)
    torch.testing.assert_close(found.S, S, rtol=1e-6, atol=0)
    assert_near(found.product(), matrix.double(), 2e-6)
    factor, _ = linalg.polar(linalg.short_side(matrix))
    assert_near(factor.double(), U @ Vh, 2e-5)


# -- task singular vectors ----------------------------------------------------------------------


def test_tsv_of_orthogonal_low_rank_tasks_is_their_sum() -> None:
    deltas = []
    for task in range(3):
        delta = torch.zeros(9, 12)
        delta[3 * task : 3 * task + 3, 4 * task : 4 * task + 4] = draw(task, (3, 4), 1)[0]
        deltas.append(delta)
    assert_near(tsv.merge(deltas), sum(deltas), 1e-5)


def test_tsv_parts_add_up_and_do_not_interfere() -> None:
    deltas = draw(11, (12, 9))
    parts = tsv.parts(deltas)
    assert_near(sum(parts), tsv.merge(deltas), 1e-5)
    assert tsv.interference(deltas) > 1.0
    assert tsv.interference(parts) < 1e-3


def test_tsv_of_identical_models_is_their_leading_part() -> None:
    (delta,) = draw(12, (8, 8), 1)
    expected = linalg.triples(delta, 2).product().float()
    assert_near(tsv.merge([delta] * 4), expected, 1e-5)


def test_tsv_keeps_a_direction_when_there_are_more_tasks_than_rows() -> None:
    assert tsv.kept_directions((3, 50), 20) == 1
    assert tsv.merge(draw(13, (3, 50), 20)).abs().max() > 0


# -- isotropic ----------------------------------------------------------------------------------


@few
@given(seed=seeds, shape=shapes)
def test_iso_has_one_singular_value_and_keeps_the_nuclear_norm(
    seed: int, shape: tuple[int, int]
) -> None:
    deltas = draw(seed, shape)
    flat = iso.common(deltas)
    values = torch.linalg.svdvals(flat.update.double())
    assert float((values - flat.sigma).abs().max()) < 1e-4 * flat.sigma
    nuclear = torch.linalg.svdvals(linalg.total(deltas).double()).sum()
    torch.testing.assert_close(values.sum(), nuclear, rtol=1e-5, atol=0)


def test_iso_cts_without_room_for_tasks_is_iso_c() -> None:
    deltas = draw(21, (6, 5), 7)
    for fraction in (0.8, 1.0):
        assert_near(
            iso.common_and_specific(deltas, fraction).update, iso.common(deltas).update, 1e-6
        )


def test_numerical_rank_leaves_directions_without_strength_alone() -> None:
    left, right = draw(22, (20, 2), 2)
    low = left @ right.T
    numerical, full = iso.common([low], "numerical"), iso.common([low], "full")
    assert torch.linalg.matrix_rank(numerical.update.double(), rtol=1e-5) == 2
    assert torch.linalg.matrix_rank(full.update.double(), rtol=1e-5) == 20


@pytest.mark.parametrize(("rank", "is_cut"), [(2, True), (6, True), (8, False)])
def test_low_rank_is_told_by_a_gap_in_the_spectrum(rank: int, is_cut: bool) -> None:
    left, right = draw(24, (9, rank), 1)[0], draw(25, (14, rank), 1)[0]
    assert iso.common([left @ right.T]).is_cut is is_cut
    strengths = torch.logspace(0, -9, 30, dtype=torch.float64)
    decaying = rotation(26, 30) * strengths @ rotation(27, 30)
    assert not iso.common([decaying]).is_cut


def test_a_task_without_an_update_adds_no_directions_of_its_own() -> None:
    deltas = [*draw(23, (12, 30), 2), torch.zeros(12, 30)]
    flat = iso.common_and_specific(deltas, 0.5)
    assert torch.linalg.matrix_rank(flat.update.double(), rtol=1e-5) == 10
    assert flat.is_cut
    full = iso.common_and_specific(deltas, 0.5, "full")
    assert torch.linalg.matrix_rank(full.update.double(), rtol=1e-5) == 12
    assert not iso.common_and_specific(deltas[:2], 0.5).is_cut


# -- continual ----------------------------------------------------------------------------------


@few
@given(seed=seeds, shape=shapes, alpha=st.floats(0.0, 0.99))
def test_projection_leaves_nothing_on_the_protected_pairs(
    seed: int, shape: tuple[int, int], alpha: float
) -> None:
    update, delta = (matrix.double() for matrix in draw(seed, shape, 2))
    kept = opcm.project(update, delta, alpha=alpha)
    U, S, Vh = torch.linalg.svd(update.double(), full_matrices=False)
    rank = opcm.occupied_rank(S, alpha)
    core = U.T @ kept @ Vh.T
    assert float(core.diagonal().abs().max()) < 1e-5
    if rank:
        assert float(core[:rank, :rank].abs().max()) < 1e-5


def test_protecting_all_leaves_nothing_that_touches_a_dominant_direction() -> None:
    update, delta = (matrix.double() for matrix in draw(31, (9, 7), 2))
    U, S, Vh = torch.linalg.svd(update.double(), full_matrices=False)
    rank = opcm.occupied_rank(S, 0.6)
    assert rank > 0
    kept = opcm.project(update, delta, alpha=0.6, zero_diagonal=False, protect="all")
    assert float((U[:, :rank].T @ kept).abs().max()) < 1e-6
    assert float((kept @ Vh[:rank].T).abs().max()) < 1e-6


def test_the_same_model_again_adds_nothing() -> None:
    (delta,) = draw(32, (8, 6), 1)
    assert_near(opcm.add(delta, delta), delta, 1e-6)


def test_a_tensor_nothing_has_touched_takes_the_new_task_vector() -> None:
    (delta,) = draw(33, (8, 6), 1)
    assert_near(opcm.add(torch.zeros(8, 6), delta), delta, 0.0)


def test_full_protection_leaves_nothing_in_the_occupied_subspace() -> None:
    left, right, (delta,) = draw(34, (9, 3), 1)[0], draw(35, (7, 3), 1)[0], draw(36, (9, 7), 1)
    update = left @ right.T
    assert opcm.occupied_rank(torch.tensor([3.0, 2.0, 1.0]), 1.0) == 3
    kept = opcm.project(update, delta, alpha=1.0, protect="all").double()
    U, _, Vh = torch.linalg.svd(update.double(), full_matrices=False)
    assert float((U[:, :3].T @ kept).abs().max()) < 1e-5
    assert float((kept @ Vh[:3].T).abs().max()) < 1e-5


@pytest.mark.parametrize("protect", ["inner", "all"])
def test_projection_turns_and_scales_with_the_task_vectors(protect: opcm.Protected) -> None:
    update, delta = (matrix.double() for matrix in draw(37, (8, 6), 2))
    left, right = rotation(38, 8), rotation(39, 6)
    kept = opcm.project(update, delta, protect=protect)
    turned = opcm.project(left @ update @ right, left @ delta @ right, protect=protect)
    assert_near(turned, left @ kept @ right, 1e-9)
    assert_near(opcm.project(1e-3 * update, 1e-3 * delta, protect=protect), 1e-3 * kept, 1e-9)


# -- WUDI and OptMerge --------------------------------------------------------------------------


@few
@given(seed=seeds, shape=shapes)
def test_wudi_gradient_and_loss_are_those_of_the_definition(
    seed: int, shape: tuple[int, int]
) -> None:
    deltas = [delta.double() for delta in draw(seed, shape)]
    m = draw(seed + 7, shape, 1)[0].double().requires_grad_()
    loss = sum(((m - d) @ d.T).square().sum() / d.square().sum() for d in deltas)
    loss.backward()
    found = quadratic.wudi_problem(deltas)
    for form in (found, found.formed()):
        torch.testing.assert_close(form.gradient(m.detach()), m.grad, rtol=1e-9, atol=1e-9)
        assert form.loss(m.detach()) == pytest.approx(float(loss.detach()), rel=1e-9)


@few
@given(seed=seeds, shape=shapes)
def test_closed_form_without_filter_is_the_minimum(seed: int, shape: tuple[int, int]) -> None:
    deltas = [delta.double() for delta in draw(seed, shape)]
    problem = quadratic.wudi_problem(deltas)
    start = quadratic.starting_point(deltas, "sum")
    best = quadratic.closed_form(problem, start, quadratic.Spectral("none"))
    for other in (start, start / 3, quadratic.adam(problem, start, 50, 1e-2)):
        assert problem.loss(best) <= problem.loss(other) + 1e-9
    assert float(problem.gradient(best).abs().max()) < 1e-8


@pytest.mark.parametrize("shape", [(3, 20), (20, 3)])
def test_filters_run_from_the_start_to_the_minimum(shape: tuple[int, int]) -> None:
    deltas = [delta.double() for delta in draw(41, shape)]
    problem, start = quadratic.wudi_problem(deltas), quadratic.starting_point(deltas, "sum")
    best = quadratic.closed_form(problem, start, quadratic.Spectral("none"))
    for spectral, expected in (
        (quadratic.Spectral(time=1e-9), start),
        (quadratic.Spectral(time=1e9), best),
        (quadratic.Spectral("tikhonov", strength=1e-12), best),
        (quadratic.Spectral("landweber", iterations=0), start),
    ):
        assert_near(quadratic.closed_form(problem, start, spectral), expected, 1e-6)


@pytest.mark.parametrize("filter", ["exponential", "tikhonov", "landweber", "none"])
@pytest.mark.parametrize("count", [1, 3])
def test_copies_of_one_model_give_it_back(filter: quadratic.Filter, count: int) -> None:
    (delta,) = draw(45, (6, 9), 1)
    spectral = quadratic.Spectral(filter)
    merged = quadratic.wudi_closed([delta] * count, spectral, init="mean")
    assert_near(merged, delta, 1e-5)
    if filter == "none":
        assert_near(quadratic.wudi_closed([delta] * count, spectral), delta, 1e-5)


def test_tasks_with_disjoint_inputs_do_not_interfere() -> None:
    deltas = [torch.zeros(5, 12) for _ in range(3)]
    for task, delta in enumerate(deltas):
        delta[:, 4 * task : 4 * task + 4] = draw(task + 50, (5, 4), 1)[0]
    merged = quadratic.wudi_closed(deltas, quadratic.Spectral("none"), init="mean")
    assert_near(merged, sum(deltas), 1e-5)


@few
@given(seed=seeds, scale=st.floats(0.01, 100))
def test_closed_form_scales_with_the_task_vectors(seed: int, scale: float) -> None:
    deltas = draw(seed, (6, 8))
    spectral = quadratic.Spectral("none", adaptive="participation_sqrt")
    scaled = quadratic.wudi_closed([scale * delta for delta in deltas], spectral)
    assert_near(scaled / scale, quadratic.wudi_closed(deltas, spectral), 1e-4)


@pytest.mark.parametrize("rule", [*quadratic.ADAPTIVE, "cumvar_0.9"])
def test_adaptive_ranks_lie_between_one_direction_and_all(rule: str) -> None:
    flat = torch.ones(10, dtype=torch.float64)
    single = torch.full((10,), 1e-8, dtype=torch.float64)
    single[0] = 1.0
    assert quadratic.adaptive_rank(single, rule, (10, 10)) <= 2
    assert 1 <= quadratic.adaptive_rank(flat, rule, (10, 10)) <= 10


def test_unknown_rank_rule_says_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"participation_sqrt.*cumvar_<share>"):
        quadratic.adaptive_rank(torch.ones(3), "elbow", (3, 3))


def test_descent_without_momentum_never_raises_the_loss() -> None:
    deltas = [delta.double() for delta in draw(61, (6, 9))]
    problem = optmerge.denoised_problem(deltas, "lora", 2)
    m, losses = linalg.mean(deltas), []
    for _ in range(20):
        losses.append(problem.loss(m))
        m = quadratic.sgd(problem, m, 1, 0.4, 0.0)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_optmerge_keeps_a_direction_when_there_are_more_experts_than_rows() -> None:
    assert optmerge.kept_rank((3, 9), 5, "full", None) == 1
    assert optmerge.kept_rank((4, 9), 3, "modality", None) == 1
    assert optmerge.kept_rank((20, 30), 5, "lora", None) == 4
    assert optmerge.kept_rank((20, 30), 5, "lora", 0.5) == 10


def test_optmerge_of_lora_experts_starts_at_their_mean() -> None:
    deltas = draw(46, (6, 9))
    average = sum(deltas) / 3
    assert_near(optmerge.merge(deltas, "lora", steps=0), average, 1e-6)
    assert_near(optmerge.merge(deltas, "lora", lr=1e-12), average, 1e-6)
    assert_near(optmerge.merge(deltas, "full", steps=0), sum(deltas), 1e-6)


def test_optmerge_at_full_rank_is_wudi() -> None:
    deltas = draw(62, (6, 8))
    centred = optmerge.merge(deltas, "full", ratio=1.0, steps=40, lr=1e-3)
    assert_near(centred, quadratic.wudi_adam(deltas, steps=40, lr=1e-3), 1e-5)


# -- measured statistics ------------------------------------------------------------------------


@few
@given(seed=seeds, scale=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_regmean_is_the_least_squares_optimum(seed: int, scale: float) -> None:
    weights, inputs = draw(seed, (4, 6), 2), draw(seed + 1, (30, 6), 2)
    grams = [x.T @ x / len(x) for x in inputs]
    best = regmean.merge(weights, grams, scale=scale)
    assert not best.ridged

    def error(W: torch.Tensor) -> float:
        shrunk = [regmean.shrink(gram, scale) for gram in grams]
        moved = [(W - own).double() for own in weights]
        return float(sum(torch.trace(m @ G @ m.T) for m, G in zip(moved, shrunk, strict=True)))

    for step in draw(seed + 2, (4, 6), 3):
        assert error(best.weight + 0.01 * step) >= error(best.weight)


def test_regmean_does_not_depend_on_order_scale_or_copies() -> None:
    weights, inputs = draw(77, (4, 6)), draw(78, (30, 6))
    grams = [x.T @ x for x in inputs]
    plain = regmean.merge(weights, grams).weight
    assert_near(regmean.merge(weights[::-1], grams[::-1]).weight, plain, 1e-6)
    assert_near(regmean.merge(weights, [1e-4 * gram for gram in grams]).weight, plain, 1e-6)
    assert_near(regmean.merge(weights, [grams[0]] * 3).weight, sum(weights) / 3, 1e-6)
    assert_near(regmean.merge([weights[0]] * 3, grams).weight, weights[0], 1e-6)


def test_regmean_without_correlations_weighs_every_input_by_its_size() -> None:
    weights, inputs = draw(79, (4, 6), 2), draw(80, (30, 6), 2)
    grams = [x.T @ x for x in inputs]
    sizes = [gram.diagonal() for gram in grams]
    expected = (weights[0] * sizes[0] + weights[1] * sizes[1]) / (sizes[0] + sizes[1])
    assert_near(regmean.merge(weights, grams, scale=0.0).weight, expected, 1e-6)


def test_regmean_averages_inputs_that_no_model_saw() -> None:
    weights, inputs = draw(71, (4, 6), 2), draw(72, (30, 6), 2)
    for x in inputs:
        x[:, 2] = 0.0
    merged = regmean.merge(weights, [x.T @ x for x in inputs], scale=0.9).weight
    assert_near(merged[:, 2], (weights[0] + weights[1])[:, 2] / 2, 1e-6)


def test_regmean_with_fewer_tokens_than_inputs_keeps_what_nothing_determines() -> None:
    (weight,), (inputs,) = draw(73, (4, 6), 1), draw(74, (2, 6), 1)
    solved = regmean.merge([weight, weight], [inputs.T @ inputs] * 2, scale=1.0)
    assert solved.ridged
    assert_near(solved.weight, weight, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [2, 4])
def test_regmean_averages_what_only_rounding_noise_determines(
    dtype: torch.dtype, tokens: int
) -> None:
    for seed in range(10):
        weights = draw(seed, (4, 16), 2)
        inputs = [x.double() for x in draw(100 + seed, (tokens, 16), 2)]
        grams = [x.T @ x / tokens for x in inputs]
        solved = regmean.merge(weights, [gram.to(dtype) for gram in grams], scale=1.0)
        assert solved.ridged
        average = (weights[0] + weights[1]).double() / 2
        size = (grams[0] + grams[1]).diagonal().rsqrt()
        scaled = size[:, None] * (grams[0] + grams[1]) * size
        pulls = [G @ (W - average).T for G, W in zip(grams, weights, strict=True)]
        departure = torch.linalg.pinv(scaled, rtol=1e-10) @ (size[:, None] * sum(pulls))
        assert_near(solved.weight, average + (size[:, None] * departure).T, 0.3)


def test_regmean_takes_weights_with_the_inputs_first() -> None:
    weights, inputs = draw(75, (4, 6), 2), draw(76, (30, 6), 2)
    grams = [x.T @ x for x in inputs]
    plain = regmean.merge(weights, grams).weight
    turned = regmean.merge([W.T.contiguous() for W in weights], grams, transposed=True).weight
    assert_near(turned.T, plain, 1e-6)


@few
@given(seed=seeds, floor=st.sampled_from(["favour_target", "all", "add"]))
def test_fisher_merge_lies_between_the_models(seed: int, floor: fisher.Floor) -> None:
    models, fishers = draw(seed, (5, 4)), [F.square() for F in draw(seed + 1, (5, 4))]
    merged = fisher.merge(models, fishers, [0.2, 0.3, 0.5], floor)
    stacked = torch.stack(models)
    assert bool((merged <= stacked.amax(0) + 1e-6).all())
    assert bool((merged >= stacked.amin(0) - 1e-6).all())


def test_fisher_merge_minimises_the_sum_of_diagonal_quadratics() -> None:
    models, curvatures = draw(81, (5, 4)), [F.square() + 0.1 for F in draw(82, (5, 4))]
    merged = fisher.merge(models, curvatures, [1.0, 1.0, 1.0], "all")
    pull = sum(F * (merged - theta) for theta, F in zip(models, curvatures, strict=True))
    assert float(pull.abs().max()) < 1e-5


@pytest.mark.parametrize("floor", ["favour_target", "all", "add"])
def test_fisher_of_equal_information_is_the_weighted_mean(floor: fisher.Floor) -> None:
    models, information = draw(84, (5, 4), 2), draw(85, (5, 4), 1)[0].square() + 0.1
    merged = fisher.merge(models, [information] * 2, [3.0, 1.0], floor)
    assert_near(merged, 0.75 * models[0] + 0.25 * models[1], 1e-6)


def test_normalised_fishers_do_not_depend_on_their_scales_or_on_the_donors_order() -> None:
    models, fishers = draw(86, (5, 4)), [F.square() + 0.1 for F in draw(87, (5, 4))]
    weights = [0.2, 0.3, 0.5]

    def merged(order: list[int], scales: list[float]) -> torch.Tensor:
        own = [fishers[i] * scale for i, scale in zip(order, scales, strict=True)]
        norms = [float(F.double().norm()) for F in own]
        picked = [weights[i] for i in order]
        factors = fisher.coefficients(picked, norms, "favour_target", 1e-6, normalize=True)
        return fisher.merge([models[i] for i in order], own, factors)

    plain = merged([0, 1, 2], [1.0, 1.0, 1.0])
    assert_near(merged([0, 1, 2], [100.0, 0.01, 7.0]), plain, 1e-6)
    assert_near(merged([0, 2, 1], [1.0, 1.0, 1.0]), plain, 1e-6)


def test_a_model_without_information_keeps_its_weight() -> None:
    factors = fisher.coefficients([0.5, 0.5], [0.0, 2.0], "favour_target", 1e-6, normalize=True)
    assert factors == [0.5, 0.25]


def test_fisher_keeps_the_target_where_nobody_knows() -> None:
    models = draw(83, (5, 4))
    nothing = [torch.zeros(5, 4)] * 3
    assert_near(fisher.merge(models, nothing, [1.0, 1.0, 1.0]), models[0], 0.0)
    assert_near(fisher.merge(models, nothing, [0.0, 1.0, 1.0]), models[0], 0.0)
    assert_near(fisher.merge(models, nothing, [1.0, 1.0, 1.0], "all"), sum(models) / 3, 1e-6)


# -- KnOTS --------------------------------------------------------------------------------------


@few
@given(seed=seeds, shape=shapes)
def test_updates_are_the_basis_times_their_coordinates(seed: int, shape: tuple[int, int]) -> None:
    deltas = draw(seed, shape)
    aligned = knots.align(deltas)
    for delta, own in zip(deltas, aligned.coordinates, strict=True):
        assert_near(aligned.U @ own, delta, 1e-5)
    joint = torch.linalg.svdvals(torch.cat(deltas, dim=1).double())
    torch.testing.assert_close(aligned.S, joint[: len(aligned.S)], rtol=1e-6, atol=1e-7)


def test_knots_without_election_adds_the_task_vectors() -> None:
    deltas = draw(91, (9, 7))
    assert_near(knots.merge(deltas, "sum"), sum(deltas), 1e-5)


@pytest.mark.parametrize("shape", [(9, 7), (5, 12)])
def test_knots_turns_with_the_output_side(shape: tuple[int, int]) -> None:
    deltas, left = draw(92, shape), rotation(93, shape[0]).float()
    turned = knots.merge([left @ delta for delta in deltas], "ties", 0.4)
    assert_near(turned, left @ knots.merge(deltas, "ties", 0.4), 1e-3)


def test_knots_keeps_the_published_number_of_coordinates() -> None:
    (delta,) = draw(94, (10, 10), 1)
    aligned = knots.align([delta])
    found = aligned.U.T @ knots.merge([delta], "ties", 0.2)
    assert int((found.abs() > 1e-5).sum()) == int(100 * 0.2) + 1


@pytest.mark.parametrize("rule", ["ties", "ties_sum", "sum", "mean"])
@pytest.mark.parametrize("basis", ["output", "input"])
def test_knots_merges_coordinates_by_its_rule(rule: str, basis: str) -> None:
    deltas = [delta.double() for delta in draw(54, (6, 8))]
    oriented = [delta.T for delta in deltas] if basis == "input" else deltas
    U, S, Vh = torch.linalg.svd(torch.cat(oriented, dim=1), full_matrices=False)
    rows = torch.stack((S[:, None] * Vh).split(oriented[0].shape[1], dim=1))
    limits = [row.abs().flatten().sort().values[row.numel() - row.numel() // 2 - 1] for row in rows]
    kept = torch.stack(
        [row * (row.abs() >= limit * (1 - 1e-9)) for row, limit in zip(rows, limits, strict=True)]
    )
    if rule.startswith("ties"):
        sign = kept.sum(0).sign()
        sign[sign == 0] = sign.sum().sign()
        kept = kept * (kept.sign() == sign)
    merged = kept.sum(0)
    if rule in {"ties", "mean"}:
        merged = merged / (kept != 0).sum(0).clamp(min=1)
    expected = U @ merged
    found = knots.merge(deltas, rule, 0.5, basis=basis)
    assert_near(found, expected.T if basis == "input" else expected, 1e-6)
