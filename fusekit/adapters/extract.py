"""Extracting a LoRA adapter from the difference of a fine-tuned model and its base."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import xxhash

from fusekit.adapters.adapter import (
    Array,
    Kind,
    LoraModule,
    bias_name,
    same_bits,
    to_float32,
)
from fusekit.adapters.linalg import (
    ThinSvd,
    allocate_ranks,
    energy_rank,
    exact_svd,
    randomized_svd,
)
from fusekit.adapters.peft_format import read_array, read_finite
from fusekit.adapters.peft_writer import AdapterWriter
from fusekit.adapters.provenance import Provenance, short_name
from fusekit.adapters.unfinished import AdapterJournal
from fusekit.checkpoint.source import TensorSource
from fusekit.checkpoint.writer import check_target
from fusekit.errors import CheckpointError, FusekitError

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|wpe|embed_in|word_embeddings|position_embeddings|"
    r"token_type_embeddings|tok_embeddings|embeddings?|shared)\.weight$"
)
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)\.weight$")
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """What to keep of the difference.

    Attributes:
        rank: largest rank of any module.
        energy: keep the smallest rank that captures this share of the squared norm, up to `rank`.
        parameter_budget: factor entries to spend over all modules, shared out by singular values,
            no module above `rank`.
        sv_epsilon: drop singular values at or below this (absolute).
        svd: `randomized` (default) or `exact`.
        oversample, iterations, seed: of the randomized decomposition.
        distribute: share the singular values between both factors; else all of them go on A.
        include, exclude: regular expressions searched in module names; exclude wins.
        save: regular expressions of modules that are stored whole where they differ.
        embeddings: input embeddings and output heads: `save` whole, as `lora`, or `skip`.
        biases: the difference as `lora` biases, the whole vector (`save`), or `skip`.
        others: norms and other tensors that do not decompose: `save` whole or `skip`.
        conv1d: the model stores GPT-2's Conv1D weights as (in, out).
    """

    rank: int = 128
    energy: float | None = None
    parameter_budget: int | None = None
    sv_epsilon: float = 0.0
    svd: Literal["randomized", "exact"] = "randomized"
    oversample: int = 8
    iterations: int = 2
    seed: int = 0
    distribute: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    save: tuple[str, ...] = ()
    embeddings: Literal["save", "lora", "skip"] = "save"
    biases: Literal["lora", "save", "skip"] = "lora"
    others: Literal["save", "skip"] = "save"
    conv1d: bool = False


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """How much of one module's difference its factors hold.

    Attributes:
        rank: of the factors.
        norm: Frobenius norm of the difference.
        residual: norm of what the factors miss, over `norm`.
        wasteful: the factors have more entries than the full matrix.
    """

    name: str
    rank: int
    norm: float
    residual: float
    wasteful: bool


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """What was extracted, and what was not.

    Attributes:
        modules: decomposed modules.
        saved: tensors stored whole.
        lost: tensors that differ from the base but are not in the adapter.
        unchanged: number of tensors equal to the base's.
    """

    modules: tuple[ModuleReport, ...]
    saved: tuple[str, ...]
    lost: tuple[str, ...]
    unchanged: int

    @property
    def residual(self) -> float:
        """Norm of all that the factors miss over the norm of all they were made from."""
        total = sum(module.norm**2 for module in self.modules)
        missed = sum((module.norm * module.residual) ** 2 for module in self.modules)
        return float(np.sqrt(missed / total)) if total else 0.0


Role = Literal["linear", "conv1d", "conv", "embedding", "other", "excluded"]
_KINDS: dict[Role, Kind] = {
    "linear": "linear",
    "conv1d": "linear",
    "conv": "conv",
    "embedding": "embedding",
}


def extract_adapter(
    base: TensorSource,
    model: TensorSource,
    folder: str | Path,
    options: ExtractOptions | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> ExtractReport:
    """Write a PEFT adapter that turns `base` into an approximation of `model`.

    Per weight matrix `D = W_model - W_base = U S V^T`, cut to rank R: `B = U sqrt(S)`,
    `A = sqrt(S) V^T`, scaling 1. Embeddings are decomposed transposed, convolutions flattened.
    Modules are read, decomposed and written one at a time. What is decomposed waits in
    `<folder>.decomposed`, which an interrupted run leaves behind. A manifest.json and a model card
    README.md say what was done.

    Args:
        base: the model the adapter will be put on.
        model: the fine-tuned model. A longer vocabulary is allowed; its embeddings are saved whole.
        folder: where to write; must not hold anything.
        config: `base_model_name_or_path` and `task_type` for adapter_config.json.
        overwrite: replace the folder if it exists, once the new one is complete.
        resume: go on from what an interrupted run of the same models and options decomposed. Files
            that changed are noticed; of models in memory only the labels are compared.

    Raises:
        CheckpointError: tensors missing in the base, shapes that differ elsewhere than in
            embeddings, NaN or Inf, or no difference at all.
        FusekitError: options out of range.
    """
    options = options or ExtractOptions()
    _check_options(options)
    _check_names(base, model)
    check_target(Path(folder), overwrite)
    from fusekit import __version__

    subject = {
        "fusekit": __version__,
        "options": dataclasses.asdict(options),
        "inputs": [base.identity(), model.identity()],
    }
    spool_folder = Path(folder).with_name(Path(folder).name + ".decomposed")
    with _Spool(spool_folder, subject, resume) as spool:
        differences = _Differences(base, model, options, spool)
        found = list(differences.decompose())
        ranks = _ranks(found, options)
        return _write(differences, found, ranks, folder, options, config or {}, overwrite)


def decompose(delta: Array, options: ExtractOptions, omega: Array | None = None) -> ThinSvd:
    """The leading singular triples of a difference, at most `options.rank` of them.

    `omega` is the test matrix of a randomized decomposition, instead of a drawn one.
    """
    rank = min(options.rank, *delta.shape)
    if options.svd == "exact":
        found = exact_svd(delta, rank)
    else:
        found = randomized_svd(
            delta,
            rank,
            oversample=options.oversample,
            iterations=options.iterations,
            seed=options.seed,
            omega=omega,
        )
    return found.truncated(int(np.count_nonzero(options.sv_epsilon < found.S)))


def low_rank_residual(
    target: Array, reference: Array, rank: int, *, svd: Literal["randomized", "exact"] = "exact"
) -> tuple[Array, Array]:
    """Factors `(A, B)`, B of unit scaling, of the best rank-`rank` approximation of the difference.

    `B @ A ~ target - reference` with `B = U S` and `A = V^T`: initial per-layer adapters of a model
    whose layers share `reference` (Relaxed Recursive Transformers), or the exclusive part of an
    expert beside a shared one (Twin-Merging). The rank is clipped to the matrix's; rank 0 gives
    empty factors.

    References:
        "Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA",
        arXiv 2410.20672.
        "Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging", arXiv 2406.15479.
    """
    delta = to_float32(target) - to_float32(reference)
    found = decompose(delta, ExtractOptions(rank=rank, svd=svd))
    return found.factors("left")


def twin_rank(shape: tuple[int, ...], mask_rate: float) -> int:
    """Rank Twin-Merging keeps of a matrix: `int((1 - mask_rate) * min(shape))`, in floating point
    as written (`int((1 - 0.9) * 10)` is 0)."""
    return int((1 - mask_rate) * min(shape))


def _check_options(options: ExtractOptions) -> None:
    if options.rank < 1:
        raise FusekitError(f"rank is {options.rank}, expected 1 or more")
    if options.energy is not None and not 0 < options.energy <= 1:
        raise FusekitError(f"energy is {options.energy}, expected more than 0, at most 1")
    if options.energy is not None and options.parameter_budget is not None:
        raise FusekitError("energy and parameter_budget exclude each other")
    for pattern in (*options.include, *options.exclude, *options.save):
        try:
            re.compile(pattern)
        except re.error as error:
            raise FusekitError(f"{pattern!r} is not a regular expression: {error}") from None


def _check_names(base: TensorSource, model: TensorSource) -> None:
    for name, info in model.tensors.items():
        if name not in base.tensors:
            raise CheckpointError(
                f"{model.where(name)}: tensor {name!r} is not in the base {base.label}"
            )
        shape = base.tensors[name].shape
        if info.shape != shape and not (_is_vocabulary(name) and info.shape[1:] == shape[1:]):
            raise CheckpointError(
                f"tensor {name!r} has shape {list(info.shape)} in {model.label}, "
                f"{list(shape)} in the base {base.label}"
            )
    missing = next((name for name in base.tensors if name not in model.tensors), None)
    if missing is not None:
        raise CheckpointError(
            f"{base.where(missing)}: tensor {missing!r} is not in the model {model.label}"
        )


def _is_vocabulary(name: str) -> bool:
    weight = name.removesuffix("bias") + "weight" if name.endswith(".bias") else name
    return bool(_EMBEDDING.search(weight) or _HEAD.search(weight))


@dataclass(frozen=True, slots=True)
class _Found:
    """A decomposed difference of norm `norm` whose factors wait on disk; `rest` is outside them."""

    name: str
    role: Role
    shape: tuple[int, ...]
    matrix_shape: tuple[int, int]
    norm: float
    rest: float
    S: Array
    spooled: Path


Outcome = Literal["unchanged", "excluded", "changed"]
"""What there is to say of a tensor that was not decomposed."""


class _Spool:
    """Decompositions on disk, and a journal of the tensors that are done with.

    A context manager: on leaving, the folder is removed, unless an error leaves something to go on
    with.

    Args:
        folder: where to keep them.
        subject: everything the decompositions depend on.
        resume: take over what the folder holds of this very subject.
    """

    def __init__(self, folder: Path, subject: Mapping[str, Any], resume: bool) -> None:
        self._folder = folder
        self._journal = AdapterJournal(folder, subject)
        entries = self._journal.entries() if resume else []
        if not entries:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self._journal.begin(entries)
        self._noted = {entry["name"]: entry for entry in entries}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or not self._journal.is_begun:
            shutil.rmtree(self._folder, ignore_errors=True)

    def known(self, name: str) -> _Found | Outcome | None:
        """What an earlier run found out about a tensor."""
        entry = self._noted.get(name)
        if entry is None or "outcome" in entry:
            return None if entry is None else entry["outcome"]
        path = self._path(name)
        with np.load(path) as spooled:
            S = spooled["S"]
        shapes = {key: tuple(entry[key]) for key in ("shape", "matrix_shape")}
        return _Found(**{**entry, **shapes}, S=S, spooled=path)

    def keep(self, name: str, svd: ThinSvd) -> Path:
        """Bring a tensor's decomposition to the disk."""
        path = self._path(name)
        with path.open("wb") as file:
            np.savez(file, U=svd.U, S=svd.S, Vt=svd.Vt)
            file.flush()
            os.fsync(file.fileno())
        return path

    def note(self, name: str, found: _Found | Outcome) -> None:
        """Write down what was found out about a tensor."""
        if isinstance(found, str):
            entry: dict[str, Any] = {"name": name, "outcome": found}
        else:
            fields = ("name", "role", "shape", "matrix_shape", "norm", "rest")
            entry = {field: getattr(found, field) for field in fields}
        if self._journal.note(entry):
            self._journal.sync()

    def _path(self, name: str) -> Path:
        return self._folder / f"{xxhash.xxh3_128_hexdigest(name.encode())}.npz"


class _Differences:
    """Which tensors differ, and the decompositions of those that have one."""

    def __init__(
        self, base: TensorSource, model: TensorSource, options: ExtractOptions, spool: _Spool
    ) -> None:
        self.base = base
        self.model = model
        self._options = options
        self._spool = spool
        self.changed: list[str] = []
        self.excluded: list[str] = []
        self.unchanged = 0

    def decompose(self) -> Iterator[_Found]:
        """One pass over the model; what differs but does not decompose is left in `changed`."""
        for name in self.model.tensors:
            found = self._spool.known(name)
            if found is None:
                found = self._examined(name)
                self._spool.note(name, found)
            if isinstance(found, _Found):
                yield found
            elif found == "unchanged":
                self.unchanged += 1
            else:
                (self.excluded if found == "excluded" else self.changed).append(name)

    def _examined(self, name: str) -> _Found | Outcome:
        info = self.model.tensors[name]
        tuned = read_finite(self.model, name)
        base = read_finite(self.base, name)
        if _same_values(base, tuned):
            return "unchanged"
        role = _role(name, info.shape, self._options)
        if role == "excluded":
            return "excluded"
        if role not in _KINDS or base.shape != tuned.shape or not info.dtype.is_float:
            return "changed"
        delta = as_matrix(to_float32(tuned) - to_float32(base), role)
        svd = decompose(delta, self._options)
        norm = float(np.linalg.norm(delta))
        # Subtracted, not from the difference of squares, which cancels to half the digits.
        delta -= (svd.U * svd.S) @ svd.Vt
        return _Found(
            name=name,
            role=role,
            shape=info.shape,
            matrix_shape=delta.shape,
            norm=norm,
            rest=float(np.linalg.norm(delta)),
            S=svd.S,
            spooled=self._spool.keep(name, svd),
        )


def _same_values(base: Array, tuned: Array) -> bool:
    """Whether two tensors are equal, be it in different element types."""
    if same_bits(base, tuned):
        return True
    return base.shape == tuned.shape and np.array_equal(to_float32(base), to_float32(tuned))


def _role(name: str, shape: tuple[int, ...], options: ExtractOptions) -> Role:
    module, _, leaf = name.rpartition(".")
    if not _selected(module, options):
        return "excluded"
    if leaf != "weight" or _found_in(module, options.save):
        return "other"
    if _EMBEDDING.search(name):
        return "embedding" if options.embeddings == "lora" and len(shape) == 2 else "other"
    if _HEAD.search(name):
        return "linear" if options.embeddings == "lora" and len(shape) == 2 else "other"
    if len(shape) == 2:
        return "conv1d" if options.conv1d and _CONV1D.search(name) else "linear"
    if len(shape) > 3 or (len(shape) == 3 and "conv" in name):
        return "conv"
    return "other"


def _selected(module: str, options: ExtractOptions) -> bool:
    if _found_in(module, options.exclude):
        return False
    return not options.include or _found_in(module, options.include)


def _found_in(module: str, patterns: tuple[str, ...]) -> bool:
    return any(re.search(pattern, module) for pattern in patterns)


def as_matrix(delta: Array, role: Role) -> Array:
    """A difference as the (out, in) matrix whose factors PEFT stores."""
    if role in {"embedding", "conv1d"}:
        return np.ascontiguousarray(delta.T)
    return delta.reshape(delta.shape[0], -1)


def _ranks(found: list[_Found], options: ExtractOptions) -> dict[str, int]:
    if options.parameter_budget is not None:
        return allocate_ranks(
            {f.name: f.S for f in found},
            {f.name: sum(f.matrix_shape) for f in found},
            options.parameter_budget,
        )
    if options.energy is None:
        return {f.name: len(f.S) for f in found}
    return {f.name: min(len(f.S), _energy_rank(f, options.energy)) for f in found}


def _energy_rank(found: _Found, energy: float) -> int:
    """Rank for a share of the whole difference's energy, of which the triples hold only a part."""
    return energy_rank(np.append(found.S, found.rest), energy)


def _write(
    differences: _Differences,
    found: list[_Found],
    ranks: Mapping[str, int],
    folder: str | Path,
    options: ExtractOptions,
    config: Mapping[str, Any],
    overwrite: bool,
) -> ExtractReport:
    if not any(ranks.values()):
        chosen = " that was chosen" if options.include or options.exclude else ""
        raise CheckpointError(
            f"{differences.model.label}: no weight matrix{chosen} differs from that of "
            f"{differences.base.label}, so there is nothing to extract"
        )
    biases, saved, lost = _placed(differences, found, ranks, options)
    fields = dict(config)
    if any(name.endswith(".bias") for name in saved):
        fields["bias"] = "lora_only"
    reports = [_module_report(f, ranks[f.name]) for f in found]
    report = ExtractReport(
        modules=tuple(report for report in reports if report.rank),
        saved=tuple(saved),
        lost=tuple(lost),
        unchanged=differences.unchanged,
    )
    provenance = _provenance(differences, report, options)
    with AdapterWriter(folder, fields, provenance, overwrite=overwrite) as writer:
        for f in found:
            if ranks[f.name]:
                _write_module(writer, differences, f, ranks[f.name], biases, options)
        for name in saved:
            writer.replace(name, read_array(differences.model, name))
    return report


def _provenance(
    differences: _Differences, report: ExtractReport, options: ExtractOptions
) -> Provenance:
    base, model = differences.base, differences.model
    chosen = {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(options)
        if (value := getattr(options, field.name)) != field.default
    }
    return Provenance(
        title=f"{short_name(model.label)} as an adapter of {short_name(base.label)}",
        text=f"The difference of `{model.label}` and `{base.label}`, every matrix cut to low rank: "
        f"{report.residual:.1%} of its norm is missed.",
        record={"extraction": chosen},
        inputs=[{"reference": source.label, **source.identity()} for source in (base, model)],
        tags=("extracted",),
    )


def _placed(
    differences: _Differences,
    found: list[_Found],
    ranks: Mapping[str, int],
    options: ExtractOptions,
) -> tuple[set[str], list[str], list[str]]:
    """Biases that go with their module, tensors saved whole, tensors the adapter cannot hold."""
    adapted = {f.name for f in found if ranks[f.name] and f.role != "embedding"}
    names = differences.model.tensors
    biases: set[str] = set()
    saved: dict[str, None] = {}
    lost = list(differences.excluded)
    for name in differences.changed:
        module, _, leaf = name.rpartition(".")
        owned = leaf == "bias" and f"{module}.weight" in adapted
        vocabulary = _is_vocabulary(name)
        policy = options.embeddings if vocabulary else options.others
        if leaf == "bias":
            policy = options.biases if owned or options.biases == "skip" else policy
        if _found_in(module, options.save):
            policy = "save"
        # A resized vocabulary has no difference to decompose.
        resized = vocabulary and names[name].shape != differences.base.tensors[name].shape
        if owned and policy == "lora":
            biases.add(name)
        elif owned and policy == "save":
            saved[name] = None
        elif module and not owned and (policy == "save" or (resized and policy == "lora")):
            # PEFT swaps in whole modules, so the unchanged tensors of the module come along.
            saved |= dict.fromkeys(n for n in names if n.rpartition(".")[0] == module)
        else:
            lost.append(name)
    lost += [f.name for f in found if not ranks[f.name]]
    return biases, list(saved), [name for name in lost if name not in saved]


def _write_module(
    writer: AdapterWriter,
    differences: _Differences,
    found: _Found,
    rank: int,
    biases: set[str],
    options: ExtractOptions,
) -> None:
    with np.load(found.spooled) as spooled:
        svd = ThinSvd(spooled["U"], found.S, spooled["Vt"]).truncated(rank)
    A, B = svd.factors("balanced" if options.distribute else "right")
    dtype = differences.model.tensors[found.name].dtype.numpy
    bias = bias_name(found.name)
    writer.add(
        LoraModule(
            name=found.name,
            A=A.astype(dtype),
            B=B.astype(dtype),
            alpha=float(rank),
            kind=_KINDS[found.role],
            transposed=found.role in {"embedding", "conv1d"},
            kernel=found.shape[1:] if found.role == "conv" else (),
            bias=_bias_difference(differences, bias) if bias in biases else None,
        )
    )


def _module_report(found: _Found, rank: int) -> ModuleReport:
    missed = float(np.hypot(found.rest, np.linalg.norm(found.S[rank:])))
    rows, columns = found.matrix_shape
    return ModuleReport(
        name=found.name,
        rank=rank,
        norm=found.norm,
        residual=missed / found.norm,
        wasteful=rank * (rows + columns) > rows * columns,
    )


def _bias_difference(differences: _Differences, name: str) -> Array:
    tuned = read_array(differences.model, name)
    difference = to_float32(tuned) - to_float32(read_array(differences.base, name))
    return difference.astype(tuned.dtype)
