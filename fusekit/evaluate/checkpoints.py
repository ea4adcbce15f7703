"""Reading what is to be scored: the whole tensors of small checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusekit.checkpoint.folder import open_checkpoint
from fusekit.checkpoint.source import TensorSource
from fusekit.errors import CheckpointError


def read_tensor(source: TensorSource, name: str) -> NDArray[Any]:
    """A whole tensor as it is stored."""
    info = source.tensors[name]
    values = np.empty(info.shape, dtype=info.dtype.numpy)
    source.read_into(name, 0, info.size, values.reshape(-1).view(np.uint8).data)
    return values


def read_finite(source: TensorSource, name: str, dtype: Any = np.float64) -> NDArray[Any]:
    """A whole floating-point tensor, converted.

    Raises:
        CheckpointError: it is not floating point, or holds NaN or Inf.
    """
    info = source.tensors[name]
    if not info.dtype.is_float:
        raise CheckpointError(
            f"{source.where(name)}: tensor {name!r} is {info.dtype.name}, expected floating point"
        )
    values = read_tensor(source, name).astype(dtype)
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise CheckpointError(
            f"{source.where(name)}: tensor {name!r} holds {bad} NaN or Inf, expected finite values"
        )
    return values


def load_into(model: Any, checkpoint: Path) -> Any:
    """A torch module with a checkpoint's tensors, which must be its own by name and shape.

    Raises:
        CheckpointError: a tensor that is missing, unknown, of another shape or not finite.
    """
    import torch

    source = open_checkpoint(str(checkpoint)).source
    try:
        own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        for name in [*own, *source.tensors]:
            found = source.tensors.get(name)
            if found is None or own.get(name) != found.shape:
                expected = list(own[name]) if name in own else "no such tensor"
                shape = list(found.shape) if found else "no such tensor"
                raise CheckpointError(
                    f"{source.label}: tensor {name!r}: found {shape}, expected {expected}"
                )
        model.load_state_dict(
            {name: torch.from_numpy(read_finite(source, name, np.float32)) for name in own}
        )
    finally:
        source.close()
    return model.eval()
