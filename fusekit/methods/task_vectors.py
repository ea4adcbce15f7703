"""Task arithmetic and its relatives: one pipeline from task vectors to a merged model.

delta -> prune -> rescale -> weight -> elect a sign -> normalise -> lambda -> add to the base.
Every method here is a choice of settings of that pipeline.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fusekit import kernels
from fusekit.methods.base import (
    Additive,
    Block,
    Combine,
    Method,
    Parameter,
    Rule,
    Scope,
    Summary,
    Tensor,
)
from fusekit.methods.combines import linear
from fusekit.methods.pruning import (
    OfModel,
    Prunings,
    RandomDrop,
    drop_smallest,
    inverse_density,
    match_l1,
    prune,
    trim_exact,
    trim_threshold,
)

if TYPE_CHECKING:
    from fusekit.methods.base import Array

Pruner = Generator[Summary, Any, Prunings]

_ELECTIONS = {"mass": 0, "count": 1, "normmass": 2, "normfrac": 3}
_MERGES = {"mean": 0, "sum": 1, "max": 2}


@dataclass(frozen=True, eq=False)
class PrunedSum(Combine):
    """base + sum_i weights[i] * pruned delta_i."""

    deltas: ClassVar[bool] = True

    prunings: Prunings
    weights: tuple[float, ...]

    def apply(self, block: Block, out: Array) -> None:
        import numpy as np

        rows = prune(block, self.prunings)
        weights = np.array(self.weights, dtype=np.float64)
        kernels.linear.weighted_sum(rows, weights, block.base, 1.0, out)


@dataclass(frozen=True, eq=False)
class ElectedMerge(Combine):
    """base + scale * merge of the pruned deltas that agree with the elected sign."""

    deltas: ClassVar[bool] = True

    prunings: Prunings
    ballots: tuple[float, ...]
    weights: tuple[float, ...]
    election: int
    tie_sign: int
    merge: int
    scale: float

    def apply(self, block: Block, out: Array) -> None:
        import numpy as np

        kernels.elect.elect_and_merge(
            prune(block, self.prunings),
            np.array(self.ballots, dtype=np.float64),
            np.array(self.weights, dtype=np.float64),
            self.election,
            self.tie_sign,
            self.merge,
            block.base,
            self.scale,
            out,
        )


@dataclass(frozen=True, eq=False)
class SignBalance(Additive):
    """sum of the elected signs over all positions: whose sign is the majority's."""

    deltas: ClassVar[bool] = True

    prunings: Prunings
    ballots: tuple[float, ...]
    election: int
    scope: Scope = "group"

    def width(self, tensor: Tensor) -> int:
        return 1

    def group_key(self) -> tuple[Any, ...]:
        return (SignBalance, self.election)

    def measure(self, block: Block, out: Array) -> None:
        import numpy as np

        rows = prune(block, self.prunings)
        ballots = np.array(self.ballots, dtype=np.float64)
        out[:, 0] = 0.0
        out[0, 0] = kernels.elect.sign_balance(rows, ballots, self.election)


@dataclass(frozen=True, eq=False)
class SquaredNorms(Additive):
    """Squared norm of every pruned task vector."""

    deltas: ClassVar[bool] = True

    prunings: Prunings
    scope: Scope = "group"

    def width(self, tensor: Tensor) -> int:
        return tensor.models

    def group_key(self) -> type:
        return SquaredNorms

    def measure(self, block: Block, out: Array) -> None:
        rows = prune(block, self.prunings)
        for model in range(len(rows)):
            kernels.gram.gram(rows[model : model + 1], out[:, model : model + 1])


def add_up(tensor: Tensor, prunings: Prunings) -> Combine:
    """base + lambda * sum_i w_i delta_i (divided by sum_i w_i if normalised), without election."""
    weights = [float(weight) for weight in tensor.each("weight")]
    scale = tensor["lambda"]
    if tensor["normalize"]:
        total = sum(weights)
        scale /= total if abs(total) >= 1e-8 else 1.0
    weights = [scale * weight for weight in weights]
    if not any(prunings):
        return linear(weights, 1.0 - sum(weights))
    return PrunedSum(prunings, tuple(weights))


def elect(tensor: Tensor, prunings: Prunings) -> Generator[Summary, Any, Combine]:
    """base + lambda * the disjoint merge of the deltas under an elected sign."""
    weights = tuple(float(weight) for weight in tensor.each("weight"))
    ballots = weights if tensor["weights_in_election"] else (1.0,) * tensor.models
    election = _ELECTIONS[tensor["election"]]
    if tensor["election"] in {"normmass", "normfrac"}:
        norms = yield SquaredNorms(prunings)
        ballots = tuple(
            b / norm if norm > 0 else 0.0 for b, norm in zip(ballots, norms.tolist(), strict=True)
        )
    tie_sign = 1
    if tensor["zero"] == "majority":
        balance = float((yield SignBalance(prunings, ballots, election))[0])
        tie_sign = (balance > 0) - (balance < 0)
    merge = tensor["merge"] or ("mean" if tensor["normalize"] else "sum")
    return ElectedMerge(
        prunings, ballots, weights, election, tie_sign, _MERGES[merge], tensor["lambda"]
    )


def rescale(
    tensor: Tensor, prunings: Prunings, densities: Sequence[float]
) -> Generator[Summary, Any, Prunings]:
    """What pruning took away, given back: by expectation, by l1 norm, or not at all."""
    if tensor["rescale"] == "l1":
        return (yield from match_l1(tensor, prunings))
    if tensor["rescale"] == "inverse":
        return inverse_density(prunings, densities)
    return prunings


def _nothing(tensor: Tensor) -> Prunings:
    return ((),) * tensor.models


def _task_arithmetic(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    yield from ()
    return add_up(tensor, _nothing(tensor))


def _trim(tensor: Tensor, first: Prunings, densities: Sequence[float]) -> Pruner:
    """TIES' trimming, by either of its rules; `mask_rate` replaces densities where it is given."""
    size = tensor.group_size
    rates = tensor.each("mask_rate")
    if any(rate is not None for rate in rates):
        dropped = [0 if rate is None else int(size * rate) for rate in rates]
        return (yield from trim_threshold(tensor, dropped, first))
    if tensor["rule"] == "threshold":
        dropped = [0 if d >= 1.0 else size - int(size * d) for d in densities]
        return (yield from trim_threshold(tensor, dropped, first))
    return (yield from trim_exact(tensor, densities, first))


def _ties(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    densities = tensor.each("density")
    prunings = yield from _trim(tensor, _nothing(tensor), densities)
    prunings = yield from rescale(tensor, prunings, densities)
    return (yield from elect(tensor, prunings))


def _dare_prune(tensor: Tensor) -> Pruner:
    densities = tensor.each("density")
    if tensor["only_2d"] and len(tensor.shape) < 2:
        return _nothing(tensor)
    if tensor["strategy"] == "magnitude":
        prunings = yield from drop_smallest(tensor, densities, _nothing(tensor))
    else:
        prunings = tuple(
            ()
            if density >= 1.0 and not (tensor.masks and tensor.masks[i] is not None)
            else (RandomDrop(density),)
            for i, density in enumerate(densities)
        )
    if tensor["weight_format"] == "finetuned":
        prunings = tuple(tuple(OfModel(step) for step in steps) for steps in prunings)
    return (yield from rescale(tensor, prunings, densities))


def _dare_linear(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    prunings = yield from _dare_prune(tensor)
    return add_up(tensor, prunings)


def _dare_ties(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    prunings = yield from _dare_prune(tensor)
    rates = tensor.each("mask_rate")
    dropped = [0 if rate is None else int(tensor.group_size * rate) for rate in rates]
    prunings = yield from trim_threshold(tensor, dropped, prunings)
    return (yield from elect(tensor, prunings))


def _weight() -> Parameter:
    return Parameter(
        "weight",
        "float",
        "Multiplier of the model's task vector; may be negative.",
        default=1.0,
        per_model=True,
    )


def _common(*, normalize: bool) -> tuple[Parameter, ...]:
    return (
        Parameter("lambda", "float", "Scale of the merged task vector.", default=1.0),
        Parameter(
            "normalize", "bool", "Divide by the sum of the (kept) weights.", default=normalize
        ),
        Parameter(
            "int8_mask",
            "bool",
            "Accepted for compatibility, without effect: masks are never stored.",
            default=False,
        ),
    )


def _rescale(default: str) -> Parameter:
    return Parameter(
        "rescale",
        "choice",
        "Give back what pruning took: true or 'l1' keeps the tensor's sum of magnitudes, 'inverse' "
        "divides by the density (unbiased), false or 'none' leaves it.",
        default=default,
        choices=("none", "inverse", "l1"),
        aliases={True: "l1", False: "none"},
    )


_ELECTION = (
    Parameter(
        "election",
        "choice",
        "How models vote for a position's sign: by value, by sign, by the signed square relative to "
        "the model's squared norm, or by the largest such share alone.",
        default="mass",
        choices=tuple(_ELECTIONS),
    ),
    Parameter(
        "weights_in_election",
        "bool",
        "Whether the weights count in the sign election too.",
        default=True,
    ),
    Parameter(
        "zero",
        "choice",
        "The sign where votes cancel: positive, or the majority sign of the group.",
        default="positive",
        choices=("positive", "majority"),
    ),
    Parameter(
        "merge",
        "choice",
        "What becomes of the entries that agree; left out, mean if normalize else sum.",
        default=None,
        choices=tuple(_MERGES),
    ),
)

_MASK_RATE = Parameter(
    "mask_rate",
    "float",
    "Trim entries below the int(D * mask_rate)-th smallest magnitude (threshold rule).",
    default=None,
    per_model=True,
    minimum=0.0,
    maximum=1.0,
)


def _density(text: str, default: Any, **limits: Any) -> Parameter:
    return Parameter("density", "float", text, default=default, per_model=True, **limits)


_DARE_DENSITY = _density(
    "Probability of keeping an entry (1 - drop rate).", 1.0, minimum=0.0, maximum=1.0
)
_DARE = (
    Parameter(
        "strategy",
        "choice",
        "Which entries to drop: at random, or the smallest of the tensor.",
        default="random",
        choices=("random", "magnitude"),
    ),
    Parameter(
        "weight_format",
        "choice",
        "What is masked: the task vector, or the fine-tuned weights themselves (a control).",
        default="delta",
        choices=("delta", "finetuned"),
    ),
    Parameter("only_2d", "bool", "Leave vectors (biases, norms) unpruned.", default=False),
)

_ILHARCO = "Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, arXiv 2212.04089"
_YADAV = (
    "Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023, "
    "arXiv 2306.01708"
)
_YU = (
    "Yu et al., Language Models are Super Mario: Absorbing Abilities from Homologous Models as a "
    "Free Lunch, ICML 2024, arXiv 2311.03099"
)


def _method(name: str, title: str, rule: Rule, **about: Any) -> Method:
    return Method(name=name, title=title, rule=rule, base="origin", base_required=True, **about)


METHODS = (
    _method(
        "task_arithmetic",
        "Task arithmetic",
        _task_arithmetic,
        summary="Add (or subtract) task vectors, the differences that fine-tuning made.",
        formula="y = base + lambda sum_i w_i (x_i - base)",
        references=(_ILHARCO,),
        parameters=(_weight(), *_common(normalize=False)),
        use_when="The baseline for models fine-tuned from one base; lambda 0.3 to 0.4 for many tasks.",
        caveats=(
            "A weight is a multiplier, not a share: three weights of 1 add three full updates. "
            "Too large a lambda collapses the model."
        ),
    ),
    _method(
        "ties",
        "TIES-Merging",
        _ties,
        summary="Trim small updates, elect a sign per weight, average the updates that agree.",
        formula="y = base + lambda mean over {i: sign(w_i d_i) = s} of d_i,  s = sign(sum_i w_i d_i)",
        references=(_YADAV,),
        parameters=(
            _weight(),
            _density("Fraction of entries kept, the largest first.", 0.2, above=0.0, maximum=1.0),
            Parameter(
                "rule",
                "choice",
                "exact keeps int(density D) entries, ties by position; threshold keeps every entry "
                "of at least the (D - int(density D))-th smallest magnitude, as the authors' code.",
                default="exact",
                choices=("exact", "threshold"),
            ),
            _MASK_RATE,
            _rescale("none"),
            *_ELECTION,
            *_common(normalize=True),
        ),
        passes="two (order statistics, combine); exact ties add one",
        use_when="Task vectors with heavy tails that conflict in sign.",
        caveats=(
            "Weights take part in the sign election unless weights_in_election is false. On small "
            "models trained briefly, updates are not redundant and high densities win."
        ),
    ),
    _method(
        "dare_linear",
        "DARE",
        _dare_linear,
        summary="Drop entries of the task vectors at random, rescale the rest, add them up.",
        formula="y = base + lambda sum_i w_i r_i (m_i * (x_i - base)),  m_i ~ Bernoulli(density)",
        references=(_YU, _ILHARCO),
        parameters=(_weight(), _DARE_DENSITY, _rescale("l1"), *_DARE, *_common(normalize=False)),
        passes="two with rescale l1, else one",
        use_when="Fine-tunes with small updates (most entries below 0.005).",
        caveats=(
            "In expectation it equals task arithmetic; the rescale matters where lambda is not "
            "tuned. Large updates (0.03 and more) suffer even at density 0.9."
        ),
    ),
    _method(
        "dare_ties",
        "DARE + TIES",
        _dare_ties,
        summary="Random drop and rescale, then sign election and merging of what agrees.",
        formula="as dare_linear, summed over the entries that agree with the elected sign",
        references=(_YU, _YADAV),
        parameters=(
            _weight(),
            _DARE_DENSITY,
            _MASK_RATE,
            _rescale("l1"),
            *_DARE,
            *_ELECTION,
            *_common(normalize=False),
        ),
        passes="two with rescale l1, one more with mask_rate",
        use_when="As DARE, where task vectors conflict in sign.",
        caveats="Without mask_rate nothing is trimmed by magnitude.",
    ),
)
