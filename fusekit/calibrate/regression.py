"""RegMean++: least squares layer by layer, on inputs that come through the layers merged so far."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fusekit.calibrate.hooks import Capture, is_linear, linear_modules
from fusekit.calibrate.models import Batch, as_in_use, blocks_of, forward, mask_of
from fusekit.errors import FusekitError
from fusekit.methods.matrix.linalg import mean
from fusekit.methods.matrix.regmean import merge


@torch.no_grad()
def regmean_plus_plus(
    merged: nn.Module,
    models: Sequence[nn.Module],
    batches: Sequence[Sequence[Batch]],
    blocks: str,
    *,
    scale: float = 0.9,
) -> None:
    """Merge models into one of their architecture, block by block.

    Everything outside the blocks is averaged first. Then, for block l: every model's data comes
    through the merged part so far, runs through that model's own block l, whose linear layers' Gram
    matrices are taken, padding left out; the block is merged by RegMean (biases, norms: averages)
    and the data moves on through it.

    Args:
        merged: takes the result, its own weights are overwritten.
        models: the models to merge, all alike.
        batches: for every model, its data.
        blocks: name of the list of blocks in the module, such as `model.layers`.
        scale: of the Gram matrices' off-diagonal entries.

    Warns:
        UserWarning: linear layers that no data reached, which are averaged, or whose equations
            needed a ridge.

    Raises:
        FusekitError: no such list of blocks, not as many data sets as models, or one without data.

    References:
        "RegMean++", arXiv 2508.03121.
    """
    if len(batches) != len(models):
        raise FusekitError(f"batches: found {len(batches)} data sets for {len(models)} models")
    if not all(map(len, batches)):
        raise FusekitError("batches: found an empty data set, expected at least one batch for each")
    _average(merged, models, outside=blocks)
    count = len(blocks_of(merged, blocks))
    with contextlib.ExitStack() as stack:
        for module in (merged, *models):
            stack.enter_context(as_in_use(module))
        streams = [[_caught(merged, blocks, batch) for batch in own] for own in batches]
        notes: dict[str, list[str]] = {}
        for index in range(count):
            for name, note in _merge_block(merged, models, blocks, index, streams, scale):
                notes.setdefault(note, []).append(f"{blocks}.{index}.{name}")
            block = blocks_of(merged, blocks)[index]
            streams = [[_next(call, call.run(block)) for call in own] for own in streams]
    for note, names in notes.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(f"regmean_plus_plus: {names[0]}{others}: {note}", stacklevel=2)


@dataclass(frozen=True, eq=False)
class Call:
    """Arguments of a block's forward call, and which of its positions are text (None: all)."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    mask: Tensor | None

    def run(self, block: nn.Module) -> Any:
        return block(*self.arguments, **self.keywords)


def _merge_block(
    merged: nn.Module,
    models: Sequence[nn.Module],
    blocks: str,
    index: int,
    streams: Sequence[Sequence[Call]],
    scale: float,
) -> list[tuple[str, str]]:
    """Merge one block; what there is to say of its layers."""
    notes = []
    target = blocks_of(merged, blocks)[index]
    candidates = [blocks_of(model, blocks)[index] for model in models]
    grams = [_grams(block, calls) for block, calls in zip(candidates, streams, strict=True)]
    parameters = [dict(block.named_parameters()) for block in candidates]
    for name, value in target.named_parameters():
        weights = [own[name].detach() for own in parameters]
        owner = name.removesuffix(".weight")
        if name.endswith(".weight") and all(owner in gram for gram in grams):
            module = target.get_submodule(owner)
            solved = merge(
                weights,
                [gram[owner] for gram in grams],
                scale=scale,
                transposed=not isinstance(module, nn.Linear),
            )
            value.copy_(solved.weight)
            if solved.ridged:
                notes.append((owner, "the data leaves weights undetermined, a ridge was added"))
        else:
            value.copy_(mean(weights))
            if name.endswith(".weight") and is_linear(target.get_submodule(owner)):
                notes.append((owner, "no data reached the layer, it was averaged"))
    return notes


def _grams(block: nn.Module, calls: Sequence[Call]) -> dict[str, Tensor]:
    watched = Capture(block, "gram", linear_modules(block))
    with watched.watching():
        for call in calls:
            watched.mask = call.mask
            call.run(block)
            watched.forget()
    return watched.results()


def _average(merged: nn.Module, models: Sequence[nn.Module], outside: str) -> None:
    """The average of all parameters outside the blocks."""
    inside = re.compile(rf"^{re.escape(outside)}\.\d+\.")
    parameters = [dict(model.named_parameters()) for model in models]
    for name, value in merged.named_parameters():
        if not inside.match(name):
            value.copy_(mean([own[name].detach() for own in parameters]))


class _StopForwardError(Exception):
    """Ends a forward pass once the first block's input is known."""


def _caught(model: nn.Module, blocks: str, batch: Batch) -> Call:
    """What the first block is called with on a batch."""
    calls: list[Call] = []

    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.append(Call(arguments, dict(keywords), mask_of(batch)))
        raise _StopForwardError

    handle = blocks_of(model, blocks)[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with contextlib.suppress(_StopForwardError):
            forward(model, batch)
    finally:
        handle.remove()
    if not calls:
        raise FusekitError(f"blocks: the model's forward pass does not reach {blocks!r}")
    return calls[0]


def _next(call: Call, output: Any) -> Call:
    """The call of the following block, which takes this one's output first."""
    hidden = output[0] if isinstance(output, tuple) else output
    if call.arguments:
        return replace(call, arguments=(hidden, *call.arguments[1:]))
    return replace(call, keywords={**call.keywords, "hidden_states": hidden})
