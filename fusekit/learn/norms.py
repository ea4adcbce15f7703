"""Batch normalisation after merging: running statistics of the merged model, not averaged ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusekit.calibrate.models import Batch, as_in_use, device_of, forward, to_device
from fusekit.errors import FusekitError


def reestimate_batch_norms(model: nn.Module, batches: Iterable[Batch]) -> int:
    """Replace the running statistics of a model's batch norms by those of its own activations.

    An average of weights changes what flows through the layers, so that averaged means and
    variances fit none of it. They become the averages over the batches; everything else is left as
    it is.

    Args:
        model: changed in place.
        batches: inputs as of `fusekit.calibrate`, of more than one example each.

    Returns:
        How many layers were re-estimated; without any, the data is not looked at.

    Raises:
        FusekitError: no batches.

    References:
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
        increasing inference time", arXiv 2203.05482.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return 0
    given = list(batches)
    if not given:
        raise FusekitError("batches: found none, expected inputs to estimate batch norms on")
    with torch.no_grad(), as_in_use(model), _estimating(layers):
        for batch in given:
            forward(model, to_device(batch, device_of(model)))
    return len(layers)


@contextlib.contextmanager
def _estimating(layers: Sequence[_BatchNorm]) -> Iterator[None]:
    """Batch norms that start afresh and average over all batches alike."""
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
