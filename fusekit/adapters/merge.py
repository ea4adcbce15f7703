"""Merging LoRA adapters into one adapter, module by module, without the base model."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fusekit.adapters.adapter import (
    Adapter,
    Array,
    LoraModule,
    common_dtype,
    joined,
    same_bits,
    to_float32,
    widen,
)
from fusekit.adapters.combine import (
    COMBINATIONS,
    Combination,
    Drop,
    MajoritySign,
    Pruner,
    combine,
    weighted_sum,
)
from fusekit.adapters.knots import Agreement, Aligned, Block, align, merge_coordinates
from fusekit.adapters.lego import MAX_REWEIGHTING, LegoOptions, merge_pieces
from fusekit.adapters.linalg import (
    ThinSvd,
    allocate_ranks,
    exact_svd,
    pad_rank,
    product_singular_values,
    product_svd,
    randomized_svd,
    repeated_coefficients,
    stack_factors,
)
from fusekit.adapters.peft_format import read_array
from fusekit.checkpoint.dtypes import dtype_named
from fusekit.checkpoint.source import TensorSource
from fusekit.errors import CheckpointError, FusekitError, did_you_mean

METHODS = (
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
    "lora_lego",
    "knots_linear",
    "knots_ties",
    "knots_dare_ties",
)
AVERAGING = (
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_ties_svd",
    "lora_lego",
    "knots_ties",
    "knots_dare_ties",
)
"""Methods that divide by the number of agreeing sources themselves: default weight 1, not 1/n."""

BLOCK_BYTES = 32 << 20
"""Dense updates are combined in blocks of rows of about this size, over all sources together."""

_CANCELS = (
    "lora_lego: pieces of one cluster nearly cancel; their mean is scaled by "
    f"{MAX_REWEIGHTING:g} and stays smaller than they are"
)

DENSE_EXACT_SIDE = 512
"""Dense results whose shorter side is at most this get an exact SVD under `svd="auto"`."""


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """What a merge is asked for beyond its method and weights.

    Attributes:
        rank: rank of the result. Defaults: svd types the largest source rank, LoRA-LEGO the mean
            source rank, all others what the method gives.
        parameter_budget: factor entries to spend over all modules instead of one rank, shared out
            by singular values.
        density: fraction of entries kept, for methods that drop entries; one, or one per adapter.
        majority_sign_method: TIES elects by sum of values (`total`) or of signs (`frequency`).
        convention: `peft` reproduces PEFT's `add_weighted_adapter`. `fusekit` differs where that
            surprises: linear types divide by the root of the total weight, so that merging copies
            of one adapter with weights that sum to 1 gives that adapter; ranks that differ are
            padded with zeros; singular values are shared evenly between the factors.
        svd: decomposition of dense results: exact, randomized, or by size.
        replacements: full-rank tensors that several sources hold and that differ: refuse (`error`),
            take the `first`, or `average` by weight.
        dtype: element type of the merged factors, such as `bfloat16`. Default: that of the sources,
            or float32 where they differ.
        seed: of random masks, test matrices and clusters.
        knots_basis: the side whose common basis KnOTS takes.
        lego: options of LoRA-LEGO.
    """

    rank: int | None = None
    parameter_budget: int | None = None
    density: float | Sequence[float] | None = None
    majority_sign_method: MajoritySign = "total"
    convention: Literal["fusekit", "peft"] = "fusekit"
    svd: Literal["auto", "exact", "randomized"] = "auto"
    replacements: Literal["error", "first", "average"] = "error"
    dtype: str | None = None
    seed: int = 0
    knots_basis: Literal["output", "input"] = "output"
    lego: LegoOptions = dataclasses.field(default_factory=LegoOptions)

    def densities(self, count: int) -> list[float]:
        """The fraction kept of each of `count` adapters; 1 where none is given."""
        if self.density is None:
            return [1.0] * count
        if isinstance(self.density, (int, float)):
            return [float(self.density)] * count
        return list(self.density)


@dataclass(frozen=True, eq=False, slots=True)
class _Part:
    """One source's share in one module: `coefficient * B @ A`, or a dense update (DoRA).

    A and B are in the source's own element type.
    """

    source: int
    weight: float
    module: LoraModule
    A: Array
    B: Array
    dense: Array | None

    @property
    def coefficient(self) -> float:
        return self.weight * self.module.scaling


Settings = tuple[Sequence[float], MergeOptions]
"""Weights and options of one tensor."""

Tell = Callable[[str, str], None]
"""What is to be said of a merge, and the module it is about."""

Combine = Callable[[str, Sequence[_Part], MergeOptions], tuple[Array, Array]]
"""A module's name, its sources and options -> factors (A, B) of the merged update."""


def merge_adapters(
    adapters: Sequence[Adapter],
    method: str = "svd",
    weights: Sequence[float] | None = None,
    options: MergeOptions | None = None,
    base: TensorSource | None = None,
    vary: Callable[[str], Settings] | None = None,
    on_remark: Tell | None = None,
) -> Adapter:
    """One adapter from several: each module merged on its own, when it is read.

    Every method works from the factors with each source's true scaling (rsLoRA and alpha patterns
    included), and the result has scaling 1. Modules that only some sources have are merged from
    those; biases of modules are added with their scalings.

    Args:
        adapters: at least one. Ranks and target modules may differ.
        method: one of `METHODS`.
        weights: one per adapter, any sign. Default 1/n, or 1 for methods that average already.
        options: see `MergeOptions`.
        base: the base model, needed only for DoRA sources, whose update depends on its weights.
        vary: weights and options by tensor name, where they differ. `parameter_budget`, `dtype`,
            `knots_basis` and KnOTS's densities hold for the whole merge: those of `options` count.
        on_remark: called with what a method has to say of a module, and the module's name, from the
            thread that computes the module. Default: a UserWarning.

    Returns:
        An adapter whose modules are computed at access, so that writing it never holds it whole.

    Raises:
        FusekitError: unknown method, missing or impossible options, weights that do not fit.
        CheckpointError: adapters that disagree on a module's shape; DoRA without a base.

    References:
        "TIES-Merging" arXiv 2306.01708, "DARE" arXiv 2311.03099, "LoRA-LEGO" arXiv 2409.16167,
        "Model merging with SVD to tie the Knots" arXiv 2410.19735.

    Example:
        >>> import numpy as np
        >>> from fusekit.adapters import adapter_from_tensors
        >>> config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
        >>> factors = {"q.lora_A.weight": np.ones((1, 3)), "q.lora_B.weight": np.ones((2, 1))}
        >>> one = adapter_from_tensors(factors, config)
        >>> merge_adapters([one, one], "cat", [0.5, 0.25]).modules["q.weight"].delta()
        array([[0.75, 0.75, 0.75],
               [0.75, 0.75, 0.75]], dtype=float32)
    """
    options = options or MergeOptions()
    settings = (checked_weights(adapters, method, weights, options), options)
    if vary is not None:
        for name in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
            checked_weights(adapters, method, *vary(name))
    settings_of = vary or (lambda _: settings)
    label = f"{method} of {len(adapters)} adapters"
    if vary is None and _changes_nothing(method, *settings):
        return dataclasses.replace(adapters[0], label=label)
    check_adapters(adapters, method, settings_of, base)
    pool = _Pool(adapters, settings_of, base)
    modules = _MergedModules(pool, _combiner(pool, method, options, on_remark or _warn), options)
    replacements = _merged_replacements(adapters, settings_of)
    return Adapter(label, modules, replacements, _shared_config(adapters))


def check_adapters(
    adapters: Sequence[Adapter],
    method: str,
    settings: Callable[[str], Settings],
    base: TensorSource | None,
) -> None:
    """Refuse adapters that do not merge with each other, as far as that shows without reading one.

    Raises:
        CheckpointError, FusekitError: see `merge_adapters`.
    """
    for adapter in adapters:
        adapter.require_names()
        _check_dora(adapter, method, base)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        holders = [adapter for adapter in adapters if name in adapter.modules]
        outlines = [(a.label, module) for a in holders if (module := a.outline(name)) is not None]
        for label, module in outlines[1:]:
            _check_agreement(label, module, *outlines[0])
        if method in COMBINATIONS and len(adapters) > 1:
            _check_ranks(name, [module.rank for _, module in outlines], settings(name)[1])


def _check_ranks(name: str, ranks: Sequence[int], options: MergeOptions) -> None:
    if len(set(ranks)) > 1 and options.convention == "peft":
        raise FusekitError(
            f"adapter module {name!r} has ranks {list(ranks)}: combining factors needs equal "
            "ranks; use cat or svd"
        )


def _check_agreement(label: str, module: LoraModule, other_label: str, other: LoraModule) -> None:
    same = (
        module.kind == other.kind
        and module.A.shape[1] == other.A.shape[1]
        and module.B.shape[0] == other.B.shape[0]
        and module.kernel == other.kernel
        and module.experts == other.experts
    )
    if not same:
        raise CheckpointError(
            f"adapter module {module.name!r} is {module.kind} of shape "
            f"{list(module.weight_shape)} in {label}, but {other.kind} of shape "
            f"{list(other.weight_shape)} in {other_label}: they are for different base models"
        )


def _check_dora(adapter: Adapter, method: str, base: TensorSource | None) -> None:
    if adapter.dora and not method.endswith("svd"):
        raise CheckpointError(
            f"{adapter.label}: uses DoRA, whose update is not a product of two small factors; "
            "merge it with svd or one of the _svd methods"
        )
    if adapter.dora and base is None:
        raise CheckpointError(
            f"{adapter.label}: uses DoRA, whose update depends on the base's weights: merging "
            "needs the base model (base_model of a recipe, --base)"
        )


def _changes_nothing(method: str, weights: Sequence[float], options: MergeOptions) -> bool:
    """Whether a merge gives back its only source, whatever the source holds."""
    untouched = options.rank is None and options.parameter_budget is None and options.dtype is None
    return list(weights) == [1] and untouched and not method.startswith("lora_lego")


def checked_weights(
    adapters: Sequence[Adapter],
    method: str,
    weights: Sequence[float] | None,
    options: MergeOptions,
) -> list[float]:
    """One weight per adapter, after everything that can be refused without reading one.

    Raises:
        FusekitError: see `merge_adapters`.
    """
    if method not in METHODS:
        raise FusekitError(
            f"unknown adapter merge method {method!r}{did_you_mean(method, METHODS)}"
        )
    if not adapters:
        raise FusekitError("no adapters to merge")
    if weights is None:
        weights = [default_weight(method, len(adapters))] * len(adapters)
    if len(weights) != len(adapters):
        raise FusekitError(f"{len(weights)} weights for {len(adapters)} adapters")
    if not all(math.isfinite(weight) for weight in weights):
        raise FusekitError(f"weights must be finite, found {list(weights)}")
    needs_density = method.startswith(("ties", "dare", "magnitude_prune", "knots_dare"))
    if needs_density and options.density is None:
        raise FusekitError(f"method {method!r} needs a density, the fraction of entries kept")
    densities = options.densities(len(adapters))
    if len(densities) != len(adapters):
        raise FusekitError(f"{len(densities)} densities for {len(adapters)} adapters")
    for density in densities:
        if not 0 <= density <= 1:
            raise FusekitError(f"density is {density}, expected 0 to 1")
        if "dare" in method and density == 0:
            raise FusekitError("density is 0: DARE divides by it, expected more than 0")
    if options.dtype is not None and not dtype_named(options.dtype).is_float:
        raise FusekitError(f"dtype is {options.dtype!r}, expected a floating-point type")
    if options.rank is not None and options.rank < 1:
        raise FusekitError(f"rank is {options.rank}, expected 1 or more")
    if options.rank is not None and options.parameter_budget is not None:
        raise FusekitError("rank and parameter_budget exclude each other")
    return list(weights)


def default_weight(method: str, adapters: int) -> float:
    """What an adapter counts if no weight is given: 1 for methods that average, else 1/n."""
    return 1.0 if method in AVERAGING else 1.0 / adapters


class _Pool:
    """The adapters to merge, module by module, checked against each other."""

    def __init__(
        self,
        adapters: Sequence[Adapter],
        settings: Callable[[str], Settings],
        base: TensorSource | None,
    ) -> None:
        self.adapters = adapters
        self._settings = settings
        self._base = base
        self.names = list(dict.fromkeys(name for a in adapters for name in a.modules))

    def options(self, name: str) -> MergeOptions:
        return self._settings(name)[1]

    def parts(self, name: str) -> list[_Part]:
        """Every source's share in a module."""
        found: list[_Part] = []
        weights, _ = self._settings(name)
        for index, (adapter, weight) in enumerate(zip(self.adapters, weights, strict=True)):
            if name not in adapter.modules:
                continue
            module = adapter.modules[name]
            if found:
                first = self.adapters[found[0].source].label
                _check_agreement(adapter.label, module, first, found[0].module)
            found.append(
                _Part(
                    source=index,
                    weight=weight,
                    module=module,
                    A=module.A,
                    B=module.B,
                    dense=self._dense(module),
                )
            )
        return found

    def _dense(self, module: LoraModule) -> Array | None:
        """The update (out, in) of a DoRA module, which is not of low rank."""
        if module.magnitude is None:
            return None
        if self._base is None:
            raise CheckpointError(
                f"adapter module {module.name!r} uses DoRA: its update depends on the base's "
                "weights, so merging needs the base model"
            )
        if module.name not in self._base.tensors:
            raise CheckpointError(f"{self._base.label}: no tensor {module.name!r}")
        weight = read_array(self._base, module.name)
        update = module.apply(weight) - weight.astype(np.float32)
        return update.T if module.transposed else update.reshape(update.shape[0], -1)


class _MergedModules(Mapping[str, LoraModule]):
    """Modules merged at access."""

    def __init__(self, pool: _Pool, combine_parts: Combine, options: MergeOptions) -> None:
        self._pool = pool
        self._combine = combine_parts
        self._dtype = None if options.dtype is None else dtype_named(options.dtype).numpy
        self._ranks: Mapping[str, int] | None = None
        if options.parameter_budget is not None:
            self._ranks = self._allocated(options.parameter_budget)

    def __getitem__(self, name: str) -> LoraModule:
        parts = self._pool.parts(name)
        if not parts:
            raise KeyError(name)
        options = self._pool.options(name)
        rank = options.rank if self._ranks is None else self._ranks[name]
        factors = []
        for expert, expert_parts in _by_expert(name, parts).items():
            A, B = self._combine(expert, expert_parts, options)
            if rank is not None and rank < A.shape[0]:
                A, B = product_svd(B, A, rank).factors(_split(options))
            factors.append((A, B))
        width = max(1, *(A.shape[0] for A, _ in factors))
        A, B = _joined([pad_rank(A, B, width) for A, B in factors])
        first = parts[0].module
        dtype = self._dtype or common_dtype([x for p in parts for x in (p.module.A, p.module.B)])
        biases = [
            np.float32(part.coefficient) * part.module.bias.astype(np.float32)
            for part in parts
            if part.module.bias is not None
        ]
        return dataclasses.replace(
            first,
            A=A.astype(dtype),
            B=B.astype(dtype),
            alpha=float(width),
            rslora=False,
            magnitude=None,
            magnitude_axis="output",
            bias=np.sum(biases, axis=0).astype(dtype) if biases else None,
        )

    def __contains__(self, name: object) -> bool:
        return name in self._pool.names

    def __iter__(self) -> Iterator[str]:
        if self._ranks is None:
            return iter(self._pool.names)
        return (name for name in self._pool.names if self._ranks[name] > 0)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _allocated(self, budget: int) -> dict[str, int]:
        values, costs = {}, {}
        for name in self._pool.names:
            experts = _by_expert(name, self._pool.parts(name))
            spectra = []
            for expert, parts in experts.items():
                A, B = self._combine(expert, parts, self._pool.options(name))
                spectra.append(product_singular_values(B, A))
                costs[name] = len(experts) * (A.shape[1] + B.shape[0])
            length = max(len(spectrum) for spectrum in spectra)
            padded = [np.pad(spectrum, (0, length - len(spectrum))) for spectrum in spectra]
            values[name] = np.linalg.norm(padded, axis=0)
        return allocate_ranks(values, costs, budget)


def _by_expert(name: str, parts: Sequence[_Part]) -> dict[str, list[_Part]]:
    """The parts of each expert of a raw parameter, under a name of its own; else all of them."""
    experts = parts[0].module.experts
    if experts == 1:
        return {name: list(parts)}
    return {
        f"{name}[{expert}]": [
            dataclasses.replace(
                part,
                A=part.A.reshape(experts, part.module.rank, -1)[expert],
                B=part.B.reshape(part.B.shape[0], part.module.rank, experts)[:, :, expert],
            )
            for part in parts
        ]
        for expert in range(experts)
    }


def _joined(factors: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Factors per expert in a raw parameter's layout: experts run slowest in A, fastest in B."""
    if len(factors) == 1:
        return factors[0]
    A = np.concatenate([a for a, _ in factors], axis=0)
    B = np.stack([b for _, b in factors], axis=2)
    return A, B.reshape(B.shape[0], -1)


def _warn(remark: str, module: str) -> None:
    warnings.warn(f"{remark} (tensor {module!r})", stacklevel=2)


def _combiner(pool: _Pool, method: str, options: MergeOptions, tell: Tell) -> Combine:
    alone = len(pool.adapters) == 1
    if method == "cat" or (method.startswith("knots") and alone):
        return lambda name, parts, _: stack_factors(_low_rank(name, parts))
    if method == "lora_lego":
        return functools.partial(_lego, tell)
    if method.startswith("knots"):
        return _Knots(pool, method, options)
    dense = method.endswith("svd")
    combination = COMBINATIONS.get(method.removesuffix("_svd"), Combination())
    if alone:
        combination = Combination()
        dense = dense and options.convention == "fusekit"
    space = _delta_space if dense else _factor_space
    return lambda name, parts, own: space(name, parts, combination, own)


def _split(options: MergeOptions) -> str:
    """Where singular values go, see `ThinSvd.factors`."""
    return "left" if options.convention == "peft" else "balanced"


def _low_rank(name: str, parts: Sequence[_Part]) -> list[tuple[Array, Array, float]]:
    """The parts as `(A, B, coefficient)`; refuses updates that are not of low rank."""
    for part in parts:
        if part.dense is not None:
            raise CheckpointError(
                f"adapter module {name!r} uses DoRA: its update is not a product of two small "
                "factors; merge it with svd or one of the _svd methods"
            )
    return [(part.A, part.B, part.coefficient) for part in parts]


def _factor_space(
    name: str, parts: Sequence[_Part], combination: Combination, options: MergeOptions
) -> tuple[Array, Array]:
    """The A's combined with each other and the B's with each other.

    Cheap and approximate: the product holds cross terms `B_i A_j`.
    """
    triples = _low_rank(name, parts)
    ranks = [A.shape[0] for A, _, _ in triples]
    if len(parts) > 1:
        _check_ranks(name, ranks, options)
    sizes = [abs(coefficient) for _, _, coefficient in triples]
    total = 1.0
    if options.convention == "fusekit" and not combination.elect:
        # c / sqrt(total) and |c| / sqrt(total) multiply out to c for one adapter or equal ones.
        total = sum(sizes) or 1.0
        on_a = [coefficient / math.sqrt(total) for _, _, coefficient in triples]
        on_b = [size / math.sqrt(total) for size in sizes]
    else:
        on_a = [math.copysign(math.sqrt(s), c) for s, (_, _, c) in zip(sizes, triples, strict=True)]
        on_b = [math.sqrt(size) for size in sizes]
    densities = _densities(parts, options)
    rank, first = max(ranks), triples[0]

    def combined(
        what: str, factors: Sequence[Array], on_factors: Sequence[float], shape: tuple[int, int]
    ) -> Array:
        return combine(
            combination,
            _rows(factors, shape),
            on_factors,
            densities,
            options.majority_sign_method,
            _dropper(name, what, parts, options),
        ).reshape(shape)

    A = combined("A", [A for A, _, _ in triples], on_a, (rank, first[0].shape[1]))
    B = combined("B", [B for _, B, _ in triples], on_b, (first[1].shape[0], rank))
    return A, B


def _rows(matrices: Sequence[Array], shape: tuple[int, int]) -> Array:
    """Each matrix in float32 as one row, with zeros where it is smaller than `shape`."""
    rows = np.zeros((len(matrices), *shape), np.float32)
    for row, matrix in zip(rows, matrices, strict=True):
        widen(matrix, row[: matrix.shape[0], : matrix.shape[1]])
    return rows.reshape(len(matrices), -1)


def _delta_space(
    name: str, parts: Sequence[_Part], combination: Combination, options: MergeOptions
) -> tuple[Array, Array]:
    """The updates themselves combined, and the result cut to its best low rank.

    A plain sum of products is decomposed from its factors; what is entry-wise needs one dense
    matrix of this module at a time.
    """
    split = _split(options)
    rank = options.rank or max(part.A.shape[0] for part in parts)
    plain = combination == Combination()
    if plain and all(part.dense is None for part in parts):
        triples = _low_rank(name, parts)
        A, B = joined([A for A, _, _ in triples], 0), joined([B for _, B, _ in triples], 1)
        return product_svd(B, A, rank, repeated_coefficients(triples)).factors(split)
    delta = _combined_delta(name, parts, combination, options)
    return _dense_svd(delta, rank, options).factors(split)


def _dense_svd(delta: Array, rank: int, options: MergeOptions) -> ThinSvd:
    side = min(delta.shape)
    exact = options.svd == "exact" or (
        options.svd == "auto"
        and (options.convention == "peft" or side <= DENSE_EXACT_SIDE or 2 * rank >= side)
    )
    if exact:
        return exact_svd(delta, rank)
    return randomized_svd(delta, rank, seed=options.seed)


def _combined_delta(
    name: str, parts: Sequence[_Part], combination: Combination, options: MergeOptions
) -> Array:
    """The dense combination of updates (out, in), built from blocks of rows."""
    parts = [dataclasses.replace(p, A=to_float32(p.A), B=to_float32(p.B)) for p in parts]
    rows, columns = parts[0].B.shape[0], parts[0].A.shape[1]
    step = min(rows, max(1, BLOCK_BYTES // (4 * columns * len(parts))))
    blocks = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    weights = [part.weight for part in parts]
    majority = options.majority_sign_method if combination.elect else None
    room = np.empty(len(parts) * step * columns, np.float32)
    sparsify = _sparsifiers(name, parts, combination, options, blocks, room)
    delta = np.empty((rows, columns), np.float32)
    for block in blocks:
        size = (block.stop - block.start) * columns
        updates = room[: len(parts) * size].reshape(len(parts), size)
        for part, update, sparsified in zip(parts, updates, sparsify, strict=True):
            _delta_rows(part, block, update)
            sparsified(block.start * columns, update)
        delta[block] = weighted_sum(updates, weights, majority).reshape(-1, columns)
    return delta


def _sparsifiers(
    name: str,
    parts: Sequence[_Part],
    combination: Combination,
    options: MergeOptions,
    blocks: Sequence[slice],
    room: Array,
) -> list[Callable[[int, Array], None]]:
    """For every dense update, what zeroes entries of its blocks: given where they begin, in order.

    Thresholds are found from the very blocks that will be combined, computed in `room`.
    """
    drop = _dropper(name, "delta", parts, options)

    def sparsifier(place: int, part: _Part, density: float) -> Callable[[int, Array], None]:
        if density == 1 or combination.sparsify == "none":
            return lambda _, update: None
        if combination.sparsify == "random":
            return lambda start, update: drop(place, start, update)
        entries = part.B.shape[0] * part.A.shape[1]
        kept = int(density * entries)
        prune = Pruner(lambda: (_delta_rows(part, block, room) for block in blocks), kept)
        return lambda _, update: prune(update)

    densities = _densities(parts, options)
    return [
        sparsifier(place, part, density)
        for place, (part, density) in enumerate(zip(parts, densities, strict=True))
    ]


def _densities(parts: Sequence[_Part], options: MergeOptions) -> list[float]:
    """The fraction kept of every part."""
    by_source = options.densities(1 + max(part.source for part in parts))
    return [by_source[part.source] for part in parts]


def _delta_rows(part: _Part, rows: slice, room: Array) -> Array:
    """Some rows of a source's update, at the beginning of `room`."""
    columns = part.A.shape[1]
    update: Array = room[: (rows.stop - rows.start) * columns].reshape(-1, columns)
    if part.dense is not None:
        update[...] = part.dense[rows]
    else:
        np.matmul(part.B[rows], part.A, out=update)
        update *= np.float32(part.module.scaling)
    return update


def _lego(
    tell: Tell, name: str, parts: Sequence[_Part], options: MergeOptions
) -> tuple[Array, Array]:
    triples = _low_rank(name, parts)
    pieces = sum(A.shape[0] for A, _, _ in triples)
    rank = options.rank or max(1, round(pieces / len(triples)))
    seed = _key(options.seed, name, "pieces")
    result = merge_pieces(triples, rank, options.lego, seed)
    if result.cancels:
        tell(_CANCELS, name)
    return result.A, result.B


class _Knots:
    """KnOTS over all modules: global thresholds first, then one module at a time."""

    def __init__(self, pool: _Pool, method: str, options: MergeOptions) -> None:
        self._pool = pool
        self._options = options
        self._rule: Literal["ties", "linear"] = "linear" if method == "knots_linear" else "ties"
        self._drop = method == "knots_dare_ties"
        self._densities = options.densities(len(pool.adapters))
        self._found: dict[str, Aligned] = {}  # small matrices only, for the passes that follow
        kept = [1.0] * len(pool.adapters) if self._drop else self._densities
        self._agreement = Agreement(self._all_blocks, kept)

    def __call__(self, name: str, parts: Sequence[_Part], _: MergeOptions) -> tuple[Array, Array]:
        aligned = self._aligned(name, parts)
        weights = np.zeros(len(self._densities))
        weights[[part.source for part in parts]] = [part.weight for part in parts]
        A, B = self._sides(parts)
        merged = np.empty((len(aligned.S), A[0].shape[1]), np.float32)
        done = 0
        for block in self._blocks(name, parts, aligned):
            columns = slice(done, done + block.coordinates.shape[2])
            merged[:, columns] = merge_coordinates(block, weights, self._rule, self._agreement)
            done = columns.stop
        basis = aligned.basis(B)
        return (basis.T, merged.T) if self._options.knots_basis == "input" else (merged, basis)

    def _sides(self, parts: Sequence[_Part]) -> tuple[list[Array], list[Array]]:
        """All A and all B, changing places if the basis is the input side's."""
        if self._options.knots_basis == "input":
            return [part.B.T for part in parts], [part.A.T for part in parts]
        return [part.A for part in parts], [part.B for part in parts]

    def _aligned(self, name: str, parts: Sequence[_Part]) -> Aligned:
        _low_rank(name, parts)
        if name not in self._found:
            A, B = self._sides(parts)
            scalings = [part.module.scaling for part in parts]
            self._found[name] = align(list(zip(A, B, scalings, strict=True)))
        return self._found[name]

    def _blocks(
        self, name: str, parts: Sequence[_Part], aligned: Aligned, step: int = 1
    ) -> Iterator[Block]:
        A = [a[:, ::step] for a in self._sides(parts)[0]]
        drop = _dropper(name, "coordinates", parts, self._options)
        done = 0
        for block in aligned.blocks(A, [part.source for part in parts]):
            if self._drop:
                for place, row in enumerate(block.rows):
                    drop(place, done, row)
                done += block.rows.shape[1]
            yield block

    def _all_blocks(self, step: int) -> Iterator[Block]:
        for name in self._pool.names:
            for expert, parts in _by_expert(name, self._pool.parts(name)).items():
                yield from self._blocks(expert, parts, self._aligned(expert, parts), step)


def _dropper(name: str, what: str, parts: Sequence[_Part], options: MergeOptions) -> Drop:
    """Random drops that depend on seed, source, module, factor and the entry's place alone."""
    densities = _densities(parts, options)
    keys = [np.uint64(_key(options.seed, part.source, name, what)) for part in parts]

    def drop(place: int, start: int, entries: Array) -> None:
        from fusekit.kernels import random

        random.drop(entries, densities[place], keys[place], start)
        entries /= np.float32(densities[place])

    return drop


def _key(*parts: int | str) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _shared_config(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What the merged adapter says of its base: fields on which the sources agree, and all their
    `modules_to_save`."""
    config: dict[str, Any] = {}
    for field in ("base_model_name_or_path", "revision", "task_type", "bias"):
        values = {repr(a.config[field]): a.config[field] for a in adapters if field in a.config}
        if len(values) == 1:
            config[field] = next(iter(values.values()))
        elif field == "bias" and values:
            config[field] = "all"
    saved = [m for adapter in adapters for m in adapter.config.get("modules_to_save") or ()]
    config["modules_to_save"] = list(dict.fromkeys(saved))
    return config


def _merged_replacements(
    adapters: Sequence[Adapter], settings: Callable[[str], Settings]
) -> Mapping[str, Array]:
    merged: dict[str, Array] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.replacements):
        weights, options = settings(name)
        holders = [i for i, adapter in enumerate(adapters) if name in adapter.replacements]
        tensors = [adapters[i].replacements[name] for i in holders]
        alike = all(same_bits(tensors[0], tensor) for tensor in tensors[1:])
        if alike or options.replacements == "first":
            merged[name] = tensors[0]
        elif options.replacements == "error":
            raise CheckpointError(
                f"tensor {name!r} is saved whole, and differently, in "
                f"{adapters[holders[0]].label} and {adapters[holders[1]].label}: low-rank merging "
                "does not apply to it; choose replacements='first' or 'average'"
            )
        else:
            merged[name] = _average(name, tensors, [weights[i] for i in holders])
    return merged


def _average(name: str, tensors: Sequence[Array], weights: Sequence[float]) -> Array:
    shapes = [list(tensor.shape) for tensor in tensors]
    if any(shape != shapes[0] for shape in shapes):
        raise CheckpointError(f"tensor {name!r} is saved whole in shapes {shapes}: cannot average")
    total = sum(weights)
    if total == 0:
        raise FusekitError(f"tensor {name!r}: the weights of its holders sum to 0: cannot average")
    mean = sum(
        (
            np.float32(w / total) * t.astype(np.float32)
            for w, t in zip(weights, tensors, strict=True)
        ),
        start=np.zeros(tensors[0].shape, np.float32),
    )
    return np.asarray(mean).astype(common_dtype(tensors))
