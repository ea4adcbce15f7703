"""What is in an adapter, and how far adapters overlap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusekit.adapters.adapter import Adapter, Array, LoraModule
from fusekit.adapters.linalg import orthogonalize, product_singular_values
from fusekit.errors import FusekitError

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """One module's update.

    Attributes:
        norm: Frobenius norm of `scaling * B @ A`.
        spectral: its largest singular value.
        stable_rank: `norm^2 / spectral^2`, how many directions really carry it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    scaling: float
    norm: float
    spectral: float
    stable_rank: float
    dora: bool
    bias: bool


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """An adapter's modules and sizes.

    Attributes:
        replacements: tensors saved whole, with their shapes.
        parameters: entries in factors, magnitudes and biases.
        norm: Frobenius norm of all updates together.
    """

    label: str
    modules: tuple[ModuleInfo, ...]
    replacements: tuple[tuple[str, tuple[int, ...]], ...]
    parameters: int
    norm: float


@dataclass(frozen=True, slots=True)
class Overlap:
    """Adapters against each other, over the modules they share; (n, n) symmetric matrices.

    Attributes:
        labels: of the adapters.
        cosine: between the updates as vectors, all shared modules together.
        output: mean squared cosine of the principal angles between the updates' output spaces,
            averaged over modules: 0 orthogonal, 1 when one space holds the other.
        input: the same of input spaces.
        shared: number of modules a pair has in common.
        modules: the same of single modules, by name; NaN where an adapter has not got it.
    """

    labels: tuple[str, ...]
    cosine: Matrix
    output: Matrix
    input: Matrix
    shared: npt.NDArray[np.int64]
    modules: Mapping[str, ModuleOverlap]


@dataclass(frozen=True, slots=True)
class ModuleOverlap:
    """Adapters against each other in one module, see `Overlap`."""

    cosine: Matrix
    output: Matrix
    input: Matrix


def describe_adapter(adapter: Adapter) -> AdapterInfo:
    """Ranks, scalings and norms of an adapter, from its factors alone.

    Norms are of the low-rank update; DoRA's rescaling depends on the base and is left out.
    """
    modules = []
    parameters = 0
    for module in adapter.modules.values():
        modules.append(_describe(module))
        arrays = (module.A, module.B, module.magnitude, module.bias)
        parameters += sum(array.size for array in arrays if array is not None)
    return AdapterInfo(
        label=adapter.label,
        modules=tuple(modules),
        replacements=tuple((name, t.shape) for name, t in adapter.replacements.items()),
        parameters=parameters,
        norm=math.sqrt(sum(module.norm**2 for module in modules)),
    )


def compare_adapters(adapters: Sequence[Adapter]) -> Overlap:
    """Cosines and principal-angle overlaps of every pair, without forming any update.

    `<D_i, D_j> = s_i s_j trace((B_j^T B_i)(A_i A_j^T))`; raw parameters with several experts are
    left out.

    Raises:
        FusekitError: shapes of a module that differ between adapters.
    """
    count = len(adapters)
    products = np.zeros((count, count))
    norms_i, norms_j = np.zeros((count, count)), np.zeros((count, count))
    modules: dict[str, ModuleOverlap] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        held = {i: a.modules[name] for i, a in enumerate(adapters) if name in a.modules}
        held = {i: module for i, module in held.items() if module.experts == 1}
        _check_shapes(name, adapters, held)
        factors = {i: _scaled(module) for i, module in held.items()}
        spaces = {i: _spaces(A, B) for i, (A, B) in factors.items()}
        squares = {i: _inner(pair, pair) for i, pair in factors.items()}
        cosine, output, inputs = (np.full((count, count), np.nan) for _ in range(3))
        for i in held:
            for j in held:
                product = _inner(factors[i], factors[j])
                cosine[i, j] = _quotient(product, squares[i] * squares[j])
                output[i, j] = _overlap(spaces[i][1], spaces[j][1])
                inputs[i, j] = _overlap(spaces[i][0], spaces[j][0])
                products[i, j] += product
                norms_i[i, j] += squares[i]
                norms_j[i, j] += squares[j]
        modules[name] = ModuleOverlap(cosine, output, inputs)
    held_by = [~np.isnan(each.cosine) for each in modules.values()]
    shared = np.asarray(sum(held_by, np.zeros((count, count), np.int64)))
    pairs = np.maximum(shared, 1)
    scale = np.sqrt(norms_i * norms_j)
    return Overlap(
        labels=tuple(adapter.label for adapter in adapters),
        cosine=np.divide(products, scale, out=np.zeros_like(products), where=scale > 0),
        output=np.nansum([each.output for each in modules.values()], axis=0) / pairs,
        input=np.nansum([each.input for each in modules.values()], axis=0) / pairs,
        shared=shared,
        modules=modules,
    )


def _quotient(product: float, squares: float) -> float:
    return product / math.sqrt(squares) if squares > 0 else 0.0


def _describe(module: LoraModule) -> ModuleInfo:
    per_expert = [product_singular_values(B, A) * abs(module.scaling) for A, B in _experts(module)]
    values = np.concatenate(per_expert)
    norm = float(np.linalg.norm(values))
    spectral = float(values.max(initial=0.0))
    return ModuleInfo(
        name=module.name,
        kind=module.kind,
        shape=module.weight_shape,
        rank=module.rank,
        scaling=module.scaling,
        norm=norm,
        spectral=spectral,
        stable_rank=(norm / spectral) ** 2 if spectral else 0.0,
        dora=module.magnitude is not None,
        bias=module.bias is not None,
    )


def _experts(module: LoraModule) -> list[tuple[Array, Array]]:
    split_a = module.A.astype(np.float64).reshape(module.experts, module.rank, -1)
    split_b = module.B.astype(np.float64).reshape(-1, module.rank, module.experts)
    return [(split_a[e], split_b[:, :, e]) for e in range(module.experts)]


def _scaled(module: LoraModule) -> tuple[Matrix, Matrix]:
    return module.A.astype(np.float64), module.B.astype(np.float64) * module.scaling


def _inner(one: tuple[Matrix, Matrix], other: tuple[Matrix, Matrix]) -> float:
    (A, B), (A_other, B_other) = one, other
    return float(np.sum((B.T @ B_other) * (A @ A_other.T)))


def _spaces(A: Matrix, B: Matrix) -> tuple[Matrix, Matrix]:
    """Orthonormal bases of the update's row space (in, k) and column space (out, k).

    The update's, not the factors': a rank whose other half is zero spans nothing.
    """
    left, right = orthogonalize(B.T @ B), orthogonalize(A @ A.T)
    u, s, vt = np.linalg.svd(left.R @ right.R.T, full_matrices=False)
    keep = s > s.max(initial=0.0) * 1e-6
    return A.T @ (right.basis @ vt[keep].T), B @ (left.basis @ u[:, keep])


def _overlap(one: Matrix, other: Matrix) -> float:
    smaller = min(one.shape[1], other.shape[1])
    return float(np.linalg.norm(one.T @ other) ** 2) / smaller if smaller else 0.0


def _check_shapes(name: str, adapters: Sequence[Adapter], held: dict[int, LoraModule]) -> None:
    shapes = {i: (m.B.shape[0], m.A.shape[1]) for i, m in held.items()}
    first = next(iter(shapes), 0)
    for i, shape in shapes.items():
        if shape != shapes[first]:
            raise FusekitError(
                f"adapter module {name!r} is {list(shape)} in {adapters[i].label}, "
                f"{list(shapes[first])} in {adapters[first].label}"
            )
