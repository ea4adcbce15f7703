"""TALL masks: which weights of the summed task vector each task needs; consensus merging."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusekit import kernels
from fusekit.kernels.packed import Packed
from fusekit.methods.base import (
    Block,
    Combine,
    Method,
    Parameter,
    Remark,
    SidePart,
    SideTensor,
    Summary,
    Tensor,
)
from fusekit.methods.pruning import OnPruned, prune, trim_threshold
from fusekit.methods.task_masks import TASK, empty_masks, masks, packed

if TYPE_CHECKING:
    from fusekit.methods.base import Array

_MASS, _SUM = 0, 1


@dataclass(frozen=True, eq=False)
class StandOut(OnPruned, Combine):
    """What both methods need of a block: the multi-task vector and every task's mask.

    The vector is the sum of the task vectors, or under `ties` the sum of their trimmed entries
    that agree with the elected sign.
    """

    ratios: tuple[float, ...]
    ties: bool

    @property
    def in_registers(self) -> bool:  # type: ignore[override]
        return not self.ties

    def summed(self, block: Block) -> Packed | None:
        """The operands of bfloat16 models whose task vectors are summed as they are."""
        return None if self.ties else block.bfloat16

    def vector_and_masks(self, block: Block) -> tuple[Array, Array]:
        import numpy as np

        n = len(block.rows)
        update = block.scratch("multi-task", block.base.shape, block.rows.dtype)
        if self.ties:
            rows = block.scratch("trimmed", block.rows.shape, block.rows.dtype)
            rows[:] = block.rows
            trimmed = prune(block.with_rows(rows), self.prunings)
            zeros = block.scratch("zeros", block.base.shape, block.rows.dtype)
            zeros[:] = 0
            ones = np.ones(n)
            work = block.scratch("work", (3, kernels.elect.CHUNK), np.float64)
            kernels.elect.elect_and_merge(
                trimmed, ones, ones, _MASS, 1, _SUM, zeros, 1.0, work, update
            )
        else:
            kernels.linear.weighted_sum(block.rows, np.ones(n), block.base[:0], 0.0, update)
        keep = empty_masks(block)
        kernels.masks.stand_out(block.rows, update, np.array(self.ratios), keep)
        return update, keep


@dataclass(frozen=True, eq=False)
class WithMasks(StandOut):
    """base + the multi-task vector; the masks go beside it."""

    def encode(self, block: Block, out: Array) -> bool:
        import numpy as np

        operands = self.summed(block)
        if operands is None:
            return False
        place, ratios = (operands.bits, operands.start), np.array(self.ratios)
        return bool(kernels.needed.sum_and_masks(*place, ratios, empty_masks(block), out))

    def apply(self, block: Block, out: Array) -> None:
        import numpy as np

        update, _ = self.vector_and_masks(block)
        kernels.linear.weighted_sum(update[np.newaxis], np.ones(1), block.base, 1.0, out)

    def side(self, block: Block) -> Iterator[SidePart]:
        return packed(block, empty_masks(block))


@dataclass(frozen=True, eq=False)
class Consensus(StandOut):
    """base + scale * the multi-task vector where at least `tasks` masks are set."""

    tasks: int
    scale: float

    def encode(self, block: Block, out: Array) -> bool:
        import numpy as np

        operands = self.summed(block)
        if operands is None:
            return False
        place, ratios = (operands.bits, operands.start), np.array(self.ratios)
        return bool(kernels.needed.consensus(*place, ratios, self.tasks, self.scale, out))

    def apply(self, block: Block, out: Array) -> None:
        update, keep = self.vector_and_masks(block)
        kernels.masks.add_needed(update, keep, self.tasks, self.scale, block.base, out)


def _trim(tensor: Tensor) -> Generator[Summary, Any, tuple[Any, ...]]:
    if tensor["vector"] == "ta":
        return ()
    dropped = tensor.group_size - int(tensor.group_size * tensor["density"])
    return (yield from trim_threshold(tensor, [dropped] * tensor.models, ()))


def _tall_masks(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    prunings = yield from _trim(tensor)
    return WithMasks(prunings, tuple(tensor.each("tall_lambda")), tensor["vector"] == "ties")


def _consensus(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    if tensor["k"] > tensor.models:
        yield Remark(
            f"consensus: k {tensor['k']} exceeds the {tensor.models} models: the base stays"
        )
    prunings = yield from _trim(tensor)
    ratios, ties = tuple(tensor.each("tall_lambda")), tensor["vector"] == "ties"
    return Consensus(prunings, ratios, ties, tensor["k"], tensor["alpha"])


def _side(tensor: Tensor) -> tuple[SideTensor, ...]:
    return (masks(tensor),)


_LAMBDA = Parameter(
    "tall_lambda",
    "float",
    "How much larger than 1/lambda the others' disturbance of a weight may be; smaller keeps more "
    "(the authors choose among 0.2, 0.3, 0.4, 0.5 and 0.6 by validation).",
    default=0.4,
    per_model=True,
    minimum=0.0,
)
_VECTOR = (
    Parameter(
        "vector",
        "choice",
        "The multi-task vector: the sum of the task vectors, or the TIES sum.",
        default="ta",
        choices=("ta", "ties"),
    ),
    Parameter(
        "density",
        "float",
        "Share of the largest entries that the TIES vector keeps.",
        default=0.2,
        above=0.0,
        maximum=1.0,
    ),
)
_REFERENCE = (
    "Wang et al., Localizing Task Information for Improved Model Merging and Compression, "
    "ICML 2024, arXiv 2405.07813"
)

METHODS = (
    Method(
        name="tall_masks",
        title="TALL masks",
        summary=(
            "The sum of all task vectors, plus a bit per weight and task that cuts each task's "
            "knowledge out of it again (`fusekit reconstruct`)."
        ),
        formula=(
            "y = base + t, t = sum_i d_i; task i: base + m_i t, m_i = [|d_i| > lambda |t - d_i|]"
        ),
        references=(_REFERENCE,),
        parameters=(_LAMBDA, *_VECTOR, TASK),
        rule=_tall_masks,
        base="origin",
        base_required=True,
        integers="first",
        side=_side,
        use_when=(
            "Compressing many experts of one base to one vector and one bit per weight and task, "
            "when the task is known at inference."
        ),
        passes="one; two with vector: ties",
        caveats=(
            "The merged model itself adds all task vectors at full strength and is only the "
            "carrier. There is no scale per task: identical models are not recovered. In bfloat16 "
            "the sum is rounded; out_dtype: float32 keeps it exact. lambda is best chosen per task "
            "on validation data."
        ),
    ),
    Method(
        name="consensus",
        title="Consensus merging",
        summary="Keeps the entries of the summed task vector that at least k tasks need.",
        formula="y = base + alpha [sum_i m_i >= k] t,  m_i = [|d_i| > lambda |t - d_i|]",
        references=(_REFERENCE,),
        parameters=(
            Parameter(
                "alpha", "float", "Scale of what is kept; worth tuning between 0 and 1.", 0.4
            ),
            Parameter(
                "k",
                "int",
                "Tasks that must need an entry: 2 drops what nobody or one task needs, 1 only "
                "what nobody needs, 0 nothing.",
                default=2,
                minimum=0,
            ),
            _LAMBDA,
            *_VECTOR,
        ),
        rule=_consensus,
        base="origin",
        base_required=True,
        integers="first",
        passes="one; two with vector: ties",
        use_when="Many (eight and more) experts, where most entries matter to one task only.",
        caveats=(
            "With up to about six tasks it does no better than tuned task arithmetic. With two "
            "models and k = 2 little may be left; k above the number of models leaves the base. "
            "Results depend on lambda and alpha, which the "
            "authors choose on validation data."
        ),
    ),
)
