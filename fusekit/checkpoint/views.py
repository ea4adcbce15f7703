"""Sources made of other sources: other names for the same tensors, a LoRA folded into a base."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fusekit.checkpoint.dtypes import DTYPES, dtype_of
from fusekit.checkpoint.recent import Recent
from fusekit.checkpoint.source import TensorInfo, TensorSource
from fusekit.errors import CheckpointError
from fusekit.tokenizers.embedding import EMBEDDING_NAMES, HEAD_NAMES

if TYPE_CHECKING:
    from fusekit.adapters.adapter import Adapter, LoraModule

Array = npt.NDArray[Any]

_MODULES_KEPT = 16
_REPLACEMENTS_KEPT = 2
_NORM_ELEMENTS = 1 << 18


class RenamedSource(TensorSource):
    """Tensors of another source under other names; those that are not named are not offered.

    Args:
        source: where the tensors are.
        names: offered name -> name in `source`.

    Raises:
        CheckpointError: a name that `source` does not have.

    >>> short = RenamedSource(source, {"weight": "model.norm.weight"})   # doctest: +SKIP
    """

    def __init__(self, source: TensorSource, names: Mapping[str, str]) -> None:
        self.label = source.label
        self._source = source
        self._names = dict(names)
        for old in self._names.values():
            if old not in source.tensors:
                raise _unknown(source.label, "tensor", old, source.tensors)
        self._tensors = {
            new: TensorInfo(new, source.tensors[old].dtype, source.tensors[old].shape)
            for new, old in self._names.items()
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read_into(self, name: str, start: int, stop: int, out: memoryview) -> None:
        self._source.read_into(self._names[name], start, stop, out)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        self._source.prefetch(self._names[name], start, stop)

    def where(self, name: str) -> str:
        return self._source.where(self._names[name])

    def identity(self) -> dict[str, Any]:
        return self._source.identity()

    def close(self) -> None:
        self._source.close()


@dataclass(frozen=True, eq=False, slots=True)
class _Update:
    """One module's update, ready for the kernel.

    `left` (matrices * rows, rank) and `right` (matrices, rank, columns) multiply to the update in
    the tensor's own layout. `factors` (DoRA) scale its rows, or its columns if `by_column`.
    """

    left: Array
    right: Array
    scaling: float
    factors: Array | None
    by_column: bool

    @property
    def columns(self) -> int:
        return int(self.right.shape[2])

    def apply(self, values: Array, start: int) -> None:
        """Fold the update into elements `[start, start + values.size)`, in place."""
        from fusekit.kernels import lowrank

        lowrank.add_low_rank(self.left, self.right, self.scaling, start, values)
        if self.factors is not None:
            index = np.arange(start, start + values.size)
            along = index % self.columns if self.by_column else index // self.columns
            values *= self.factors[along]


class LoraSource(TensorSource):
    """A base with a LoRA adapter folded in, computed for the elements that are read.

    `W' = W + scaling * B @ A` in the tensor's layout; with DoRA `W' = m * V / ||V||` for
    `V = W + scaling * B @ A`, norms over each output (or input) feature, which are computed once
    per tensor from a streaming pass (a feature of norm 0 stays 0). Full tensors that the adapter
    holds (`modules_to_save`, trained biases) replace the base's first, and are offered too where
    the base has none. Changed tensors are offered as F32 (F64 where the base has F64), so nothing
    is rounded before a merge; all others come from the base as they are.

    Adapter names may lack, or have in excess, one leading prefix (`transformer.`, `model.`)
    compared with the base's, as checkpoints of a bare model and of a model with a head differ.

    Args:
        base: the model the adapter was trained on.
        adapter: as `fusekit.adapters.load_adapter` returns it.

    Raises:
        CheckpointError: an adapted tensor that the base does not have (with the nearest name), of
            another shape, or of a quantised or integer type; NaN or Inf in the adapter.

    References:
        "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
        "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732.
        "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.

    >>> source = LoraSource(base, load_adapter("adapter", base.tensors))   # doctest: +SKIP
    """

    def __init__(self, base: TensorSource, adapter: Adapter) -> None:
        self.label = f"{base.label}+{adapter.label}"
        self._base = base
        self._adapter = adapter
        self._module_names: dict[str, str] = {}
        self._bias_names: dict[str, str] = {}
        self._replacement_names: dict[str, str] = {}
        self._stored = dict(base.tensors)
        self._updates: Recent[str, _Update] = Recent(_MODULES_KEPT)
        self._biases: Recent[str, Array] = Recent(_MODULES_KEPT)
        self._replacements: Recent[str, Array] = Recent(_REPLACEMENTS_KEPT)
        required = [name for name in adapter.replacements if not self._may_be_new(name)]
        required += [name for name in adapter.modules if name not in adapter.replacements]
        prefixes = _prefixes(required, base, adapter.label)
        for name in adapter.replacements:
            self._offer_replacement(name, _in_base(name, prefixes, base))
        self._tensors = dict(self._stored)
        for name in adapter.modules:
            self._offer_adapted(name, _in_base(name, prefixes, base))

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def base(self) -> TensorSource:
        """The model without the adapter."""
        return self._base

    def changes(self, name: str) -> bool:
        """Whether the adapter replaces a tensor or has an update of it."""
        return name in self._module_names or name in self._replacement_names

    def read_into(self, name: str, start: int, stop: int, out: memoryview) -> None:
        adapted, shifted = name in self._module_names, name in self._bias_names
        if not adapted and not shifted:
            self._read_unadapted(name, start, stop, out)
            return
        values = self._unadapted(name, start, stop)
        if adapted:
            self._update(name).apply(values, start)
        if shifted:
            values += self._bias(name)[start:stop]
        out[:] = values.view(np.uint8).data

    def prefetch(self, name: str, start: int, stop: int) -> None:
        if name not in self._replacement_names:
            self._base.prefetch(name, start, stop)

    def where(self, name: str) -> str:
        return self._base.where(name) if name in self._base.tensors else self._adapter.label

    def identity(self) -> dict[str, Any]:
        return {"base": self._base.identity(), "adapter": _adapter_identity(self._adapter)}

    def close(self) -> None:
        self._base.close()

    def _may_be_new(self, name: str) -> bool:
        """Whether a full tensor may be absent from the base.

        So it is for the heads of `modules_to_save`, and for resized or untied embeddings and heads,
        which PEFT saves whole.
        """
        return self._is_saved(name) or _is_vocabulary(name)

    def _is_saved(self, name: str) -> bool:
        """Whether a tensor belongs to `modules_to_save`, or is a base that is adapted itself."""
        module = f".{name.rpartition('.')[0]}"
        saved = self._adapter.config.get("modules_to_save") or ()
        return name in self._adapter.modules or any(
            module.endswith(f".{entry}") or f".{entry}." in module for entry in saved
        )

    def _offer_replacement(self, name: str, target: str) -> None:
        array = self._adapter.replacements[name]
        before = self._base.tensors.get(target)
        if (
            before is not None
            and before.shape != array.shape
            and not self._is_saved(name)
            and not (_is_vocabulary(name) and before.shape[1:] == array.shape[1:])
        ):
            raise CheckpointError(
                f"{self._adapter.label}: tensor {name!r} has shape {list(array.shape)}, "
                f"{self._base.where(target)} has {list(before.shape)}"
            )
        self._stored[target] = TensorInfo(target, dtype_of(array.dtype), array.shape)
        self._replacement_names[target] = name

    def _offer_adapted(self, name: str, target: str) -> None:
        module = self._adapter.modules[name]
        module.oriented(self._tensors[target].shape)
        self._offer_computed(target)
        self._module_names[target] = name
        if module.bias is None:
            return
        bias = f"{target.removesuffix('weight')}bias"
        if bias not in self._tensors or self._tensors[bias].shape != module.bias.shape:
            raise CheckpointError(
                f"{self._adapter.label}: module {name!r} changes a bias of "
                f"{module.bias.size} elements, {self._base.label} has no such tensor {bias!r}"
            )
        self._offer_computed(bias)
        self._bias_names[bias] = name

    def _offer_computed(self, target: str) -> None:
        info = self._tensors[target]
        if info.dtype.name not in _COMPUTED:
            raise CheckpointError(
                f"{self._base.where(target)}: tensor {target!r} is {info.dtype.name}: a LoRA can "
                f"only be folded into {', '.join(_COMPUTED)}; dequantise the base first"
            )
        self._tensors[target] = TensorInfo(target, DTYPES[_COMPUTED[info.dtype.name]], info.shape)

    def _read_unadapted(self, name: str, start: int, stop: int, out: memoryview) -> None:
        if name not in self._replacement_names:
            self._base.read_into(name, start, stop, out)
            return
        saved = self._replacements.get(
            name, lambda: self._adapter.replacements[self._replacement_names[name]]
        )
        out[:] = saved.reshape(-1)[start:stop].view(np.uint8).data

    def _unadapted(self, name: str, start: int, stop: int) -> Array:
        """Elements before the low-rank update, in the type in which it is computed."""
        raw = np.empty(stop - start, self._stored[name].dtype.numpy)
        self._read_unadapted(name, start, stop, raw.view(np.uint8).data)
        return raw.astype(self._tensors[name].dtype.numpy)

    def _bias(self, name: str) -> Array:
        return self._biases.get(name, lambda: self._make_bias(name))

    def _make_bias(self, name: str) -> Array:
        module = self._adapter.modules[self._bias_names[name]]
        scaled: Array = np.asarray(module.bias, self._tensors[name].dtype.numpy) * module.scaling
        return scaled

    def _update(self, name: str) -> _Update:
        return self._updates.get(name, lambda: self._make_update(name))

    def _make_update(self, name: str) -> _Update:
        info = self._tensors[name]
        module = self._adapter.modules[self._module_names[name]].oriented(info.shape)
        update = _low_rank(module, info.dtype.numpy)
        if module.magnitude is None:
            return update
        update = replace(update, by_column=module.transposed != (module.magnitude_axis == "input"))
        magnitude = module.magnitude.astype(np.float64)
        # A convolution's input channel is several columns, one per place of the kernel.
        squares = self._squares(name, update).reshape(magnitude.size, -1)
        norms = np.sqrt(squares.sum(axis=1))
        factors = np.divide(magnitude, norms, out=np.zeros_like(norms), where=norms > 0)
        repeated = np.repeat(factors, squares.shape[1])
        return replace(update, factors=repeated.astype(info.dtype.numpy))

    def _squares(self, name: str, update: _Update) -> npt.NDArray[np.float64]:
        """Sum of squares of each row of `W + scaling * B @ A`, or of each column if `by_column`,
        from one pass over the base."""
        size, columns = self._tensors[name].size, update.columns
        squares = np.zeros(columns if update.by_column else size // columns)
        step = max(1, _NORM_ELEMENTS // columns)
        for row in range(0, size // columns, step):
            start, stop = row * columns, min(size, (row + step) * columns)
            values = self._unadapted(name, start, stop)
            update.apply(values, start)
            block = np.square(values.astype(np.float64)).reshape(-1, columns)
            if update.by_column:
                squares += block.sum(axis=0)
            else:
                squares[row : row + len(block)] = block.sum(axis=1)
        return squares


def _is_vocabulary(name: str) -> bool:
    """Whether a tensor has a row for every token: an embedding, a head or its bias."""
    return bool(EMBEDDING_NAMES.search(name) or HEAD_NAMES.search(name))


_COMPUTED = {"F16": "F32", "BF16": "F32", "F32": "F32", "F64": "F64"}


def equal_tensors(source: TensorSource, one: str, other: str) -> bool:
    """Whether two floating-point tensors of a source hold the same values."""
    infos = [source.tensors[name] for name in (one, other)]
    if infos[0].shape != infos[1].shape:
        return False
    for start in range(0, infos[0].size, _NORM_ELEMENTS):
        stop = min(start + _NORM_ELEMENTS, infos[0].size)
        mine, theirs = (np.empty(stop - start, info.dtype.numpy) for info in infos)
        source.read_into(one, start, stop, mine.view(np.uint8).data)
        source.read_into(other, start, stop, theirs.view(np.uint8).data)
        if not np.array_equal(mine.astype(np.float64), theirs.astype(np.float64)):
            return False
    return True


def _low_rank(module: LoraModule, kind: np.dtype[Any]) -> _Update:
    """The factors in the layout of the base tensor, without DoRA."""
    A, B = module.A.astype(kind), module.B.astype(kind)
    rows_out, columns_in = B.shape[0], A.shape[1]
    stacked_a = A.reshape(module.experts, module.rank, columns_in)
    # In B the expert index runs fastest, in A slowest.
    stacked_b = B.reshape(rows_out, module.rank, module.experts).transpose(2, 0, 1)
    if module.transposed:
        left, right = stacked_a.transpose(0, 2, 1), stacked_b.transpose(0, 2, 1)
    else:
        left, right = stacked_b, stacked_a
    return _Update(
        left=np.ascontiguousarray(left).reshape(-1, module.rank),
        right=np.ascontiguousarray(right),
        scaling=module.scaling,
        factors=None,
        by_column=module.transposed,
    )


def _prefixes(names: list[str], base: TensorSource, label: str) -> tuple[str, str]:
    """The one leading prefix to take off, and the one to put on, that leads all names to the base.

    Raises:
        CheckpointError: no such change finds them all.
    """
    missing = [name for name in names if name not in base.tensors]
    if not missing:
        return "", ""
    first = f"{missing[0].partition('.')[0]}."
    heads = dict.fromkeys(f"{name.partition('.')[0]}." for name in base.tensors)
    for strip, add in [(first, ""), *(("", head) for head in heads)]:
        if all(
            name.startswith(strip) and f"{add}{name[len(strip) :]}" in base.tensors
            for name in missing
        ):
            return strip, add
    raise _unknown(base.label, f"{label} adapts tensor", missing[0], base.tensors)


def _in_base(name: str, prefixes: tuple[str, str], base: TensorSource) -> str:
    """The base's name for an adapter's name; the name itself where the base has none."""
    strip, add = prefixes
    changed = f"{add}{name.removeprefix(strip)}"
    return changed if name not in base.tensors and changed in base.tensors else name


def _unknown(place: str, what: str, name: str, known: Iterable[str]) -> CheckpointError:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    nearest = f"; the nearest is {near[0]!r}" if near else ""
    return CheckpointError(f"{place}: {what} {name!r}, which is not there{nearest}")


def _adapter_identity(adapter: Adapter) -> dict[str, Any]:
    """Sizes and times of the adapter's files, where it came from a folder or a file."""
    place = Path(adapter.label)
    files = sorted(place.glob("adapter_*")) if place.is_dir() else [place]
    return {
        "label": adapter.label,
        "files": [
            {"path": str(file.resolve()), "size": stat.st_size, "modified_ns": stat.st_mtime_ns}
            for file in files
            if file.is_file()
            for stat in [file.stat()]
        ],
    }
