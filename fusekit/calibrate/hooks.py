"""One engine that watches the inputs of modules and keeps streaming statistics of them.

Modules that are fed the same tensor (query, key and value; gate and up) share one accumulator's
work. Padding is left out. Nothing of the activations themselves is kept.
"""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusekit.calibrate.models import Batch, as_in_use, device_of, forward, mask_of, to_device
from fusekit.errors import FusekitError

SPLIT_COLUMNS = 512
"""A Gram matrix at least this wide is computed by blocks, those below the diagonal left out."""


class Accumulator(ABC):
    """A sum over tokens of what one module is fed, in float64."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.sum = torch.zeros(self.shape(inputs), dtype=torch.float64, device=device)
        self.tokens = 0

    @staticmethod
    @abstractmethod
    def shape(inputs: int) -> tuple[int, ...]:
        """Of the sum, for a module with that many inputs."""

    @abstractmethod
    def measure(self, rows: Tensor) -> Tensor:
        """The sum over rows (tokens, inputs)."""

    def result(self) -> Tensor:
        """The mean over tokens, in float32."""
        return (self.sum / max(self.tokens, 1)).float()


class Gram(Accumulator):
    """Mean of the outer products: (inputs, inputs), symmetric."""

    @staticmethod
    def shape(inputs: int) -> tuple[int, ...]:
        return (inputs, inputs)

    def measure(self, rows: Tensor) -> Tensor:
        width = rows.shape[1]
        if width < SPLIT_COLUMNS:
            return rows.T @ rows
        step = -(-width // 4)
        product = rows.new_zeros((width, width))
        for start in range(0, width, step):
            left = rows[:, start : start + step]
            product[start : start + step, start:] = left.T @ rows[:, start:]
        return product

    def result(self) -> Tensor:
        mean = super().result()
        return mean.triu() + mean.triu(1).T


class Mean(Accumulator):
    """Mean input: (inputs,)."""

    @staticmethod
    def shape(inputs: int) -> tuple[int, ...]:
        return (inputs,)

    def measure(self, rows: Tensor) -> Tensor:
        return rows.sum(0, dtype=torch.float64)


class Norm(Mean):
    """Root mean square of every input: (inputs,)."""

    def measure(self, rows: Tensor) -> Tensor:
        return rows.double().square().sum(0)

    def result(self) -> Tensor:
        return (self.sum / max(self.tokens, 1)).sqrt().float()


KINDS: dict[str, type[Accumulator]] = {"gram": Gram, "mean": Mean, "norm": Norm}


@dataclass
class _Shared:
    """What was computed from the tensor that was seen last."""

    source: Tensor
    sum: Tensor
    tokens: int


class Capture:
    """Accumulators of one kind on named modules.

    Args:
        model: any module.
        kind: `gram`, `mean` or `norm`.
        names: the modules to watch.
    """

    def __init__(self, model: nn.Module, kind: str, names: Sequence[str]) -> None:
        self.kind = kind
        self.model = model
        self.accumulators = {
            name: KINDS[kind](inputs_of(model.get_submodule(name)), device_of(model))
            for name in names
        }
        self._shared: _Shared | None = None
        self._mask: Tensor | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks in place, removed again whatever happens."""
        with contextlib.ExitStack() as stack:
            for name in self.accumulators:
                module = self.model.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(self._hook(name)).remove)
            yield

    @torch.no_grad()
    def run(self, batch: Batch) -> None:
        """Take in one batch, with the hooks in place."""
        self._mask = mask_of(batch)
        forward(self.model, batch)
        self.forget()

    def forget(self) -> None:
        """Let go of the last input: another forward pass may put another one in its memory."""
        self._shared = None

    def results(self) -> dict[str, Tensor]:
        """Every module's statistic; modules that were never called are left out."""
        return {name: own.result() for name, own in self.accumulators.items() if own.tokens}

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Sums and counts, from which measuring can go on."""
        return (
            {name: own.sum for name, own in self.accumulators.items()},
            {name: own.tokens for name, own in self.accumulators.items()},
        )

    def restore(self, sums: dict[str, Tensor], counts: dict[str, int]) -> None:
        """Go on from an earlier state."""
        for name, own in self.accumulators.items():
            own.sum.copy_(sums[name])
            own.tokens = counts[name]

    def _hook(self, name: str) -> Callable[[nn.Module, Any], None]:
        accumulator = self.accumulators[name]

        def hook(module: nn.Module, arguments: Any) -> None:
            source = arguments[0].detach()
            seen = self._shared
            if seen is None or not _same(seen.source, source):
                rows = self._rows(source)
                seen = self._shared = _Shared(source, accumulator.measure(rows), len(rows))
            accumulator.sum += seen.sum
            accumulator.tokens += seen.tokens

        return hook

    def _rows(self, source: Tensor) -> Tensor:
        """(tokens, inputs) in float32, padding left out."""
        rows = source.reshape(-1, source.shape[-1]).float()
        if self._mask is not None and self._mask.shape == source.shape[:-1]:
            rows = rows[self._mask.reshape(-1).bool()]
        return rows


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same memory, unchanged."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a._version == b._version


def is_linear(module: nn.Module) -> bool:
    """Linear layers, GPT-2's transposed ones included."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def inputs_of(module: nn.Module) -> int:
    """How many inputs a linear layer has."""
    if isinstance(module, nn.Linear):
        return module.in_features
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[0]


def linear_modules(model: nn.Module, pattern: str | None = None) -> list[str]:
    """Names of the linear layers, of those only in which a regular expression is found.

    Raises:
        FusekitError: not a regular expression, or no layer has such a name.
    """
    names = [name for name, module in model.named_modules() if is_linear(module)]
    if pattern is None:
        return names
    try:
        chosen = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise FusekitError(
            f"modules: found {pattern!r}, expected a regular expression: {error}"
        ) from None
    if not chosen:
        raise FusekitError(f"modules: no linear layer's name contains {pattern!r}")
    return chosen


def capture(
    model: nn.Module, batches: Iterable[Batch], kind: str = "gram", modules: str | None = None
) -> dict[str, Tensor]:
    """A statistic of the inputs of linear layers over batches.

    Args:
        model: any module; its mode, flags and configuration come back as they were.
        batches: keyword tensors (`input_ids`, `attention_mask`), tensors, or (inputs, labels).
        kind: `gram` (in, in), the mean over tokens of the outer product; `mean` (in,); `norm`
            (in,), the root mean square.
        modules: regular expression of the layers' names; default all.

    Returns:
        Statistic in float32 by name of the layer; layers that were never called are missing.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> capture(nn.Sequential(model), [torch.ones(3, 2)])["0"].tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    if kind not in KINDS:
        raise FusekitError(f"statistic: found {kind!r}, expected one of {', '.join(KINDS)}")
    watched = Capture(model, kind, linear_modules(model, modules))
    with as_in_use(model), watched.watching():
        for batch in batches:
            watched.run(to_device(batch, device_of(model)))
    return watched.results()
