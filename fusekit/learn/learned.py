"""Learned soups: the mixing weights of a model soup trained on held-out batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fusekit.errors import FusekitError


@dataclass(frozen=True)
class LearnedSoup:
    """A soup with its mixing weights.

    Attributes:
        soup: `sum_i alpha_i theta_i` by name.
        names: the tensors that are mixed, in the order of alpha's rows.
        alpha: (tensors, models), or (1, models) for one row for all; rows add up to 1.
        beta: what the logits were multiplied by.
        losses: the loss of every step, before it.
    """

    soup: dict[str, Tensor]
    names: tuple[str, ...]
    alpha: Tensor
    beta: float
    losses: tuple[float, ...]


def learned_soup(
    module: nn.Module,
    models: Sequence[Mapping[str, Tensor]],
    batches: Sequence[tuple[Tensor, Tensor]] | Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int = 5,
    lr: float = 0.05,
    by_layer: bool = True,
    scale_logits: bool = True,
) -> LearnedSoup:
    """Learn `alpha = softmax(raw)` per tensor on `cross_entropy(beta * logits, y)`.

    raw starts equal for all models, so the soup starts as their average; AdamW without weight decay
    learns raw and beta. The module is called with the soup's weights and its own are left as they
    are; it runs in evaluation mode.

    Args:
        module: an architecture whose call on a batch returns logits (batch, classes).
        models: state dicts, all alike. Tensors that are not floating-point come from the first.
        batches: pairs (inputs, labels); gone through `epochs` times.
        lr: of AdamW.
        by_layer: one row of weights per tensor; otherwise one for the whole model.
        scale_logits: learn beta as well, from 1.

    Raises:
        FusekitError: no models, or tensors that do not match.

    References:
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
        increasing inference time", arXiv 2203.05482.
    """
    names = _mixed_names(models)
    stacked = {name: torch.stack([model[name] for model in models]).float() for name in names}
    rest = {name: value for name, value in models[0].items() if name not in stacked}
    rows = len(names) if by_layer else 1
    raw = torch.full((rows, len(models)), 1.0 / len(models), requires_grad=True)
    beta = torch.ones((), requires_grad=scale_logits)
    optimizer = torch.optim.AdamW([raw, beta] if scale_logits else [raw], lr=lr, weight_decay=0.0)

    def mixed() -> dict[str, Tensor]:
        alpha = raw.softmax(dim=1).expand(len(names), -1)
        return {
            name: torch.tensordot(alpha[row], stacked[name], dims=1)
            for row, name in enumerate(names)
        }

    training, losses = module.training, []
    module.eval()
    try:
        for _ in range(epochs):
            for inputs, labels in batches:
                logits = functional_call(module, {**rest, **mixed()}, (inputs,))
                loss = nn.functional.cross_entropy(beta * logits, labels)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(float(loss.detach()))
    finally:
        module.train(training)
    with torch.no_grad():
        soup = {name: value.to(models[0][name].dtype) for name, value in mixed().items()}
        alpha = raw.softmax(dim=1)
    ordered = {name: soup[name] if name in soup else rest[name] for name in models[0]}
    return LearnedSoup(ordered, names, alpha, float(beta.detach()), tuple(losses))


def _mixed_names(models: Sequence[Mapping[str, Tensor]]) -> tuple[str, ...]:
    if not models:
        raise FusekitError("models: found none, expected at least one state dict")
    first = models[0]
    for i, model in enumerate(models[1:], start=1):
        odd = next(
            (name for name in {*first, *model} if name not in first or name not in model), ""
        )
        if odd:
            raise FusekitError(f"models[{i}]: tensor {odd!r} is not in both it and models[0]")
        for name, value in first.items():
            if model[name].shape != value.shape:
                raise FusekitError(
                    f"models[{i}]: tensor {name!r} has shape {list(model[name].shape)}, expected "
                    f"{list(value.shape)} as in models[0]"
                )
    return tuple(name for name, value in first.items() if value.is_floating_point())
