"""Reversible merging (RMM): many adapters as one shared basis and a few coefficients per task."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from fusekit.adapters.adapter import (
    Adapter,
    Array,
    Kind,
    LoraModule,
    common_dtype,
    to_float32,
)
from fusekit.adapters.linalg import pad_rank, product_singular_values, product_svd
from fusekit.adapters.peft_format import read_array
from fusekit.adapters.provenance import Provenance, file_identities
from fusekit.checkpoint.layout import MANIFEST
from fusekit.checkpoint.safetensors import SafetensorsFile, is_file_name
from fusekit.checkpoint.writer import new_folder
from fusekit.errors import CheckpointError, FusekitError

BASIS_NAME = "basis.safetensors"
PACK_NAME = "pack.json"
FORMAT = "fusekit-reversible-1"
ALIGNMENT_SWEEPS = 3
WHOLE = "/whole"
"""What follows a base tensor's name where a task saves the tensor itself."""


@dataclass(frozen=True, eq=False, slots=True)
class SideBasis:
    """The shared part of one factor of one module, position by position.

    A position is a row of B or a column of A: a vector of the rank's length, one per task.

    Attributes:
        mean: (positions, rank).
        basis: (positions, rank, directions), orthonormal directions.
    """

    mean: Array
    basis: Array

    def project(self, vectors: Array) -> Array:
        """Coefficients (positions, directions) of one task's vectors (positions, rank)."""
        return np.asarray(np.einsum("qrp,qr->qp", self.basis, vectors - self.mean))

    def rebuild(self, coefficients: Array) -> Array:
        """One task's vectors (positions, rank) from its coefficients."""
        return np.asarray(self.mean + np.einsum("qrp,qp->qr", self.basis, coefficients))


def fit_side(vectors: Array, directions: int) -> tuple[SideBasis, Array]:
    """Per position, the mean and the principal directions that leave the least squared error.

    Args:
        vectors: (tasks, positions, rank).
        directions: kept per position, 0 to `min(rank, tasks - 1)`; at the upper end exact.

    Returns:
        The basis and the coefficients (tasks, positions, directions).

    References:
        "Towards Reversible Model Merging For Low-rank Weights", arXiv 2510.14163.
    """
    X = vectors.astype(np.float64).transpose(1, 2, 0)
    mean = X.mean(axis=2)
    centred = X - mean[:, :, None]
    basis = np.linalg.svd(centred, full_matrices=False)[0][:, :, :directions]
    if directions:
        largest = np.abs(basis).argmax(axis=1, keepdims=True)
        basis = basis * np.where(np.take_along_axis(basis, largest, axis=1) < 0, -1.0, 1.0)
    coefficients = np.einsum("qrp,qrn->nqp", basis, centred)
    side = SideBasis(mean.astype(np.float32), basis.astype(np.float32))
    return side, coefficients.astype(np.float32)


def storage_ratio(directions: int, rank: int, tasks: int) -> float:
    """Numbers stored over the numbers of all adapters: `(p (r + n) + r) / (r n)`."""
    return (directions * (rank + tasks) + rank) / (rank * tasks)


def directions_for(ratio: float, rank: int, tasks: int) -> int:
    """The most directions whose storage ratio does not exceed `ratio`, at least 0."""
    wanted = math.floor((ratio * tasks - 1) * rank / (rank + tasks) + 1e-9)
    return max(0, min(wanted, rank, tasks - 1))


@dataclass(frozen=True, slots=True)
class TaskError:
    """Relative error of a task's rebuilt updates, over all modules, beside the honest comparator.

    Attributes:
        packed: of the reversible merge.
        truncated: of cutting the task's own adapter to the rank that takes as many bytes.
    """

    task: str
    packed: float
    truncated: float


@dataclass(frozen=True, slots=True)
class PackReport:
    """What packing costs and loses.

    Attributes:
        ratio: numbers stored over those of the original adapters.
        truncated_rank: the equal-size rank of the comparator, averaged over modules.
    """

    directions: int
    ratio: float
    truncated_rank: float
    errors: tuple[TaskError, ...]

    @property
    def recommended(self) -> str:
        """`keep the adapters`, `rank truncation` or `reversible merging`."""
        if self.ratio >= 1:
            return "keep the adapters"
        packed = sum(error.packed for error in self.errors)
        truncated = sum(error.truncated for error in self.errors)
        return "reversible merging" if packed < truncated else "rank truncation"


def pack_adapters(
    adapters: Mapping[str, Adapter],
    folder: str | Path,
    *,
    directions: int | None = None,
    ratio: float | None = None,
    align: bool = False,
    provenance: Provenance | None = None,
) -> PackReport:
    """Write a pack: mean and directions shared by all tasks, coefficients per task.

    Everything is stored in the adapters' element type. Scalings are folded into B first. Ranks that
    differ are padded with zeros after balancing. What is not of low rank - biases, DoRA magnitudes,
    tensors saved whole - is kept with each task as it is; reported errors are those of `B @ A`.

    Args:
        adapters: task name -> adapter. Modules that only some tasks have are fitted on those.
        folder: the pack to create; must not exist.
        directions: kept per position; more than are needed for an exact pack are cut.
        ratio: instead, the storage ratio to stay under.
        align: rotate every task's rank space towards the others first. Updates do not change.
        provenance: where the adapters come from, for manifest.json; None writes none.

    Raises:
        FusekitError: no or both budgets, no adapters, a pack that exists.
        CheckpointError: adapters that disagree on shapes, adapters of several experts.
    """
    if (directions is None) == (ratio is None):
        raise FusekitError("give either directions or ratio")
    if not adapters:
        raise FusekitError("no adapters to pack")
    for task in adapters:
        _check_task_name(task)
    path = Path(folder)
    if path.exists():
        raise CheckpointError(f"{folder}: already exists; packs are written to new folders")
    for adapter in adapters.values():
        _check_packable(adapter)
    names = dict.fromkeys(name for adapter in adapters.values() for name in adapter.modules)
    builder = _PackBuilder(list(adapters))

    def budget(rank: int, tasks: int) -> int:
        wanted = directions_for(ratio or 0.0, rank, tasks) if directions is None else directions
        return min(wanted, rank, tasks - 1)

    for name in names:
        holders = {task: a.modules[name] for task, a in adapters.items() if name in a.modules}
        builder.add(name, holders, budget, align)
    for task, adapter in adapters.items():
        builder.keep(task, _not_low_rank(adapter))
    builder.write(path, _pack_config(adapters), _own_config(adapters), provenance)
    return builder.report()


@dataclass(frozen=True, eq=False, slots=True)
class Pack:
    """An opened pack.

    Attributes:
        folder: where it lies.
        tasks: names of the tasks that can be unpacked.
        config: fields of adapter_config.json that all tasks share.
        own: further fields of single tasks.
        modules: what the pack knows of each module.
    """

    folder: Path
    tasks: tuple[str, ...]
    config: Mapping[str, Any]
    own: Mapping[str, Mapping[str, Any]]
    modules: Mapping[str, Mapping[str, Any]]
    basis: SafetensorsFile

    def side(self, name: str, factor: str) -> SideBasis:
        return SideBasis(
            to_float32(read_array(self.basis, f"{name}/{factor}/mean")),
            to_float32(read_array(self.basis, f"{name}/{factor}/basis")),
        )

    def unpack(self, task: str) -> Adapter:
        """One task's adapter, rebuilt."""
        if task not in self.tasks:
            raise FusekitError(f"{self.folder}: no task {task!r} (tasks: {', '.join(self.tasks)})")
        coefficients = SafetensorsFile(self.folder / f"{task}.safetensors")

        def kept(name: str) -> Array | None:
            return read_array(coefficients, name) if name in coefficients.tensors else None

        modules = {}
        for name, facts in self.modules.items():
            if f"{name}/A" not in coefficients.tensors:
                continue
            A = self._rebuilt(name, "A", coefficients).T
            B = self._rebuilt(name, "B", coefficients)
            modules[name] = LoraModule(
                name=name,
                A=np.ascontiguousarray(A),
                B=B,
                alpha=float(A.shape[0]),
                kind=facts["kind"],
                transposed=facts["transposed"],
                kernel=tuple(facts["kernel"]),
                magnitude=kept(f"{name}/magnitude"),
                bias=kept(f"{name}/bias"),
            )
        whole = {
            name.removesuffix(WHOLE): read_array(coefficients, name)
            for name in coefficients.tensors
            if name.endswith(WHOLE)
        }
        coefficients.close()
        config = {**self.config, **self.own.get(task, {})}
        return Adapter(f"{self.folder}:{task}", modules, whole, config)

    def _rebuilt(self, name: str, factor: str, coefficients: SafetensorsFile) -> Array:
        side, key = self.side(name, factor), f"{name}/{factor}"
        expected = (side.basis.shape[0], side.basis.shape[2])
        info = coefficients.tensors.get(key)
        if info is None or info.shape != expected:
            found = "missing" if info is None else f"of shape {list(info.shape)}"
            raise CheckpointError(
                f"{coefficients.label}: tensor {key!r} is {found}, expected {list(expected)}"
            )
        return side.rebuild(_read(coefficients, key))

    def provenance(self, task: str) -> Provenance:
        """How an unpacked adapter was made, for `write_adapter`."""
        files = [self.folder / name for name in (PACK_NAME, BASIS_NAME, f"{task}.safetensors")]
        return Provenance(
            title=task,
            text="Rebuilt from a pack of adapters that share a basis (reversible model merging).",
            record={"unpacked": {"task": task}},
            inputs=[file_identities(str(self.folder), files)],
            tags=("reversible-merging",),
            citations=("Towards Reversible Model Merging For Low-rank Weights (arXiv 2510.14163)",),
        )

    def add(self, task: str, adapter: Adapter, identity: Mapping[str, Any] | None = None) -> float:
        """Store another task on the pack's basis, without refitting, and open the pack again to
        unpack it. Returns the relative error of its updates.

        Args:
            identity: what pins the adapter, for the pack's manifest if it has one.

        Raises:
            FusekitError: the task exists, or its name does not name a file.
            CheckpointError: a module the pack does not know, of another shape, or of a larger rank.
        """
        _check_task_name(task)
        if task in self.tasks:
            raise FusekitError(f"{self.folder}: task {task!r} exists already")
        _check_packable(adapter)
        tensors = _not_low_rank(adapter)
        wanted, missed = 0.0, 0.0
        for name, module in adapter.modules.items():
            A, B = self._fitting(name, module)
            side_a, side_b = self.side(name, "A"), self.side(name, "B")
            svd_a, svd_b = product_svd(B, A).factors()
            svd_a, svd_b = pad_rank(svd_a, svd_b, A.shape[0])
            gauges = [(A, B), _rotated(svd_a, svd_b, side_a.mean.T, side_b.mean)]
            fits = [_projected(side_a, side_b, a, b) for a, b in gauges]
            error, coefficients_a, coefficients_b = min(fits, key=lambda fit: fit[0])
            tensors[f"{name}/A"], tensors[f"{name}/B"] = coefficients_a, coefficients_b
            wanted += _product_norm(B, A) ** 2
            missed += error**2
        path = self.folder / f"{task}.safetensors"
        _save(path, tensors)
        self._describe(path, identity)
        facts = json.loads((self.folder / PACK_NAME).read_text(encoding="utf-8"))
        facts["tasks"].append(task)
        facts.setdefault("own", {}).update(_own_config({task: adapter}))
        _write_json(self.folder / PACK_NAME, facts)
        return math.sqrt(missed / wanted) if wanted else 0.0

    def _describe(self, path: Path, identity: Mapping[str, Any] | None) -> None:
        """Enter a new file into the pack's manifest. The pack itself learns of the task later: an
        addition that was interrupted can be made again."""
        manifest = self.folder / MANIFEST
        if not manifest.is_file():
            return
        content = json.loads(manifest.read_text(encoding="utf-8"))
        content["files"][path.name] = _described(path)
        if identity is not None and identity not in content["inputs"]:
            content["inputs"].append(identity)
        _write_json(manifest, content)

    def _fitting(self, name: str, module: LoraModule) -> tuple[Array, Array]:
        if name not in self.modules:
            raise CheckpointError(f"{self.folder}: the pack has no module {name!r}")
        facts = self.modules[name]
        A, B = _scaled(module)
        expected = (facts["rank"], facts["in"], facts["out"])
        if (A.shape[1], B.shape[0]) != expected[1:] or A.shape[0] > expected[0]:
            raise CheckpointError(
                f"{self.folder}: module {name!r} has rank {A.shape[0]}, in {A.shape[1]}, out "
                f"{B.shape[0]}; the pack holds rank {expected[0]}, in {expected[1]}, out "
                f"{expected[2]}"
            )
        if A.shape[0] < expected[0]:
            A, B = pad_rank(A, B, expected[0])
        return A, B


def open_pack(folder: str | Path) -> Pack:
    """The pack in a folder.

    Raises:
        CheckpointError: it is not a pack.
    """
    path = Path(folder)
    try:
        facts = json.loads((path / PACK_NAME).read_text(encoding="utf-8"))
    except OSError as error:
        reason = f"{path / PACK_NAME} cannot be read: {error.strerror}"
        raise CheckpointError(f"{folder}: not a pack of adapters: {reason}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path / PACK_NAME}: not valid JSON") from None
    found = facts.get("format") if isinstance(facts, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{folder}: format is {found!r}, expected {FORMAT!r}")
    basis = SafetensorsFile(path / BASIS_NAME)
    try:
        _check_facts(facts, basis)
    except (KeyError, TypeError, ValueError):
        basis.close()
        raise CheckpointError(
            f"{path / PACK_NAME}: does not describe the tensors of {BASIS_NAME}"
        ) from None
    own = facts.get("own", {})
    return Pack(path, tuple(facts["tasks"]), facts["config"], own, facts["modules"], basis)


def _check_facts(facts: Mapping[str, Any], basis: SafetensorsFile) -> None:
    """Raises KeyError, TypeError or ValueError where a pack's description is not one."""
    if not all(is_file_name(task) for task in facts["tasks"]):
        raise ValueError
    own = facts.get("own", {})
    if not all(isinstance(config, dict) for config in (facts["config"], own, *own.values())):
        raise TypeError
    for name, module in facts["modules"].items():
        if module["kind"] not in get_args(Kind) or type(module["transposed"]) is not bool:
            raise ValueError
        kernel = module["kernel"]
        if kernel and math.prod(kernel) != module["in"]:
            raise ValueError
        for factor, positions in (("A", module["in"]), ("B", module["out"])):
            mean = basis.tensors[f"{name}/{factor}/mean"].shape
            directions = basis.tensors[f"{name}/{factor}/basis"].shape
            if mean != (positions, module["rank"]) or directions[:2] != mean:
                raise ValueError


class _PackBuilder:
    """Collects a pack's tensors module by module, and the errors on the way."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = tasks
        self._basis: dict[str, Array] = {}
        self._coefficients: dict[str, dict[str, Array]] = {task: {} for task in tasks}
        self._modules: dict[str, dict[str, Any]] = {}
        self._squares: dict[str, Array] = {task: np.zeros(3) for task in tasks}
        self._directions = 0
        self._stored = 0
        self._original = 0
        self._truncated_ranks: list[int] = []

    def add(
        self,
        name: str,
        holders: Mapping[str, LoraModule],
        budget: Callable[[int, int], int],
        align: bool,
    ) -> None:
        factors = _common_rank(name, holders)
        if align:
            factors = align_gauges(factors)
        tasks = len(factors)
        A = np.stack([a.T for a, _ in factors])
        B = np.stack([b for _, b in factors])
        rank = A.shape[2]
        kept = budget(rank, tasks)
        self._directions = max(self._directions, kept)
        rebuilt = {}
        dtype = common_dtype([array for m in holders.values() for array in (m.A, m.B)])
        for factor, vectors in (("A", A), ("B", B)):
            side, coefficients = fit_side(vectors, kept)
            mean, basis, on_basis = (x.astype(dtype) for x in (side.mean, side.basis, coefficients))
            self._basis[f"{name}/{factor}/mean"] = mean
            self._basis[f"{name}/{factor}/basis"] = basis
            stored = SideBasis(to_float32(mean), to_float32(basis))
            rebuilt[factor] = [stored.rebuild(to_float32(c)) for c in on_basis]
            for task, c in zip(holders, on_basis, strict=True):
                self._coefficients[task][f"{name}/{factor}"] = c
            self._stored += mean.size + basis.size + on_basis.size
        first = next(iter(holders.values()))
        positions = A.shape[1] + B.shape[1]
        self._original += sum(m.rank for m in holders.values()) * positions
        truncated = int(storage_ratio(kept, rank, tasks) * rank + 1e-9)
        self._truncated_ranks.append(min(truncated, rank))
        for i, task in enumerate(holders):
            values = product_singular_values(B[i], A[i].T)
            self._squares[task] += (
                float(np.square(values).sum()),
                _difference_norm((B[i], A[i].T), (rebuilt["B"][i], rebuilt["A"][i].T)) ** 2,
                float(np.square(values[truncated:]).sum()),
            )
        self._modules[name] = {
            "rank": rank,
            "in": A.shape[1],
            "out": B.shape[1],
            "kind": first.kind,
            "transposed": first.transposed,
            "kernel": list(first.kernel),
        }

    def keep(self, task: str, tensors: Mapping[str, Array]) -> None:
        """Store tensors with a task as they are."""
        self._coefficients[task].update(tensors)
        size = sum(tensor.size for tensor in tensors.values())
        self._stored += size
        self._original += size

    def write(
        self,
        folder: Path,
        config: Mapping[str, Any],
        own: Mapping[str, Mapping[str, Any]],
        provenance: Provenance | None,
    ) -> None:
        with new_folder(folder) as work:
            _save(work / BASIS_NAME, self._basis)
            for task, tensors in self._coefficients.items():
                _save(work / f"{task}.safetensors", tensors)
            facts = {
                "format": FORMAT,
                "tasks": list(self._tasks),
                "config": dict(config),
                "own": dict(own),
                "modules": self._modules,
            }
            _write_json(work / PACK_NAME, facts)
            if provenance is not None:
                files = {path.name: _described(path) for path in sorted(work.glob("*.safetensors"))}
                _write_json(work / MANIFEST, {**provenance.manifest({}), "files": files})

    def report(self) -> PackReport:
        errors = []
        for task, (wanted, missed, cut) in self._squares.items():
            scale = wanted or 1.0
            errors.append(TaskError(task, math.sqrt(missed / scale), math.sqrt(cut / scale)))
        return PackReport(
            directions=self._directions,
            ratio=self._stored / self._original,
            truncated_rank=float(np.mean(self._truncated_ranks)),
            errors=tuple(errors),
        )


def align_gauges(factors: Sequence[tuple[Array, Array]]) -> list[tuple[Array, Array]]:
    """The same updates `B_i A_i` with rank spaces turned towards each other.

    Each is balanced by its SVD, then rotated by the orthogonal Procrustes solution
    `Q = U W^T, U S W^T = svd(B_i^T B_ref + A_i A_ref^T)` towards the running mean, in sweeps.
    """
    turned = []
    for A, B in factors:
        svd_a, svd_b = product_svd(B, A).factors()
        turned.append(pad_rank(svd_a, svd_b, A.shape[0]))
    reference = turned[0]
    for _ in range(ALIGNMENT_SWEEPS):
        turned = [_rotated(A, B, *reference) for A, B in turned]
        reference = (
            np.mean([a for a, _ in turned], axis=0),
            np.mean([b for _, b in turned], axis=0),
        )
    return turned


def _rotated(A: Array, B: Array, A_ref: Array, B_ref: Array) -> tuple[Array, Array]:
    u, _, wt = np.linalg.svd((B.T @ B_ref + A @ A_ref.T).astype(np.float64))
    turn = (u @ wt).astype(np.float32)
    return turn.T @ A, B @ turn


def _projected(
    side_a: SideBasis, side_b: SideBasis, A: Array, B: Array
) -> tuple[float, Array, Array]:
    """Error of the rebuilt update, and the coefficients of both factors on a pack's basis."""
    on_a, on_b = side_a.project(A.T), side_b.project(B)
    rebuilt = (side_b.rebuild(on_b), side_a.rebuild(on_a).T)
    return _difference_norm((B, A), rebuilt), on_a, on_b


def _common_rank(name: str, holders: Mapping[str, LoraModule]) -> list[tuple[Array, Array]]:
    factors = [_scaled(module) for module in holders.values()]
    shapes = {(a.shape[1], b.shape[0]) for a, b in factors}
    if len(shapes) > 1:
        raise CheckpointError(
            f"adapter module {name!r} has different (in, out) shapes across tasks: {sorted(shapes)}"
        )
    ranks = [a.shape[0] for a, _ in factors]
    if len(set(ranks)) == 1:
        return factors
    balanced = [product_svd(b, a).factors() for a, b in factors]
    return [pad_rank(a, b, max(ranks)) for a, b in balanced]


def _scaled(module: LoraModule) -> tuple[Array, Array]:
    return to_float32(module.A), to_float32(module.B) * np.float32(module.scaling)


def _check_packable(adapter: Adapter) -> None:
    adapter.require_names()
    for name in adapter.modules:
        module = adapter.outline(name) or adapter.modules[name]
        refused = {
            "several experts": module.experts > 1,
            "DoRA over its input features": module.magnitude_axis == "input",
        }
        for what, present in refused.items():
            if present:
                raise CheckpointError(
                    f"{adapter.label}: module {name!r} has {what}, which a pack cannot hold"
                )


def _not_low_rank(adapter: Adapter) -> dict[str, Array]:
    """What a task's file keeps as it is: magnitudes, biases (scaled), tensors saved whole."""
    tensors = {f"{name}{WHOLE}": tensor for name, tensor in adapter.replacements.items()}
    for name, module in adapter.modules.items():
        if module.magnitude is not None:
            tensors[f"{name}/magnitude"] = module.magnitude
        if module.bias is not None:
            scaled = to_float32(module.bias) * np.float32(module.scaling)
            tensors[f"{name}/bias"] = scaled.astype(module.bias.dtype)
    return tensors


def _product_norm(B: Array, A: Array) -> float:
    """Frobenius norm of `B @ A`: the root of `trace((B^T B)(A A^T))`."""
    B, A = B.astype(np.float64), A.astype(np.float64)
    return math.sqrt(max(0.0, float(np.sum((B.T @ B) * (A @ A.T)))))


def _difference_norm(one: tuple[Array, Array], other: tuple[Array, Array]) -> float:
    """Norm of `B_1 A_1 - B_2 A_2`, written as a product of differences so that it does not cancel:
    `(B_1 - B_2) A_1 + B_2 (A_1 - A_2)`."""
    (B, A), (B_other, A_other) = one, other
    return _product_norm(
        np.concatenate([B - B_other, B_other], axis=1), np.concatenate([A, A - A_other])
    )


def _pack_config(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for field in ("base_model_name_or_path", "revision", "task_type"):
        values = [a.config.get(field) for a in adapters.values()]
        if all(value == values[0] for value in values):
            config[field] = values[0]
    return config


def _own_config(adapters: Mapping[str, Adapter]) -> dict[str, dict[str, Any]]:
    """By task, what adapter_config.json must say of tensors that are saved whole."""
    fields = ("modules_to_save", "bias")
    return {
        task: {field: adapter.config[field] for field in fields if adapter.config.get(field)}
        for task, adapter in adapters.items()
        if adapter.replacements
    }


def _read(source: SafetensorsFile, name: str) -> Array:
    return to_float32(read_array(source, name))


def _check_task_name(task: str) -> None:
    """Refuse a name that cannot be that of a task's file."""
    if not is_file_name(task) or task.startswith(".") or f"{task}.safetensors" == BASIS_NAME:
        raise FusekitError(
            f"task name {task!r}: expected a plain file name, other than {Path(BASIS_NAME).stem!r}"
        )


def _described(path: Path) -> dict[str, dict[str, Any]]:
    """What a manifest says of the tensors of a file."""
    from fusekit.engine.manifest import entries_of

    with contextlib.closing(SafetensorsFile(path)) as source:
        return entries_of(source)


def _save(path: Path, tensors: Mapping[str, Array]) -> None:
    from safetensors.numpy import save

    _write_whole(path, save({k: np.ascontiguousarray(v) for k, v in tensors.items()}))


def _write_json(path: Path, facts: Mapping[str, Any]) -> None:
    _write_whole(path, (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode())


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file, flushed; one of that name stays whole until then."""
    draft = path.with_name(f"{path.name}.new")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def truncate_adapter(adapter: Adapter, rank: int) -> Adapter:
    """Every update cut to its best approximation of at most this rank, scaling 1."""
    modules = {}
    for name, module in adapter.modules.items():
        A, B = _scaled(module)
        A, B = product_svd(B, A, rank).factors()
        modules[name] = dataclasses.replace(module, A=A, B=B, alpha=float(A.shape[0]), rslora=False)
    return dataclasses.replace(adapter, modules=modules)
