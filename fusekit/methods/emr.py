"""EMR-Merging: elect a unified vector, mask it per task, rescale."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fusekit import kernels
from fusekit.kernels import GRANULE
from fusekit.kernels.packed import Packed
from fusekit.methods.base import (
    Additive,
    Block,
    Combine,
    Method,
    Parameter,
    Remark,
    Scope,
    SidePart,
    SideTensor,
    Summary,
    Tensor,
)
from fusekit.methods.summaries import fill_unknown
from fusekit.methods.task_masks import TASK, empty_masks, masks, packed, scales
from fusekit.methods.task_vectors import SquaredNorms

if TYPE_CHECKING:
    from fusekit.methods.base import Array


def _unified(block: Block, factors: Sequence[float]) -> tuple[Array, Array]:
    """The unified vector of a block, and per task where it agrees with it."""
    for row, factor in zip(block.rows, factors, strict=True):
        if factor != 1.0:
            row *= row.dtype.type(factor)
    update = block.scratch("unified", block.base.shape, block.rows.dtype)
    keep = empty_masks(block)
    kernels.masks.unify(block.rows, update, keep)
    return update, keep


def _scales_nothing(factors: Sequence[float]) -> bool:
    return all(factor == 1.0 for factor in factors)


def _as_read(block: Block, factors: Sequence[float]) -> Packed | None:
    """The operands of bfloat16 models whose task vectors are not scaled."""
    return block.bfloat16 if _scales_nothing(factors) else None


@dataclass(frozen=True)
class Magnitudes(Additive):
    """Per task sum |tau_k|, then sum |M_k tau_u|; with `by_tensor` every tensor adds its means."""

    deltas: ClassVar[bool] = True

    by_tensor: bool
    factors: tuple[float, ...]
    scope: Scope

    @property
    def in_registers(self) -> bool:  # type: ignore[override]
        return _scales_nothing(self.factors)

    def width(self, tensor: Tensor) -> int:
        return 2 * tensor.models

    def measure(self, block: Block, out: Array) -> None:
        operands = _as_read(block, self.factors)
        if operands is None:
            self._measure_decoded(block, out)
        elif not kernels.needed.agreement(operands.bits, operands.start, block.size, out):
            slowly = block.scratch("sums", out.shape, out.dtype)
            self._measure_decoded(block, slowly)
            fill_unknown(out, slowly)
        if self.by_tensor:
            out /= block.tensor.size

    def _measure_decoded(self, block: Block, out: Array) -> None:
        update, keep = _unified(block, self.factors)
        n = len(keep)
        kernels.norms.sums(block.rows, kernels.norms.MAGNITUDES, GRANULE, out[:, :n])
        kernels.masks.kept_sums(update, keep, GRANULE, out[:, n:])


@dataclass(frozen=True)
class Unify(Combine):
    """base + the unified vector; masks and scales go beside it."""

    deltas: ClassVar[bool] = True

    scales: tuple[float, ...]
    factors: tuple[float, ...]

    @property
    def in_registers(self) -> bool:  # type: ignore[override]
        return _scales_nothing(self.factors)

    def encode(self, block: Block, out: Array) -> bool:
        operands = _as_read(block, self.factors)
        if operands is None:
            return False
        keep = empty_masks(block)
        return bool(kernels.needed.unified(operands.bits, operands.start, keep, out))

    def apply(self, block: Block, out: Array) -> None:
        import numpy as np

        update, _ = _unified(block, self.factors)
        kernels.linear.weighted_sum(update[np.newaxis], np.ones(1), block.base, 1.0, out)

    def side(self, block: Block) -> Iterator[SidePart]:
        import numpy as np

        yield from packed(block, empty_masks(block))
        if block.start == 0:
            yield f"scales.{block.tensor.name}", 0, np.array(self.scales, dtype=np.float64)


def _emr(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    scope: Scope = "tensor" if tensor["rescale"] == "per_tensor" else "model"
    factors = (1.0,) * tensor.models
    if tensor["equalize"]:
        factors = _to_one_norm((yield SquaredNorms((), scope="model")).tolist())
    sums = yield Magnitudes(tensor["rescale"] == "code", factors, scope)
    scaled, kept = sums[: tensor.models].tolist(), sums[tensor.models :].tolist()
    own = [size / factor for size, factor in zip(scaled, factors, strict=True)]
    for task, (update, agreeing) in enumerate(zip(own, kept, strict=True)):
        if update > 0.0 == agreeing:
            yield Remark(f"task {task + 1} is lost: the others outvote every entry of its update")
    scales = tuple(a / b if b > 0 else 1.0 for a, b in zip(own, kept, strict=True))
    return Unify(scales, factors)


def _to_one_norm(squares: Sequence[float]) -> tuple[float, ...]:
    """What every task vector is multiplied with to have the mean of their norms."""
    norms = [math.sqrt(square) for square in squares]
    mean = sum(norms) / len(norms)
    return tuple(mean / norm if norm > 0.0 else 1.0 for norm in norms)


def _side(tensor: Tensor) -> tuple[SideTensor, ...]:
    return masks(tensor), scales(tensor)


METHODS = (
    Method(
        name="emr",
        title="EMR-Merging",
        summary=(
            "One unified model, plus a bit per weight and a scale for every task, from which "
            "`fusekit reconstruct` rebuilds each expert closely."
        ),
        formula=(
            "y = base + u, u = s max{|d_k| : d_k s > 0}, s = sign(sum_k d_k); "
            "task k: base + r_k [d_k s > 0] u"
        ),
        references=(
            "Huang et al., EMR-Merging: Tuning-Free High-Performance Model Merging, NeurIPS 2024, "
            "arXiv 2405.17461",
        ),
        parameters=(
            Parameter(
                "rescale",
                "choice",
                "What the scale r_k matches: sums over tensors of mean magnitudes (code, as the "
                "authors' program), sums over all weights (global, as the paper), or each tensor's "
                "sum on its own (per_tensor: recommended, better and more stable).",
                default="code",
                choices=("code", "global", "per_tensor"),
            ),
            Parameter(
                "equalize",
                "bool",
                "Scale all task vectors to their mean norm before they vote, for experts whose "
                "updates differ much in size; the scales r_k give every task its own size back.",
                default=False,
            ),
            TASK,
        ),
        rule=_emr,
        base="origin",
        base_required=True,
        model_scope=True,
        integers="first",
        side=_side,
        passes="two (scales, unified vector and masks)",
        use_when=(
            "Serving many experts of one base when the task is known: one model and 1/16 (bf16) "
            "or 1/32 (float32) of a model per task."
        ),
        caveats=(
            "Not one model for all tasks: the unified model is the carrier (no better than tuned "
            "task arithmetic by itself), and comparing reconstructed experts with static merges is "
            "unfair because they are told the task. "
            "Heads and batch-norm statistics that differ by task should be kept per task. Experts "
            "whose updates differ much in size suffer. Reconstruction reads the base again."
        ),
    ),
)
