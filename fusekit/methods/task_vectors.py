"""Task arithmetic and its relatives: one pipeline from task vectors to a merged model.

delta -> prune -> rescale -> weight -> elect a sign -> normalise -> lambda -> add to the base.
Every method of the family is a pruner followed by `add_up` or `elect`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from fusekit import kernels
from fusekit.kernels.packed import Packed, Steps
from fusekit.methods.base import (
    Additive,
    Block,
    Combine,
    Method,
    Parameter,
    Remark,
    Rule,
    Scope,
    Summary,
    Tensor,
)
from fusekit.methods.combines import linear
from fusekit.methods.pruning import (
    AddBase,
    OnPruned,
    Prunings,
    RowPruning,
    Scale,
    SubtractBase,
    add_up_pruned,
    drop_random,
    drop_smallest,
    inverse_density,
    match_l1,
    prune,
    selected,
    trim_exact,
    trim_threshold,
)

if TYPE_CHECKING:
    from fusekit.methods.base import Array

Pruned = Generator[Summary, Any, Prunings]
Merged = Generator[Summary, Any, Combine]

_ELECTIONS = {"mass": 0, "count": 1, "normmass": 2, "normfrac": 3}
_MERGES = {"mean": 0, "sum": 1, "max": 2}


@dataclass(frozen=True, eq=False)
class PrunedSum(OnPruned, Combine):
    """base + sum_i weights[i] * pruned delta_i."""

    runs_programs: ClassVar[bool] = True

    weights: tuple[float, ...]

    def encode(self, block: Block, out: Array) -> bool:
        import numpy as np

        packed = block.bfloat16
        if packed is None:
            return False
        weights = np.array(self.weights, dtype=np.float64)
        drops = self.drops(block)
        if drops is not None and not drops.scales:
            place = packed.bits, packed.start, block.start, drops.keys, drops.densities
            return bool(kernels.direct.drop_weighted_sum(*place, weights, out))
        program = self.program(block)
        factors = program.kept_factors() if program is not None else None
        if program is not None and factors is not None and (factors == 1.0).all():
            kept = packed.bits, packed.start, block.start, program.flags
            return len(factors) == 3 and bool(kernels.lottery.sum_of_three(*kept, weights, out))
        if program is None or not program.only_cuts:
            return False

        def merge(rest: Packed, steps: Steps, out: Array) -> int:
            sum_cut = kernels.trimmed.weighted_sum
            return int(sum_cut(rest.bits, rest.start, steps, weights, out))

        def merge_tile(run: Packed, position: int, steps: Steps, row: Array) -> None:
            kernels.tiles.weighted_sum(run, position, steps, weights, row)

        return program.encode(block, out, merge, merge_tile)

    def apply(self, block: Block, out: Array) -> None:
        import numpy as np

        weights = np.array(self.weights, dtype=np.float64)
        program, packed = self.program(block), block.packed
        if program is None or packed is None:
            rows = prune(block, self.prunings)
            kernels.linear.weighted_sum(rows, weights, block.base, 1.0, out)
            return
        with program.on(block) as steps:
            kernels.tiles.weighted_sum(packed, block.start, steps, weights, out)

    def rescaled(self, scale: float) -> Combine:
        return replace(self, weights=tuple(scale * weight for weight in self.weights))


@dataclass(frozen=True, eq=False)
class ElectedMerge(OnPruned, Combine):
    """base + scale * merge of the pruned deltas that agree with the elected sign."""

    runs_programs: ClassVar[bool] = True

    ballots: tuple[float, ...]
    weights: tuple[float, ...]
    election: int
    tie_sign: int
    merge: int
    scale: float

    def encode(self, block: Block, out: Array) -> bool:
        import numpy as np

        packed = block.bfloat16
        if packed is None or len(self.weights) != 3:
            return False
        if self.election != _ELECTIONS["mass"] or self.tie_sign != 1 or self.merge > 1:
            return False
        ballots, weights = np.array(self.ballots), np.array(self.weights)
        divide = self.merge == _MERGES["mean"]
        rule = kernels.ballot.election(ballots, weights, divide, self.scale)
        drops = self.drops(block)
        if drops is not None and self.prunings:
            place = packed.bits, packed.start, block.start
            chances = drops.keys, drops.densities, drops.factors
            return bool(kernels.lottery.drop_and_elect(*place, *chances, rule, out))
        selection = selected(self.prunings, block.start)
        if selection is not None:
            cut, left = selection
            varying = packed.bits, packed.start, cut.threshold, left
            if not kernels.selected.elect_of_three(*varying, rule, out):
                return False
            cut.leave(int(left[0]))
            return True
        program = self.program(block)
        factors = program.kept_factors() if program is not None else None
        if program is not None and factors is not None:
            place, kept = (packed.bits, packed.start, block.start), (program.flags, factors)
            return bool(kernels.lottery.elect_of_three(*place, *kept, rule, out))
        if program is None or not program.only_cuts:
            return False

        def merge(rest: Packed, steps: Steps, out: Array) -> int:
            elect_cut = kernels.trimmed.elect_of_three
            return int(elect_cut(rest.bits, rest.start, steps, rule, out))

        def merge_tile(run: Packed, position: int, steps: Steps, row: Array) -> None:
            voting = ballots, weights, self.election, self.tie_sign, self.merge, self.scale
            kernels.tiles.elect_and_merge(run, position, steps, *voting, row)

        return program.encode(block, out, merge, merge_tile)

    def apply(self, block: Block, out: Array) -> None:
        import numpy as np

        ballots = np.array(self.ballots, dtype=np.float64)
        weights = np.array(self.weights, dtype=np.float64)
        choices = (self.election, self.tie_sign, self.merge)
        program, packed = self.program(block), block.packed
        if program is None or packed is None:
            rows, elect = prune(block, self.prunings), kernels.elect
            work = block.scratch("work", (3, elect.CHUNK), np.float64)
            elect.elect_and_merge(
                rows, ballots, weights, *choices, block.base, self.scale, work, out
            )
            return
        with program.on(block) as steps:
            kernels.tiles.elect_and_merge(
                packed, block.start, steps, ballots, weights, *choices, self.scale, out
            )

    def rescaled(self, scale: float) -> Combine:
        return replace(self, scale=scale * self.scale)


@dataclass(frozen=True, eq=False)
class SignBalance(OnPruned, Additive):
    """sum of the elected signs over all positions: whose sign is the majority's."""

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
class SquaredNorms(OnPruned, Additive):
    """Squared norm of every pruned task vector."""

    runs_programs: ClassVar[bool] = True

    scope: Scope = "group"

    def width(self, tensor: Tensor) -> int:
        return tensor.models

    def group_key(self) -> type:
        return SquaredNorms

    def measure(self, block: Block, out: Array) -> None:
        add_up_pruned(block, self, kernels.norms.SQUARES, False, out)


def given_weights(tensor: Tensor) -> tuple[float, ...]:
    """The models' weights as the recipe has them."""
    return tuple(float(weight) for weight in tensor.each("weight"))


def add_up(tensor: Tensor, prunings: Prunings, weights: Sequence[float]) -> Combine:
    """base + lambda * sum_i w_i delta_i (divided by sum_i w_i if normalised), without election."""
    scale = tensor["lambda"]
    if tensor["normalize"]:
        total = sum(weights)
        scale /= total if abs(total) >= 1e-8 else 1.0
    weights = [scale * weight for weight in weights]
    while prunings and isinstance(last := prunings[-1], Scale):
        prunings = prunings[:-1]
        weights[last.model] *= last.factor
    if not prunings:
        return linear(weights, 1.0 - sum(weights))
    return PrunedSum(prunings, tuple(weights))


def elect(tensor: Tensor, prunings: Prunings, weights: tuple[float, ...]) -> Merged:
    """base + lambda * the disjoint merge of the deltas under an elected sign."""
    ballots = weights if tensor["weights_in_election"] else (1.0,) * tensor.models
    election = _ELECTIONS[tensor["election"]]
    if tensor["election"] in {"normmass", "normfrac"}:
        norms = yield SquaredNorms(prunings)
        ballots = tuple(
            b / norm if norm > 0 else 0.0 for b, norm in zip(ballots, norms.tolist(), strict=True)
        )
    if ballots[0] > 0.0 and len(set(ballots)) == 1:
        ballots = (1.0,) * tensor.models  # the same election, and what cancels does so exactly
    merge = tensor["merge"] or ("mean" if tensor["normalize"] else "sum")
    if merge == "mean" and min(weights) < 0.0 < max(weights):
        yield Remark("dividing by weights of both signs: the sum of those that agree may be near 0")
    tie_sign = 1
    if tensor["zero"] == "majority":
        balance = float((yield SignBalance(prunings, ballots, election))[0])
        tie_sign = (balance > 0) - (balance < 0)
    return ElectedMerge(
        prunings, ballots, weights, election, tie_sign, _MERGES[merge], tensor["lambda"]
    )


def rescale(
    tensor: Tensor, drops: Prunings, densities: Sequence[float], first: Prunings = ()
) -> Pruned:
    """What the drops took away, given back: by expectation, by l1 norm, or not at all.

    `first` are the prunings before the drops.
    """
    if tensor["rescale"] == "l1":
        return (yield from match_l1(tensor, first, drops))
    if tensor["rescale"] == "inverse":
        return (*first, *drops, *inverse_density(densities))
    return (*first, *drops)


def _task_arithmetic(tensor: Tensor) -> Merged:
    yield from ()
    return add_up(tensor, (), given_weights(tensor))


def trim(tensor: Tensor, densities: Sequence[float]) -> Pruned:
    """TIES' trimming to a density, by either of its rules."""
    if tensor["rule"] == "exact":
        return (yield from trim_exact(tensor, densities, ()))
    size = tensor.group_size
    dropped = [0 if d >= 1.0 else size - max(int(size * d), 0) for d in densities]
    return (yield from trim_threshold(tensor, dropped, ()))


def _mask_rates(tensor: Tensor) -> list[int]:
    """How many entries per model lie below the cut of the threshold rule with mask rates."""
    rates = tensor.each("mask_rate")
    return [0 if rate is None else int(tensor.group_size * rate) for rate in rates]


def _ties(tensor: Tensor) -> Merged:
    densities = tensor.each("density")
    if any(rate is not None for rate in tensor.each("mask_rate")):
        prunings = yield from trim_threshold(tensor, _mask_rates(tensor), ())
    else:
        prunings = yield from trim(tensor, densities)
    prunings = yield from rescale(tensor, prunings, densities)
    return (yield from elect(tensor, prunings, given_weights(tensor)))


def _dare_prune(tensor: Tensor) -> Pruned:
    densities = tensor.each("density")
    if tensor["only_2d"] and len(tensor.shape) < 2:
        return ()
    drops: tuple[RowPruning, ...] = drop_random(tensor, densities)
    pruned = [drop.model for drop in drops] if tensor["weight_format"] == "finetuned" else []
    first = tuple(AddBase(model) for model in pruned)
    if tensor["strategy"] == "magnitude":
        drops = yield from drop_smallest(tensor, densities, first)
    prunings = yield from rescale(tensor, drops, densities, first)
    return (*prunings, *(SubtractBase(model) for model in pruned))


def _dare_linear(tensor: Tensor) -> Merged:
    prunings = yield from _dare_prune(tensor)
    return add_up(tensor, prunings, given_weights(tensor))


def _dare_ties(tensor: Tensor) -> Merged:
    prunings = yield from _dare_prune(tensor)
    prunings = yield from trim_threshold(tensor, _mask_rates(tensor), prunings)
    return (yield from elect(tensor, prunings, given_weights(tensor)))


def weight_parameter() -> Parameter:
    return Parameter(
        "weight",
        "float",
        "Multiplier of the model's task vector; may be negative.",
        default=1.0,
        per_model=True,
    )


def common_parameters(*, normalize: bool) -> tuple[Parameter, ...]:
    return (
        Parameter("lambda", "float", "Scale of the merged task vector.", default=1.0),
        Parameter(
            "normalize", "bool", "Divide by the sum of the (kept) weights.", default=normalize
        ),
        int8_mask_parameter(),
    )


def int8_mask_parameter() -> Parameter:
    return Parameter(
        "int8_mask",
        "bool",
        "Accepted for compatibility, without effect: masks are never stored as bytes.",
        default=False,
    )


def rescale_parameter(default: str) -> Parameter:
    return Parameter(
        "rescale",
        "choice",
        "Give back what pruning took: true or 'l1' keeps the tensor's sum of magnitudes, 'inverse' "
        "divides by the density (unbiased), false or 'none' leaves it.",
        default=default,
        choices=("none", "inverse", "l1"),
        aliases={True: "l1", False: "none"},
    )


ELECTION = (
    Parameter(
        "election",
        "choice",
        "How models vote for a position's sign: by value, by sign, by the signed square relative "
        "to the model's squared norm, or by the largest such share alone.",
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

RULE = Parameter(
    "rule",
    "choice",
    "exact keeps int(density D) entries, ties by position; threshold keeps every entry of at least "
    "the (D - int(density D))-th smallest magnitude, as the TIES authors' code.",
    default="exact",
    choices=("exact", "threshold"),
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


def density_parameter(text: str, default: Any, **limits: Any) -> Parameter:
    return Parameter("density", "float", text, default=default, per_model=True, **limits)


_DARE_DENSITY = density_parameter(
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
YADAV = (
    "Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023, "
    "arXiv 2306.01708"
)
_YU = (
    "Yu et al., Language Models are Super Mario: Absorbing Abilities from Homologous Models as a "
    "Free Lunch, ICML 2024, arXiv 2311.03099"
)


def task_vector_method(name: str, title: str, rule: Rule, **about: Any) -> Method:
    return Method(name=name, title=title, rule=rule, base="origin", base_required=True, **about)


METHODS = (
    task_vector_method(
        "task_arithmetic",
        "Task arithmetic",
        _task_arithmetic,
        summary="Add (or subtract) task vectors, the differences that fine-tuning made.",
        formula="y = base + lambda sum_i w_i (x_i - base)",
        references=(_ILHARCO,),
        parameters=(weight_parameter(), *common_parameters(normalize=False)),
        use_when="The baseline for fine-tunes of one base; lambda 0.3 to 0.4 for many tasks.",
        caveats=(
            "A weight is a multiplier, not a share: three weights of 1 add three full updates. "
            "Too large a lambda collapses the model."
        ),
    ),
    task_vector_method(
        "ties",
        "TIES-Merging",
        _ties,
        summary="Trim small updates, elect a sign per weight, average the updates that agree.",
        formula=(
            "y = base + lambda mean of d_i over {i: sign(w_i d_i) = s},  s = sign(sum_i w_i d_i)"
        ),
        references=(YADAV,),
        parameters=(
            weight_parameter(),
            density_parameter(
                "Fraction of entries kept, the largest first.", 0.2, above=0.0, maximum=1.0
            ),
            RULE,
            _MASK_RATE,
            rescale_parameter("none"),
            *ELECTION,
            *common_parameters(normalize=True),
        ),
        passes="two (order statistics, combine); exact ties add one",
        use_when="Task vectors with heavy tails that conflict in sign.",
        caveats=(
            "Weights take part in the sign election unless weights_in_election is false. On small "
            "models trained briefly, updates are not redundant and high densities win."
        ),
    ),
    task_vector_method(
        "dare_linear",
        "DARE",
        _dare_linear,
        summary="Drop entries of the task vectors at random, rescale the rest, add them up.",
        formula="y = base + lambda sum_i w_i r_i (m_i * (x_i - base)),  m_i ~ Bernoulli(density)",
        references=(_YU, _ILHARCO),
        parameters=(
            weight_parameter(),
            _DARE_DENSITY,
            rescale_parameter("l1"),
            *_DARE,
            *common_parameters(normalize=False),
        ),
        passes="two with rescale l1, else one",
        use_when="Fine-tunes with small updates (most entries below 0.005).",
        caveats=(
            "In expectation it equals task arithmetic; the rescale matters where lambda is not "
            "tuned. Large updates (0.03 and more) suffer even at density 0.9."
        ),
    ),
    task_vector_method(
        "dare_ties",
        "DARE + TIES",
        _dare_ties,
        summary="Random drop and rescale, then sign election and merging of what agrees.",
        formula="as dare_linear, summed over the entries that agree with the elected sign",
        references=(_YU, YADAV),
        parameters=(
            weight_parameter(),
            _DARE_DENSITY,
            _MASK_RATE,
            rescale_parameter("l1"),
            *_DARE,
            *ELECTION,
            *common_parameters(normalize=False),
        ),
        passes="two with rescale l1, one more with mask_rate",
        use_when="As DARE, where task vectors conflict in sign.",
        caveats="Without mask_rate nothing is trimmed by magnitude.",
    ),
)
