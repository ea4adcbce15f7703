"""Representation surgery: small modules per task that take a merge's bias out of its features.

Of the last features alone, learned on features computed once; or of every block's, each corrected
before the next block sees it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fusekit.calibrate import models as calibration
from fusekit.errors import FusekitError, did_you_mean

Loss = Literal["l1", "mse"]
_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": nn.functional.l1_loss,
    "mse": nn.functional.mse_loss,
}

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
    loss: Loss = "l1",
    surgery: Surgery | None = None,
) -> Fitted:
    """Train the tasks' modules on `mean |z_hat - z_expert|` with Adam, or on the mean square.

    Encoders are frozen, so features are computed once, by the caller; a task's batches are repeated
    until `steps` are done. Tasks do not influence each other.

    Args:
        batches: per task, pairs of features of the merged model and of the expert.
        rank: of each task's module.
        lr: of its training.
        steps: of its training.
        loss: `l1`, the mean distance, as published, or `mse`, the mean squared distance.
        surgery: the module to train further; a new one by default.

    Raises:
        FusekitError: features that are not finite or do not fit each other, options out of range. A
            task without any batch
            is left as the identity, with a warning.

    References:
        "Representation Surgery for Multi-Task Model Merging", arXiv 2402.02705.
    """
    _check_options(rank, steps, lr, loss)
    collected = {task: list(pairs) for task, pairs in batches.items()}
    width = _checked_width(collected)
    surgery = Surgery(tuple(collected), width, rank) if surgery is None else surgery
    losses: dict[str, list[float]] = {task: [] for task in collected}
    for task, pairs in collected.items():
        if _is_empty(task, pairs):
            continue
        place = surgery.tasks.index(task)
        optimizer = torch.optim.Adam([surgery.down[place], surgery.up[place]], lr=lr)
        for merged, expert in itertools.islice(itertools.cycle(pairs), steps):
            distance = _LOSSES[loss](surgery(merged, task), expert)
            optimizer.zero_grad()
            distance.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses[task].append(float(distance.detach()))
    return Fitted(surgery, losses)


def _check_options(rank: int, steps: int, lr: float, loss: str) -> None:
    for name, value in (("rank", rank), ("steps", steps)):
        if value < 0:
            raise FusekitError(f"{name}: found {value}, expected 0 or more")
    if not lr > 0:
        raise FusekitError(f"lr: found {lr}, expected more than 0")
    if loss not in _LOSSES:
        raise FusekitError(f"loss: found {loss!r}, expected {' or '.join(map(repr, _LOSSES))}")


def _is_empty(task: str, batches: Sequence[Any]) -> bool:
    """Whether a task has nothing to learn from, which is pointed out."""
    if not batches:
        warnings.warn(f"task {task!r} has no batches: its features stay as they are", stacklevel=3)
    return not batches


class DeepSurgery(nn.Module):
    """A `Surgery` behind every block of a model.

    Args:
        tasks: names of the tasks.
        features: width of the blocks' outputs.
        blocks: how many.
        rank: of every module.
    """

    def __init__(self, tasks: Sequence[str], features: int, blocks: int, rank: int = 16) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.blocks = nn.ModuleList(Surgery(tasks, features, rank) for _ in range(blocks))

    def corrections(self, task: str) -> list[Callable[[Tensor], Tensor]]:
        """By block, what its output goes through."""
        return [functools.partial(own, task=task) for own in self.blocks]

    def parameters_of(self, task: str) -> list[nn.Parameter]:
        """What is learned for a task."""
        place = self.tasks.index(task)
        pairs = (
            (own.down[place], own.up[place]) for own in self.blocks if isinstance(own, Surgery)
        )
        return [parameter for pair in pairs for parameter in pair]

    @contextlib.contextmanager
    def operating(self, model: nn.Module, blocks: str, task: str) -> Iterator[None]:
        """A model whose blocks' outputs are corrected for a task; as it was before afterwards.

        Args:
            model: the merged model.
            blocks: name of its list of blocks, such as `model.layers`.
            task: which of the tasks; `FusekitError` if there is no such one.
        """
        with _changed(calibration.blocks_of(model, blocks), self.corrections(task)):
            yield


@dataclass(frozen=True)
class DeepFitted:
    """Trained modules behind every block, and their losses per step and task."""

    surgery: DeepSurgery
    losses: dict[str, list[float]]


def fit_deep_surgery(
    merged: nn.Module,
    experts: Mapping[str, nn.Module],
    batches: Mapping[str, Iterable[calibration.Batch]],
    blocks: str,
    *,
    rank: int = 16,
    steps: int = 500,
    lr: float = 1e-3,
    loss: Loss = "l1",
) -> DeepFitted:
    """Train a module behind every block on `sum_l mean |z_hat_l - z_l,expert|` with Adam.

    `z_hat_l` is the corrected output of the merged model's block l, from which its next block goes
    on; padding does not count. The models themselves are left as they are.

    Args:
        merged: the merged model.
        experts: by task, the expert, built like the merged model.
        batches: by task, unlabelled inputs as of `fusekit.calibrate`; repeated until `steps`.
        blocks: name of the list of blocks, such as `model.layers`.
        rank: of each task's modules.
        steps: of their training.
        lr: of their training.
        loss: of every block, as of `fit_surgery`.

    Raises:
        FusekitError: no such list of blocks, or an expert is missing. A task without any batch is
            left as the identity, with a warning.

    References:
        "SurgeryV2: Bridging the Gap Between Model Merging and Multi-Task Learning with Deep
        Representation Surgery", arXiv 2410.14389.
    """
    _check_options(rank, steps, lr, loss)
    collected = {task: list(own) for task, own in batches.items()}
    for task in collected:
        if task not in experts:
            raise FusekitError(f"experts: none for task {task!r}{did_you_mean(task, experts)}")
    first = next((own[0] for own in collected.values() if own), None)
    if first is None:
        raise FusekitError("batches: found none for any task, expected inputs to learn from")
    with contextlib.ExitStack() as stack:
        for model in (merged, *experts.values()):
            stack.enter_context(calibration.as_in_use(model))
        outputs = _outputs(merged, blocks, first)
        surgery = DeepSurgery(tuple(collected), outputs[0].shape[-1], len(outputs), rank)
        surgery.to(outputs[0].device)
        losses: dict[str, list[float]] = {task: [] for task in collected}
        for task, own in collected.items():
            if _is_empty(task, own):
                continue
            learned = surgery.parameters_of(task)
            optimizer = torch.optim.Adam(learned, lr=lr)
            for batch in itertools.islice(itertools.cycle(own), steps):
                with torch.no_grad():
                    expected = _outputs(experts[task], blocks, batch)
                found = _outputs(merged, blocks, batch, surgery.corrections(task))
                distances = [
                    _LOSSES[loss](ours, theirs)
                    for ours, theirs in zip(found, expected, strict=True)
                ]
                total = torch.stack(distances).sum()
                optimizer.zero_grad()
                total.backward(inputs=learned)  # type: ignore[no-untyped-call]
                optimizer.step()
                losses[task].append(float(total.detach()))
    return DeepFitted(surgery, losses)


def _outputs(
    model: nn.Module,
    blocks: str,
    batch: calibration.Batch,
    corrections: Sequence[Callable[[Tensor], Tensor]] | None = None,
) -> list[Tensor]:
    """The blocks' outputs (tokens, width), corrected if so asked, without padding."""
    found: list[Tensor] = []
    mask = calibration.mask_of(batch)

    def keep(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def kept(features: Tensor) -> Tensor:
            changed = change(features)
            padded = mask is not None and mask.shape == changed.shape[:-1]
            found.append(changed[mask.bool()] if mask is not None and padded else changed)
            return changed

        return kept

    own = calibration.blocks_of(model, blocks)
    changes = corrections or [lambda features: features] * len(own)
    with _changed(own, [keep(change) for change in changes]):
        calibration.forward(model, calibration.to_device(batch, calibration.device_of(model)))
    return found


@contextlib.contextmanager
def _changed(
    blocks: Sequence[nn.Module], changes: Sequence[Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Blocks whose output (the first of a tuple) goes through a function."""

    def hook(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any, Any], Any]:
        def replace(module: nn.Module, arguments: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        return replace

    with contextlib.ExitStack() as stack:
        for block, change in zip(blocks, changes, strict=True):
            stack.callback(block.register_forward_hook(hook(change)).remove)
        yield


def _checked_width(batches: Mapping[str, Sequence[Batch]]) -> int:
    """The features' common width."""
    width: int | None = None
    for task, pairs in batches.items():
        for merged, expert in pairs:
            if merged.shape[:-1] != expert.shape[:-1]:
                raise FusekitError(
                    f"task {task!r}: features of the merged model have shape "
                    f"{list(merged.shape)}, of the expert {list(expert.shape)}: expected those of "
                    "the same inputs"
                )
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
