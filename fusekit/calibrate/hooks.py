"""One engine that watches the inputs of modules and keeps streaming statistics of them.

Modules that are fed the same tensor (query, key and value; gate and up) share one accumulator.
Inputs are collected until a matrix product is worth its while; padding is left out. Nothing of the
activations themselves is kept.
"""

from __future__ import annotations

import contextlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from fusekit.calibrate.models import Batch, as_in_use, device_of, forward, mask_of, to_device
from fusekit.errors import FusekitError
from fusekit.methods.matrix.linalg import outer

BLOCK_COLUMNS = 4096
"""Gram matrices are computed by blocks of so many rows; those below the diagonal are left out."""

COLLECTED_TOKENS = 1024
"""Inputs are collected up to so many tokens, or as many as a layer has inputs, for one product."""


class Accumulator(ABC):
    """A sum over tokens of what modules are fed, in float64."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.sum = torch.zeros(self.shape(inputs), dtype=torch.float64, device=device)
        self.tokens = 0

    @staticmethod
    @abstractmethod
    def shape(inputs: int) -> tuple[int, ...]:
        """Of the sum, for a module with that many inputs."""

    @staticmethod
    def collected(inputs: int) -> int:
        """Tokens to wait for before they are added."""
        return 0

    @classmethod
    def held_bytes(cls, inputs: int) -> int:
        """Of the sum and of what is waiting to be added to it."""
        return 8 * math.prod(cls.shape(inputs)) + 4 * inputs * cls.collected(inputs)

    @abstractmethod
    def add(self, rows: Tensor) -> None:
        """Take in rows (tokens, inputs)."""

    @classmethod
    def mean(cls, total: Tensor, tokens: int) -> Tensor:
        """The statistic, in float32, of a sum over so many tokens."""
        mean = torch.empty_like(total, dtype=torch.float32)
        return torch.div(total, max(tokens, 1), out=mean)


class Gram(Accumulator):
    """Mean of the outer products: (inputs, inputs), symmetric."""

    @staticmethod
    def shape(inputs: int) -> tuple[int, ...]:
        return (inputs, inputs)

    @staticmethod
    def collected(inputs: int) -> int:
        return max(COLLECTED_TOKENS, inputs)

    def add(self, rows: Tensor) -> None:
        for start in range(0, rows.shape[1], BLOCK_COLUMNS):
            stop = start + BLOCK_COLUMNS
            block = rows[:, start:stop].T
            self.sum[start:stop, start:stop] += outer(block)
            self.sum[start:stop, stop:] += block @ rows[:, stop:]

    @classmethod
    def mean(cls, total: Tensor, tokens: int) -> Tensor:
        mean = super().mean(total, tokens)
        for start in range(0, len(mean), BLOCK_COLUMNS):
            stop = start + BLOCK_COLUMNS
            mean[stop:, start:stop] = mean[start:stop, stop:].T
        return mean


class Mean(Accumulator):
    """Mean input: (inputs,)."""

    @staticmethod
    def shape(inputs: int) -> tuple[int, ...]:
        return (inputs,)

    def add(self, rows: Tensor) -> None:
        self.sum += rows.sum(0, dtype=torch.float64)


class Norm(Mean):
    """Root mean square of every input: (inputs,)."""

    def add(self, rows: Tensor) -> None:
        self.sum += rows.double().square().sum(0)

    @classmethod
    def mean(cls, total: Tensor, tokens: int) -> Tensor:
        return (total / max(tokens, 1)).sqrt().float()


KINDS: dict[str, type[Accumulator]] = {"gram": Gram, "mean": Mean, "norm": Norm}

Together = tuple[str, ...]
"""Modules that are fed the same tensor."""

SEPARATOR = "\n"
"""Between the names of modules that share a sum on disk."""


@dataclass
class _Fed:
    """The tensor that was seen last, as it was then, and the modules that were fed it so far."""

    source: Tensor
    version: int
    rows: Tensor
    modules: list[str]

    def is_fed(self, source: Tensor) -> bool:
        """Whether a tensor is the same memory, unchanged."""
        own = self.source
        return (
            own.data_ptr() == source.data_ptr()
            and own.shape == source.shape
            and own.stride() == source.stride()
            and self.version == source._version
        )


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
        self.names = list(names)
        self._sums: dict[Together, Accumulator] = {}
        self._collected: dict[Together, list[Tensor]] = {}
        self.mask: Tensor | None = None
        """Of the batch that is run, which positions are text; None for all."""
        self._fed: _Fed | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks in place, and NumPy on as many threads as torch, until it ends in whatever way."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(threadpool_limits(torch.get_num_threads(), user_api="blas"))
            for name in self.names:
                module = self.model.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(self._hook(name)).remove)
            yield

    @torch.no_grad()
    def run(self, batch: Batch) -> None:
        """Take in one batch, with the hooks in place."""
        self.mask = mask_of(batch)
        forward(self.model, batch)
        self.forget()

    def forget(self) -> None:
        """Let go of the last input: another forward pass may put another one in its memory."""
        fed, self._fed = self._fed, None
        if fed is not None:
            modules = tuple(fed.modules)
            collected = self._collected.setdefault(modules, [])
            collected.append(fed.rows)
            enough = KINDS[self.kind].collected(fed.rows.shape[1])
            if sum(map(len, collected)) >= enough:
                self._add_up(modules)

    def results(self) -> dict[str, Tensor]:
        """Every module's statistic; modules that were never called are left out."""
        sums, counts = self.state()
        found: dict[str, Tensor] = {}
        means = {key: KINDS[self.kind].mean(total, counts[key]) for key, total in sums.items()}
        for name in self.names:
            keys = [key for key in sums if name in key.split(SEPARATOR)]
            if len(keys) == 1:
                found[name] = means[keys[0]]
            elif keys:  # fed together with others in some calls and not in others
                total = sum((sums[key] for key in keys[1:]), sums[keys[0]])
                found[name] = KINDS[self.kind].mean(total, sum(counts[key] for key in keys))
        return found

    def counts(self) -> dict[str, int]:
        """How many tokens each module has been fed; modules that were never called are left out."""
        _, counts = self.state()
        fed = {
            name: sum(counts[key] for key in counts if name in key.split(SEPARATOR))
            for name in self.names
        }
        return {name: count for name, count in fed.items() if count}

    def unreached(self) -> list[str]:
        """The modules that were never called."""
        sums, _ = self.state()
        return sorted(set(self.names).difference(*(key.split(SEPARATOR) for key in sums)))

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Sums and counts, from which measuring can go on, by the modules that share them."""
        self.forget()
        for modules in list(self._collected):
            self._add_up(modules)
        sums = {SEPARATOR.join(modules): own.sum for modules, own in self._sums.items()}
        return sums, {SEPARATOR.join(modules): own.tokens for modules, own in self._sums.items()}

    def restore(self, sums: dict[str, Tensor], counts: dict[str, int]) -> None:
        """Go on from an earlier state."""
        for key, total in sums.items():
            own = self._accumulator(tuple(key.split(SEPARATOR)))
            own.sum.copy_(total)
            own.tokens = counts[key]

    def _accumulator(self, modules: Together) -> Accumulator:
        if modules not in self._sums:
            inputs = inputs_of(self.model.get_submodule(modules[0]))
            self._sums[modules] = KINDS[self.kind](inputs, device_of(self.model))
        return self._sums[modules]

    def _add_up(self, modules: Together) -> None:
        """Add what has been collected of modules to their statistic."""
        collected = self._collected.pop(modules)
        rows = collected[0] if len(collected) == 1 else torch.cat(collected)
        own = self._accumulator(modules)
        own.add(rows)
        own.tokens += len(rows)

    def _hook(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, arguments: Any) -> None:
            source = arguments[0].detach()
            fed = self._fed
            if fed is not None and name not in fed.modules and fed.is_fed(source):
                fed.modules.append(name)
                return
            self.forget()
            self._fed = _Fed(source, source._version, self._rows(source), [name])

        return hook

    def _rows(self, source: Tensor) -> Tensor:
        """(tokens, inputs) in float32, padding left out; a copy, which may outlive the input."""
        rows = source.reshape(-1, source.shape[-1])
        if self.mask is not None and self.mask.shape == source.shape[:-1]:
            return rows[self.mask.reshape(-1).bool()].float()
        return rows.to(torch.float32, copy=True)


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
