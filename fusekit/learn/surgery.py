"""Representation surgery: a small module per task that takes a merge's bias out of its features."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusekit.errors import FusekitError, did_you_mean

Batch = tuple[Tensor, Tensor]
"""Features (batch, d) of the merged model and of the task's expert, on the same inputs."""


class Surgery(nn.Module):
    """`z - up_t relu(down_t z)` for the features z (batch, d) of task t.

    Starts as the identity: `up` is zero, `down` drawn uniformly from (-1/sqrt(d), 1/sqrt(d)).

    Args:
        tasks: names of the tasks.
        features: d, the features' width.
        rank: rows of `down`; 0 changes nothing.
    """

    def __init__(self, tasks: Sequence[str], features: int, rank: int = 16) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        bound = features**-0.5
        self.down = nn.ParameterList(
            nn.Parameter(torch.empty(rank, features).uniform_(-bound, bound)) for _ in tasks
        )
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(features, rank)) for _ in tasks)

    def forward(self, features: Tensor, task: str) -> Tensor:
        """Corrected features; `FusekitError` names the tasks if there is no such one."""
        if task not in self.tasks:
            raise FusekitError(f"unknown task {task!r}{did_you_mean(task, self.tasks)}")
        place = self.tasks.index(task)
        down, up = self.down[place], self.up[place]
        corrected: Tensor = features - torch.relu(features @ down.T) @ up.T
        return corrected


@dataclass(frozen=True)
class Fitted:
    """A trained module and its losses per step and task, each before its step."""

    surgery: Surgery
    losses: dict[str, list[float]]


def fit_surgery(
    batches: Mapping[str, Iterable[Batch]],
    *,
    rank: int = 16,
    steps: int = 500,
    lr: float = 1e-3,
    surgery: Surgery | None = None,
) -> Fitted:
    """Train the tasks' modules on `mean |z_hat - z_expert|` with Adam.

    Encoders are frozen, so features are computed once, by the caller; a task's batches are repeated
    until `steps` are done. Tasks do not influence each other.

    Args:
        batches: per task, pairs of features of the merged model and of the expert.
        rank, lr, steps: size and training of each task's module.
        surgery: the module to train further; a new one by default.

    Raises:
        FusekitError: features that are not finite or whose widths differ. A task without any batch
            is left as the identity, with a warning.

    References:
        "Representation Surgery for Multi-Task Model Merging", arXiv 2402.02705.
    """
    collected = {task: list(pairs) for task, pairs in batches.items()}
    width = _checked_width(collected)
    surgery = Surgery(tuple(collected), width, rank) if surgery is None else surgery
    losses: dict[str, list[float]] = {task: [] for task in collected}
    for task, pairs in collected.items():
        if not pairs:
            warnings.warn(
                f"task {task!r} has no batches: its features stay as they are", stacklevel=2
            )
            continue
        place = surgery.tasks.index(task)
        optimizer = torch.optim.Adam([surgery.down[place], surgery.up[place]], lr=lr)
        for merged, expert in itertools.islice(itertools.cycle(pairs), steps):
            loss = nn.functional.l1_loss(surgery(merged, task), expert)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses[task].append(float(loss.detach()))
    return Fitted(surgery, losses)


def _checked_width(batches: Mapping[str, Sequence[Batch]]) -> int:
    """The features' common width."""
    width: int | None = None
    for task, pairs in batches.items():
        for merged, expert in pairs:
            for whose, features in (("merged model", merged), ("expert", expert)):
                width = features.shape[-1] if width is None else width
                if features.shape[-1] != width:
                    raise FusekitError(
                        f"task {task!r}: features of the {whose} have width "
                        f"{features.shape[-1]}, expected {width} as the others"
                    )
                if not bool(torch.isfinite(features).all()):
                    raise FusekitError(
                        f"task {task!r}: features of the {whose} hold NaN or infinite values"
                    )
    if width is None:
        raise FusekitError("batches: found none for any task, expected features to learn from")
    return width
