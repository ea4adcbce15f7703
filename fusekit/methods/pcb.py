"""Parameter competition balancing: every entry of every task vector gets its own coefficient."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from fusekit import kernels
from fusekit.methods.base import (
    Block,
    Combine,
    Copy,
    Method,
    OrderStatistics,
    Parameter,
    Summary,
    Tensor,
)
from fusekit.methods.pruning import Magnitudes

if TYPE_CHECKING:
    from fusekit.methods.base import Array

_CLAMPS = {"root": 1e-4, "nlp": 0.01, "vision": 0.01, "vision_es": 0.01}
_INDIVISIBLE = 1e-37
_COMPARISONS = {"root": 0, "nlp": 0, "vision": 1, "vision_es": 2}


@dataclass(frozen=True)
class Scores(OrderStatistics):
    """The largest score of every model, and the one below which the share 1 - r lies.

    `clips` are the magnitudes every task vector is clipped to.
    """

    deltas: ClassVar[bool] = True
    in_registers: ClassVar[bool] = True
    absolute: ClassVar[bool] = False

    wanted: tuple[int, ...]
    clips: tuple[tuple[float, float], ...]
    comparison: int

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        return (self.wanted,) * len(self.clips)

    def values(self, block: Block) -> Array:
        import numpy as np

        low, high = np.array(self.clips, dtype=block.rows.dtype).T.copy()
        scores = block.scratch("scores", block.rows.shape, block.rows.dtype)
        kernels.compete.scores(block.rows, low, high, self.comparison, scores)
        return scores

    def collect(self, block: Block, keys: Array, at: int) -> bool:
        packed = block.bfloat16
        if packed is None:
            return False
        place = packed.bits, packed.start, block.size
        kernels.compete.score_keys(*place, *self.clipping(), keys, at)
        return True

    def tally(self, block: Block, brackets: Array, bins: Array, above: Array) -> bool:
        import numpy as np

        largest = np.zeros((len(self.clips), 2), np.int64)
        return self.tally_largest(block, brackets, bins, above, largest)

    def tally_largest(
        self, block: Block, brackets: Array, bins: Array, above: Array, largest: Array
    ) -> bool:
        packed = block.bfloat16
        if packed is None:
            return False
        place = packed.bits, packed.start
        if not kernels.direct.all_finite(*place, packed.start + block.size):
            return False
        counts = brackets, bins, above, largest
        kernels.compete.count_scores(*place, block.size, *self.clipping(), *counts)
        return True

    def clipping(self) -> tuple[Array, Array, int]:
        """The kernels' arguments in float32: lower and upper clips, and the comparison."""
        import numpy as np

        low, high = np.array(self.clips, np.float32).T.copy()
        return low, high, self.comparison


@dataclass(frozen=True)
class ScoredMean(Combine):
    """base + the score-weighted mean of the clipped task vectors.

    `thresholds` are scores above which entries take part, `factors` scale what lies above so that
    the best entry of a model weighs 1.
    """

    deltas: ClassVar[bool] = True
    in_registers: ClassVar[bool] = True

    scores: Scores
    thresholds: tuple[float, ...]
    factors: tuple[float, ...]
    weights: tuple[float, ...]

    @cached_property
    def _is_plain(self) -> bool:
        """Whether float32 tells every model's best score from its threshold."""
        import numpy as np

        cuts = zip(self.thresholds, self.factors, strict=True)
        return all(np.float32(t + 1.0 / f) > np.float32(t) for t, f in cuts if f)

    def encode(self, block: Block, out: Array) -> bool:
        import numpy as np

        packed = block.bfloat16
        if packed is None or not self._is_plain:
            return False
        numbers = (np.array(x, np.float32) for x in (self.thresholds, self.factors, self.weights))
        place = packed.bits, packed.start
        return bool(kernels.compete.merge_scored(*place, *self.scores.clipping(), *numbers, out))

    def apply(self, block: Block, out: Array) -> None:
        import numpy as np

        low, high = np.array(self.scores.clips, dtype=block.rows.dtype).T.copy()
        kernels.compete.scored_mean(
            block.rows,
            self.scores.values(block),
            low,
            high,
            np.array(self.thresholds, dtype=np.float64),
            np.array(self.factors, dtype=np.float64),
            np.array(self.weights, dtype=np.float64),
            block.base,
            out,
        )


def _clips(low: float, high: float) -> tuple[float, float]:
    """The magnitudes to clip to: a single one where float32 cannot divide by what is between."""
    return (high if high - low < _INDIVISIBLE else low), high


def _pcb(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    size, variant, n = tensor.group_size, tensor["variant"], tensor.models
    clamp = tensor["clamp"] if tensor["clamp"] is not None else _CLAMPS[variant]
    # Positions in ascending order, rounded as the authors' code does; ranks count from the top.
    lower, upper = int(size * clamp), int(size * (1 - clamp) - 1)
    ranks = ((size - lower, size - upper),) * n
    edges = yield Magnitudes((), ranks, sampled=tensor["edges"] == "sampled")
    clips = tuple(_clips(low.value, high.value) for low, high in edges)
    cut = min(int(size * (1 - tensor["ratio"])), size - 1)
    scores = Scores((size - cut, 1), clips, _COMPARISONS[variant])
    thresholds, factors = [], []
    for (threshold, best), (_, high) in zip((yield scores), clips, strict=True):
        spread = best.value - threshold.value
        # A single winner, or a tie for the first place: whoever reaches the maximum weighs 1.
        below = best.value - max(abs(best.value) * 1e-12, 1e-30)
        thresholds.append(threshold.value if spread > 0 else below)
        unchanged = high == 0.0 and spread <= 0
        factors.append(0.0 if unchanged else 1.0 / (best.value - thresholds[-1]))
    if not any(factors):
        return Copy(-1)
    weights = tuple(tensor["lambda"] * weight for weight in tensor.each("weight"))
    return ScoredMean(scores, tuple(thresholds), tuple(factors), weights)


METHODS = (
    Method(
        name="pcb",
        title="PCB-Merging",
        summary=(
            "Weighs every entry by its size within its task vector and its agreement with the "
            "others, drops low scores, averages the rest by score."
        ),
        formula="y = base + lambda sum_i w_i c_i s_i / sum_i s_i,  s_i = top r of exp(n N_i^2) a_i",
        references=(
            "Du et al., Parameter Competition Balancing for Model Merging, NeurIPS 2024, "
            "arXiv 2410.02396",
        ),
        parameters=(
            Parameter(
                "ratio",
                "float",
                "Share of entries that get a score above zero, per model.",
                default=0.1,
                above=0.0,
                maximum=1.0,
            ),
            Parameter(
                "weight",
                "float",
                "The model's own lambda; multiplies its clipped task vector.",
                default=1.0,
                per_model=True,
            ),
            Parameter("lambda", "float", "Scale of the merged task vector.", default=1.0),
            Parameter(
                "variant",
                "choice",
                "Which of the authors' programs to follow: root and nlp measure agreement by "
                "tanh(x_i sum_j x_j), vision by tanh(x_i sum_j N_j), vision_es by "
                "sum_j tanh(N_i N_j).",
                default="nlp",
                choices=tuple(_CLAMPS),
            ),
            Parameter(
                "clamp",
                "float",
                "Share of the smallest and of the largest magnitudes that are clipped; left out, "
                "0.0001 for root and 0.01 otherwise.",
                default=None,
                minimum=0.0,
                maximum=0.49,
            ),
            Parameter(
                "edges",
                "choice",
                "The magnitudes that are clipped to: exact, or the quantiles of a million evenly "
                "spaced entries (off by less than 0.1 % of the ranks), which saves a pass.",
                default="exact",
                choices=("exact", "sampled"),
            ),
        ),
        rule=_pcb,
        base="origin",
        base_required=True,
        passes="three to four (order statistics of sizes, then of scores, combine)",
        use_when=(
            "Four or more experts whose task vectors are trimmed hard (ratio 0.05 to 0.2), where "
            "TIES would be tried; lambda 0.8 to 2.2 is worth tuning."
        ),
        caveats=(
            "The authors rank over the whole model: granularity: model reproduces them. The mean "
            "is not a sum, so the update does not grow with the number of models. The advantage "
            "over TIES vanishes for ratios of 0.4 and more, and dense task arithmetic can win on "
            "small models. One model alone is not returned unchanged. Clipping raises the smallest "
            "nonzero updates to the clip's lower edge. Paper and code use different activations; "
            "this follows the code."
        ),
    ),
)
