"""Try on handwritten digits what the authors of merging methods claim, and write the tables.

Tasks of four kinds, each trained anew for every seed: six groupings of the ten digits; six ways of
turning the images, with one head for all; changes of the images, a few small and many large. Then
sixteen fine-tunings of one classifier (soups), estimators of the Fisher information, and the
squared error that merged matrices make on the layers' real inputs. One thread, some ten minutes.

    python -m scripts.reproduce_experiments [--seeds 3] [--out docs/experiments.md]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fusekit import merge_state_dicts
from fusekit.calibrate import capture, diagonal_fisher
from fusekit.checkpoint.statistics import save_statistics
from fusekit.evaluate.digits import PRETRAINING_TASK
from fusekit.learn import fit_surgery, learned_soup, select
from scripts.train_digits_experts import (
    CLASS_OF_DIGIT,
    FINE_TUNING,
    PRETRAINING,
    WIDTH,
    DigitsEncoder,
    Schedule,
    fit,
    load_splits,
    random_head,
)

PAGE = Path(__file__).parents[1] / "docs" / "experiments.md"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"

State = dict[str, Any]
"""A state dict of NumPy arrays."""

SCALES = tuple(round(0.05 * step, 2) for step in range(1, 41))
"""Values of lambda (or beta) that tuning tries, on validation images."""

FISHER_EXAMPLES, GRAM_EXAMPLES, SURGERY_STEPS = 128, 256, 500


@dataclass(frozen=True)
class Task:
    """One question about images: by split, images (n, 64) and classes (n,); a frozen head."""

    name: str
    images: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]
    head: Tensor


@dataclass(frozen=True)
class Study:
    """A base and one expert per task."""

    tasks: Sequence[Task]
    base: State
    experts: Sequence[State]
    layers: int

    def encode(self, state: Mapping[str, Any], images: Tensor) -> Tensor:
        """Features (n, 64) of an encoder with these weights."""
        tensors = {name: torch.as_tensor(value) for name, value in state.items()}
        with torch.no_grad():
            features: Tensor = functional_call(DigitsEncoder(self.layers), tensors, (images,))
        return features

    def accuracy(self, state: State, split: str = "test", tasks: Iterable[int] = ()) -> float:
        """Mean accuracy in percent over tasks (by index; all by default)."""
        chosen = [self.tasks[i] for i in tasks] or list(self.tasks)
        return statistics.fmean(
            _percent(self.encode(state, task.images[split]) @ task.head.T, task.labels[split])
            for task in chosen
        )

    def moved(self, update: State, scale: float) -> State:
        """base + scale * update."""
        return {name: value + scale * update[name] for name, value in self.base.items()}

    def merge(self, method: str, each: Any = None, **parameters: Any) -> State:
        """All experts merged, every linear layer as a matrix."""
        if method not in {"linear", "fisher", "regmean"}:
            parameters = {**parameters, "base": self.base}
        return _merge(self.experts, method, each, **parameters)


def _merge(
    models: Sequence[State], method: str, each: Any = None, base: Any = None, **parameters: Any
) -> State:
    return merge_state_dicts(
        models,
        method=method,
        base=base,
        parameters=parameters,
        model_parameters=each,
        threads=1,
    )


def _percent(logits: Tensor, labels: Tensor) -> float:
    return 100.0 * float((logits.argmax(dim=1) == labels).float().mean())


def _weights(model: nn.Module) -> State:
    return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}


# -- tasks -----------------------------------------------------------------------------------------


def label_partitions(seed: int) -> Study:
    """The same images grouped in six ways; frozen random heads; the base tells the ten digits."""
    images, digits, generator = _digits(seed)
    tasks = [
        Task(
            name,
            images,
            {split: torch.tensor(classes)[own] for split, own in digits.items()},
            random_head(max(classes) + 1, generator),
        )
        for name, classes in CLASS_OF_DIGIT.items()
    ]
    pretraining = next(task for task in tasks if task.name == PRETRAINING_TASK)
    base = DigitsEncoder()
    _train(base, pretraining, PRETRAINING, generator)
    rest = [task for task in tasks if task is not pretraining]
    return _fine_tuned(rest, base, FINE_TUNING, generator)


CHANGES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda x: x,
    "turned by 90": lambda x: x.rot90(1, (1, 2)),
    "inverted": lambda x: 1.0 - x,
    "mirrored": lambda x: x.flip(2),
    "shifted, less contrast": lambda x: 0.5 * x.roll(1, 2),
    "turned by 180": lambda x: x.rot90(2, (1, 2)),
    "turned by 270": lambda x: x.rot90(3, (1, 2)),
    "upside down": lambda x: x.flip(1),
}
"""What is done to images (n, 8, 8)."""


@dataclass(frozen=True)
class Changed:
    """Tasks that differ in their images, from a base trained weakly on all of them."""

    changes: Sequence[str]
    rounds: int
    fine_tuning: Schedule
    one_head: bool
    layers: int = 2

    def __call__(self, seed: int) -> Study:
        images, digits, generator = _digits(seed)
        heads = [random_head(10, generator) for _ in self.changes]
        tasks = [
            Task(
                name,
                {
                    split: CHANGES[name](own.reshape(-1, 8, 8)).reshape(-1, 64)
                    for split, own in images.items()
                },
                digits,
                heads[0] if self.one_head else head,
            )
            for name, head in zip(self.changes, heads, strict=True)
        ]
        base = DigitsEncoder(self.layers)
        _pretrain_on_all(base, tasks, self.rounds, generator)
        return _fine_tuned(tasks, base, self.fine_tuning, generator)


def _digits(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor], torch.Generator]:
    torch.manual_seed(seed)
    splits = load_splits(seed)
    images = {
        split: torch.tensor(pixels.reshape(len(pixels), -1) / 16, dtype=torch.float32)
        for split, (pixels, _) in splits.items()
    }
    digits = {split: torch.tensor(own, dtype=torch.long) for split, (_, own) in splits.items()}
    return images, digits, torch.Generator().manual_seed(seed)


def _train(
    model: DigitsEncoder, task: Task, schedule: Schedule, generator: torch.Generator
) -> None:
    fit(model, task.head, task.images["train"], task.labels["train"], schedule, generator)


def _pretrain_on_all(
    model: DigitsEncoder, tasks: Sequence[Task], rounds: int, generator: torch.Generator
) -> None:
    """One step per task and round, on the first 150 training images."""
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for task in [task for _ in range(rounds) for task in tasks]:
        batch = torch.randint(150, (64,), generator=generator)
        logits = model(task.images["train"][batch]) @ task.head.T
        loss = nn.functional.cross_entropy(logits, task.labels["train"][batch])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def _fine_tuned(
    tasks: Sequence[Task], base: DigitsEncoder, schedule: Schedule, generator: torch.Generator
) -> Study:
    experts = []
    for task in tasks:
        expert = copy.deepcopy(base)
        _train(expert, task, schedule, generator)
        experts.append(_weights(expert))
    return Study(tasks, _weights(base), experts, len(base.encoder["layers"]))  # type: ignore[arg-type]


STUDIES: Mapping[str, Callable[[int], Study]] = {
    "label partitions": label_partitions,
    "turned images, one head": Changed(
        (
            "as they are",
            "turned by 90",
            "turned by 180",
            "turned by 270",
            "mirrored",
            "upside down",
        ),
        rounds=60,
        fine_tuning=FINE_TUNING,
        one_head=True,
        layers=6,
    ),
    "changed images, easy": Changed(
        tuple(CHANGES)[:5], rounds=60, fine_tuning=Schedule(250, 1e-3), one_head=False
    ),
    "changed images, hard": Changed(
        tuple(CHANGES)[:6], rounds=25, fine_tuning=Schedule(400, 1e-3), one_head=False
    ),
}


# -- figures ---------------------------------------------------------------------------------------


@dataclass
class Figures:
    """What was measured: one value per seed by label, in the order in which they came."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, label: str, value: float) -> None:
        """One more seed's value."""
        self.values.setdefault(label, []).append(value)

    def mean(self, label: str) -> float:
        """Over seeds."""
        return statistics.fmean(self.values[label])

    def spread(self, label: str) -> float:
        """Standard deviation over seeds; 0 of one."""
        own = self.values[label]
        return statistics.stdev(own) if len(own) > 1 else 0.0


def measure_study(study: Study, figures: Figures, seed: int) -> None:
    """All methods on one study."""
    everyone = range(len(study.tasks))
    figures.add("base", study.accuracy(study.base))
    figures.add(
        "expert of the task",
        statistics.fmean(study.accuracy(study.experts[i], tasks=[i]) for i in everyone),
    )
    figures.add("average", study.accuracy(study.merge("linear", weight=1.0)))
    for label, (method, parameters) in MERGES.items():
        merged = study.merge(method, **parameters)
        figures.add(label, study.accuracy(merged))
        figures.add(f"{label}, tuned", _tuned(study, merged))
    _measure_depth(study, figures)
    _measure_continual(study, figures, seed)
    with tempfile.TemporaryDirectory(prefix="fusekit-experiments-") as folder:
        _measure_with_data(study, figures, Path(folder))
    _measure_surgery(study, figures)


PLAIN = {"exclude": ""}
MERGES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "task arithmetic": ("task_arithmetic", {"weight": 1.0}),
    "TIES, 20 %": ("ties", {"weight": 1.0, "density": 0.2}),
    "TSV": ("tsv", PLAIN),
    "Iso-C": ("iso_c", PLAIN),
    "Iso-CTS": ("iso_cts", PLAIN),
    "KnOTS": ("knots", PLAIN),
    "WUDI, 300 steps of Adam": ("wudi", {**PLAIN, "solver": "adam"}),
    "WUDI, closed form, time 30": ("wudi", {**PLAIN, "time": 30.0}),
    "WUDI, closed form, time 300": ("wudi", {**PLAIN, "time": 300.0}),
    "WUDI, closed form, time 100000": ("wudi", {**PLAIN, "time": 1e5}),
    "WUDI, closed form, 0.65 of the directions": ("wudi", {**PLAIN, "ratio": 0.65}),
    "WUDI, closed form, adaptive rank": ("wudi", {**PLAIN, "solver": "adaptive"}),
    "OptMerge, full": ("optmerge", PLAIN),
}
"""Merges at lambda 1, which are also tuned: their update is proportional to lambda."""


def _tuned(study: Study, merged: State) -> float:
    """Test accuracy at the lambda that is best on validation images, the smallest of equals."""
    update = {name: merged[name] - value for name, value in study.base.items()}
    best = max(
        SCALES, key=lambda scale: (study.accuracy(study.moved(update, scale), "validation"), -scale)
    )
    return study.accuracy(study.moved(update, best))


def _measure_depth(study: Study, figures: Figures) -> None:
    """LiNeS and its reverse on the sum of the task vectors, slope tuned on validation images."""
    count = len(study.experts)
    merged = study.merge("task_arithmetic", weight=1.0)
    update = {name: merged[name] - value for name, value in study.base.items()}
    depth = {name: _depth(name, study.layers) for name in update}

    def scaled(first: float, slope: float) -> State:
        return {
            name: value + (first + slope * depth[name]) * update[name]
            for name, value in study.base.items()
        }

    def best(candidates: Sequence[State]) -> float:
        scores = [study.accuracy(state, "validation") for state in candidates]
        return study.accuracy(candidates[scores.index(max(scores))])

    slopes = [0.1 * step for step in range(1, 11)]
    figures.add("task arithmetic + LiNeS, tuned", best([scaled(1 / count, s) for s in slopes]))
    figures.add(
        "task arithmetic + LiNeS reversed, tuned",
        best([scaled(1 / count + s, -s) for s in slopes]),
    )


def _depth(name: str, layers: int) -> float:
    """Position of a tensor's layer, 0 for the first (and what comes before) to 1 for the last."""
    parts = name.split(".")
    return int(parts[2]) / max(layers - 1, 1) if parts[0] == "encoder" else 0.0


def _measure_continual(study: Study, figures: Figures, seed: int) -> None:
    """One model after another in three random orders; what is forgotten on the way."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(study.experts)).tolist() for _ in range(3)]
    for label, parameters in CONTINUAL.items():
        final, transfer = [], []
        for order in orders:
            learned = []
            for count in range(1, len(order) + 1):
                merged = _merge(
                    [study.experts[i] for i in order[:count]],
                    "opcm",
                    None,
                    study.base,
                    **parameters,
                )
                learned.append(study.accuracy(merged, tasks=order[count - 1 : count]))
            kept = [study.accuracy(merged, tasks=[i]) for i in order]
            final.append(statistics.fmean(kept))
            transfer.append(
                statistics.fmean(b - a for a, b in zip(learned[:-1], kept[:-1], strict=True))
            )
        figures.add(label, statistics.fmean(final))
        figures.add(f"{label}: spread over orders", statistics.stdev(final))
        figures.add(f"{label}: backward transfer", statistics.fmean(transfer))


CONTINUAL: Mapping[str, dict[str, Any]] = {
    "running sum of kept norm": {**PLAIN, "alpha": 0.0, "zero_diagonal": False},
    "OPCM": PLAIN,
    "OPCM, diagonal kept": {**PLAIN, "zero_diagonal": False},
}


class _Classifier(nn.Module):
    """An encoder with a task's head."""

    def __init__(self, study: Study, state: State, head: Tensor) -> None:
        super().__init__()
        self.encoder = DigitsEncoder(study.layers)
        self.encoder.load_state_dict({k: torch.as_tensor(v) for k, v in state.items()})
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.encoder(images) @ self.head.T
        return logits


def _measure_with_data(study: Study, figures: Figures, folder: Path) -> None:
    """Fisher merging and RegMean, each expert measured on training images of its task."""
    fishers, grams = [], []
    for task, expert in zip(study.tasks, study.experts, strict=True):
        model = _Classifier(study, expert, task.head)
        images = task.images["train"]
        fishers.append(_plain_names(diagonal_fisher(model, [images[:FISHER_EXAMPLES]], "exact")))
        grams.append(_plain_names(capture(model, [images[:GRAM_EXAMPLES]], "gram")))
    for label, floor in (("Fisher", 1e-6), ("Fisher, floor 0.001", 1e-3)):
        each = _saved(folder, fishers, "fisher")
        merged = study.merge("fisher", each, floor=floor)
        figures.add(label, study.accuracy(merged))
    for scale in (0.95, 0.6):
        each = _saved(folder, grams, "gram")
        merged = study.merge("regmean", each, **PLAIN, scale=scale)
        figures.add(f"RegMean, scale {scale:g}", study.accuracy(merged))
    candidates = {
        "average": study.merge("linear", weight=1.0),
        "sum (task arithmetic)": study.merge("task_arithmetic", weight=1.0),
        "WUDI, closed form, time 300": study.merge("wudi", **PLAIN, time=300.0),
        "WUDI, exact minimum": study.merge("wudi", **PLAIN, solver="none"),
        "RegMean, scale 1": study.merge("regmean", each, **PLAIN, scale=1.0),
    }
    _measure_errors(study, figures, grams, candidates)


def _plain_names(measured: Mapping[str, Tensor]) -> State:
    """Statistics by the encoder's own names."""
    return {name.removeprefix("encoder."): value.numpy() for name, value in measured.items()}


def _saved(folder: Path, measured: Sequence[State], kind: str) -> list[dict[str, str]]:
    """Files of statistics, as the models' parameters."""
    each = []
    for i, own in enumerate(measured):
        path = folder / f"{kind}{i}.safetensors"
        save_statistics(path, {f"{name}/{kind}": value for name, value in own.items()}, {})
        each.append({"statistics": str(path)})
    return each


def _measure_errors(
    study: Study, figures: Figures, grams: Sequence[State], candidates: Mapping[str, State]
) -> None:
    """`sum |(m - d_i) X_i|^2` over matrices and tasks, in percent of that of no update (m = 0)."""

    def error(merged: State) -> float:
        total = 0.0
        for layer in grams[0]:
            name = f"{layer}.weight"
            for expert, gram in zip(study.experts, grams, strict=True):
                left = (merged[name] - expert[name]).astype(np.float64)
                total += float(np.sum((left @ gram[layer]) * left))
        return total

    nothing = error(study.base)
    for label, merged in candidates.items():
        figures.add(
            f"layers' squared error, % of the base's: {label}", 100 * error(merged) / nothing
        )


def _measure_surgery(study: Study, figures: Figures) -> None:
    """Features of two merges corrected per task, by modules learned on unlabelled images."""
    arithmetic = study.merge("task_arithmetic", weight=1.0, **{"lambda": 0.3})
    figures.add("task arithmetic, lambda 0.3", study.accuracy(arithmetic))
    for label, merged in (
        ("average", study.merge("linear", weight=1.0)),
        ("task arithmetic, lambda 0.3,", arithmetic),
    ):
        batches = {
            task.name: [
                (study.encode(merged, x), study.encode(expert, x))
                for x in torch.split(task.images["train"], 16)
            ]
            for task, expert in zip(study.tasks, study.experts, strict=True)
        }
        fitted = fit_surgery(batches, rank=16, steps=SURGERY_STEPS)
        with torch.no_grad():
            scores = [
                _percent(
                    fitted.surgery(study.encode(merged, task.images["test"]), task.name)
                    @ task.head.T,
                    task.labels["test"],
                )
                for task in study.tasks
            ]
        figures.add(f"{label} with surgery (told the task)", statistics.fmean(scores))


# -- soups and the Fisher information --------------------------------------------------------------

SOUP_MODELS = 16


def measure_soups(figures: Figures, seed: int) -> None:
    """Fine-tunings of one weakly trained classifier, with random settings and noisy labels."""
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    bunch = load_digits()
    order = rng.permutation(len(bunch.target))
    images = torch.tensor(bunch.images.reshape(-1, 64)[order] / 16, dtype=torch.float32)
    labels = torch.tensor(bunch.target[order], dtype=torch.long)
    pretraining, training, validation, test = (
        slice(0, 300),
        slice(300, 900),
        slice(900, 1200),
        slice(1200, None),
    )
    noisy = labels.clone()
    wrong = torch.as_tensor(rng.random(len(labels)) < 0.15)
    noisy[wrong] = torch.as_tensor(rng.integers(0, 10, int(wrong.sum())))
    start = nn.Sequential(DigitsEncoder(2), nn.Linear(WIDTH, 10))
    _fit_classifier(start, images[pretraining], labels[pretraining], rng, steps=60, lr=1e-3)
    models: list[State] = []
    for _ in range(SOUP_MODELS):
        own = copy.deepcopy(start)
        _fit_classifier(
            own,
            images[training],
            noisy[training],
            rng,
            steps=int(rng.integers(200, 601)),
            lr=float(np.exp(rng.uniform(np.log(1e-4), np.log(5e-3)))),
            decay=float(rng.choice([0.0, 1e-3, 1e-2, 1e-1])),
            smoothing=float(rng.choice([0.0, 0.1])),
            noise=float(rng.choice([0.0, 0.1, 0.2])),
        )
        models.append(_weights(own))

    def accuracy(state: Mapping[str, Any], part: slice) -> float:
        tensors = {name: torch.as_tensor(value) for name, value in state.items()}
        with torch.no_grad():
            return _percent(functional_call(start, tensors, (images[part],)), labels[part])

    def soup(chosen: Sequence[int]) -> State:
        return _merge([models[i] for i in chosen], "linear", weight=1.0)

    tests = [accuracy(model, test) for model in models]
    figures.add("single models, mean", statistics.fmean(tests))
    figures.add("single models, best on the test images", max(tests))
    figures.add("uniform soup", accuracy(soup(range(SOUP_MODELS)), test))
    for rule in (">", ">="):
        chosen = select(SOUP_MODELS, lambda own: accuracy(soup(own), validation), accept=rule)
        if rule == ">":
            figures.add("single model, best on validation", tests[chosen.order[0]])
        figures.add(f"greedy soup, joins if {rule}", accuracy(soup(chosen.ingredients), test))
        figures.add(f"greedy soup, joins if {rule}: models", len(chosen.ingredients))
    learned = learned_soup(
        start,
        [{name: torch.as_tensor(value) for name, value in model.items()} for model in models],
        [(images[validation], labels[validation])],
        epochs=10,
    )
    figures.add("learned soup, by tensor", accuracy(learned.soup, test))


def _fit_classifier(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    rng: np.random.Generator,
    *,
    steps: int,
    lr: float,
    decay: float = 0.0,
    smoothing: float = 0.0,
    noise: float = 0.0,
) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    for _ in range(steps):
        batch = torch.as_tensor(rng.integers(0, len(images), 64))
        inputs = images[batch] + noise * torch.randn(len(batch), images.shape[1])
        loss = nn.functional.cross_entropy(model(inputs), labels[batch], label_smoothing=smoothing)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def measure_estimators(study: Study, figures: Figures) -> None:
    """How near (cosine) estimates of the Fisher information come to the exact expectation.

    On images that the expert has not seen: of its training images it is so sure that unlikely
    labels, on which nearly all the information lies, are never drawn.
    """
    task, expert = study.tasks[2], study.experts[2]
    model = _Classifier(study, expert, task.head)
    images = task.images["validation"][:FISHER_EXAMPLES]
    labels = task.labels["validation"][:FISHER_EXAMPLES]

    def flat(measured: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([value.double().flatten() for value in measured.values()])

    exact = flat(diagonal_fisher(model, [images], "exact"))

    def nearness(batches: Sequence[Any], estimator: Any) -> float:
        found = flat(diagonal_fisher(model, batches, estimator))
        return float(found @ exact / (found.norm() * exact.norm()))

    for draws in (1, 4, 16):
        figures.add(f"sampled, {draws} per example", nearness([images] * draws, "sampled"))
    figures.add("empirical", nearness([(images, labels)], "empirical"))
    for size in (1, 8, 32):
        figures.add(
            f"batch_sqrt, batches of {size}", nearness(torch.split(images, size), "batch_sqrt")
        )


# -- the page --------------------------------------------------------------------------------------

CLAIMS: tuple[tuple[str, str, str], ...] = (
    (
        "LiNeS improves tuned task arithmetic",
        "task arithmetic + LiNeS, tuned",
        "task arithmetic, tuned",
    ),
    ("its reverse does not", "task arithmetic, tuned", "task arithmetic + LiNeS reversed, tuned"),
    ("TIES beats task arithmetic, both tuned", "TIES, 20 %, tuned", "task arithmetic, tuned"),
    ("TSV beats task arithmetic, both tuned", "TSV, tuned", "task arithmetic, tuned"),
    ("Iso-C beats task arithmetic, both tuned", "Iso-C, tuned", "task arithmetic, tuned"),
    (
        "WUDI (time 300) beats task arithmetic, both at lambda 1",
        "WUDI, closed form, time 300",
        "task arithmetic",
    ),
    ("the same, both tuned", "WUDI, closed form, time 300, tuned", "task arithmetic, tuned"),
    (
        "WUDI's closed form beats Adam, both at lambda 1",
        "WUDI, closed form, time 300",
        "WUDI, 300 steps of Adam",
    ),
    ("OPCM beats a running sum of the same norm", "OPCM", "running sum of kept norm"),
    ("OPCM beats the (running) average", "OPCM", "average"),
    ("Fisher beats the average", "Fisher", "average"),
    ("RegMean beats the average", "RegMean, scale 0.95", "average"),
    ("surgery improves the average", "average with surgery (told the task)", "average"),
)
"""What authors claim: text, what should be better, than what."""

Tables = Mapping[str, Figures]


def render(studies: Tables, soups: Figures, estimators: Figures, seeds: int) -> str:
    """The generated part of the page."""
    columns = list(studies)
    head = ["| accuracy % | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    labels = list(next(iter(studies.values())).values)
    rows = [
        f"| {label} | " + " | ".join(_cell(studies[name], label) for name in columns) + " |"
        for label in labels
    ]
    claims = [
        f"| {text} | "
        + " | ".join(_difference(studies[name], better, worse) for name in columns)
        + " |"
        for text, better, worse in CLAIMS
    ]
    plural = "s" if seeds > 1 else ""
    return "\n".join(
        [
            f"Mean and standard deviation over {seeds} seed{plural}, on 500 test images.",
            "",
            "### What authors claim",
            "",
            "The difference in points of accuracy; the claim holds where it is positive. **Bold**: "
            "the same sign in every seed.",
            "",
            head[0].replace("accuracy %", "claim"),
            head[1],
            *claims,
            "",
            "### Figures",
            "",
            *head,
            *rows,
            "",
            "### Soups",
            "",
            f"{SOUP_MODELS} fine-tunings with random settings and 15 % wrong labels.",
            "",
            *_listing(soups, "accuracy % on 597 test images"),
            "",
            "### Estimators of the Fisher information",
            "",
            *_listing(estimators, "cosine with the exact one", digits=3),
        ]
    )


def _cell(figures: Figures, label: str, digits: int = 1) -> str:
    return f"{figures.mean(label):.{digits}f} ± {figures.spread(label):.{digits}f}"


def _difference(figures: Figures, better: str, worse: str) -> str:
    pairs = list(zip(figures.values[better], figures.values[worse], strict=True))
    text = f"{statistics.fmean(a - b for a, b in pairs):+.1f}"
    return f"**{text}**" if len({a > b for a, b in pairs}) == 1 else text


def _listing(figures: Figures, what: str, digits: int = 1) -> list[str]:
    rows = [f"| {label} | {_cell(figures, label, digits)} |" for label in figures.values]
    return [f"| | {what} |", "|---|---:|", *rows]


def replace_figures(page: Path, text: str) -> None:
    """Put text between the page's markers."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise SystemExit(f"{page}: expected {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Measure everything and rewrite the figures of the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=PAGE, help="page with the two markers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    studies = {name: Figures() for name in STUDIES}
    soups, estimators = Figures(), Figures()
    for seed in range(arguments.seeds):
        for name, make in STUDIES.items():
            begun = time.process_time()
            study = make(seed)
            measure_study(study, studies[name], seed)
            if name == "label partitions":
                measure_estimators(study, estimators)
            print(f"seed {seed}, {name}: {time.process_time() - begun:.0f} s", flush=True)
        measure_soups(soups, seed)
    replace_figures(arguments.out, render(studies, soups, estimators, arguments.seeds))


if __name__ == "__main__":
    main()
