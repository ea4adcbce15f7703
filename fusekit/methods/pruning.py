"""Ways to thin task vectors out. A pruning changes a block's rows in place."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from fusekit import kernels
from fusekit.kernels import GRANULE
from fusekit.kernels.packed import Packed, Steps
from fusekit.methods.base import (
    Additive,
    Block,
    Cumulative,
    OrderStatistics,
    OrderValue,
    Remark,
    Request,
    Scope,
    ShareOfNonzero,
    Summary,
    Tensor,
)
from fusekit.methods.summaries import delta_sums, fill_unknown

if TYPE_CHECKING:
    from fusekit.methods.base import Array


@dataclass(frozen=True)
class Step:
    """A pruning of one model as `kernels.tiles` knows it; `kind` by its name there."""

    kind: str
    model: int
    value: float = 0.0
    key: int = 0
    cut: Cut | None = None
    flags: Array | None = None


class Pruning(ABC):
    """Zeroes or scales entries of the models' rows."""

    def unit(self, shape: tuple[int, ...]) -> int:
        """Blocks must be whole multiples of this many elements."""
        return 1

    @abstractmethod
    def apply(self, block: Block) -> None:
        """Change the block's rows in place."""

    def step(self, tensor: Tensor) -> Step | None:
        """The same as a step of a program, where there is one."""
        return None


@dataclass(frozen=True, eq=False)
class RowPruning(Pruning):
    """A pruning of one model's row."""

    model: int

    def apply(self, block: Block) -> None:
        self.thin(block.rows[self.model], block)

    @abstractmethod
    def thin(self, row: Array, block: Block) -> None:
        """Change the model's row in place."""


LARGE_UPDATE = 0.03
"""Mean magnitude of a task vector from which on dropping entries at random does harm."""

Prunings = tuple[Pruning, ...]
"""Applied in order."""


def prune(block: Block, prunings: Prunings) -> Array:
    """The block's rows after the prunings."""
    for pruning in prunings:
        pruning.apply(block)
    return block.rows


@dataclass(frozen=True)
class Program:
    """Prunings in the form that `kernels.tiles` runs on packed operands."""

    kinds: Array
    values: Array
    keys: Array
    flags: Array
    cuts: tuple[tuple[int, Cut], ...]
    only_cuts: bool
    """Whether it does nothing but cut the small or the large entries off."""

    def steps(self, block: Block) -> Steps:
        """The steps for a block."""
        import numpy as np

        left = np.zeros(len(self.kinds), np.int64)
        for number, cut in self.cuts:
            left[number] = cut.left(block.start)
        return Steps(self.kinds, self.values, self.keys, left, self.flags)

    def leave(self, left: Array) -> None:
        """Let cuts know what is left of their ties behind a block."""
        for number, cut in self.cuts:
            cut.leave(int(left[number]))

    def kept_factors(self) -> Array | None:
        """By model, what is multiplied by; None if it does more than keep what is flagged first."""
        import numpy as np

        factors = np.ones(len(self.flags), np.float32)
        for (kind, model), value in zip(self.kinds.tolist(), self.values.tolist(), strict=True):
            if kind == kernels.tiles.SCALE and len(factors) and factors[model] == 1.0:
                factors[model] = value
            elif kind != kernels.tiles.KEEP_PACKED:
                return None
        return factors if len(factors) else None

    @contextmanager
    def on(self, block: Block) -> Iterator[Steps]:
        """The steps for a block; afterwards cuts know what is left of their ties."""
        steps = self.steps(block)
        yield steps
        self.leave(steps.left)

    def encode(
        self,
        block: Block,
        out: Array,
        merge: Callable[[Packed, Steps, Array], int],
        merge_tile: Callable[[Packed, int, Steps, Array], None],
    ) -> bool:
        """Merge a bfloat16 block in registers, and the runs that these leave over by tiles.

        `merge` takes operands, steps and room for the result, and returns how far it came;
        `merge_tile`, which is told the position in the tensor too, merges a run to float32. False
        where a value is not finite.
        """
        packed, codecs, done = block.packed, kernels.codecs, 0
        assert packed is not None
        steps = self.steps(block)
        while True:
            rest = packed.behind(done)
            done += merge(rest, steps, out[done:])
            if done == block.size:
                self.leave(steps.left)
                return True
            run = out[done : done + kernels.trimmed.CHUNK]
            row = block.scratch("run", (run.size,), "float32")
            merge_tile(packed.behind(done), block.start + done, steps, row)
            if packed.special.any() or codecs.count_nonfinite(row):
                return False
            if codecs.encode_bf16(row, run):
                return False
            done += run.size


def _compiled(tensor: Tensor, prunings: Prunings) -> Program | None:
    import numpy as np

    steps = [pruning.step(tensor) for pruning in prunings]
    known = [step for step in steps if step is not None]
    if len(known) < len(steps):
        return None
    kinds = kernels.tiles
    flags = next((step.flags for step in known if step.flags is not None), None)
    return Program(
        np.array([(getattr(kinds, s.kind), s.model) for s in known], np.int64).reshape(-1, 2),
        np.array([step.value for step in known], np.float64),
        np.array([step.key for step in known], np.uint64),
        np.empty((0, 0), np.uint8) if flags is None else flags,
        tuple((number, s.cut) for number, s in enumerate(known) if s.cut is not None),
        all(step.kind in kernels.trimmed.STEPS for step in known),
    )


@dataclass(frozen=True, eq=False)
class OnPruned(Request):
    """A request whose rows are task vectors after prunings."""

    deltas: ClassVar[bool] = True

    runs_programs: ClassVar[bool] = False
    """Whether packed blocks are worked on by the prunings' program."""

    prunings: Prunings

    @property
    def in_registers(self) -> bool:  # type: ignore[override]
        steps = (type(pruning).step for pruning in self.prunings)
        return self.runs_programs and Pruning.step not in steps

    def unit(self, shape: tuple[int, ...]) -> int:
        return max((pruning.unit(shape) for pruning in self.prunings), default=1)

    @cached_property
    def _programs(self) -> list[Program | None]:
        return []

    @cached_property
    def _drops(self) -> list[Drops | None]:
        return []

    def program(self, block: Block) -> Program | None:
        """The prunings as a program, where they and the block's operands allow one."""
        if block.packed is None:
            return None
        if not self._programs:
            self._programs.append(_compiled(block.tensor, self.prunings))
        return self._programs[0]

    def drops(self, block: Block) -> Drops | None:
        """The prunings as random drops, where they are nothing else."""
        if not self._drops:
            self._drops.append(_random_drops(block.tensor, self.prunings))
        return self._drops[0]


@dataclass(frozen=True, eq=False)
class Scale(RowPruning):
    """Multiply what is left."""

    factor: float

    def thin(self, row: Array, block: Block) -> None:
        row *= row.dtype.type(self.factor)

    def step(self, tensor: Tensor) -> Step:
        return Step("SCALE", self.model, self.factor)


@dataclass(frozen=True, eq=False)
class RandomDrop(RowPruning):
    """Keep each entry with probability `density`, or where the user's mask says so."""

    density: float

    def thin(self, row: Array, block: Block) -> None:
        import numpy as np

        mask = explicit_mask(block.tensor, self.model)
        if mask is not None:
            row *= mask[block.start : block.start + row.size]
        elif self.density < 1.0:
            key = np.uint64(block.tensor.keys[self.model])
            kernels.random.drop(row, self.density, key, block.start)

    def step(self, tensor: Tensor) -> Step | None:
        if explicit_mask(tensor, self.model) is not None:
            return None
        return Step("DROP", self.model, self.density, tensor.keys[self.model])


def explicit_mask(tensor: Tensor, model: int) -> Array | None:
    """The keep mask the user gave for a model's tensor, flat, if any."""
    return tensor.masks[model] if tensor.masks else None


@dataclass(frozen=True, eq=False)
class AddBase(RowPruning):
    """Go from the task vector to the model's own weights: what follows prunes those."""

    def thin(self, row: Array, block: Block) -> None:
        row += block.base


@dataclass(frozen=True, eq=False)
class SubtractBase(RowPruning):
    """Go back to the task vector."""

    def thin(self, row: Array, block: Block) -> None:
        row -= block.base


@dataclass(frozen=True, eq=False)
class KeepAbove(RowPruning):
    """Keep entries whose magnitude exceeds a threshold."""

    threshold: float

    def thin(self, row: Array, block: Block) -> None:
        kernels.order.keep_above(row, row.dtype.type(self.threshold))

    def step(self, tensor: Tensor) -> Step:
        return Step("KEEP_ABOVE", self.model, self.threshold)


@dataclass(frozen=True, eq=False)
class Cut:
    """A place in the order of a row's magnitudes, largest first, equal ones by position.

    The entries before the cut are those above `threshold` and the first `ties` of those equal to
    it; without `ties`, all of those. `ties_before` holds, per granule of the tensor, how many equal
    entries came before it; without it, blocks must come in order and the cut counts for itself.
    """

    threshold: float
    ties: int | None = None
    ties_before: Array | None = None
    _left: list[int] = field(default_factory=lambda: [0])

    def left(self, start: int) -> int:
        """Entries equal to the threshold that lie before the cut, from element `start` on."""
        assert self.ties is not None
        if self.ties_before is not None:
            return max(self.ties - int(self.ties_before[start // GRANULE]), 0)
        return self.ties if start == 0 else self._left[0]

    def leave(self, left: int) -> None:
        """Remember how many are left behind the block just cut."""
        self._left[0] = left

    def keep_before(self, row: Array, start: int) -> None:
        """Zero the entries behind the cut; `row` holds elements start, start + 1, ..."""
        threshold = row.dtype.type(self.threshold)
        if self.ties is None:
            kernels.order.keep_at_least(row, threshold)
            return
        left = self.left(start)
        self.leave(left - kernels.order.keep_first(row, threshold, left))

    def drop_before(self, row: Array, start: int) -> None:
        """Zero the entries before the cut."""
        threshold = row.dtype.type(self.threshold)
        if self.ties is None:
            kernels.order.drop_at_least(row, threshold)
            return
        left = self.left(start)
        self.leave(left - kernels.order.drop_first(row, threshold, left))


@dataclass(frozen=True, eq=False)
class KeepLargest(RowPruning):
    """Keep the entries before a cut."""

    cut: Cut

    def thin(self, row: Array, block: Block) -> None:
        self.cut.keep_before(row, block.start)

    def step(self, tensor: Tensor) -> Step:
        if self.cut.ties is None:
            return Step("KEEP_AT_LEAST", self.model, self.cut.threshold)
        return Step("KEEP_FIRST", self.model, self.cut.threshold, cut=self.cut)


@dataclass(frozen=True, eq=False)
class DropLargest(RowPruning):
    """Drop the entries before a cut."""

    cut: Cut

    def thin(self, row: Array, block: Block) -> None:
        self.cut.drop_before(row, block.start)

    def step(self, tensor: Tensor) -> Step:
        if self.cut.ties is None:
            return Step("DROP_AT_LEAST", self.model, self.cut.threshold)
        return Step("DROP_FIRST", self.model, self.cut.threshold, cut=self.cut)


@dataclass(frozen=True, eq=False)
class Ordered(OnPruned, OrderStatistics):
    """Largest values of some rows. `wanted` has, per row, the ranks of interest (1 the largest)."""

    wanted: tuple[tuple[int | ShareOfNonzero, ...], ...]
    scope: Scope = "group"
    sampled: bool = False

    @property
    def ranks(self) -> tuple[tuple[int | ShareOfNonzero, ...], ...]:
        return self.wanted

    def group_key(self) -> tuple[Any, ...]:
        return (type(self), self.wanted, self.sampled)


class Magnitudes(Ordered):
    """Largest magnitudes of the task vectors, one row per model."""

    runs_programs: ClassVar[bool] = True

    def values(self, block: Block) -> Array:
        return prune(block, self.prunings)

    def plain(self, block: Block) -> Packed | None:
        """The operands of bfloat16 models whose task vectors are not pruned."""
        return None if self.prunings else block.bfloat16

    def collect(self, block: Block, keys: Array, at: int) -> bool:
        packed = self.plain(block)
        if packed is None:
            return False
        kernels.direct.magnitudes(packed.bits, packed.start, block.size, keys, at)
        return True

    def tally(self, block: Block, brackets: Array, bins: Array, above: Array) -> bool:
        program, packed = self.program(block), block.packed
        if program is None or packed is None:
            return False
        counts, done = (brackets, bins, above), 0
        if self.plain(block) is not None:
            done = kernels.direct.count_brackets(packed.bits, packed.start, block.size, *counts)
            if done == block.size:
                return True
        rest = packed.behind(done), block.size - done, block.start + done
        with program.on(block) as steps:
            kernels.tiles.count_brackets(*rest, steps, *counts, block.tensor.models)
        return True


class Variances(Ordered):
    """Largest variances over the models: a single row."""

    def values(self, block: Block) -> Array:
        packed = block.packed
        if packed is None or self.prunings:
            return variances_of(prune(block, self.prunings), block)
        out = block.scratch("variance", (1, block.size), "float32")
        done = 0
        if block.bfloat16 is not None:
            done = kernels.direct.variance(packed.bits, packed.start, out[0])
        if done < block.size:
            kernels.tiles.variance(packed.behind(done), block.tensor.models, out[0, done:])
        return out

    def tally(self, block: Block, brackets: Array, bins: Array, above: Array) -> bool:
        packed, counts = block.bfloat16, (brackets, bins, above)
        if packed is None or self.prunings:
            return False
        place = packed.bits, packed.start, block.size
        done = kernels.selected.count_brackets(*place, *counts)
        if done < block.size:
            rest = block.scratch("variance", (1, block.size - done), "float32")
            kernels.tiles.variance(packed.behind(done), block.tensor.models, rest[0])
            kernels.order.count_brackets(rest.view("uint32"), *counts)
        return True


def variances_of(rows: Array, block: Block) -> Array:
    """(1, m) population variances over decoded rows."""
    out = block.scratch("variance", (1, rows.shape[1]), rows.dtype)
    kernels.thin.variance(rows, out[0])
    return out


@dataclass(frozen=True, eq=False)
class TiesBefore(Cumulative):
    """Per (row, threshold), how many entries equal to the threshold come before each granule."""

    deltas: ClassVar[bool] = True

    order: Ordered
    thresholds: tuple[tuple[int, float], ...]

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        return self.order.scope

    def width(self, tensor: Tensor) -> int:
        return len(self.thresholds)

    def group_key(self) -> tuple[Any, ...]:
        return (TiesBefore, self.order.group_key(), self.thresholds)

    def measure(self, block: Block, out: Array) -> None:
        import numpy as np

        packed = self.order.plain(block) if isinstance(self.order, Magnitudes) else None
        if packed is not None:
            models = np.array([row for row, _ in self.thresholds])
            keys = np.array([value for _, value in self.thresholds], np.float32).view(np.uint32)
            kernels.direct.count_equal(packed.bits, packed.start, block.size, models, keys, out)
            return
        rows = self.order.values(block)
        for grain in range(len(out)):
            part = rows[:, grain * GRANULE : (grain + 1) * GRANULE]
            for column, (row, threshold) in enumerate(self.thresholds):
                equal = part.dtype.type(threshold)
                out[grain, column] = kernels.order.count_equal(part[row], equal)


@dataclass(frozen=True)
class Drops:
    """Random drops of all models, and what the kept entries are multiplied by."""

    keys: Array
    densities: Array
    factors: Array

    @property
    def scales(self) -> bool:
        """Whether any factor is not 1."""
        return bool((self.factors != 1.0).any())


def _random_drops(tensor: Tensor, prunings: Prunings) -> Drops | None:
    """The prunings where each model is dropped from and then scaled once at most."""
    import numpy as np

    densities, factors = [1.0] * tensor.models, [1.0] * tensor.models
    for pruning in prunings:
        if isinstance(pruning, Scale) and factors[pruning.model] == 1.0:
            factors[pruning.model] = pruning.factor
            continue
        if not isinstance(pruning, RandomDrop) or densities[pruning.model] != 1.0:
            return None
        if explicit_mask(tensor, pruning.model) is not None:
            return None
        densities[pruning.model] = pruning.density
    return Drops(
        np.array(tensor.keys, np.uint64), np.array(densities), np.array(factors, np.float32)
    )


def selected(prunings: Prunings, start: int) -> tuple[Cut, Array] | None:
    """(the cut, equal variances left, -1: all) where nothing but positions are kept."""
    import numpy as np

    if len(prunings) != 1:
        return None
    (pruning,) = prunings
    if not isinstance(pruning, KeepVarying):
        return None
    cut = pruning.cut
    return cut, np.array([-1 if cut.ties is None else cut.left(start)])


def _add_up_in_registers(
    block: Block, request: OnPruned, what: int, unpruned: bool, out: Array
) -> bool:
    """`add_up_pruned` where there is a kernel for bfloat16 models; whether all sums are known.

    What is not known is not finite.
    """
    import numpy as np

    out[:] = np.nan
    packed = block.bfloat16
    if packed is None:
        return False
    bits = packed.bits, packed.start, block.size
    if what == kernels.norms.MAGNITUDES and unpruned:
        drops = request.drops(block)
        if drops is None or drops.scales:
            return False
        kernels.direct.drop_sums(*bits, block.start, drops.keys, drops.densities, out)
        return bool(np.isfinite(out).all())
    if what != kernels.norms.SQUARES or unpruned:
        return False
    selection = selected(request.prunings, block.start)
    if selection is not None:
        cut, left = selection
        if not kernels.selected.squares(*bits, cut.threshold, left, out):
            return False
        cut.leave(int(left[0]))
        return True
    program = request.program(block)
    if program is None or not program.only_cuts:
        return False
    steps = program.steps(block)
    if not kernels.trimmed.squares(*bits, steps, out):
        return False
    program.leave(steps.left)
    return True


def add_up_pruned(block: Block, request: OnPruned, what: int, unpruned: bool, out: Array) -> None:
    """Sums of the pruned task vectors per grain and model; `unpruned` puts those before in front.

    `what` is one of `kernels.norms`' sums.
    """
    grain = request.grain(block.tensor.shape)
    if not request.prunings:
        delta_sums(block, what, grain, out[:, -block.tensor.models :])
        if unpruned:
            out[:, : block.tensor.models] = out[:, -block.tensor.models :]
        return
    if _add_up_in_registers(block, request, what, unpruned, out):
        return
    slowly = block.scratch("sums", out.shape, out.dtype)
    _add_up_decoded(block, request, what, unpruned, grain, slowly)
    fill_unknown(out, slowly)


def _add_up_decoded(
    block: Block, request: OnPruned, what: int, unpruned: bool, grain: int, out: Array
) -> None:
    """`add_up_pruned` of operands of any type."""
    program, packed = request.program(block), block.packed
    if program is not None and packed is not None and grain == GRANULE:
        with program.on(block) as steps:
            kernels.tiles.sums(packed, block.size, block.start, steps, what, unpruned, out)
        return
    n, sums = block.tensor.models, kernels.norms.sums
    if unpruned:
        sums(block.rows, what, grain, out[:, :n])
        out = out[:, n:]
    sums(prune(block, request.prunings), what, grain, out)


@dataclass(frozen=True, eq=False)
class PrunedSums(OnPruned, Additive):
    """sum |v| of every task vector before and after pruning: (2, models)."""

    runs_programs: ClassVar[bool] = True

    scope: Scope = "tensor"

    def width(self, tensor: Tensor) -> int:
        return 2 * tensor.models

    def group_key(self) -> type:
        return PrunedSums

    def measure(self, block: Block, out: Array) -> None:
        add_up_pruned(block, self, kernels.norms.MAGNITUDES, True, out)

    def result(self, total: Array) -> Array:
        return total.reshape(2, -1)


@dataclass(frozen=True, eq=False)
class KeepVarying(Pruning):
    """Keep, in all models, the positions whose variance over the models lies before a cut."""

    cut: Cut

    def apply(self, block: Block) -> None:
        chosen = variances_of(block.rows, block)[0]
        self.cut.keep_before(chosen, block.start)
        kernels.thin.keep_where(chosen, block.rows)

    def step(self, tensor: Tensor) -> Step:
        if self.cut.ties is None:
            return Step("KEEP_VARYING", 0, self.cut.threshold)
        return Step("KEEP_FIRST_VARYING", 0, self.cut.threshold, cut=self.cut)


def exact_cuts(
    tensor: Tensor, order: Ordered
) -> Generator[Summary, Any, tuple[tuple[Cut, ...], ...]]:
    """Per row and wanted rank k, the cut behind exactly k entries."""
    found: Sequence[tuple[OrderValue, ...]] = yield order
    places = [(row, value) for row, values in enumerate(found) for value in values]
    # Entries that are zero anyway need no choice among them.
    split = [
        value.value != 0.0 and value.greater + value.equal != value.rank for _, value in places
    ]
    before = None
    if any(split) and not tensor.in_order:
        before = yield TiesBefore(order, tuple((row, value.value) for row, value in places))
    cuts: list[list[Cut]] = [[] for _ in order.wanted]
    for column, (row, value) in enumerate(places):
        cut = Cut(value.value, None if value.rank else 0)
        if split[column]:
            ties = value.rank - value.greater
            cut = Cut(value.value, ties, None if before is None else before[:, column])
        cuts[row].append(cut)
    return tuple(map(tuple, cuts))


def survivors(density: float, size: int) -> int:
    """int(density * size), but at least one: a small tensor does not vanish by rounding."""
    if density <= 0.0:
        return 0
    return max(1, int(density * size)) if density < 1.0 else size


def emptied(densities: Sequence[float]) -> Prunings:
    """Zeroes the models of which nothing is to be kept."""
    return tuple(Scale(i, 0.0) for i, density in enumerate(densities) if density <= 0.0)


def trim_exact(
    tensor: Tensor, densities: Sequence[float], first: Prunings
) -> Generator[Summary, Any, Prunings]:
    """Keep exactly max(1, int(density * D)) entries per model, ties by lowest position first."""
    size = tensor.group_size
    counts = [survivors(density, size) for density in densities]
    first = (*first, *emptied(densities))
    wanted = tuple((count,) if 0 < count < size else () for count in counts)
    if not any(wanted):
        return first
    cuts = yield from exact_cuts(tensor, Magnitudes(first, wanted))
    return (*first, *(KeepLargest(i, own[0]) for i, own in enumerate(cuts) if own))


def trim_two_sided(
    tensor: Tensor, densities: Sequence[float], gammas: Sequence[float]
) -> Generator[Summary, Any, Prunings]:
    """Drop the int(gamma * D) largest entries and keep the int(density * D) that follow.

    Where the two do not fit together the density wins; a density of 1 or more prunes nothing.
    """
    size = tensor.group_size
    if any(g + d > 1.0 > d for g, d in zip(gammas, densities, strict=True)):
        yield Remark("density + gamma exceeds 1: gamma gives way")
    counts = [survivors(density, size) for density in densities]
    tops = [min(int(gamma * size), size - c) for gamma, c in zip(gammas, counts, strict=True)]
    wanted = tuple(
        tuple(rank for rank in (top + count, top) if 0 < rank < size) if count else ()
        for top, count in zip(tops, counts, strict=True)
    )
    prunings: list[Pruning] = list(emptied(densities))
    if not any(wanted):
        return tuple(prunings)
    cuts = yield from exact_cuts(tensor, Magnitudes((), wanted))
    for model, (ranks, own) in enumerate(zip(wanted, cuts, strict=True)):
        for rank, cut in zip(ranks, own, strict=True):
            prunings.append((KeepLargest if rank > tops[model] else DropLargest)(model, cut))
    return tuple(prunings)


def trim_threshold(
    tensor: Tensor, dropped: Sequence[int], first: Prunings
) -> Generator[Summary, Any, Prunings]:
    """Keep entries of at least the dropped[i]-th smallest magnitude, all ties included."""
    size = tensor.group_size
    if not any(dropped):
        return first
    largest: Sequence[tuple[OrderValue, ...]] = yield Magnitudes(
        first, tuple((size - k + 1,) if k else () for k in dropped)
    )
    return (
        *first,
        *(KeepLargest(i, Cut(values[0].value)) for i, values in enumerate(largest) if values),
    )


def drop_smallest(
    tensor: Tensor, densities: Sequence[float], first: Prunings
) -> Generator[Summary, Any, tuple[RowPruning, ...]]:
    """Drop entries not above the int((1 - density) * D)-th smallest magnitude of the tensor."""
    # 1 - 0.9 is a little less than 0.1.
    dropped = [int(tensor.size * (1.0 - density) + 1e-6) for density in densities]
    if not any(dropped):
        return ()
    largest: Sequence[tuple[OrderValue, ...]] = yield Magnitudes(
        first, tuple((tensor.size - k + 1,) if k else () for k in dropped), scope="tensor"
    )
    return tuple(KeepAbove(i, values[0].value) for i, values in enumerate(largest) if values)


def drop_random(tensor: Tensor, densities: Sequence[float]) -> tuple[RandomDrop, ...]:
    """Keep every entry with its model's density as probability, or by the masks given."""
    return tuple(
        RandomDrop(i, density)
        for i, density in enumerate(densities)
        if density < 1.0 or explicit_mask(tensor, i) is not None
    )


def keep_most_varying(tensor: Tensor, share: float) -> Generator[Summary, Any, Prunings]:
    """Keep the int(share * varying) positions whose variance over the models is largest.

    `varying` counts the positions that are not the same in all models. A share of 1 or more prunes
    nothing, one of 0 everything.
    """
    if share >= 1.0:
        return ()
    if share <= 0.0:
        return emptied([0.0] * tensor.models)
    ((cut,),) = yield from exact_cuts(tensor, Variances((), ((ShareOfNonzero(share),),)))
    return (KeepVarying(cut),)


def match_l1(tensor: Tensor, first: Prunings, drops: Prunings) -> Generator[Summary, Any, Prunings]:
    """Scale what the drops leave so that it keeps the tensor's sum of magnitudes.

    `first` are the prunings before them, which the sum comes after.
    """
    prunings = (*first, *drops)
    if not drops:
        return prunings
    whole, kept = yield PrunedSums(prunings)
    if first:
        _, whole = yield PrunedSums(first)
    for model in range(tensor.models):
        if whole[model] > 0.0 == kept[model]:
            yield Remark(f"pruning leaves nothing of the task vector of model {model + 1}")
    at_random = any(isinstance(pruning, RandomDrop) for pruning in drops)
    if at_random and not first and max(whole) > LARGE_UPDATE * tensor.size:
        yield Remark("updates as large as these suffer from random drops even at density 0.9")
    return (*prunings, *l1_scales(whole.tolist(), kept.tolist()))


def l1_scales(whole: Iterable[float], kept: Iterable[float]) -> Prunings:
    """Factors whole / kept per model; none where either sum is practically zero or not finite."""
    return scales(
        a / b if min(a, b) >= 1e-7 and max(a, b) < math.inf else 1.0
        for a, b in zip(whole, kept, strict=True)
    )


def scales(factors: Iterable[float]) -> Prunings:
    """A factor per model."""
    return tuple(Scale(i, factor) for i, factor in enumerate(factors) if factor != 1.0)


def inverse_density(densities: Iterable[float]) -> Prunings:
    """Divide what is kept by the probability of keeping it: unbiased."""
    return scales(1.0 / density if 0.0 < density < 1.0 else 1.0 for density in densities)
