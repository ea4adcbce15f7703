"""The manifest of a finished output, and checking an output against it."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusekit.checkpoint.folder import open_checkpoint
from fusekit.checkpoint.layout import MANIFEST as MANIFEST
from fusekit.checkpoint.layout import SIDE_FILE
from fusekit.checkpoint.ranges import MissingFileError, open_ranges
from fusekit.checkpoint.remote import is_url, read_small, within
from fusekit.checkpoint.safetensors import is_file_name
from fusekit.checkpoint.source import TensorSource
from fusekit.engine.checksum import ALGORITHM, checksum_of
from fusekit.engine.measurements import statistics_identities
from fusekit.engine.plan import Plan
from fusekit.errors import CheckpointError

FORMAT = "fusekit-manifest/1"


def manifest(
    plan: Plan,
    checksums: Mapping[str, str],
    companions: Mapping[str, bytes],
    side: TensorSource | None = None,
) -> dict[str, Any]:
    """Recipe, version, the identities of all inputs and every output tensor's checksum.

    `companions` are the small files that the output needs; `side` is the side file as written, if
    the output has one.
    """
    from fusekit import __version__

    content: dict[str, Any] = {
        "format": FORMAT,
        "fusekit": __version__,
        "recipe": dict(plan.recipe),
        "inputs": input_identities(plan),
        "statistics": statistics_identities(plan),
        "checksum": ALGORITHM,
        "tensors": {
            planned.name: {
                "file": plan.layout.shard_of[planned.name].file_name,
                "dtype": planned.dtype.name,
                "shape": list(planned.shape),
                "checksum": checksums[planned.name],
            }
            for planned in plan.tensors
        },
        "companions": {name: _hash(content) for name, content in companions.items()},
    }
    if side is not None:
        content["side_tensors"] = {
            name: {"file": SIDE_FILE, **entry} for name, entry in entries_of(side).items()
        }
    return content


def _hash(content: bytes) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(content)


def entries_of(source: TensorSource) -> dict[str, dict[str, Any]]:
    """What a manifest says of every tensor of a source, which is read whole."""
    return {
        info.name: {
            "dtype": info.dtype.name,
            "shape": list(info.shape),
            "checksum": tensor_checksum(source, info.name),
        }
        for info in source.tensors.values()
    }


def input_identities(plan: Plan) -> list[dict[str, Any]]:
    """What pins every input: as the recipe names it, and where and what it was."""
    return [
        {"reference": checkpoint.reference, **checkpoint.source.identity()}
        for checkpoint in plan.checkpoints
    ]


@dataclass(frozen=True)
class Verification:
    """The outcome of checking an output: how much was checked and what is wrong."""

    tensors: int
    nbytes: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(out: str | Path) -> Verification:
    """Compare a merged folder, or one at a URL, with its manifest: every tensor, config, tokenizer.

    The model card (README.md) is not compared: it is there to be edited.

    Raises:
        CheckpointError: no manifest, or one of another format.
    """
    path, text = _manifest_text(out)
    try:
        content = json.loads(text)
        entries, files = _entries(content["tensors"]), _files(content)
        companions = _companions(content)
        form = content["format"], content["checksum"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: not a fusekit manifest") from None
    if form != (FORMAT, ALGORITHM):
        raise CheckpointError(
            f"{path}: format {form[0]!r} with {form[1]!r}, expected {FORMAT!r} with {ALGORITHM!r}"
        )
    found = [_compare(open_checkpoint(str(out)).source, entries)] if entries or not files else []
    for name, own in files.items():
        try:
            found.append(_compare(open_checkpoint(_inside(out, name)).source, own))
        except CheckpointError as error:
            found.append(Verification(len(own), 0, (str(error),)))
    problems = [problem for part in found for problem in part.problems]
    problems += [
        f"{name}: {problem}"
        for name, written in companions.items()
        if (problem := _companion_problem(_inside(out, name), written)) is not None
    ]
    return Verification(
        sum(part.tensors for part in found), sum(part.nbytes for part in found), tuple(problems)
    )


def _entries(content: Any) -> dict[str, Mapping[str, Any]]:
    """What a manifest says of tensors, by name. Raises TypeError if it is no such thing."""
    if not isinstance(content, dict) or not all(isinstance(e, dict) for e in content.values()):
        raise TypeError
    return content


def _files(content: Mapping[str, Any]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """What a manifest says of files whose tensors are not the checkpoint's, by file and name.

    Raises TypeError if it is no such thing.
    """
    files = {name: _entries(own) for name, own in content.get("files", {}).items()}
    if "side_tensors" in content:
        files[SIDE_FILE] = _entries(content["side_tensors"])
    if not all(map(is_file_name, files)):
        raise TypeError
    return {name: own for name, own in files.items() if own}


def _companions(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Hashes of small files, by paths that stay in the folder. Raises TypeError if they do not."""
    found: Any = content.get("companions", {})
    if not isinstance(found, dict) or not all(
        is_file_name(part) for name in found for part in name.split("/")
    ):
        raise TypeError
    return found


def _companion_problem(path: str, written: Any) -> str | None:
    try:
        content = read_small(open_ranges(path)) if is_url(path) else Path(path).read_bytes()
    except (MissingFileError, FileNotFoundError):
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if _hash(content) == written else "differs from what was written"


def _inside(out: str | Path, name: str) -> str:
    """The path or URL of a file of an output."""
    return within(str(out), name) if is_url(str(out)) else str(Path(out) / name)


def _manifest_text(out: str | Path) -> tuple[str, bytes]:
    """Where the manifest of an output is, and its content."""
    path = _inside(out, MANIFEST)
    if is_url(str(out)):
        return path, read_small(open_ranges(path))
    try:
        return path, Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _compare(source: TensorSource, entries: Mapping[str, Any]) -> Verification:
    """Check every tensor of a source, and close it."""
    with contextlib.closing(source):
        problems = [
            f"{name}: not in the manifest" for name in source.tensors if name not in entries
        ]
        nbytes = 0
        for name, entry in entries.items():
            problem = _problem(source, name, entry)
            if problem is None:
                nbytes += source.tensors[name].nbytes
            else:
                problems.append(f"{name}: {problem}")
    return Verification(len(entries), nbytes, tuple(problems))


def _problem(source: TensorSource, name: str, entry: Mapping[str, Any]) -> str | None:
    info = source.tensors.get(name)
    if info is None:
        return "missing"
    found = {"dtype": info.dtype.name, "shape": list(info.shape)}
    expected = {key: entry.get(key) for key in found}
    if found != expected:
        return (
            f"is {found['dtype']} {found['shape']}, "
            f"expected {expected['dtype']} {expected['shape']}"
        )
    if tensor_checksum(source, name) != entry.get("checksum"):
        return "the bytes differ from those that were written"
    return None


def tensor_checksum(source: TensorSource, name: str) -> str:
    """The checksum of one tensor, read chunk by chunk."""
    info = source.tensors[name]
    return checksum_of(info.size, info.dtype.itemsize, functools.partial(source.read_into, name))
