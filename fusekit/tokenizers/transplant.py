"""Giving a model's embedding or head another tokenizer's vocabulary, without training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fusekit.errors import FusekitError, did_you_mean
from fusekit.tokenizers import approximate, matching
from fusekit.tokenizers.approximate import Array, SubwordRule, WeightScheme
from fusekit.tokenizers.matching import Matching
from fusekit.tokenizers.vocabulary import Vocabulary

Method = Literal[
    "omp", "common_interpolation", "subword", "mean", "zero", "randn", "john_hewitt", "landmark_pca"
]
Where = Literal["none", "embed", "lm_head", "both"]

_BASIS_METHODS = frozenset({"omp", "common_interpolation", "landmark_pca"})
_PICKING_METHODS = frozenset({"omp", "common_interpolation"})
_WORKSPACE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class TransplantOptions:
    """How rows of tokens the model lacks are made.

    Attributes:
        method: `omp` (default), `common_interpolation`, `subword`, `mean`, `zero`, `randn`
            (standard normal), `john_hewitt` (normal with the rows' mean and covariance),
            `landmark_pca`.
        k: shared tokens per row (`omp`, `common_interpolation`).
        cosine: nearest by cosine instead of euclidean distance (`common_interpolation`).
        weight_scheme: weights of the nearest rows (`common_interpolation`).
        subword_rule: how rows of pieces are combined (`subword`).
        prefix_match: copy the row of the longest proper prefix the model knows, where.
        byte_match: match single-byte tokens with `<0xNN>` tokens, where.
        scale: factor on approximated rows.
        noise: standard deviation of normal noise added to approximated rows.
        zero_untrained: zero the rows of tokens that are poorly trained in both models.
        batch: approximated rows per step at most; less when memory would be large.
        seed: of the random methods and the noise.
    """

    method: Method = "omp"
    k: int = 64
    cosine: bool = False
    weight_scheme: WeightScheme = "distance_proportional"
    subword_rule: SubwordRule = "mean"
    prefix_match: Where = "none"
    byte_match: Where = "none"
    scale: float = 1.0
    noise: float = 0.0
    zero_untrained: bool = False
    batch: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "method": get_args(Method),
            "weight_scheme": get_args(WeightScheme),
            "subword_rule": get_args(SubwordRule),
            "prefix_match": get_args(Where),
            "byte_match": get_args(Where),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise FusekitError(f"{name}: unknown {value!r}{did_you_mean(str(value), known)}")
        for name in ("k", "batch"):
            if getattr(self, name) < 1:
                raise FusekitError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.noise < 0:
            raise FusekitError(f"noise: expected a standard deviation >= 0, found {self.noise}")


def transplant(
    model_rows: Array,
    donor_rows: Array,
    model: Vocabulary,
    donor: Vocabulary,
    options: TransplantOptions | None = None,
    *,
    head: bool = False,
    untrained: NDArray[np.int64] | None = None,
) -> Array:
    """A model's embedding (or head) in the donor's vocabulary.

    Rows of tokens both know are copied, the others approximated from `donor_rows`; ids no donor
    token uses keep the model's row of that id where no token of the model uses it either, and get
    the mean row otherwise. Transplanting a model to its own tokenizer changes nothing.

    Args:
        model_rows: (n_model, h_model) rows by the model's ids.
        donor_rows: (n_donor, h_donor) rows by the donor's ids.
        model: the model's vocabulary.
        donor: the donor's vocabulary.
        options: the method and its settings.
        head: whether the matrix is an output head.
        untrained: donor ids to zero and to keep out of the approximation.

    Returns:
        (max(n_donor, donor.size), h_model) rows of the type of `model_rows`.

    Raises:
        FusekitError: the two vocabularies share no token and the method needs some.

    References: Goddard and Fernandes Neto, "Training-Free Tokenizer Transplantation via Orthogonal
    Matching Pursuit", 2025, arXiv 2506.06607.
    """
    options = options or TransplantOptions()
    matched = matching.match_tokens(model, donor, len(model_rows), len(donor_rows))
    rows = np.empty((max(len(donor_rows), donor.size), model_rows.shape[1]), model_rows.dtype)
    _fill_unused(rows, model_rows, model, donor)
    rows[matched.shared_donor] = model_rows[matched.shared_model]

    copied = _copied(matched, model, len(model_rows), options, head)
    rows[matched.missing[copied >= 0]] = model_rows[copied[copied >= 0]]
    todo = np.flatnonzero(copied < 0)
    if len(todo):
        space = _SharedSpace.of(model_rows, donor_rows, matched, model, untrained)
        if options.method in _BASIS_METHODS and len(space.donor_ids) == 0:
            raise FusekitError(
                f"method {options.method!r} needs tokens that {model.label} and {donor.label} "
                "share, and they share none: 'subword', 'mean' and 'zero' do without"
            )
        generator = np.random.Generator(np.random.Philox([options.seed, int(head)]))
        make = _row_maker(space, options, head, generator)
        pieces: list[list[int]] = []
        if options.method == "subword":
            meanings = [matched.meanings[place] for place in todo]
            pieces = matching.pieces(meanings, model, len(model_rows))
        step = _step(space, options)
        for start in range(0, len(todo), step):
            ids = matched.missing[todo[start : start + step]]
            values = options.scale * make(ids, pieces[start : start + step])
            if options.noise:
                values += options.noise * generator.standard_normal(values.shape)
            rows[ids] = values.astype(rows.dtype)
    rows[[number for number in donor.ids.values() if number >= len(donor_rows)]] = 0
    if untrained is not None:
        rows[untrained] = 0
    return rows


@dataclass(frozen=True)
class _SharedSpace:
    """Both matrices, and the ids of the shared tokens that rows may be described with."""

    model_rows: Array
    donor_rows: Array
    donor_ids: NDArray[np.int64]
    model_ids: NDArray[np.int64]
    used_ids: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        model_rows: Array,
        donor_rows: Array,
        matched: Matching,
        model: Vocabulary,
        untrained: NDArray[np.int64] | None,
    ) -> _SharedSpace:
        kept = ~np.isin(matched.shared_donor, [] if untrained is None else untrained)
        used = np.unique([number for number in model.ids.values() if number < len(model_rows)])
        return cls(
            model_rows, donor_rows, matched.shared_donor[kept], matched.shared_model[kept], used
        )

    @cached_property
    def x(self) -> Array:
        """Shared tokens' rows in the donor."""
        return _float(self.donor_rows[self.donor_ids])

    @cached_property
    def y(self) -> Array:
        """The same tokens' rows in the model."""
        return _float(self.model_rows[self.model_ids])

    @cached_property
    def used(self) -> Array:
        """The model's rows that belong to a token."""
        return _float(self.model_rows[self.used_ids])


def _row_maker(
    space: _SharedSpace, options: TransplantOptions, head: bool, generator: np.random.Generator
) -> Callable[[NDArray[np.int64], list[list[int]]], Array]:
    """The method as a function from donor ids (and their pieces) to rows."""
    width = space.model_rows.shape[1]
    k = min(options.k, len(space.donor_ids))

    def targets(ids: NDArray[np.int64]) -> Array:
        return _float(space.donor_rows[ids])

    if options.method == "omp":
        return lambda ids, _: approximate.omp(targets(ids), space.x, k).read_in(space.y)
    if options.method == "common_interpolation":
        return lambda ids, _: approximate.common_interpolation(
            targets(ids), space.x, k, cosine=options.cosine, scheme=options.weight_scheme
        ).read_in(space.y)
    if options.method == "landmark_pca":
        rotation = approximate.landmark_rotation(space.x, space.y)
        return lambda ids, _: rotation.carry(targets(ids))
    if options.method == "subword":
        matrix = _float(space.model_rows)
        return lambda _, pieces: approximate.subword_rows(
            matrix, pieces, options.subword_rule, head=head
        )
    if options.method == "mean":
        mean = space.used.mean(axis=0, dtype=np.float64)
        return lambda ids, _: np.tile(mean, (len(ids), 1))
    if options.method == "john_hewitt":
        distribution = approximate.row_distribution(space.used)
        return lambda ids, _: distribution.draw(len(ids), generator)
    if options.method == "randn":
        return lambda ids, _: generator.standard_normal((len(ids), width))
    return lambda ids, _: np.zeros((len(ids), width))


def _copied(
    matched: Matching, model: Vocabulary, rows: int, options: TransplantOptions, head: bool
) -> NDArray[np.int64]:
    """For each missing token the model's id whose row is copied by a looser match, or -1."""
    copied = np.full(len(matched.missing), -1, np.int64)
    places = ("lm_head", "both") if head else ("embed", "both")
    known = matching.meanings(model, rows)
    if options.byte_match in places:
        copied = matching.byte_matches(matched.meanings, known)
    if options.prefix_match in places:
        prefixes = matching.prefix_matches(matched.meanings, known)
        copied = np.where(copied >= 0, copied, prefixes)
    return copied


def _fill_unused(rows: Array, model_rows: Array, model: Vocabulary, donor: Vocabulary) -> None:
    """Rows of ids that are no token of the donor: the model's own unused ones, else its mean."""
    unused = unused_ids(donor, len(rows))
    if len(unused) == 0:
        return
    own = np.intersect1d(unused, unused_ids(model, len(model_rows)))
    rows[unused] = _float(model_rows).mean(axis=0, dtype=np.float64).astype(rows.dtype)
    rows[own] = model_rows[own]


def unused_ids(vocabulary: Vocabulary, rows: int) -> NDArray[np.int64]:
    """Ids below `rows` that belong to no token."""
    free = np.ones(rows, bool)
    free[[number for number in vocabulary.ids.values() if number < rows]] = False
    return np.flatnonzero(free)


def _step(space: _SharedSpace, options: TransplantOptions) -> int:
    """Rows per step: `options.batch`, or fewer where the workspace would be large."""
    k = min(options.k, len(space.donor_ids)) if options.method in _PICKING_METHODS else 1
    per_row = 16 * k * space.donor_rows.shape[1] + 5 * len(space.donor_ids)
    affordable: int = _WORKSPACE_BYTES // max(1, per_row)
    return max(1, min(options.batch, affordable))


def _float(rows: Array) -> Array:
    """float64 stays, stored types of fewer bits become float32."""
    return rows if rows.dtype == np.float64 else rows.astype(np.float32)
