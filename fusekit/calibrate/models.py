"""Calling any model on any batch, and putting it back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusekit.errors import FusekitError

Batch = Any
"""Keyword tensors as of transformers (with `labels` apart), a tensor, or (inputs, labels)."""


def forward(model: nn.Module, batch: Batch) -> Any:
    """The model's output on a batch, its labels left out."""
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key != "labels"})
    if isinstance(batch, (tuple, list)):
        return model(batch[0])
    return model(batch)


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: an attribute, the first of a tuple, or all of it."""
    found: Tensor
    if hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)):
        found = output[0]
    else:
        found = output
    return found


def labels_of(batch: Batch) -> Tensor | None:
    """The labels of a batch, if it has any."""
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def mask_of(batch: Batch) -> Tensor | None:
    """Which positions are text, not padding."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


def size_of(batch: Batch) -> int:
    """How many examples a batch holds."""
    return len(_tensors(batch)[0])


def example(batch: Batch, index: int) -> Batch:
    """A batch of one of a batch's examples."""
    if isinstance(batch, Mapping):
        return {key: value[index : index + 1] for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(value[index : index + 1] for value in batch)
    return batch[index : index + 1]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch whose tensors are on a device."""
    if isinstance(batch, Mapping):
        return {key: value.to(device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(value.to(device) for value in batch)
    return batch.to(device)


def _tensors(batch: Batch) -> list[Tensor]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    return list(batch) if isinstance(batch, (tuple, list)) else [batch]


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter is."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def blocks_of(model: nn.Module, name: str) -> list[nn.Module]:
    """A model's blocks, by the name of their list.

    Raises:
        FusekitError: there is no such list.
    """
    try:
        found = model.get_submodule(name)
    except AttributeError:
        found = None
    if not isinstance(found, (nn.ModuleList, nn.Sequential)) or not len(found):
        raise FusekitError(f"blocks: {name!r} is not a list of blocks of {type(model).__name__}")
    return list(found)


@contextlib.contextmanager
def as_in_use(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no cache of keys and values; restores flags and configuration.

    Raises:
        FusekitError: a compiled model, whose hooks would not be called.
    """
    if hasattr(model, "_orig_mod"):
        raise FusekitError("the model is compiled: measure it before torch.compile")
    modes = {module: module.training for module in model.modules()}
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    model.eval()
    if cached is not None:
        config.use_cache = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        if cached is not None:
            config.use_cache = cached
