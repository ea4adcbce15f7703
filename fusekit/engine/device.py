"""Where torch computes: a device by its name, refused in a sentence where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusekit.errors import FusekitError, MissingExtraError

if TYPE_CHECKING:
    import torch

LONGEST_REASON = 120
"""Characters of torch's own words that are repeated."""


def torch_device(name: str, purpose: str) -> torch.device:
    """The torch device of that name, once a small tensor has been there.

    Args:
        name: such as `cpu`, `cuda` or `cuda:1`.
        purpose: what needs torch, for the message where it is missing.

    Raises:
        MissingExtraError: torch is missing.
        FusekitError: there is no such device.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise MissingExtraError(purpose, "torch") from None
    try:
        device = torch.device(name)
    except RuntimeError:
        raise FusekitError(f"device: found {name!r}, expected cpu, cuda or cuda:<number>") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            there = f"it has {count}" if count else "no CUDA device is available to it"
            raise FusekitError(
                f"device: {name!r} cannot be used by PyTorch {torch.__version__}: {there}"
            )
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0][:LONGEST_REASON]
        raise FusekitError(f"device: {name!r} cannot be used: {reason}") from None
    return device
