"""Localize-and-Stitch: the largest updates of every task, averaged where tasks overlap."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusekit import kernels
from fusekit.methods.base import Block, Combine, Method, Parameter, Summary, Tensor
from fusekit.methods.pruning import OnPruned, prune, trim_threshold

if TYPE_CHECKING:
    from fusekit.methods.base import Array


@dataclass(frozen=True, eq=False)
class Stitched(OnPruned, Combine):
    """base + the mean of the pruned deltas that are not 0."""

    def apply(self, block: Block, out: Array) -> None:
        kernels.stitch.mean_of_kept(prune(block, self.prunings), block.base, out)


def _localize_and_stitch(tensor: Tensor) -> Generator[Summary, Any, Combine]:
    size = tensor.group_size
    kept = [max(1, int(density * size)) for density in tensor.each("density")]
    prunings = yield from trim_threshold(tensor, [size - count + 1 for count in kept], ())
    return Stitched(prunings)


METHODS = (
    Method(
        name="localize_and_stitch",
        title="Localize-and-Stitch",
        summary=(
            "Keeps every model's largest updates, and averages where those of several models meet."
        ),
        formula="y = base + sum_i m_i d_i / max(1, sum_i m_i),  m_i = 1 on the largest |d_i|",
        references=(
            "He et al., Localize-and-Stitch: Efficient Model Merging via Sparse Task Arithmetic, "
            "TMLR 2025, arXiv 2408.13656",
            "He et al., MergeBench: A Benchmark for Merging Domain-Specialized LLMs, "
            "NeurIPS 2025, arXiv 2505.10833",
        ),
        parameters=(
            Parameter(
                "density",
                "float",
                "Share of the entries that is kept, the largest; ties at the cut are all kept. The "
                "authors keep 0.05 to 0.1 of the whole model (granularity: model).",
                default=0.1,
                per_model=True,
                above=0.0,
                maximum=1.0,
            ),
        ),
        rule=_localize_and_stitch,
        base="origin",
        base_required=True,
        integers="first",
        passes="two (order statistics, combine)",
        use_when=(
            "Large fine-tuned models whose skills sit in few weights, with nothing to validate on: "
            "there is no scale to tune."
        ),
        caveats=(
            "Masks are found by magnitude, not learned on data. Small models change everywhere and "
            "lose what is not kept. Entries that a model did not change count for none. The "
            "authors' code for MergeBench divides by the overlap with one other mask only; this "
            "is the paper's rule."
        ),
    ),
)
