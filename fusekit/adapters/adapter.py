"""Adapters in memory: low-rank updates of a base checkpoint's tensors, and what they mean."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fusekit.errors import CheckpointError

Array = npt.NDArray[Any]
Float = npt.NDArray[np.float32]
Kind = Literal["linear", "conv", "embedding", "parameter"]


@dataclass(frozen=True, eq=False, slots=True)
class LoraModule:
    """The low-rank update of one base tensor: `scaling * B @ A`, seen as a matrix (out, in).

    Attributes:
        name: the base tensor it changes, e.g. `model.layers.0.self_attn.q_proj.weight`.
        A: (rank, in). A convolution's kernel axes are flattened into `in`.
        B: (out, rank). With `experts` > 1, A is (experts * rank, in) and B (out, rank * experts),
            the expert index running fastest in B.
        alpha: numerator of the scaling.
        rslora: scaling is `alpha / sqrt(rank)` instead of `alpha / rank`.
        transposed: the base tensor stores the matrix's transpose (GPT-2's Conv1D, embeddings).
        kernel: a convolution's (in channels, *kernel size), else empty.
        magnitude: DoRA's norms of the output features (out,), else None.
        magnitude_axis: `input` if DoRA's norms are of the input features (in,) instead, or of a
            convolution's input channels, as in some files of kohya's format.
        bias: update of the module's bias (out,) before scaling, else None.
    """

    name: str
    A: Array
    B: Array
    alpha: float
    rslora: bool = False
    kind: Kind = "linear"
    transposed: bool = False
    kernel: tuple[int, ...] = ()
    experts: int = 1
    magnitude: Array | None = None
    magnitude_axis: Literal["output", "input"] = "output"
    bias: Array | None = None

    @property
    def rank(self) -> int:
        return int(self.A.shape[0]) // self.experts

    @property
    def scaling(self) -> float:
        """`alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the base tensor; for several experts, with `in` before `out` if transposed."""
        rows, columns = self.B.shape[0], self.A.shape[1]
        if self.kind == "conv":
            return (rows, *self.kernel)
        matrix = (columns, rows) if self.transposed else (rows, columns)
        return (self.experts, *matrix) if self.experts > 1 else matrix

    def oriented(self, weight_shape: tuple[int, ...]) -> LoraModule:
        """This module with `transposed` settled by the shape of the base tensor.

        A config's single `fan_in_fan_out` flag cannot describe a model that has both layouts, so
        for linear layers the shape decides wherever the matrix is not square.

        Raises:
            CheckpointError: the adapter was made for a tensor of another shape.
        """
        if self.weight_shape == tuple(weight_shape):
            return self
        if self.kind in {"linear", "parameter"}:
            flipped = dataclasses.replace(self, transposed=not self.transposed)
            if flipped.weight_shape == tuple(weight_shape):
                return flipped
        raise CheckpointError(
            f"adapter module {self.name!r} is for a tensor of shape {list(self.weight_shape)}, "
            f"the base has {list(weight_shape)}: the adapter belongs to another base model"
        )

    def delta(self) -> Float:
        """`scaling * B @ A` in float32, laid out like the base tensor. Leaves DoRA out."""
        A, B = to_float32(self.A), to_float32(self.B)
        if self.experts > 1:
            split_a = A.reshape(self.experts, self.rank, -1)
            split_b = B.reshape(B.shape[0], self.rank, self.experts).transpose(2, 0, 1)
            stacked = split_b @ split_a
            product = stacked.transpose(0, 2, 1) if self.transposed else stacked
        else:
            product = (B @ A).T if self.transposed else B @ A
        delta: Float = np.ascontiguousarray(product).reshape(self.weight_shape)
        delta *= np.float32(self.scaling)
        return delta

    def apply(self, weight: Array) -> Float:
        """The adapted weight in float32: `W + delta`, with DoRA rescaled to the learned norms.

        DoRA: `V = W + delta; W' = diag(magnitude / ||V||_row) V`, rows being output features; or
        the same of columns, input features.

        Raises:
            CheckpointError: `weight` has another shape than the adapter's base tensor.

        References:
            "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.
        """
        module = self.oriented(weight.shape)
        adapted: Float = weight.astype(np.float32) + module.delta()
        if module.magnitude is None:
            return adapted
        features = int(module.transposed != (module.magnitude_axis == "input"))
        others = tuple(axis for axis in range(adapted.ndim) if axis != features)
        norms = np.sqrt(np.square(adapted).sum(axis=others, keepdims=True))
        magnitude = module.magnitude.astype(np.float32).reshape(norms.shape)
        adapted *= np.divide(magnitude, norms, out=np.zeros_like(norms), where=norms > 0)
        return adapted


class StoredModules(Mapping[str, LoraModule], ABC):
    """Modules of a file, read at each access, whose sizes are known without."""

    @abstractmethod
    def outline(self, name: str) -> LoraModule:
        """A module with all its facts and sizes; its arrays are zeros that take no memory."""


@dataclass(frozen=True, eq=False, slots=True)
class Adapter:
    """A set of low-rank updates and full-rank replacements for one base model.

    Attributes:
        label: what messages call it: a path, `memory`.
        modules: base tensor name -> update. May read from disk at each access.
        replacements: base tensor name -> full tensor used instead of the base's, before any update
            (PEFT's `modules_to_save`, trained biases, saved embeddings).
        config: the fields of adapter_config.json, empty for formats without one.
        left_out: number of tensors of other models of a pipeline in the same file, by component.
        flattened: a module whose name is flattened as kohya's tools do, the base not being known
            that tells what it stands for; empty if there is none.
        dora: whether the file has DoRA magnitudes, known before any module is read.
    """

    label: str
    modules: Mapping[str, LoraModule]
    replacements: Mapping[str, Array]
    config: Mapping[str, Any]
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    flattened: str = ""
    dora: bool = False

    def require_names(self) -> None:
        """Refuse names that no base model has.

        Raises:
            CheckpointError: a name is flattened.
        """
        if self.flattened:
            raise CheckpointError(
                f"{self.label}: module {self.flattened!r} is named as kohya's tools flatten names: "
                "what it stands for is known with the base model only, expected a base"
            )

    def outline(self, name: str) -> LoraModule | None:
        """A module's facts and sizes; None where they are known only by computing it."""
        if isinstance(self.modules, StoredModules):
            return self.modules.outline(name)
        return self.modules[name] if isinstance(self.modules, dict) else None

    def changed_tensors(self) -> list[str]:
        """Names of all base tensors this adapter changes, biases included."""
        names = dict.fromkeys(self.replacements)
        for name, module in self.modules.items():
            names[name] = None
            if module.bias is not None:
                names[bias_name(name)] = None
        return list(names)

    def apply(self, name: str, weight: Array) -> Array:
        """Base tensor `name` with this adapter folded in: float32 where it was computed on.

        Replacement first, then the low-rank update (DoRA included) or the scaled bias update.
        """
        weight = self.replacements.get(name, weight)
        if name in self.modules:
            return self.modules[name].apply(weight)
        owner = self.modules.get(weight_name(name)) if name.endswith(".bias") else None
        if owner is not None and owner.bias is not None:
            return weight.astype(np.float32) + np.float32(owner.scaling) * owner.bias
        return weight


def to_float32(array: Array) -> Float:
    """The array in float32."""
    if array.dtype == np.float32:
        return array
    widened: Float = np.empty(array.shape, np.float32)
    widen(array, widened)
    return widened


def half_precision(arrays: Iterable[Array]) -> bool:
    """Whether all arrays are of two bytes an element or fewer: products of their values summed in
    float32 are then as much finer than they as float64 is than float32."""
    return all(array.dtype.itemsize <= 2 for array in arrays)


def joined(arrays: Sequence[Array], axis: int) -> Array:
    """The arrays one after the other along an axis: in their own type, or in float32 where they
    differ."""
    dtype = common_dtype(arrays)
    if dtype.name == "bfloat16":  # whose copies are slow
        bits: Array = np.concatenate([array.view(np.uint16) for array in arrays], axis)
        return bits.view(dtype)
    return np.concatenate(arrays, axis, dtype=dtype)


def widen(array: Array, out: Float) -> None:
    """Write the array into one of float32; bfloat16 by its bits, as its casts are slow and hold
    Python's lock."""
    if array.dtype.name == "bfloat16":
        np.left_shift(array.view(np.uint16), np.uint32(16), out=out.view(np.uint32))
    else:
        out[...] = array


def same_bits(first: Array, other: Array) -> bool:
    """Whether two contiguous arrays have the same type, shape and bytes."""
    return (
        first.dtype == other.dtype
        and first.shape == other.shape
        and np.array_equal(first.reshape(-1).view(np.uint8), other.reshape(-1).view(np.uint8))
    )


def common_dtype(arrays: Iterable[Array]) -> np.dtype[Any]:
    """The arrays' element type, or float32 where they differ."""
    kinds = {array.dtype for array in arrays}
    return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)


def bias_name(weight: str) -> str:
    """`<module>.bias` for `<module>.weight`."""
    return weight.removesuffix("weight") + "bias"


def weight_name(bias: str) -> str:
    """`<module>.weight` for `<module>.bias`."""
    return bias.removesuffix("bias") + "weight"
