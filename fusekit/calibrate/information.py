"""Diagonal Fisher information: mean squares of per-example gradients of log-likelihoods."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fusekit.calibrate.models import (
    Batch,
    as_in_use,
    device_of,
    example,
    forward,
    labels_of,
    logits_of,
    mask_of,
    size_of,
    to_device,
)
from fusekit.errors import FusekitError

Estimator = Literal["exact", "sampled", "empirical", "batch_sqrt"]
ESTIMATORS: tuple[Estimator, ...] = ("exact", "sampled", "empirical", "batch_sqrt")


class Information:
    """Running sums of squared gradients of a model's parameters.

    `exact` sums over all classes, weighted by their probability; `sampled` draws one label per
    example (per token of a sequence); `empirical` takes the data's labels (a language model's next
    tokens); `batch_sqrt` squares one gradient per batch, of sqrt(p) log p summed over classes and
    examples: cheap, but not the Fisher information, and dependent on the batch size.

    A model of one output is one of regression, a normal distribution of variance 1 around it:
    `exact` and `sampled` square the gradient of the output, `empirical` that of half the squared
    error, `batch_sqrt` that of the batch's mean squared error; the last two need labels.
    """

    def __init__(self, model: nn.Module, estimator: Estimator, seed: int = 0) -> None:
        if estimator not in ESTIMATORS:
            raise FusekitError(
                f"estimator: found {estimator!r}, expected one of {', '.join(ESTIMATORS)}"
            )
        self.model = model
        self.estimator = estimator
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names = list(self.parameters)
        self.sums = {name: torch.zeros_like(p).float() for name, p in self.parameters.items()}
        self.examples = 0
        self._seed = seed

    def run(self, batch: Batch) -> None:
        """Take in one batch."""
        count = size_of(batch)
        if self.estimator == "batch_sqrt":
            logits = logits_of(forward(self.model, batch))
            if _is_one_number(logits):
                self._add(_squared_errors(logits, batch, self.estimator).mean(), 1.0)
            else:
                logp = logits.log_softmax(-1)
                self._add((logp.exp().detach().sqrt() * logp).sum(), 1.0)
        else:
            for index in range(count):
                self._run_example(example(batch, index))
                self.examples += 1
            return
        self.examples += count

    def results(self) -> dict[str, Tensor]:
        """The mean over examples, by parameter."""
        return {name: total / max(self.examples, 1) for name, total in self.sums.items()}

    def counts(self) -> dict[str, int]:
        """How many examples have been taken in."""
        return {"examples": self.examples}

    def unreached(self) -> list[str]:
        """What a checkpoint holds of the model that has no gradient: frozen weights, buffers."""
        own = [*self.model.named_parameters(), *self.model.named_buffers()]
        return sorted(name for name, x in own if x.is_floating_point() and name not in self.sums)

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Sums and counts, from which measuring can go on."""
        return self.sums, {"examples": self.examples}

    def restore(self, sums: dict[str, Tensor], counts: dict[str, int]) -> None:
        """Go on from an earlier state."""
        for name, total in self.sums.items():
            total.copy_(sums[name])
        self.examples = counts["examples"]

    def _run_example(self, one: Batch) -> None:
        logits = logits_of(forward(self.model, one)).float()
        if _is_one_number(logits):
            known = self.estimator != "empirical"
            self._add(logits.sum() if known else _squared_errors(logits, one, "empirical") / 2, 1.0)
            return
        logp = logits.log_softmax(-1)
        for objective, weight in self._objectives(logp, one):
            self._add(objective, weight)

    def _objectives(self, logp: Tensor, one: Batch) -> Iterator[tuple[Tensor, float]]:
        """Log-likelihoods to differentiate, with the weight of their squared gradients."""
        if self.estimator == "exact":
            if logp.dim() != 2:
                raise FusekitError(
                    "estimator: 'exact' sums over the classes of one prediction per example, and "
                    f"the logits have shape {list(logp.shape)}; use 'sampled' or 'empirical'"
                )
            for label, share in enumerate(logp.exp()[0].tolist()):
                yield logp[0, label], share
            return
        labels, keep = self._labels(logp, one)
        chosen = logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        yield (chosen * keep).sum(), 1.0

    def _labels(self, logp: Tensor, one: Batch) -> tuple[Tensor, Tensor]:
        """A label per prediction, and 1 where the prediction counts."""
        mask = mask_of(one)
        keep = torch.ones(logp.shape[:-1], device=logp.device)
        if logp.dim() == 3 and mask is not None:
            keep = keep * mask
        if self.estimator == "sampled":
            generator = torch.Generator().manual_seed(self._seed + self.examples)
            flat = logp.detach().exp().reshape(-1, logp.shape[-1]).cpu()
            drawn = torch.multinomial(flat, 1, generator=generator)
            return drawn.reshape(logp.shape[:-1]).to(logp.device), keep
        labels = labels_of(one)
        if logp.dim() == 3 and labels is None:
            labels = torch.roll(one["input_ids"], -1, dims=1)
            following = torch.roll(keep, -1, dims=1)
            following[:, -1] = 0
            return labels, keep * following
        labels = _labels(one, "empirical")
        return labels.clamp(min=0), keep * (labels >= 0)

    def _add(self, objective: Tensor, weight: float) -> None:
        gradients: tuple[Any, ...] = torch.autograd.grad(
            objective, list(self.parameters.values()), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(self.sums, gradients, strict=True):
            if gradient is not None:
                self.sums[name] += weight * gradient.float().square()


def _is_one_number(logits: Tensor) -> bool:
    """Whether a model returns one number per example."""
    return logits.dim() == 1 or logits.shape[-1] == 1


def _labels(batch: Batch, estimator: Estimator) -> Tensor:
    labels = labels_of(batch)
    if labels is None:
        raise FusekitError(f"estimator: {estimator!r} needs labels, and the data has none")
    return labels


def _squared_errors(outputs: Tensor, batch: Batch, estimator: Estimator) -> Tensor:
    """Of every example, its labels being numbers."""
    return (outputs.reshape(-1) - _labels(batch, estimator).reshape(-1).float()).square()


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    estimator: Estimator = "exact",
    seed: int = 0,
) -> dict[str, Tensor]:
    """`F = 1/N sum_n E_y (d log p(y | x_n) / d theta)^2`, elementwise, by parameter.

    Gradients are taken example by example, in evaluation mode. A tied parameter is counted once,
    under its first name, with the gradients of all its uses added before they are squared.

    Args:
        model: returns logits (batch, classes) or (batch, positions, classes), or one number each.
        batches: keyword tensors, tensors, or (inputs, labels).
        estimator: whose expectation over labels is taken, see `Information`.
        seed: of sampled labels.

    References:
        "Merging Models with Fisher-Weighted Averaging", arXiv 2111.09832.
    """
    information = Information(model, estimator, seed)
    with as_in_use(model):
        for batch in batches:
            information.run(to_device(batch, device_of(model)))
    return information.results()
