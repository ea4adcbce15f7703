"""Pipelines: models whose parts are sub-folders (diffusers, sentence-transformers).

The tensor `w` of the part in `unet/` is called `unet/w`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from fusekit.checkpoint.safetensors import ShardedSource, is_file_name
from fusekit.checkpoint.source import TensorSource
from fusekit.checkpoint.views import RenamedSource
from fusekit.errors import CheckpointError

DIFFUSERS_FILE = "model_index.json"
MODULES_FILE = "modules.json"
ROUTER_FILE = "router_config.json"
PIPELINE_FILES = (DIFFUSERS_FILE, MODULES_FILE)
"""Files that make a folder's sub-folders parts of one model."""

_ROOT = "."
"""A module in the pipeline's own folder."""


def is_pipeline(folder: Path) -> bool:
    """Whether a folder's sub-folders are parts of one model."""
    return any((folder / name).is_file() for name in PIPELINE_FILES)


def part_folders(folder: Path) -> list[Path]:
    """Sub-folders of a pipeline that its files name, or all where they name none.

    Links, which may lead out of it, are not followed.

    Raises:
        CheckpointError: as of `listed_parts`.
    """
    named = listed_parts(lambda name: read_file(folder / name), str(folder))
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_dir() and not path.is_symlink() and (not named or path.name in named)
    )


def read_file(path: Path) -> bytes | None:
    """A small file's content, or None where there is no such file."""
    return path.read_bytes() if path.is_file() else None


def listed_parts(read: Callable[[str], bytes | None], label: str) -> list[str]:
    """The sub-folders that a pipeline's own files name.

    Args:
        read: the content of a file of the pipeline by its name, None where there is no such file.
        label: what messages call the place.

    Raises:
        CheckpointError: a file that is not what its name says, or names a folder elsewhere.
    """
    parts: list[str] = []
    for name, names_in in _NAMED.items():
        content = None if name == ROUTER_FILE and not parts else read(name)
        if content is None:
            continue
        try:
            found = names_in(json.loads(content))
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
            raise CheckpointError(f"{label}/{name}: expected {_FORMS[name]}") from None
        for part in found:
            if part != _ROOT and not is_file_name(part):
                raise CheckpointError(
                    f"{label}/{name}: names the part {part!r}, expected a sub-folder"
                )
        parts += found
    return [part for part in dict.fromkeys(parts) if part != _ROOT]


def _in_model_index(content: Any) -> list[Any]:
    return [
        part
        for part, of in content.items()
        if not part.startswith("_") and isinstance(of, list) and of and of[0] is not None
    ]


_NAMED: dict[str, Callable[[Any], list[Any]]] = {
    DIFFUSERS_FILE: _in_model_index,
    MODULES_FILE: lambda content: [entry["path"] or _ROOT for entry in content],
    ROUTER_FILE: lambda content: list(content["types"]),
}
_FORMS = {
    DIFFUSERS_FILE: "a JSON object with the pipeline's parts",
    MODULES_FILE: "a JSON list of modules with their paths",
    ROUTER_FILE: "a JSON object with the 'types' of modules",
}


def join_parts(
    label: str, own: TensorSource | None, parts: Mapping[str, TensorSource]
) -> TensorSource:
    """One source of a pipeline's own weights and those of its parts, which get the part's prefix.

    Raises:
        CheckpointError: there is nothing to join.
    """
    sources: list[TensorSource] = [] if own is None else [own]
    sources += [
        RenamedSource(source, {f"{part}/{name}": name for name in source.tensors})
        for part, source in parts.items()
    ]
    if not sources:
        raise CheckpointError(f"{label}: no weights found in it or in its sub-folders")
    return ShardedSource(label, sources)


def weight_stem(files: Iterable[str]) -> str:
    """What libraries call the weight file of a model stored in such files, less its ending."""
    stems = {PurePosixPath(file).name.partition(".")[0].partition("-")[0] for file in files}
    return "diffusion_pytorch_model" if stems == {"diffusion_pytorch_model"} else "model"
