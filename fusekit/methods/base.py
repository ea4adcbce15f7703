"""What a merging method is: a name, parameters, and a rule that reads like its paper.

A *block* method never sees files, threads or dtypes. Its rule is a generator over one tensor: it
yields the summaries it needs to know (a Gram matrix, an order statistic) and returns how blocks are
to be combined. The engine decides how the summaries are measured and over what (`granularity`).
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from fusekit.checkpoint.layers import Layer
from fusekit.kernels import GRANULE
from fusekit.kernels.packed import BF16, Packed

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, np.dtype[Any]]

Granularity = Literal["tensor", "module", "layer", "model"]
Scope = Literal["tensor", "group", "model"]
"""Over what a summary is taken: `group` follows the recipe's granularity."""

REQUIRED: Any = type("Required", (), {"__repr__": lambda self: "required"})()
"""Default of parameters that have none."""


def _spelt(value: Any) -> str:
    """A value as YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, as users write it.

    A `per_model` parameter is looked up for every model; one that is not, once per tensor.
    `aliases` maps other accepted spellings (such as true/false) to values. A `path` is a text that
    is looked up from the working directory and the recipe's folder.
    """

    name: str
    kind: Literal["float", "int", "bool", "choice", "text", "path"]
    help: str
    default: Any = REQUIRED
    per_model: bool = False
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    aliases: Mapping[Any, Any] = field(default_factory=dict)

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    def check(self, value: Any) -> Any:
        """The value in its proper type; ValueError says what was expected instead."""
        for spelling, meaning in self.aliases.items():
            if value is spelling or (isinstance(value, str) and value == spelling):
                return meaning
        if value is None and self.default is None:
            return None
        if self.kind == "bool":
            if not isinstance(value, bool):
                raise ValueError("true or false")
            return value
        if self.kind == "choice":
            if value not in self.choices:
                raise ValueError(" or ".join(map(repr, (*self.choices, *self.aliases))))
            return value
        if self.kind in {"text", "path"}:
            if not isinstance(value, str):
                raise ValueError(f"a {self.kind}")
            return value
        return self._check_number(value)

    def _check_number(self, value: Any) -> Any:
        expected = self.describe_range()
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(expected)
        if not -sys.float_info.max <= value <= sys.float_info.max:  # NaN, Inf, huge integers
            raise ValueError(expected)
        if self.kind == "int":
            if value != int(value):
                raise ValueError(expected)
            value = int(value)
        else:
            value = float(value)
        if (
            (self.minimum is not None and value < self.minimum)
            or (self.maximum is not None and value > self.maximum)
            or (self.above is not None and value <= self.above)
        ):
            raise ValueError(expected)
        return value

    def describe_range(self) -> str:
        """The accepted values in words: `a number in [0, 1]`."""
        if self.kind in {"bool", "choice", "text", "path"}:
            return {"bool": "true or false", "text": "text", "path": "path"}.get(
                self.kind, " | ".join(map(_spelt, (*self.aliases, *self.choices)))
            )
        noun = "an integer" if self.kind == "int" else "a number"
        if self.above is None and self.minimum is None and self.maximum is None:
            return noun
        if self.above is not None:
            low = f"({self.above:g}"
        else:
            low = "(-inf" if self.minimum is None else f"[{self.minimum:g}"
        high = "inf)" if self.maximum is None else f"{self.maximum:g}]"
        return f"{noun} in {low}, {high}"


@dataclass(frozen=True)
class Tensor:
    """What a rule knows of the tensor it is asked about.

    `parameters` are the tensor's own values of the global parameters, `model_parameters` one
    mapping per model. `group_size` counts the elements over which group summaries are taken. `keys`
    are the models' 64-bit random keys for this tensor; `masks` explicit keep masks that replace
    them.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    group_size: int
    layer: Layer | None
    models: int
    has_base: bool
    parameters: Mapping[str, Any]
    model_parameters: tuple[Mapping[str, Any], ...]
    in_order: bool = False
    """Whether one worker takes all blocks from the first to the last in every scan."""
    keys: tuple[int, ...] = ()
    masks: tuple[Array | None, ...] = ()
    granularity: Granularity = "tensor"
    thresholds: tuple[float, ...] = ()
    """Per model, the smallest magnitude that is kept, where a survey of the group has found it."""

    def __getitem__(self, parameter: str) -> Any:
        return self.parameters[parameter]

    def each(self, parameter: str) -> list[Any]:
        """A per-model parameter's values, in the order of the models."""
        return [values[parameter] for values in self.model_parameters]


class Block:
    """A run of elements of one tensor: what kernels work on.

    `rows` is (models, m): the models, or their task vectors where the request asked for deltas.
    `base` is (m,), or empty without a base. `start` is the position of the first element. Rows and
    base are decoded when they are first asked for; kernels that decode for themselves take
    `packed`, where there is one, instead. `scratch` is reusable working memory by name, shape and
    dtype; its contents are undefined.
    """

    __slots__ = ("_base", "_rows", "packed", "read", "scratch", "size", "start", "tensor")

    def __init__(
        self,
        tensor: Tensor,
        start: int,
        size: int,
        scratch: Callable[[str, tuple[int, ...], Any], Array],
        read: Operands,
        packed: Packed | None = None,
    ) -> None:
        self.tensor = tensor
        self.start = start
        self.size = size
        self.scratch = scratch
        self.read = read
        self.packed = packed
        self._rows: Array | None = None
        self._base: Array | None = None

    @property
    def rows(self) -> Array:
        if self._rows is None:
            self._rows = self.read.rows(self)
        return self._rows

    @property
    def base(self) -> Array:
        if self._base is None:
            self._base = self.read.base(self)
        return self._base

    @property
    def bfloat16(self) -> Packed | None:
        """The operands as they were read, where they are bfloat16."""
        packed = self.packed
        return packed if packed is not None and packed.kind == BF16 else None

    def with_rows(self, rows: Array) -> Block:
        """The same block with other rows."""
        other = Block(self.tensor, self.start, self.size, self.scratch, self.read)
        other._rows, other._base = rows, self.base
        return other


class Operands(Protocol):
    """Decodes the operands of a block."""

    def rows(self, block: Block) -> Array:
        """(models, m), task vectors where they are asked for."""

    def base(self, block: Block) -> Array:
        """(m,), or empty without a base."""


class Request(ABC):
    """What summaries and combines share: which rows they want and how blocks may be cut."""

    deltas: ClassVar[bool] = False
    """Whether rows are handed over as task vectors (model - base)."""

    in_registers: ClassVar[bool] = False
    """Whether packed blocks are as a rule worked on without a decoded row: they may be long."""

    def unit(self, shape: tuple[int, ...]) -> int:
        """Blocks are cut at multiples of this many elements (1: anywhere)."""
        return 1

    def grain(self, shape: tuple[int, ...]) -> int:
        """Elements per partial sum: a granule, or one unit where blocks are cut at units."""
        unit = self.unit(shape)
        return GRANULE if unit == 1 else unit


class Summary(Request):
    """Something to be known before combining. Subclasses are frozen dataclasses."""

    scope: Scope = "group"

    def group_key(self) -> Hashable:
        """Tensors that share a summary must ask for the same thing: equal keys."""
        return self


@dataclass(frozen=True)
class Remark(Summary):
    """Something the user should be told: measures nothing, the rule goes on at once."""

    text: str


class Additive(Summary):
    """A vector of numbers that adds up over elements, tensors, layers and machines."""

    @abstractmethod
    def width(self, tensor: Tensor) -> int:
        """How many numbers."""

    @abstractmethod
    def measure(self, block: Block, out: Array) -> None:
        """Write (grains, width) partial sums: a grain is 8192 elements, or one unit if not 1."""

    def result(self, total: Array) -> Any:
        """What the rule receives, made from the summed vector."""
        return total


class Cumulative(Additive):
    """An additive summary of which each tensor receives the running sums *before* each grain.

    The rule gets (grains, width), counted from the start of the group.
    """


@dataclass(frozen=True)
class OrderValue:
    """The k-th largest value of a row, and how many values are greater than and equal to it."""

    value: float
    greater: int
    equal: int
    rank: int
    """The k that was asked for, or that a share came to; of 0, the value is infinite."""


@dataclass(frozen=True)
class ShareOfNonzero:
    """The rank int(share * values that are not zero), of magnitudes: known when all are seen."""

    share: float


class OrderStatistics(Summary):
    """Exact k-th largest values. The rule receives a tuple of `OrderValue` per row."""

    absolute: ClassVar[bool] = True
    """Order by magnitude (values without sign) or by value."""

    sampled: bool = False
    """Whether quantiles of a million evenly spaced values will do for large groups."""

    @property
    @abstractmethod
    def ranks(self) -> tuple[tuple[int | ShareOfNonzero, ...], ...]:
        """Per row of values, the ranks wanted: 1 is the largest, group_size the smallest."""

    @abstractmethod
    def values(self, block: Block) -> Array:
        """(rows, m) values to be ordered; may be the block's own rows, changed in place."""

    def collect(self, block: Block, keys: Array, at: int) -> bool:
        """Write the values' keys to keys[:, at : at + size], if it can without `values`."""
        return False

    def tally(self, block: Block, brackets: Array, bins: Array, above: Array) -> bool:
        """Count the values' keys as `kernels.order.count_brackets`, if it can without `values`."""
        return False

    def tally_largest(
        self, block: Block, brackets: Array, bins: Array, above: Array, largest: Array
    ) -> bool:
        """As `tally`; also updates (rows, 2) int64, each row's largest key and its number."""
        return False


class Sequential(Summary):
    """A state that one worker updates from the first element to the last (column statistics)."""

    scope: Scope = "tensor"

    @abstractmethod
    def begin(self, tensor: Tensor) -> Any:
        """An empty state."""

    @abstractmethod
    def update(self, state: Any, block: Block) -> None:
        """Take in the next block."""

    def result(self, state: Any) -> Any:
        return state


@dataclass(frozen=True)
class SideTensor:
    """An extra tensor that a method writes for one merged tensor, in a file of its own."""

    name: str
    dtype: str
    shape: tuple[int, ...]


SidePart = tuple[str, int, "Array"]
"""Name of a side tensor, offset into it in bytes, and an array whose bytes go there."""


class Combine(Request):
    """How the rows of a block become the merged row."""

    @abstractmethod
    def apply(self, block: Block, out: Array) -> None:
        """Write the merged elements; may destroy the block's rows."""

    def encode(self, block: Block, out: Array) -> bool:
        """Write the merged elements of a packed block as its own 16-bit type, (m,) uint16.

        False where it cannot, or where a value left the type's finite range: `apply` then does.
        """
        return False

    def side(self, block: Block) -> Iterable[SidePart]:
        """What the block adds to the method's side tensors; asked right after `apply`."""
        return ()

    def rescaled(self, scale: float) -> Combine | None:
        """base + scale * (what this one changes), where it is a combine of the same kind."""
        return None


@dataclass(frozen=True)
class Copy(Combine):
    """Take one model's tensor as it is, bit for bit where the dtype stays (-1: the base)."""

    model: int

    def apply(self, block: Block, out: Array) -> None:
        out[:] = block.base if self.model < 0 else block.rows[self.model]


Rule = Callable[[Tensor], Generator[Summary, Any, Combine]]


@dataclass(frozen=True)
class Measured:
    """A model's statistic of one tensor, and the L2 norm of that model's statistics together."""

    value: torch.Tensor
    norm: float


MatrixRule = Callable[
    [Tensor, "list[torch.Tensor]", "list[Measured]"], Generator[Remark, None, "torch.Tensor"]
]
"""(tensor, rows, statistics) -> the merged tensor, or update where the base is the origin.

Rows are the models' tensors, or their task vectors where the base is the origin; they may be
changed in place. What it yields on the way is told to the user.
"""


@dataclass(frozen=True)
class Method:
    """A merging method as recipes, the CLI and the documentation know it.

    `base` says what `base_model` is to the method: `origin` of task vectors, the `first` of the
    models (SLERP's t = 0), or nothing at all (None). `base_required` refuses recipes without one.
    """

    name: str
    title: str
    summary: str
    formula: str
    references: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    rule: Rule
    base: Literal["origin", "first"] | None
    base_required: bool = False
    min_models: int = 1
    max_models: int | None = None
    for_more: str = ""
    """Which methods merge more models than that, for messages."""
    keeps_nonfinite: bool = False
    """Whether NaN and Inf are handed on as they are (and reported), not refused."""
    model_scope: bool = False
    """Whether rules ask for whole-model summaries whatever the granularity."""
    integers: Literal["equal", "first"] = "equal"
    """Integer and boolean tensors: `equal` in all, or the base's (else the first model's)."""
    missing: Literal["refuse", "first"] = "refuse"
    """Tensors not all models have in one shape: `refuse` them, or keep the first model's."""
    common_rows: bool = False
    """Whether vocabularies are cut to the rows that all have even where the base has more."""
    side: Callable[[Tensor], tuple[SideTensor, ...]] | None = None
    """Names the extra tensors that are written for a merged tensor: one set of data per task."""
    whole: Callable[[Tensor], bool] | None = None
    """Which tensors `matrix` merges as a whole, with torch; the others follow `rule`."""
    matrix: MatrixRule | None = None
    working: Callable[[Tensor], int] | None = None
    """Float64 elements that `matrix` holds at most beside its operands; ten copies if None."""
    survey: Callable[[Tensor, list[torch.Tensor]], list[torch.Tensor]] | None = None
    """By model, the values of a whole tensor of which the share `density` is kept in its group."""
    continual: bool = False
    """Whether models are added to a running update that is kept beside the checkpoint."""
    others: str = ""
    """What becomes of tensors that are not merged as a whole, in words."""
    statistic: Callable[[Tensor], str] | None = None
    """The entry in every model's file of statistics that merging a tensor as a whole needs."""
    statistic_shapes: Callable[[Tensor], tuple[tuple[int, ...], ...]] | None = None
    """The shapes that entry may have."""
    passes: str = "one"
    use_when: str = ""
    caveats: str = ""

    def parameter(self, name: str) -> Parameter | None:
        return next((p for p in self.parameters if p.name == name), None)
