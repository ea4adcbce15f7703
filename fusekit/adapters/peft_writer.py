"""Writing PEFT LoRA adapters that `peft` loads without warnings, one module at a time."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from threadpoolctl import threadpool_limits

from fusekit.adapters.adapter import Adapter, Array, Kind, LoraModule
from fusekit.adapters.peft_format import (
    CONFIG_NAME,
    KEY_PREFIX,
    WEIGHTS_NAME,
    is_dotted_suffix,
)
from fusekit.adapters.provenance import CARD, Provenance
from fusekit.adapters.unfinished import AdapterJournal
from fusekit.checkpoint.dtypes import DTYPES, dtype_named, dtype_of
from fusekit.checkpoint.layout import MANIFEST
from fusekit.checkpoint.writer import PartialFolder
from fusekit.engine.checksum import ChunkDigests
from fusekit.errors import CheckpointError, FusekitError
from fusekit.memory import reuse_freed_blocks

COPY_BYTES = 1 << 22
"""Data that must move within the file moves in pieces of this size."""
ENTRY_BYTES = 120
"""About what one tensor takes in the header beside its module's name."""


class AdapterWriter:
    """Writes a PEFT adapter folder module by module; the folder appears only when it is complete.

    >>> with AdapterWriter("merged", {"task_type": "CAUSAL_LM"}) as writer:  # doctest: +SKIP
    ...     for module in modules:
    ...         writer.add(module)

    Args:
        folder: the folder to create. It must not exist, or be empty.
        config: fields carried over into adapter_config.json: `base_model_name_or_path`,
            `revision`, `task_type`, and `modules_to_save` and `bias` as hints for replacements.
        provenance: how the adapter was made, for manifest.json and README.md; None writes neither.
        overwrite: replace the folder if it exists, once the new one is complete.
        header_room: bytes to leave for the header at the start of the file. A longer header, which
            is known only at the end, costs one more copy of the data.
        resume: go on with what an interrupted run of the same provenance left; `finished` says
            which modules that is, `redone_modules` how many it had noted whose bytes, or those
            before them, have changed since. What any other run left is replaced.

    Raises:
        FusekitError: the folder exists (or with `overwrite` is no output), or another process
            writes to it.
        CheckpointError: on closing, the modules cannot be described by one adapter_config.json.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Mapping[str, Any] | None = None,
        provenance: Provenance | None = None,
        *,
        overwrite: bool = False,
        header_room: int = 0,
        resume: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self._partial = PartialFolder(self.folder, overwrite=overwrite)
        self._config = dict(config or {})
        self._provenance = provenance
        self._checksums: dict[str, str] = {}
        self._work = self._partial.path
        self._room = -(-header_room // 8) * 8
        self._header: dict[str, dict[str, Any]] = {}
        self._modules: dict[str, _Written] = {}
        self._replaced: list[str] = []
        self._journal: AdapterJournal | None = None
        if provenance is not None:
            subject = {**provenance.manifest({}), "config": self._config, "room": self._room}
            self._journal = AdapterJournal(self._work, subject)
        try:
            self._data = self._opened(resume)
        except BaseException:
            self._partial.close()
            raise
        self.finished = frozenset(module.name for module in self._modules.values())
        self.resumed_tensors = len(self._header)

    def _opened(self, resume: bool) -> BinaryIO:
        """The weights file at the place where it goes on, after what is finished was taken over."""
        path = self._work / WEIGHTS_NAME
        entries = self._journal.entries() if resume and self._journal is not None else []
        noted = len(entries)
        entries = list(itertools.takewhile(lambda entry: self._is_intact(path, entry), entries))
        self.redone_modules = noted - len(entries)
        if not entries:
            self._partial.clear()
            data = path.open("w+b")
            data.seek(8 + self._room)
            return data
        for entry in entries:
            self._modules[entry["path"]] = _Written.from_json(entry["module"])
            self._header.update(entry["header"])
            self._checksums.update(entry["checksums"])
        if self._journal is not None:
            self._journal.begin(entries)
        data = path.open("r+b")
        data.truncate(entries[-1]["end"])
        data.seek(0, os.SEEK_END)
        return data

    def _is_intact(self, path: Path, entry: Mapping[str, Any]) -> bool:
        """Whether the weights file still holds the bytes of a module that the journal notes."""
        for key, described in entry["header"].items():
            begin, end = described["data_offsets"]
            itemsize = DTYPES[described["dtype"]].itemsize
            try:
                content = np.fromfile(path, np.uint8, end - begin, offset=8 + self._room + begin)
            except OSError:
                return False
            size = content.size // itemsize
            if _checksum(content, size, itemsize) != entry["checksums"][key]:
                return False
        return True

    def __enter__(self) -> AdapterWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._data.close()
            if not self._partial.is_released:
                if self._journal is None or not self._journal.is_begun:
                    self._partial.clear()
                self._partial.close()

    def add(self, module: LoraModule) -> None:
        """Append one module's tensors.

        Raises:
            CheckpointError: DoRA over input features, which PEFT does not have.
        """
        path, known = _module_path(module), len(self._header)
        if module.magnitude is not None and module.magnitude_axis == "input":
            raise CheckpointError(
                f"{self.folder}: module {path!r} has DoRA over its input features, which PEFT "
                "cannot express: fold it into the base, or merge it with svd"
            )
        if module.kind == "embedding":
            self._put(f"{path}.lora_embedding_A", module.A)
            self._put(f"{path}.lora_embedding_B", module.B)
        elif module.kind == "conv":
            rank = module.A.shape[0]
            ones = (1,) * (len(module.kernel) - 1)
            self._put(f"{path}.lora_A.weight", module.A.reshape(rank, *module.kernel))
            self._put(f"{path}.lora_B.weight", module.B.reshape(-1, rank, *ones))
        else:
            self._put(f"{path}.lora_A.weight", module.A)
            self._put(f"{path}.lora_B.weight", module.B)
        if module.magnitude is not None:
            ones = (1,) * (len(module.kernel) - 1)
            shape = (1, -1, *ones) if module.kind == "conv" else (-1,)
            self._put(f"{path}.lora_magnitude_vector", module.magnitude.reshape(shape))
        if module.bias is not None:
            self._put(f"{path}.lora_B.bias", module.bias)
        self._modules[path] = _Written(
            module.rank,
            module.alpha,
            module.scaling,
            module.rslora,
            module.kind,
            module.transposed,
            module.name,
            module.magnitude is not None,
            module.bias is not None,
            module.B.dtype,
            module.B.shape[0],
        )
        if self._journal is not None:
            self._note(self._journal, path, list(self._header)[known:])

    def _note(self, journal: AdapterJournal, path: str, keys: Sequence[str]) -> None:
        """Write down what a killed run needs to know of a module it finished."""
        entry = {
            "path": path,
            "module": self._modules[path].as_json(),
            "header": {key: self._header[key] for key in keys},
            "checksums": {key: self._checksums[key] for key in keys},
            "end": self._data.tell(),
        }
        if journal.note(entry):
            self._data.flush()
            os.fsync(self._data.fileno())
            journal.sync()

    def replace(self, name: str, tensor: Array) -> None:
        """Append a full tensor that takes the place of base tensor `name`. After all modules."""
        path, _, leaf = name.rpartition(".")
        adapted = path in self._modules and self._modules[path].kind != "parameter"
        self._put(f"{path}.base_layer.{leaf}" if adapted else name, tensor)
        self._replaced.append(name)

    def _put(self, name: str, tensor: Array) -> None:
        key, begin = KEY_PREFIX + name, 8 + self._room
        start = self._data.tell() - begin
        content = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        self._data.write(content.data)
        self._header[key] = {
            "dtype": dtype_of(tensor.dtype).name,
            "shape": list(tensor.shape),
            "data_offsets": [start, self._data.tell() - begin],
        }
        if self._provenance is not None:
            self._checksums[key] = _checksum(content, tensor.size, tensor.dtype.itemsize)

    def _finish(self) -> None:
        config = self._peft_config()
        self._write_header()
        self._data.flush()
        os.fsync(self._data.fileno())
        self._data.close()
        self._add_file(CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True))
        if self._provenance is not None:
            tensors = {key: {"file": WEIGHTS_NAME, **self._described(key)} for key in self._header}
            content = self._provenance.manifest(tensors)
            self._add_file(MANIFEST, json.dumps(content, indent=2, ensure_ascii=False))
            self._add_file(CARD, self._provenance.card(config["base_model_name_or_path"]).rstrip())
        if self._journal is not None:
            self._journal.discard()
        self._partial.publish()

    def _described(self, key: str) -> dict[str, Any]:
        """A tensor as manifests describe it."""
        entry = self._header[key]
        checksum = self._checksums[key]
        return {"dtype": entry["dtype"], "shape": entry["shape"], "checksum": checksum}

    def _add_file(self, name: str, text: str) -> None:
        with (self._work / name).open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _write_header(self) -> None:
        """Put the header before the data, which moves if the room left for it is too small."""
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._header}).encode()
        length = max(-(-len(header) // 8) * 8, self._room)
        if length > self._room:
            self._move_data(8 + self._room, 8 + length)
        self._data.seek(0)
        self._data.write(length.to_bytes(8, "little") + header.ljust(length))

    def _move_data(self, begin: int, target: int) -> None:
        """Copy everything from one place of the file to a later one, the end first."""
        end = self._data.seek(0, os.SEEK_END)
        for stop in range(end, begin, -COPY_BYTES):
            start = max(begin, stop - COPY_BYTES)
            self._data.seek(start)
            piece = self._data.read(stop - start)
            self._data.seek(start - begin + target)
            self._data.write(piece)

    def _peft_config(self) -> dict[str, Any]:
        if not self._modules:
            raise CheckpointError(
                f"{self.folder}: no module has an update of rank 1 or more, so there is no adapter"
            )
        written = self._modules
        rslora = all(module.rslora for module in written.values())
        alphas = {
            path: module.alpha if module.rslora == rslora else module.scaling * module.rank
            for path, module in written.items()
        }
        rank = max(module.rank for module in written.values())
        alpha = next(alphas[path] for path, module in written.items() if module.rank == rank)
        dora = self._agree("DoRA magnitudes", lambda module: module.dora)
        self._pad_biases()
        parameters = [m.name for m in written.values() if m.kind == "parameter"]
        targets = [path for path, m in written.items() if m.kind != "parameter"]
        return {
            "peft_type": "LORA",
            "task_type": self._config.get("task_type"),
            "base_model_name_or_path": self._config.get("base_model_name_or_path"),
            "revision": self._config.get("revision"),
            "inference_mode": True,
            "r": rank,
            "lora_alpha": _plain_number(alpha),
            "rank_pattern": {
                _pattern_of(path, m): m.rank for path, m in written.items() if m.rank != rank
            },
            "alpha_pattern": {
                _pattern_of(path, m): _plain_number(alphas[path])
                for path, m in written.items()
                if alphas[path] != alpha
            },
            "target_modules": _targets(targets),
            "target_parameters": parameters or None,
            "modules_to_save": self._modules_to_save() or None,
            "bias": self._config.get("bias", "none"),
            "lora_bias": any(module.bias for module in written.values()),
            "use_rslora": rslora,
            "use_dora": dora,
            "fan_in_fan_out": any(m.transposed and m.kind == "linear" for m in written.values()),
            "lora_dropout": 0.0,
            "init_lora_weights": True,
        }

    def _agree(self, what: str, has: Callable[[_Written], bool]) -> bool:
        held = {has(module) for module in self._modules.values()}
        if len(held) > 1:
            path = next(path for path, module in self._modules.items() if not has(module))
            raise CheckpointError(
                f"{self.folder}: module {path!r} has no {what} while others have: "
                "a PEFT adapter has them everywhere or nowhere"
            )
        return held.pop()

    def _pad_biases(self) -> None:
        """PEFT's `lora_bias` is one flag: every linear and conv module has a bias or none has."""
        if not any(module.bias for module in self._modules.values()):
            return
        for path, module in self._modules.items():
            if not module.bias and module.kind in {"linear", "conv"}:
                self._put(f"{path}.lora_B.bias", np.zeros(module.out, module.dtype))

    def _modules_to_save(self) -> list[str]:
        bias = self._config.get("bias", "none") != "none"
        hints = list(self._config.get("modules_to_save") or ())
        needed: dict[str, None] = {}
        for name in self._replaced:
            path, _, leaf = name.rpartition(".")
            hint = next((h for h in hints if _covers(h, path)), None)
            if hint is not None:
                needed[hint] = None
            elif path not in self._modules and not (bias and leaf == "bias"):
                if not path:
                    raise CheckpointError(
                        f"{self.folder}: tensor {name!r} is in no module, so modules_to_save "
                        "cannot hold it"
                    )
                needed[path] = None
        return list(needed)


@dataclass(frozen=True, slots=True)
class _Written:
    """What adapter_config.json must say of a module that was written."""

    rank: int
    alpha: float
    scaling: float
    rslora: bool
    kind: Kind
    transposed: bool
    name: str
    dora: bool
    bias: bool
    dtype: np.dtype[Any]
    out: int

    def as_json(self) -> dict[str, Any]:
        """The fields in JSON's types."""
        return {**dataclasses.asdict(self), "dtype": dtype_of(self.dtype).name}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> _Written:
        return cls(**{**fields, "dtype": dtype_named(fields["dtype"]).numpy})


def write_adapter(
    adapter: Adapter,
    folder: str | Path,
    threads: int | None = None,
    *,
    provenance: Provenance | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Path:
    """Write an adapter as a PEFT folder; tensors and scalings survive bit for bit.

    Modules of rank 0 are left out. Raises as `AdapterWriter`.

    Args:
        threads: modules computed at once, for adapters that compute them at access. Default: the
            number of processors. The result does not depend on it.
        provenance: how the adapter was made, for manifest.json and README.md; None writes neither.
        overwrite: replace the folder if it exists, once the new one is complete.
        resume: take over the modules that an interrupted run of the same provenance finished.
    """
    options = {"provenance": provenance, "overwrite": overwrite, "resume": resume}
    with writer_for(adapter, folder, **options) as writer:
        write_modules(adapter, writer, threads)
    return Path(folder)


def writer_for(adapter: Adapter, folder: str | Path, **options: Any) -> AdapterWriter:
    """A writer with room for the header of this adapter; options as of `AdapterWriter`."""
    adapter.require_names()
    room = sum(2 * (len(name) + ENTRY_BYTES) for name in adapter.modules)
    room += sum(len(name) + ENTRY_BYTES for name in adapter.replacements)
    return AdapterWriter(folder, adapter.config, header_room=room, **options)


def write_modules(
    adapter: Adapter,
    writer: AdapterWriter,
    threads: int | None = None,
    on_module: Callable[[str], None] | None = None,
) -> None:
    """Write all that a writer does not have yet, see `write_adapter`; tells of every module."""
    missing = [name for name in adapter.modules if name not in writer.finished]
    for module in _computed(adapter.modules, missing, threads or os.cpu_count() or 1):
        if module.rank > 0:
            writer.add(module)
        if on_module is not None:
            on_module(module.name)
    for name, tensor in adapter.replacements.items():
        writer.replace(name, tensor)


def _computed(
    modules: Mapping[str, LoraModule], names: Iterable[str], threads: int
) -> Iterator[LoraModule]:
    """The modules of these names in order, a few computed ahead.

    BLAS runs on one thread meanwhile: the matrices are too small to split, and its waiting threads
    would take the processors from the modules computed beside each other.
    """
    reuse_freed_blocks()
    ahead: deque[Future[LoraModule]] = deque()
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        try:
            for name in names:
                ahead.append(pool.submit(modules.__getitem__, name))
                if len(ahead) > threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _checksum(content: Array, size: int, itemsize: int) -> str:
    digests = ChunkDigests(size)
    running = digests.from_chunk(0)
    running.update(content, itemsize)
    running.close()
    return digests.hexdigest()


def _targets(paths: list[str]) -> list[str] | str:
    """The modules as a list, or as an expression where a list would match more than them.

    An entry of a list also matches every longer name that ends in it; only a name without a dot is
    likely to have such a namesake further down.
    """
    if all("." in path for path in paths):
        return paths
    return "|".join(re.escape(path) for path in paths)


def _covers(hint: str, path: str) -> bool:
    """Whether PEFT's `modules_to_save` entry names this module or one that holds it."""
    parts = path.split(".")
    heads = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return any(is_dotted_suffix(hint, head) for head in heads)


def _module_path(module: LoraModule) -> str:
    path, _, leaf = module.name.rpartition(".")
    if not path or (leaf != "weight" and module.kind != "parameter"):
        raise FusekitError(
            f"adapter module {module.name!r}: expected a name like '<module>.weight'"
        )
    return path


def _pattern_of(path: str, module: _Written) -> str:
    """A rank/alpha pattern that matches this module and no other."""
    return "^" + re.escape(module.name if module.kind == "parameter" else path)


def _plain_number(value: float) -> float | int:
    return int(value) if math.isfinite(value) and value == int(value) else float(value)
