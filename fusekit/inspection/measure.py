"""Measuring one tensor of all models: one pass over its bytes, and a look at a sample before it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from fusekit.checkpoint.source import TensorInfo, TensorSource
from fusekit.engine.blocks import BLOCK_ELEMENTS, Array, Workspace, block_length
from fusekit.inspection.pairing import Comparison
from fusekit.inspection.statistics import TOP_SHARES, Floats, Statistics
from fusekit.kernels import GRANULE, codecs, linear, statistics

SAMPLE_ELEMENTS = 1 << 16
"""Elements of a tensor from which signs, supports and moments are estimated."""

SAMPLE_COLUMNS = 8192
"""Sampled rows longer than this are represented by a run in their middle."""

_SAMPLE_RUN = 4
"""Neighbouring rows that are sampled together, for the sake of fewer reads."""

SPECTRUM_ROWS = 64
"""Sampled rows whose inner products give the effective rank."""

_THRESHOLD_ELEMENTS = 1 << 14
"""Of those, the ones that supports' thresholds are read off."""

_POWER_STEPS = 24
"""Power steps for tensors that are held whole; larger ones get the one of the scan."""

_LEADING = 2
"""Vectors of the power step that finds the largest singular value."""


@dataclass
class Measurement:
    """What was found in one tensor; every list has one entry per model, the base left out.

    `statistics` and the ranks are None or NaN where the tensor was not compared or holds NaN or
    Inf. `digests` and `nonfinite` are by source index.
    """

    comparison: Comparison
    statistics: Statistics | None = None
    stable_rank: Floats | None = None
    effective_rank: Floats | None = None
    sampled: bool = False
    digests: dict[int, str] = field(default_factory=dict)
    nonfinite: dict[int, int] = field(default_factory=dict)


class Measurer:
    """Measures tensors with one worker's buffers.

    Args:
        sources: the base first, if there is one, then the models.
        has_base: whether the first source is the base.
    """

    def __init__(self, sources: Sequence[TensorSource], has_base: bool) -> None:
        self.sources = sources
        self.has_base = has_base
        self.space = Workspace(BLOCK_ELEMENTS)

    @property
    def models(self) -> int:
        return len(self.sources) - self.has_base

    def measure(self, comparison: Comparison) -> Measurement:
        """One tensor: norms and inner products of everything, the rest from a sample."""
        found = Measurement(comparison)
        hashes = {i: xxhash.xxh3_128() for i in comparison.infos}
        found.nonfinite = dict.fromkeys(comparison.infos, 0)
        if comparison.compared:
            with np.errstate(all="ignore"):
                self._compare(comparison, found, hashes)
        for index, info in comparison.infos.items():
            done = comparison.size if index in comparison.compared else 0
            self._read_rest(index, info, done, found, hashes[index])
            found.digests[index] = f"{info.dtype.name}{list(info.shape)}{hashes[index].hexdigest()}"
        if any(found.nonfinite.values()):
            found.statistics = found.stable_rank = found.effective_rank = None
        return found

    def _compare(
        self, comparison: Comparison, found: Measurement, hashes: dict[int, xxhash.xxh3_128]
    ) -> None:
        sample, first = self.sample(comparison)
        whole = sample[0].size == comparison.size
        spectral = self.has_base and comparison.is_matrix
        vectors = None
        if spectral and not whole:
            vectors = np.stack([_leading(own, first, comparison) for own in sample])
        products, powered = self._scan(comparison, vectors, found, hashes)
        found.sampled = not whole
        if any(found.nonfinite.values()):
            return
        found.statistics = self._statistics(comparison, sample, products)
        if not spectral:
            return
        norms = np.diag(products)[1:]
        if powered is None:
            powered = np.stack([_powered(own, _leading(own, first, comparison)) for own in sample])
        largest = np.array([np.linalg.svd(own, compute_uv=False)[0] for own in powered])
        rows = comparison.matrix_shape[0]
        found.stable_rank = np.where(norms > 0, np.maximum(norms / largest, 1.0), np.nan)
        found.effective_rank = np.array([effective_rank(own, rows) for own in sample])

    def sample(self, comparison: Comparison) -> tuple[Array, int]:
        """`rows` of the models alone, as task vectors where there is a base."""
        picked, first = self.rows(comparison, SAMPLE_ELEMENTS, SPECTRUM_ROWS)
        if not self.has_base:
            return picked, first
        deltas = picked[1:]
        deltas -= picked[0]
        return deltas, first

    def rows(self, comparison: Comparison, elements: int, least: int) -> tuple[Array, int]:
        """Evenly spaced rows of every source, and the column they start at.

        A tensor of at most `elements` is taken whole; otherwise about so many elements, but at
        least `least` rows, each cut to a run of `SAMPLE_COLUMNS` in its middle if it is longer.

        Returns:
            (sources, rows, columns), the base first if there is one; and the first column.
        """
        rows, columns = _layout(comparison)
        count, width = rows, columns
        if comparison.size > elements:
            width = min(columns, SAMPLE_COLUMNS)
            count = min(rows, max(least, elements // width))
        first = (columns - width) // 2
        run = _SAMPLE_RUN if width == columns and count < rows else 1
        count -= count % run
        picked = np.empty((len(self.sources), count, width), self._compute(comparison))
        for k in range(0, count, run):
            start = (k * (rows - run)) // max(count - run, 1) * columns + first
            together = picked[:, k : k + run].reshape(len(picked), -1)
            self._decoded(comparison, start, start + run * width, together)
            picked[:, k : k + run] = together.reshape(len(picked), run, width)
        return picked, first

    def _scan(
        self,
        comparison: Comparison,
        vectors: Array | None,
        found: Measurement,
        hashes: dict[int, xxhash.xxh3_128],
    ) -> tuple[Floats, Array | None]:
        """The pass over every element: inner products, a power step, NaN and Inf, digests."""
        space, compute = self.space, self._compute(comparison)
        columns = comparison.matrix_shape[1]
        step = block_length(columns if vectors is not None else GRANULE, BLOCK_ELEMENTS)
        k = len(self.sources)
        sums = np.zeros(k * (k + 1) // 2)
        powered = None if vectors is None else np.zeros_like(vectors)
        for start in range(0, comparison.size, step):
            stop = min(start + step, comparison.size)
            rows = space.scratch("rows", (k, stop - start), compute)
            self._scanned(comparison, start, stop, rows, found, hashes)
            statistics.products(rows, sums)
            if vectors is not None and powered is not None:
                for row, own, out in zip(rows[1:], vectors, powered, strict=True):
                    statistics.power_step(row.reshape(-1, columns), own, out)
        products = np.zeros((k, k))
        products[np.triu_indices(k)] = sums
        return products + np.triu(products, 1).T, powered

    def _statistics(self, comparison: Comparison, sample: Array, products: Floats) -> Statistics:
        n = self.models
        flat = sample.reshape(n, -1)
        scale = comparison.size / flat.shape[1]
        powers = np.empty((n, 4))
        statistics.powers(flat, powers)
        thresholds = np.array([_thresholds(row) for row in flat])
        top_energy = np.empty((n, len(TOP_SHARES)))
        for row, own, out in zip(flat, thresholds, top_energy, strict=True):
            statistics.energy_above(row, own, out)
        both, opposed = np.zeros((2, n, n)), np.zeros((2, n, n))
        positions = np.zeros(6)
        statistics.sign_counts(flat, thresholds[:, -1], both, opposed, positions)
        return Statistics(
            elements=float(comparison.size),
            gram=products,
            powers=powers * scale,
            both=_mirrored(both) * scale,
            opposed=_mirrored(opposed) * scale,
            positions=positions * scale,
            top_energy=top_energy * scale,
        )

    def _decoded(self, comparison: Comparison, start: int, stop: int, out: Array) -> None:
        """Elements of every source as rows; a model that is not compared is the base's twin."""
        for index, row in enumerate(out):
            if index in comparison.compared:
                info = comparison.infos[index]
                self.space.decode(self._read(index, info, start, stop), info.dtype, row)
            else:
                row[:] = out[0] if self.has_base else 0

    def _scanned(
        self,
        comparison: Comparison,
        start: int,
        stop: int,
        out: Array,
        found: Measurement,
        hashes: dict[int, xxhash.xxh3_128],
    ) -> None:
        """The base and task vectors (without a base: the models) as rows; counts and hashes."""
        for index, row in enumerate(out):
            if index not in comparison.compared:
                row[:] = 0
                continue
            info = comparison.infos[index]
            raw = self._read(index, info, start, stop)
            hashes[index].update(raw.data)
            if not self.has_base or index == 0:
                found.nonfinite[index] += self.space.decode(raw, info.dtype, row)
            elif info.dtype.name == "BF16" and row.dtype == np.float32:
                found.nonfinite[index] += codecs.decode_bf16_delta(raw.view(np.uint16), out[0], row)
            else:
                found.nonfinite[index] += self.space.decode(raw, info.dtype, row)
                linear.subtract(out[index : index + 1], out[0])

    def _read(self, index: int, info: TensorInfo, start: int, stop: int) -> Array:
        """The bytes of a run of elements, until the next read."""
        raw = self.space.scratch("raw", ((stop - start) * info.dtype.itemsize,), np.uint8)
        self.space.read(self.sources[index], info.name, start, stop, raw)
        return raw

    def _read_rest(
        self,
        index: int,
        info: TensorInfo,
        done: int,
        found: Measurement,
        digest: xxhash.xxh3_128,
    ) -> None:
        """Elements that were not compared: only hashed, and looked at for NaN and Inf."""
        compute = np.float64 if info.dtype.name == "F64" else np.float32
        for start in range(done, info.size, BLOCK_ELEMENTS):
            stop = min(start + BLOCK_ELEMENTS, info.size)
            raw = self._read(index, info, start, stop)
            digest.update(raw.data)
            if info.dtype.is_float:
                row = self.space.scratch("rows", (stop - start,), compute)
                found.nonfinite[index] += self.space.decode(raw, info.dtype, row)

    def _compute(self, comparison: Comparison) -> type[np.floating]:
        wide = any(comparison.infos[i].dtype.name == "F64" for i in comparison.compared)
        return np.float64 if wide else np.float32


def effective_rank(sample: Array, rows: int) -> float:
    """Participation ratio (sum s^2)^2 / sum s^4 of singular values s, from some of the rows.

    The squared inner products between different rows stand for those of all pairs of rows, which
    makes both sums unbiased; with all rows the ratio is exact.

    References:
        Gao et al., "A theory of multineuronal dimensionality, dynamics and measurement", 2017, for
        the ratio; the entropy of Roy and Vetterli's effective rank needs every singular value.
    """
    chosen = sample if len(sample) == rows else _spectrum_rows(sample)
    count = len(chosen)
    products = (chosen @ chosen.T).astype(np.float64)
    own = np.diag(products)
    off_diagonal = np.square(products).sum() - np.square(own).sum()
    others = off_diagonal * (rows * (rows - 1)) / max(count * (count - 1), 1)
    fourth = np.square(own).sum() * rows / count + others
    return float((own.sum() * rows / count) ** 2 / fourth) if fourth > 0 else math.nan


def _leading(sample: Array, first: int, comparison: Comparison) -> Array:
    """Orthonormal vectors near the leading right singular vectors of a task vector, (2, columns).

    Two power steps from a fixed start on the sampled rows.
    """
    columns = comparison.matrix_shape[1]
    noise = _noise(max(SPECTRUM_ROWS, columns))
    rows = _spectrum_rows(sample)
    products = rows @ rows.T
    mixed = products @ (products @ noise[: len(rows)].astype(sample.dtype))
    start = np.zeros((columns, _LEADING), sample.dtype)
    start[first : first + sample.shape[1]] = rows.T @ (mixed / max(np.abs(mixed).max(), 1e-300))
    if not (np.isfinite(start).all() and np.abs(start).sum(axis=0).all()):
        start[:] = noise[:columns]
    return np.ascontiguousarray(np.linalg.qr(start)[0].T)


def _powered(matrix: Array, vectors: Array) -> Array:
    """matrix.T @ matrix @ v for vectors that many power steps have turned to the leading ones."""
    for _ in range(_POWER_STEPS):
        out = np.zeros_like(vectors)
        statistics.power_step(matrix, vectors, out)
        vectors = np.ascontiguousarray(np.linalg.qr(out.T)[0].T)
    out = np.zeros_like(vectors)
    statistics.power_step(matrix, vectors, out)
    return out


@functools.cache
def _noise(length: int) -> Floats:
    return np.random.default_rng(0).standard_normal((length, _LEADING))


def _spectrum_rows(sample: Array) -> Array:
    """At most `SPECTRUM_ROWS` of the sampled rows."""
    if len(sample) <= SPECTRUM_ROWS:
        return sample
    return sample[(np.arange(SPECTRUM_ROWS) * len(sample)) // SPECTRUM_ROWS]


def _layout(comparison: Comparison) -> tuple[int, int]:
    """Rows and columns to sample from: vectors and scalars count as rows of a few elements."""
    rows, columns = comparison.matrix_shape
    if rows > 1 or columns <= SAMPLE_ELEMENTS:
        return rows, columns
    return columns // 1024, 1024


def _thresholds(row: Array) -> Floats:
    """Magnitudes that separate the largest 1, 5 and 20 % of entries; never zero."""
    step = max(1, row.size // _THRESHOLD_ELEMENTS) | 1  # odd: not always the same columns
    magnitudes = np.abs(row[::step])
    ranks = [magnitudes.size - math.ceil(share * magnitudes.size) for share in TOP_SHARES]
    values = np.partition(magnitudes, sorted(set(ranks)))[ranks].astype(np.float64)
    return np.maximum(values, np.nextafter(0.0, 1.0))


def _mirrored(upper: Floats) -> Floats:
    return upper + np.triu(upper, 1).transpose(0, 2, 1)
