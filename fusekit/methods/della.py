"""DELLA: random drops whose probability of keeping an entry grows with its magnitude's rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fusekit import kernels
from fusekit.errors import RecipeError
from fusekit.methods.base import Block, Parameter, Sequential, Tensor
from fusekit.methods.pruning import (
    Pruning,
    RowPruning,
    Step,
    emptied,
    explicit_mask,
    l1_scales,
)
from fusekit.methods.task_vectors import (
    ELECTION,
    YADAV,
    Merged,
    Pruned,
    add_up,
    common_parameters,
    density_parameter,
    elect,
    given_weights,
    rescale_parameter,
    task_vector_method,
    weight_parameter,
)

if TYPE_CHECKING:
    from fusekit.methods.base import Array


@dataclass(frozen=True)
class Ramp:
    """Keep probabilities of one model: `density - epsilon` for the smallest magnitude of a row,
    `density + epsilon` for the largest, evenly spaced in between."""

    density: float
    epsilon: float

    def ends(self, length: int) -> tuple[float, float]:
        """Probabilities of the smallest and of the largest; a row of one keeps `density`."""
        spread = self.epsilon if length > 1 else 0.0
        return self.density - spread, self.density + spread

    def line(self, length: int) -> tuple[float, float]:
        """(probability of rank 0, growth per rank)."""
        low, high = self.ends(length)
        return low, (high - low) / max(length - 1, 1)


@dataclass(frozen=True)
class Rows:
    """How a tensor falls into rows: groups of `stride` interleaved rows of `length` elements."""

    length: int
    stride: int = 1

    @property
    def unit(self) -> int:
        return self.length * self.stride


def rows_of(shape: tuple[int, ...], rank_over: str) -> Rows:
    """The rows of a tensor among which magnitudes are ranked; a vector is a single row."""
    if len(shape) < 2:
        return Rows(math.prod(shape))
    if rank_over == "axis1":
        return Rows(shape[1], math.prod(shape[2:]))
    return Rows(shape[-1] if rank_over == "last" else math.prod(shape[1:]))


@dataclass
class _Drawn:
    """Keep flags, eight to a byte, and sums of magnitudes (before, after) per model."""

    packed: Array
    totals: Array


@dataclass(frozen=True, eq=False)
class RankDrops(Sequential):
    """Draws which entries are kept. A model without a ramp keeps everything.

    Within a row, entries meet others that are drawn at random: see `kernels.lottery`. The rule
    receives (packed flags (models, bytes), sums of |v| (models, 2) before and after).
    """

    deltas: ClassVar[bool] = True
    in_registers: ClassVar[bool] = True

    ramps: tuple[Ramp | None, ...]
    rank_over: str

    def unit(self, shape: tuple[int, ...]) -> int:
        return rows_of(shape, self.rank_over).unit

    def begin(self, tensor: Tensor) -> _Drawn:
        import numpy as np

        packed = np.zeros((len(self.ramps), -(-tensor.size // 8)), np.uint8)
        for model, ramp in enumerate(self.ramps):
            mask = explicit_mask(tensor, model)
            if ramp is None:
                packed[model] = 0xFF
            elif mask is not None:
                packed[model] = np.packbits(mask != 0, bitorder="little")
        return _Drawn(packed, np.zeros((len(self.ramps), 2)))

    def update(self, state: _Drawn, block: Block) -> None:
        import numpy as np

        lottery, rows = kernels.lottery, rows_of(block.tensor.shape, self.rank_over)
        models, base = _operands(block)
        kind = np.float64 if models.dtype == np.float64 else np.float32
        sizes = np.zeros(-(-rows.length // lottery.LANES) * lottery.LANES, kind)
        keys = sizes.view(np.uint64 if kind == np.float64 else np.uint32)
        for model, ramp in enumerate(self.ramps):
            if ramp is None:
                continue
            own = models[model], base
            out = state.packed[model], state.totals[model]
            if explicit_mask(block.tensor, model) is not None:
                lottery.add_sizes(*own, block.start, rows.length, sizes, *out)
                continue
            key = np.uint64(block.tensor.keys[model])
            place = block.start, rows.length, rows.stride
            lottery.draw(*own, key, *place, *ramp.ends(rows.length), sizes, keys, *out)

    def result(self, state: _Drawn) -> tuple[Array, Array]:
        return state.packed, state.totals


def _operands(block: Block) -> tuple[Array, Array]:
    """The models and their base as bits of bfloat16, else the task vectors and nothing."""
    packed = block.bfloat16
    if packed is not None:
        stop = packed.start + block.size
        if kernels.direct.all_finite(packed.bits, packed.start, stop):
            bits = packed.bits[:, packed.start : stop]
            return bits[:-1], bits[-1]
    return block.rows, block.rows[0, :0]


def _as_integers(row: Array) -> tuple[Array, int, int]:
    """A floating-point row's bits as signed integers, the mask of its magnitude, mantissa bits."""
    import numpy as np

    if row.dtype == np.float32:
        return row.view(np.int32), 0x7FFFFFFF, 23
    return row.view(np.int64), 0x7FFFFFFFFFFFFFFF, 52


@dataclass(frozen=True, eq=False)
class KeepDrawn(RowPruning):
    """Keep the entries whose flag is set; `packed` has a row of flags per model."""

    packed: Array

    def thin(self, row: Array, block: Block) -> None:
        kernels.ranks.keep_packed(row, block.start, self.packed[self.model])

    def step(self, tensor: Tensor) -> Step:
        return Step("KEEP_PACKED", self.model, flags=self.packed)


@dataclass(frozen=True, eq=False)
class DivideByProbability(RowPruning):
    """Divide every entry by the probability with which its rank is kept."""

    ramp: Ramp
    rank_over: str

    def unit(self, shape: tuple[int, ...]) -> int:
        return rows_of(shape, self.rank_over).unit

    def thin(self, row: Array, block: Block) -> None:
        import numpy as np

        rows = rows_of(block.tensor.shape, self.rank_over)
        ranks = block.scratch("ranks", (row.size,), np.int32)
        kernels.ranks.ranks(*_as_integers(row), rows.length, rows.stride, ranks)
        kernels.ranks.scale_inverse(row, ranks, *self.ramp.line(rows.length))


def keep_probabilities(
    delta: Array, density: float, epsilon: float = 0.15, rank_over: str = "axis1"
) -> Array:
    """The probability with which DELLA keeps each entry of a task vector.

    p = (density - epsilon) + 2 epsilon r / (C - 1) for the r-th smallest magnitude (from 0; equal
    ones by position) of a row of C entries; `density` where C = 1.

    Args:
        delta: float32 or float64, any shape.
        density, epsilon: as in the recipe: 0 < density - epsilon, density + epsilon < 1; a density
            of at least 1 keeps everything, of at most 0 nothing.
        rank_over: `axis1`, `slice` or `last`: what a row is.

    Returns:
        float64, the shape of `delta`.

    Raises:
        RecipeError: density and epsilon do not fit together.

    References:
        Deep et al., DELLA-Merging, 2024, arXiv 2406.11617.

    >>> import numpy as np
    >>> keep_probabilities(np.array([3.0, -1.0, 2.0]), 0.5, 0.25).tolist()
    [0.75, 0.25, 0.5]
    """
    import numpy as np

    if density >= 1.0 or density <= 0.0:
        return np.full(delta.shape, float(density >= 1.0))
    ramp = _ramp(density, epsilon, "delta")
    rows = rows_of(delta.shape, rank_over)
    flat = np.ascontiguousarray(delta).reshape(-1)
    ranks = np.empty(flat.size, np.int32)
    kernels.ranks.ranks(*_as_integers(flat), rows.length, rows.stride, ranks)
    low, slope = ramp.line(rows.length)
    probabilities: Array = (low + slope * ranks).reshape(delta.shape)
    return probabilities


def _ramp(density: float, epsilon: float, tensor: str) -> Ramp:
    if density - epsilon <= 0.0 or density + epsilon >= 1.0:
        raise RecipeError(
            f"density {density:g} and epsilon {epsilon:g} for tensor {tensor!r}: keep "
            f"probabilities run from {density - epsilon:g} to {density + epsilon:g}, expected "
            "strictly between 0 and 1; choose a smaller epsilon"
        )
    return Ramp(density, epsilon)


def rank_based(tensor: Tensor) -> Pruned:
    """Drop entries with a probability that falls with their rank, and rescale what is left."""
    densities, over = tensor.each("density"), tensor["rank_over"]
    ramps = tuple(
        _ramp(density, epsilon, tensor.name)
        if 0.0 < density < 1.0
        else (Ramp(density, 0.0) if explicit_mask(tensor, model) is not None else None)
        for model, (density, epsilon) in enumerate(
            zip(densities, tensor.each("epsilon"), strict=True)
        )
    )
    prunings: list[Pruning] = list(emptied(densities))
    if not any(ramps):
        return tuple(prunings)
    packed, totals = yield RankDrops(ramps, over)
    if tensor["rescale"] == "inverse":
        prunings += _divisions(ramps, over)
    drawn = [model for model, ramp in enumerate(ramps) if ramp is not None]
    prunings += [KeepDrawn(model, packed) for model in drawn]
    if tensor["rescale"] == "l1":
        prunings += l1_scales(*totals.T.tolist())
    return tuple(prunings)


def _divisions(ramps: Sequence[Ramp | None], over: str) -> list[Pruning]:
    return [
        DivideByProbability(model, ramp, over)
        for model, ramp in enumerate(ramps)
        if ramp is not None and 0.0 < ramp.density < 1.0
    ]


def _della(tensor: Tensor) -> Merged:
    prunings = yield from rank_based(tensor)
    return (yield from elect(tensor, prunings, given_weights(tensor)))


def _della_linear(tensor: Tensor) -> Merged:
    prunings = yield from rank_based(tensor)
    return add_up(tensor, prunings, given_weights(tensor))


EPSILON = Parameter(
    "epsilon",
    "float",
    "Half the spread of the keep probabilities: the smallest magnitude of a row is kept with "
    "density - epsilon, the largest with density + epsilon; both strictly between 0 and 1.",
    default=0.15,
    per_model=True,
    minimum=0.0,
    maximum=1.0,
)
RANK_OVER = Parameter(
    "rank_over",
    "choice",
    "Among what magnitudes are ranked: axis1, the entries along axis 1 for each position of the "
    "other axes; slice, everything behind axis 0; last, the last axis. All the same for matrices.",
    default="axis1",
    choices=("axis1", "slice", "last"),
)

_DENSITY = density_parameter(
    "Mean probability of keeping an entry; 1 prunes nothing. Usual are 0.3 to 0.7.",
    1.0,
    minimum=0.0,
    maximum=1.0,
)
_DEEP = (
    "Deep, Bhardwaj and Poria, DELLA-Merging: Reducing Interference in Model Merging through "
    "Magnitude-Based Sampling, 2024, arXiv 2406.11617"
)
_PASSES = "two (ranks and draws, combine)"
_CAVEATS = (
    "rescale l1 (the usual tools' convention, the default) keeps a tensor's sum of magnitudes; the "
    "paper's unbiased rescaling by each entry's own probability is 'inverse'. The keep flags of "
    "the tensors being merged are held in memory, one bit per entry and model."
)

METHODS = (
    task_vector_method(
        "della",
        "DELLA",
        _della,
        summary="Random drops that spare large updates, then sign election and merging.",
        formula=(
            "m_i ~ Bernoulli(density - epsilon + 2 epsilon (rank - 1)/(C - 1));  y = base + lambda "
            "mean over {i: sign(w_i r_i m_i d_i) = s} of r_i m_i d_i"
        ),
        references=(_DEEP, YADAV),
        parameters=(
            weight_parameter(),
            _DENSITY,
            EPSILON,
            rescale_parameter("l1"),
            RANK_OVER,
            *ELECTION,
            *common_parameters(normalize=True),
        ),
        passes=_PASSES,
        use_when="As DARE with sign election, at densities of 0.2 to 0.4 where DARE loses more.",
        caveats=_CAVEATS,
    ),
    task_vector_method(
        "della_linear",
        "DELLA without election",
        _della_linear,
        summary="Random drops that spare large updates, rescaled and added up.",
        formula="y = base + lambda sum_i w_i r_i m_i (x_i - base),  m_i as in della",
        references=(_DEEP,),
        parameters=(
            weight_parameter(),
            _DENSITY,
            EPSILON,
            rescale_parameter("l1"),
            RANK_OVER,
            *common_parameters(normalize=False),
        ),
        passes=_PASSES,
        use_when="As DARE, where its uniform drops lose too much.",
        caveats=_CAVEATS,
    ),
)
