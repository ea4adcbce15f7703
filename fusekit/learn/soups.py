"""Greedy model soups: add models to an average one by one, as long as a score does not fall."""

from __future__ import annotations

import math
import random
import shlex
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fusekit.checkpoint.writer import check_target
from fusekit.engine.planner import plan
from fusekit.engine.run import MergeReport, merge, merge_state_dicts
from fusekit.errors import FusekitError

Accept = Literal[">", ">="]


@dataclass(frozen=True)
class Selection:
    """What a greedy search chose.

    Attributes:
        scores: every model's own score.
        order: in which models were tried: from the best score to the worst, of equals the later one
            first; or another one, if a restart found a better soup.
        trials: scores of the candidates, one for each model after the first.
        ingredients: the chosen models, in the order in which they joined.
        best: the score of the soup.
    """

    scores: tuple[float, ...]
    order: tuple[int, ...]
    trials: tuple[float, ...]
    ingredients: tuple[int, ...]
    best: float


def select(
    count: int,
    score: Callable[[Sequence[int]], float],
    *,
    accept: Accept = ">=",
    minimum_gain: float = 0.0,
    restarts: int = 0,
    seed: int = 0,
) -> Selection:
    """Choose ingredients among `count` models.

    Args:
        count: number of models, at least 1.
        score: how good the average of the models at these indices is; larger is better. NaN counts
            as the worst, with a warning.
        accept: whether a model joins if the score stays the same (`>=`) or only if it rises (`>`).
        minimum_gain: how much the score must rise by at least, 0 or more.
        restarts: further searches, with the models after the best in random order; the soup with
            the best score is taken, of equals the one found first.
        seed: of the random orders.

    References:
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
        increasing inference time", arXiv 2203.05482.
    """
    if count < 1:
        raise FusekitError("models: found none, expected at least one model to make a soup of")
    if accept not in {">", ">="}:
        raise FusekitError(f"accept: found {accept!r}, expected '>' or '>='")
    if not minimum_gain >= 0:
        raise FusekitError(f"minimum_gain: found {minimum_gain}, expected 0 or more")
    if restarts < 0:
        raise FusekitError(f"restarts: found {restarts}, expected 0 or more")

    def measured(indices: Sequence[int]) -> float:
        value = float(score(indices))
        if math.isnan(value):
            warnings.warn(
                f"the score of models {list(indices)} is NaN: it counts as the worst", stacklevel=3
            )
            return -math.inf
        return value

    scores = [measured([i]) for i in range(count)]
    order = sorted(range(count), key=lambda i: scores[i])[::-1]

    def search(order: Sequence[int]) -> Selection:
        ingredients, best, trials = [order[0]], scores[order[0]], []
        for candidate in order[1:]:
            trial = measured([*ingredients, candidate])
            trials.append(trial)
            needed = best + minimum_gain
            if trial > needed or (accept == ">=" and trial == needed):
                ingredients.append(candidate)
                best = trial
        return Selection(tuple(scores), tuple(order), tuple(trials), tuple(ingredients), best)

    drawn = random.Random(seed)
    orders = [[order[0], *drawn.sample(order[1:], count - 1)] for _ in range(restarts)]
    found = [search(each) for each in (order, *orders)]
    trials = [trial for selection in found for trial in selection.trials]
    if trials and max(trials) < min(scores):
        warnings.warn(
            "every average scored below the worst single model: do the models share the weights "
            "they were fine-tuned from?",
            stacklevel=2,
        )
    return max(found, key=lambda selection: selection.best)


@dataclass(frozen=True)
class GreedySoup:
    """A soup in memory and how it came about."""

    soup: dict[str, Any]
    selection: Selection


def greedy_soup(
    models: Sequence[Mapping[str, Any]],
    score: Callable[[Mapping[str, Any]], float],
    *,
    accept: Accept = ">=",
    minimum_gain: float = 0.0,
    restarts: int = 0,
    seed: int = 0,
) -> GreedySoup:
    """A greedy soup of state dicts under any scoring function.

    Args:
        models: `{name: array}` per model, NumPy arrays or torch tensors, all alike. Integers come
            from the best model.
        score: takes a state dict, returns a number; larger is better.
        accept, minimum_gain, restarts, seed: see `select`.

    Raises:
        CheckpointError: tensors of the models do not match.

    Example:
        >>> import numpy as np
        >>> models = [{"w": np.full(1, v, "f4")} for v in (0.0, 1.0, 5.0)]
        >>> made = greedy_soup(models, lambda soup: -abs(float(soup["w"][0]) - 0.5))
        >>> made.selection.ingredients, made.soup["w"].tolist()
        ((1, 0), [0.5])
    """

    def average(indices: Sequence[int]) -> dict[str, Any]:
        chosen = [models[i] for i in indices]
        return merge_state_dicts(chosen, method="model_soups")

    selection = select(
        len(models),
        lambda indices: score(average(indices)),
        accept=accept,
        minimum_gain=minimum_gain,
        restarts=restarts,
        seed=seed,
    )
    return GreedySoup(average(selection.ingredients), selection)


def greedy_soup_folder(
    models: Sequence[str],
    command: str,
    out: str | Path,
    *,
    accept: Accept = ">=",
    minimum_gain: float = 0.0,
    restarts: int = 0,
    seed: int = 0,
    threads: int | None = None,
    overwrite: bool = False,
    on_score: Callable[[Sequence[int], float], None] | None = None,
) -> Selection:
    """A greedy soup of checkpoints, scored by a command, written to a folder.

    Args:
        models: references of the checkpoints, as in a recipe.
        command: a command line that prints a number last; `{model}` in it stands for the folder of
            the candidate (appended if it does not appear). No shell is involved.
        out: the folder to create.
        accept, minimum_gain, restarts, seed: see `select`.
        threads: of the merges.
        overwrite: replace `out` if it exists, once the soup is chosen.
        on_score: called with the indices of the models of every candidate and its score.

    Raises:
        FusekitError: the command fails or prints no number; `out` exists.
    """
    target = Path(out)
    check_target(target, overwrite)
    plan(_average(models)).close()  # models that do not match are refused before any evaluation
    target.parent.mkdir(parents=True, exist_ok=True)

    def score(indices: Sequence[int]) -> float:
        value = measured(indices)
        if on_score is not None:
            on_score(indices, value)
        return value

    def measured(indices: Sequence[int]) -> float:
        if len(indices) == 1 and Path(models[indices[0]]).is_dir():
            return run_scorer(command, models[indices[0]])
        with tempfile.TemporaryDirectory(prefix=".soup-", dir=target.parent) as scratch:
            candidate = Path(scratch) / "candidate"
            merge(_average([models[i] for i in indices]), candidate, threads=threads)
            return run_scorer(command, str(candidate))

    selection = select(
        len(models),
        score,
        accept=accept,
        minimum_gain=minimum_gain,
        restarts=restarts,
        seed=seed,
    )
    chosen = _average([models[i] for i in selection.ingredients])
    merge(chosen, target, threads=threads, overwrite=overwrite)
    return selection


def uniform_soup_folder(
    models: Sequence[str],
    out: str | Path,
    *,
    threads: int | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """The average of checkpoints, written to a folder; arguments as of `greedy_soup_folder`."""
    return merge(_average(models), out, threads=threads, overwrite=overwrite)


def _average(models: Sequence[str]) -> dict[str, Any]:
    return {
        "merge_method": "model_soups",
        "models": [{"model": model} for model in models],
    }


def run_scorer(command: str, model: str) -> float:
    """The last number a scoring command prints about a model folder.

    Raises:
        FusekitError: it cannot be started, ends with an error, or its last line is no number.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise FusekitError(f"scoring command {command!r}: {error}") from None
    if not words:
        raise FusekitError("scoring command: found nothing, expected a program and its arguments")
    if not any("{model}" in word for word in words):
        words.append("{model}")
    words = [word.replace("{model}", model) for word in words]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise FusekitError(
            f"scoring command {words[0]!r} cannot be run: {error.strerror or error}"
        ) from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FusekitError(
            f"scoring command {shlex.join(words)!r} ended with status {done.returncode}: {reason}"
        )
    printed = (done.stdout.split() or [""])[-1]
    try:
        return float(printed)
    except ValueError:
        raise FusekitError(
            f"scoring command {shlex.join(words)!r} printed {printed!r} last, expected a number"
        ) from None
