"""Opening a model reference: what the user wrote -> tensors, config and the files beside them."""

from __future__ import annotations

import difflib
import itertools
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fusekit.checkpoint.companions import TEMPLATES_FOLDER, describes_model, is_companion
from fusekit.checkpoint.hub import is_hub_reference, resolve_hub
from fusekit.checkpoint.layout import JOURNAL, SIDE_FILE
from fusekit.checkpoint.npz import NpzFile
from fusekit.checkpoint.pickles import (
    PICKLE_INDEX_SUFFIX,
    PICKLE_SUFFIXES,
    PickleFile,
    open_pickle_index,
)
from fusekit.checkpoint.pipelines import (
    DIFFUSERS_FILE,
    is_pipeline,
    join_parts,
    part_folders,
    weight_stem,
)
from fusekit.checkpoint.references import exists, parse_reference
from fusekit.checkpoint.remote import fetch_companions, is_url, open_url
from fusekit.checkpoint.safetensors import (
    INDEX_SUFFIX,
    SafetensorsFile,
    ShardedSource,
    open_sharded,
)
from fusekit.checkpoint.source import TensorSource
from fusekit.checkpoint.views import LoraSource
from fusekit.errors import CheckpointError

WEIGHT_STEMS = ("model", "diffusion_pytorch_model", "adapter_model")
"""Of several weight files or indexes, the one with the first of these names is the model."""

_WEIGHT_SUFFIXES = frozenset({".safetensors", *PICKLE_SUFFIXES})

_MOST_LISTED = 1000
"""Names beside a missing one among which a similar one is looked for."""

_PICKLES = ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.bin")


@dataclass(frozen=True)
class Checkpoint:
    """An opened model: its tensors and, where it is a folder, its config and companion files.

    In a pipeline of several models, tensors of the part in sub-folder `unet` are `unet/<name>`.
    """

    reference: str
    source: TensorSource
    folder: Path | None = None
    temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)
    """What holds a folder of fetched companions alive as long as the checkpoint."""
    adapter: Path | None = None
    """The folder or file of the adapter that is folded in."""

    def config(self) -> dict[str, Any] | None:
        """The parsed config.json, or None where there is none."""
        if self.folder is None or not (self.folder / "config.json").is_file():
            return None
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"{path}: expected a JSON object")
        return config

    def companions(self) -> list[Path]:
        """Files to carry over into a merged folder, weights and their indexes left out."""
        if self.folder is None:
            return []
        return sorted(
            path
            for folder in _places(self.folder)
            for path in folder.iterdir()
            if path.is_file() and is_companion(path.name)
        )

    def parts(self) -> dict[str, str]:
        """What the weight files are called in every sub-folder that is a part of the model.

        The model's own weights are the part `""`.
        """
        folders: set[str] = set()
        if self.folder is not None and is_pipeline(self.folder):
            folders = {path.name for path in part_folders(self.folder)}
        files: dict[str, set[str]] = {}
        for name in self.source.tensors:
            part = name.partition("/")[0] if "/" in name else ""
            files.setdefault(part if part in folders else "", set()).add(self.source.where(name))
        return {part: weight_stem(each) for part, each in files.items()}


def open_checkpoint(
    reference: str,
    relative_to: Path | None = None,
    *,
    stream: bool = False,
    named: Mapping[str, Checkpoint] | None = None,
) -> Checkpoint:
    """Open what a reference names: a folder, a weight file, a URL, or a model of the hub.

    Args:
        reference: `model[@revision][+adapter[@revision]]`. A relative path is looked up from the
            working directory, then from `relative_to`; what is no path may be a URL or a hub id.
            After a `+`, a LoRA adapter that is folded in while the model is read.
        relative_to: the folder of the recipe that holds the reference.
        stream: read models of the hub by byte range, without storing them.
        named: models that are known by a name of their own.

    Raises:
        CheckpointError: nothing there, no weights in it, or a malformed file.
    """
    path = _existing(reference, relative_to)
    if path is not None:
        return _open_path(reference, path)
    parsed = parse_reference(reference)
    if named is not None and parsed.model in named:
        model = replace(named[parsed.model], reference=reference)
    else:
        model = _open_model(reference, parsed.model, parsed.revision, relative_to, stream)
    if parsed.lora is None:
        return model
    try:
        adapter = adapter_folder(reference, parsed.lora, parsed.lora_revision, relative_to)
        return replace(model, source=_with_adapter(model.source, adapter), adapter=adapter)
    except BaseException:
        model.source.close()
        raise


def _open_model(
    reference: str, model: str, revision: str | None, relative_to: Path | None, stream: bool
) -> Checkpoint:
    if is_url(model):
        temporary = tempfile.TemporaryDirectory(prefix="fusekit-")
        source = open_url(model)
        return Checkpoint(
            reference, source, fetch_companions(model, Path(temporary.name)), temporary
        )
    path = _existing(model, relative_to)
    if path is not None:
        if revision is not None:
            raise CheckpointError(
                f"model {reference!r}: {path} is on this disk and has no revision {revision!r}"
            )
        return _open_path(reference, path)
    looked = _missing(model, relative_to)
    if not is_hub_reference(model):
        raise looked
    try:
        found = resolve_hub(model, revision, stream)
    except CheckpointError as error:
        raise CheckpointError(f"{looked}; {error}") from None
    return Checkpoint(reference, found.weights or _open_folder(found.folder), found.folder)


def adapter_folder(
    reference: str, adapter: str, revision: str | None, relative_to: Path | None
) -> Path:
    """Where an adapter that a reference names is: on this disk, or fetched from the hub.

    Raises:
        CheckpointError: in neither place, or on this disk, where there are no revisions.
    """
    path = _existing(adapter, relative_to)
    if path is None:
        looked = _missing(adapter, relative_to, "adapter")
        if not is_hub_reference(adapter):
            raise looked
        try:
            return resolve_hub(adapter, revision).folder
        except CheckpointError as error:
            raise CheckpointError(f"{looked}; {error}") from None
    if revision is not None:
        raise CheckpointError(
            f"model {reference!r}: {path} is on this disk and has no revision {revision!r}"
        )
    return path


def _with_adapter(base: TensorSource, path: Path) -> TensorSource:
    from fusekit.adapters import load_adapter

    return LoraSource(base, load_adapter(path, base.tensors))


def _candidates(reference: str, relative_to: Path | None) -> list[Path]:
    path = Path(reference.removeprefix("file://")).expanduser()
    return [path] if relative_to is None else list(dict.fromkeys([path, relative_to / path]))


def _existing(reference: str, relative_to: Path | None) -> Path | None:
    return next((path for path in _candidates(reference, relative_to) if exists(path)), None)


def _missing(reference: str, relative_to: Path | None, what: str = "model") -> CheckpointError:
    looked = list(dict.fromkeys(path.absolute() for path in _candidates(reference, relative_to)))
    beside = [
        path.name
        for place in looked
        if place.parent.is_dir() and os.access(place.parent, os.R_OK)
        for path in itertools.islice(place.parent.iterdir(), _MOST_LISTED)
        if path.name != place.name  # a link to nothing
    ]
    near = difflib.get_close_matches(looked[0].name, beside, n=1, cutoff=0.6)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return CheckpointError(
        f"{what} {reference!r}: no such file or folder (looked at {' or '.join(map(str, looked))})"
        f"{hint}"
    )


def _open_path(reference: str, path: Path) -> Checkpoint:
    if path.is_dir():
        return Checkpoint(reference, _open_folder(path), path)
    if path.name.endswith((INDEX_SUFFIX, PICKLE_INDEX_SUFFIX)):
        refuse_links_out(path.parent)
    if path.name.endswith(INDEX_SUFFIX):
        return Checkpoint(reference, open_sharded(path), path.parent)
    if path.name.endswith(PICKLE_INDEX_SUFFIX):
        return Checkpoint(reference, open_pickle_index(path), path.parent)
    return Checkpoint(reference, _open_file(path))


def _open_file(path: Path) -> TensorSource:
    if path.suffix in PICKLE_SUFFIXES:
        return PickleFile(path)
    return NpzFile(path) if path.suffix == ".npz" else SafetensorsFile(path)


def _places(folder: Path) -> list[Path]:
    """A model's folder, and the folders in it that belong to the model."""
    templates = folder / TEMPLATES_FOLDER
    return [
        folder,
        *([templates] if templates.is_dir() and not templates.is_symlink() else []),
        *(part_folders(folder) if is_pipeline(folder) else []),
    ]


def refuse_links_out(folder: Path) -> None:
    """Refuse weights and companions that are links to files elsewhere, which would be copied.

    The hub's cache keeps the files of a snapshot in a folder of their own beside all snapshots.

    Raises:
        CheckpointError: there is such a link.
    """
    real = folder.resolve()
    root = real.parent.parent if real.parent.name == "snapshots" else real
    for place in _places(folder):
        for path in place.iterdir():
            is_used = path.suffix in _WEIGHT_SUFFIXES or describes_model(path.name)
            if not is_used or not path.is_symlink() or not path.is_file():
                continue
            if not path.resolve().is_relative_to(root):
                raise CheckpointError(
                    f"{path}: a link out of the folder, to {path.resolve()}; put the file itself "
                    "there"
                )


def _open_folder(folder: Path) -> TensorSource:
    if folder.name.endswith(".partial") and (folder / JOURNAL).is_file():
        raise CheckpointError(
            f"{folder}: an unfinished output, expected a checkpoint; finish it by the command "
            "that began it"
        )
    refuse_links_out(folder)
    if not is_pipeline(folder):
        own = _weights(folder)
        if own is None:
            snapshots = sorted((folder / "snapshots").glob("*/config.json"))
            hint = f"; did you mean {snapshots[-1].parent}?" if snapshots else ""
            raise CheckpointError(
                f"{folder}: no weights found, expected *.safetensors, *{INDEX_SUFFIX}, "
                f"pytorch_model.bin or *{PICKLE_INDEX_SUFFIX}{hint}"
            )
        return own
    opened: dict[str, TensorSource] = {}
    try:
        for part in part_folders(folder):
            source = _weights(part)
            if source is not None:
                opened[part.name] = source
        # Weights beside model_index.json are the whole pipeline once more, in one file.
        copied = opened and (folder / DIFFUSERS_FILE).is_file()
        own = None if copied else _weights(folder)
        return join_parts(str(folder), own, opened)
    except BaseException:
        for source in opened.values():
            source.close()
        raise


def _weights(folder: Path) -> TensorSource | None:
    """The weights in one folder, safetensors before pickles, or None."""
    indexes = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if indexes:
        preferred = (folder / f"{stem}{INDEX_SUFFIX}" for stem in WEIGHT_STEMS)
        return open_sharded(next((path for path in preferred if path in indexes), indexes[0]))
    files = sorted(path for path in folder.glob("*.safetensors") if path.name != SIDE_FILE)
    for stem in WEIGHT_STEMS:
        files = [path for path in files if path.stem == stem] or files
    if len(files) > 1:
        return ShardedSource(str(folder), [SafetensorsFile(file) for file in files])
    if files:
        return SafetensorsFile(files[0])
    pickle_indexes = sorted(folder.glob(f"*{PICKLE_INDEX_SUFFIX}"))
    if pickle_indexes:
        return open_pickle_index(pickle_indexes[0])
    pickles = [folder / name for name in _PICKLES if (folder / name).is_file()]
    return PickleFile(pickles[0]) if pickles else None
