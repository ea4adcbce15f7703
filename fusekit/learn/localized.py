"""Localize-and-Stitch's learned masks: which entries of a fine-tuning's update its task needs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusekit.calibrate.models import (
    Batch,
    as_in_use,
    device_of,
    forward,
    labels_of,
    logits_of,
    mask_of,
    to_device,
)
from fusekit.errors import FusekitError

INITIAL_LOGIT = 3.0
"""Of entries that are kept at first; the others start at its negative."""


@dataclass(frozen=True)
class LearnedMask:
    """What was learned.

    Attributes:
        kept: by name of the parameter, whether each entry's update is kept.
        losses: the batch's loss under the soft mask before every step.
    """

    kept: Mapping[str, Tensor]
    losses: tuple[float, ...]

    @property
    def density(self) -> float:
        """Share of the entries that is kept."""
        return sum(int(own.sum()) for own in self.kept.values()) / sum(
            own.numel() for own in self.kept.values()
        )

    def apply(self, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tuned model with everything that is not kept as in the base."""
        return {
            name: torch.where(self.kept[name], value, base[name]) if name in self.kept else value
            for name, value in tuned.items()
        }


def learn_mask(
    module: nn.Module,
    base: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    density: float = 0.3,
    epochs: int = 2,
    lr: float = 1.0,
    penalty: float = 1.0,
) -> LearnedMask:
    """Learn a binary mask of a fine-tuning's update delta = tuned - base on its task's data.

    Minimises `loss(base + sigmoid(S) * delta) + penalty * mean(sigmoid(S))` over logits S, which
    start at +3 for the largest |delta| of the whole model and at -3 elsewhere; what ends above 0 is
    kept. The authors take one plain gradient step an epoch, of a size (1e7 to 1e8) that fits large
    models; here every batch is a step of Adam, whose size does not depend on the gradient's.

    Args:
        module: the fine-tuned model, whose call on a batch returns logits; it comes back as it was.
        base: the base's parameters by the module's names, of the same shapes.
        batches: of the task, with labels; without any, the next tokens of `input_ids` count.
        density: share of the entries that starts as kept, more than 0 and at most 1.
        epochs: how often to go through the batches.
        lr: size of a step, in logits.
        penalty: on the share that is kept.

    Raises:
        FusekitError: an argument out of its range, no batches, or a base that lacks a parameter.

    References:
        "Localize-and-Stitch: Efficient Model Merging via Sparse Task Arithmetic", arXiv 2408.13656.
    """
    if not 0 < density <= 1:
        raise FusekitError(f"density: found {density}, expected more than 0 and at most 1")
    if not batches:
        raise FusekitError("batches: found none, expected at least one")
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for name, value in parameters.items():
        if name not in base or base[name].shape != value.shape:
            found = list(base[name].shape) if name in base else "none"
            raise FusekitError(f"base: {name!r}: found {found}, expected {list(value.shape)}")
    tuned = {name: value.detach().clone() for name, value in parameters.items()}
    start = {name: base[name].to(value) for name, value in tuned.items()}
    deltas = {name: value - start[name] for name, value in tuned.items()}
    logits = _initial(deltas, density)
    entries = sum(delta.numel() for delta in deltas.values())
    optimizer = torch.optim.Adam(list(logits.values()), lr=lr)
    losses = []
    try:
        with as_in_use(module):
            for batch in itertools.chain.from_iterable(itertools.repeat(batches, epochs)):
                with torch.no_grad():
                    for name, value in parameters.items():
                        value.copy_(start[name] + logits[name].sigmoid() * deltas[name])
                module.zero_grad()
                loss = _loss(module, to_device(batch, device_of(module)))
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(float(loss.detach()))
                for name, own in logits.items():
                    share = own.sigmoid()
                    pull = parameters[name].grad
                    change = deltas[name] * pull if pull is not None else 0.0
                    own.grad = (change + penalty / entries) * share * (1 - share)
                optimizer.step()
    finally:
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(tuned[name])
                value.grad = None
    return LearnedMask({name: own > 0 for name, own in logits.items()}, tuple(losses))


def _initial(deltas: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Logits that keep the largest entries of the whole update."""
    sizes = torch.cat([delta.abs().flatten() for delta in deltas.values()])
    kept = max(1, int(density * sizes.numel()))
    threshold = sizes.kthvalue(sizes.numel() - kept + 1).values
    return {
        name: torch.where(delta.abs() >= threshold, INITIAL_LOGIT, -INITIAL_LOGIT)
        for name, delta in deltas.items()
    }


def _loss(module: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the labels, or of the next tokens where a batch has none."""
    logits, labels = logits_of(forward(module, batch)), labels_of(batch)
    if labels is None:
        tokens, mask = batch["input_ids"], mask_of(batch)
        labels = tokens if mask is None else tokens.masked_fill(mask == 0, -100)
        logits, labels = logits[:, :-1], labels[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
