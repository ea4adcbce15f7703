"""Models on the Hugging Face hub: downloaded into its cache, or read by byte range."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fusekit.checkpoint.companions import describes_model
from fusekit.checkpoint.pipelines import DIFFUSERS_FILE, PIPELINE_FILES, join_parts
from fusekit.checkpoint.ranges import HttpRanges
from fusekit.checkpoint.remote import ChunkCache, RemoteSafetensors, open_files, read_small
from fusekit.checkpoint.safetensors import INDEX_SUFFIX, ShardedSource, read_index
from fusekit.checkpoint.source import TensorSource
from fusekit.errors import CheckpointError

_REFERENCE = re.compile(
    r"(?:hf://(?:models/)?)?(?P<repo>\w[\w.-]*(?:/\w[\w.-]*)?)(?:@(?P<revision>[^@]+))?"
)
_PICKLES = re.compile(r"(pytorch_model|adapter_model|diffusion_pytorch_model|model).*\.bin")
_WHOLE = ("model", "adapter_model", "diffusion_pytorch_model", "pytorch_model")


@dataclass(frozen=True)
class HubModel:
    """A model of the hub at one commit.

    Attributes:
        repo: its id, `organisation/name`.
        commit: the full commit hash that `revision` stood for.
        folder: the local snapshot; with streaming, without the weights.
        weights: the remote weights with streaming, else None (they are in `folder`).
    """

    repo: str
    commit: str
    folder: Path
    weights: TensorSource | None = None


def is_hub_reference(reference: str) -> bool:
    """Whether a reference has the form of a hub id (`name`, `organisation/name`) or `hf://` URL."""
    return _REFERENCE.fullmatch(reference) is not None


def resolve_hub(reference: str, revision: str | None = None, stream: bool = False) -> HubModel:
    """Fetch a model from the hub, weights as safetensors where the repository has them.

    The server is the one that `HF_ENDPOINT` names, else huggingface.co. Without a connection a
    complete snapshot in the cache is used.

    Args:
        reference: `organisation/name`, `hf://organisation/name`, each with `@revision` or without.
        revision: branch, tag or commit; the one in `reference` if None, else the default branch.
        stream: leave the weights on the server and read them by byte range, from the commit that
            the revision stands for now.

    Raises:
        CheckpointError: no such repository or revision, a gated one without access, no connection
            and nothing cached, no weights that can be read.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise CheckpointError(
            f"model {reference!r}: expected organisation/name or hf://organisation/name[@revision]"
        )
    repo, revision = match["repo"], revision or match["revision"]
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    listing = _listing(repo, revision, endpoint)
    if listing is None:
        if stream:
            raise CheckpointError(f"model {repo!r}: the hub cannot be reached, so not streamed")
        folder = _cached(repo, revision)
        return HubModel(repo, folder.name, folder)
    commit, names = listing
    weights, companions = _weight_files(repo, names), list(filter(describes_model, names))
    wanted = companions if stream else [*weights, *companions]
    folder = _downloaded(repo, revision, endpoint, wanted)
    if folder.name != commit:
        raise CheckpointError(
            f"model {repo!r}{_at(revision)} moved from commit {commit} to {folder.name} while it "
            "was fetched; run again"
        )
    streamed = _streamed(repo, commit, endpoint, weights, companions) if stream else None
    return HubModel(repo, commit, folder, streamed)


def _listing(repo: str, revision: str | None, endpoint: str | None) -> tuple[str, list[str]] | None:
    """Commit and file names, or None where the hub does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        info = HfApi(endpoint=endpoint).model_info(repo, revision=revision)
    except (HfHubHTTPError, ValueError) as error:
        if getattr(getattr(error, "response", None), "status_code", 0) >= 500:
            return None
        raise _explained(repo, revision, error) from None
    except (OfflineModeIsEnabled, OSError):
        return None
    except Exception as error:  # the HTTP library beneath differs between versions of the hub's
        if type(error).__module__.partition(".")[0] not in {"httpx", "httpx2", "requests"}:
            raise
        return None
    if info.sha is None:
        raise CheckpointError(f"model {repo!r}: the hub names no commit for {revision or 'main'!r}")
    return info.sha, [sibling.rfilename for sibling in info.siblings or ()]


def _downloaded(repo: str, revision: str | None, endpoint: str | None, names: list[str]) -> Path:
    """The local snapshot folder, with the named files fetched into it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [_literal(name) for name in names]
    try:
        return Path(
            snapshot_download(repo, revision=revision, endpoint=endpoint, allow_patterns=patterns)
        )
    except LocalEntryNotFoundError:
        raise _unreachable(repo, revision) from None
    except HfHubHTTPError as error:
        raise _explained(repo, revision, error) from None


def _cached(repo: str, revision: str | None) -> Path:
    """The local snapshot folder of an earlier download with weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Only files that every download takes: others may be absent from a usable snapshot.
        folder = Path(
            snapshot_download(
                repo, revision=revision, local_files_only=True, allow_patterns="*.json"
            )
        )
    except LocalEntryNotFoundError:
        raise _unreachable(repo, revision) from None
    if not any(path.suffix in {".safetensors", ".bin"} for path in folder.rglob("*")):
        raise _unreachable(repo, revision)
    return folder


def _unreachable(repo: str, revision: str | None) -> CheckpointError:
    return CheckpointError(
        f"model {repo!r}{_at(revision)}: the hub cannot be reached and the model is not in the "
        "cache"
    )


def _explained(repo: str, revision: str | None, error: Exception) -> CheckpointError:
    from huggingface_hub import errors

    name = f"model {repo!r}{_at(revision)}"
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{name} is gated: accept its terms on its page on the hub, then log in "
            "(hf auth login, or HF_TOKEN)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(f"{name}: the repository has no such revision")
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"{name}: no such file or folder, and not on the hub; if the repository is private, "
            "log in (hf auth login, or HF_TOKEN)"
        )
    return CheckpointError(f"{name}: the hub refused: {str(error).strip().splitlines()[0]}")


def _at(revision: str | None) -> str:
    return f" at {revision!r}" if revision else ""


def _literal(name: str) -> str:
    """A pattern that matches only this name."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _weight_files(repo: str, names: list[str]) -> list[str]:
    """The weights to fetch: safetensors if there are any, and of several copies one.

    Sub-folders belong to a model that is a pipeline. Where a diffusion pipeline's parts have
    weights, files beside them are the whole pipeline once more.
    """
    found = [name for name in names if name.endswith(".safetensors")]
    if not found:
        found = [name for name in names if _PICKLES.fullmatch(PurePosixPath(name).name)]
    folders: dict[str, list[str]] = {}
    for name in found:
        folders.setdefault(_folder(name), []).append(name)
    if not _is_pipeline(names):
        folders = {folder: group for folder, group in folders.items() if folder == ""}
    elif DIFFUSERS_FILE in names and len(folders) > 1:
        folders.pop("", None)
    if not folders:
        raise CheckpointError(
            f"model {repo!r}: holds no weights in safetensors or PyTorch format "
            f"(its files: {', '.join(names[:8]) or 'none'})"
        )
    return [name for group in folders.values() for name in _one_copy(group, names)]


def _is_pipeline(names: Iterable[str]) -> bool:
    return not set(PIPELINE_FILES).isdisjoint(names)


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _one_copy(group: list[str], names: list[str]) -> list[str]:
    """Of one folder's weight files: the whole file, or the shards of its index, or all."""
    folder = PurePosixPath(group[0]).parent
    for stem in _WHOLE:
        whole = [name for name in group if PurePosixPath(name).stem == stem]
        if whole:
            return whole
        shards = [name for name in group if PurePosixPath(name).name.startswith(f"{stem}-")]
        indexes = {str(folder / f"{stem}{end}.index.json") for end in (".safetensors", ".bin")}
        if shards and not indexes.isdisjoint(names):
            return shards
    return group


def _streamed(
    repo: str, commit: str, endpoint: str | None, weights: list[str], companions: list[str]
) -> TensorSource:
    from huggingface_hub import get_token, hf_hub_url

    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}

    def open_file(name: str) -> HttpRanges:
        return HttpRanges(hf_hub_url(repo, name, revision=commit, endpoint=endpoint), headers)

    if not weights[0].endswith(".safetensors"):
        raise CheckpointError(
            f"model {repo!r}: holds only PyTorch pickles, which are not streamed; "
            "run without streaming to download it"
        )
    label = f"hf://{repo}@{commit}"
    folders: dict[str, list[str]] = {}
    for name in weights:
        folders.setdefault(_folder(name), []).append(name)
    opened: dict[str, TensorSource] = {}
    try:
        for folder, files in folders.items():
            opened[folder] = _streamed_folder(label, folder, files, companions, open_file)
        if not _is_pipeline(companions):
            return opened[""]
        parts = {folder: source for folder, source in opened.items() if folder}
        return join_parts(label, opened.get(""), parts)
    except BaseException:
        for source in opened.values():
            source.close()
        raise


def _streamed_folder(
    label: str,
    folder: str,
    files: list[str],
    companions: list[str],
    open_file: Callable[[str], HttpRanges],
) -> TensorSource:
    prefix = f"{folder}/" if folder else ""
    for stem in _WHOLE:
        index = f"{prefix}{stem}{INDEX_SUFFIX}"
        if index in companions and f"{prefix}{stem}.safetensors" not in files:
            weight_map = read_index(read_small(open_file(index)), f"{label}/{index}")
            return open_files(
                f"{label}/{folder}".rstrip("/"), weight_map, lambda name: open_file(prefix + name)
            )
    chunks = ChunkCache()
    return ShardedSource(label, [RemoteSafetensors(open_file(name), chunks) for name in files])
