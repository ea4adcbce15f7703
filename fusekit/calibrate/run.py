"""From a model and data to a file of statistics; interrupted measurements go on where they were."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from fusekit.calibrate.data import TOKENS, read_documents, read_token_ids, token_batches
from fusekit.calibrate.hooks import KINDS, Capture, inputs_of, linear_modules
from fusekit.calibrate.information import Estimator, Information
from fusekit.calibrate.models import Batch, as_in_use, device_of, to_device
from fusekit.checkpoint.statistics import save_statistics
from fusekit.checkpoint.writer import check_file
from fusekit.engine.device import torch_device
from fusekit.errors import FusekitError, MissingExtraError

STATISTICS = ("fisher", *KINDS)

SNAPSHOT_SECONDS = 60.0
"""How often what has been measured so far is saved."""


@dataclass(frozen=True)
class Progress:
    """How far a measurement is."""

    batches: int
    total: int
    seconds: float


def measure(
    model: nn.Module,
    batches: Sequence[Batch],
    out: str | Path,
    *,
    statistic: str = "gram",
    modules: str | None = None,
    estimator: Estimator = "exact",
    seed: int = 0,
    max_memory: int | None = None,
    resume: bool = True,
    about: dict[str, Any] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Measure a model on batches and save a file of statistics.

    Args:
        model: any module; it comes back as it was.
        batches: keyword tensors, tensors, or (inputs, labels); the same ones on resuming.
        out: the file to write. What has been measured so far is kept in `<out>.partial`.
        statistic: `gram`, `mean` or `norm` of the inputs of linear layers, or `fisher`.
        modules: regular expression of the layers' names (not for `fisher`).
        estimator: of `fisher`.
        seed: of `fisher`.
        max_memory: refuse to begin if the accumulators need more bytes.
        resume: go on from `<out>.partial`; False starts over.
        about: what the data was, for the file's metadata.
        on_progress: called after every batch.

    Raises:
        FusekitError: unknown statistic, no such modules, too little memory allowed, a partial
            file of another measurement, or an `out` that cannot be written.
    """
    target = Path(out)
    check_file(target)
    watching = _instrument(model, statistic, modules, estimator, seed, max_memory)
    described = {
        "statistic": statistic,
        **({"estimator": estimator, "seed": seed} if statistic == "fisher" else {}),
        "batches": len(batches),
        "modules": sorted(watching.names),
        **(about or {}),
    }
    snapshot = _Snapshot(target.with_name(target.name + ".partial"), described)
    done = snapshot.restore(watching) if resume else 0
    begun = saved = time.monotonic()
    with as_in_use(model), _hooked(watching):
        for position, batch in enumerate(batches[done:], start=done + 1):
            watching.run(to_device(batch, device_of(model)))
            now = time.monotonic()
            if now - saved >= SNAPSHOT_SECONDS:
                snapshot.save(watching, position)
                saved = now
            if on_progress is not None:
                on_progress(Progress(position, len(batches), now - begun))
    entries = {
        f"{name}/{statistic}": value.cpu().numpy() for name, value in watching.results().items()
    }
    measured = {"counts": watching.counts(), "unreached": watching.unreached()}
    save_statistics(target, entries, {**described, **measured})
    snapshot.path.unlink(missing_ok=True)
    return target


def _instrument(
    model: nn.Module,
    statistic: str,
    modules: str | None,
    estimator: Estimator,
    seed: int,
    max_memory: int | None,
) -> Capture | Information:
    if statistic == "fisher":
        if modules is not None:
            raise FusekitError("modules: fisher is measured for all parameters; remove it")
        needed = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
        _check_memory(needed, max_memory)
        return Information(model, estimator, seed)
    if statistic not in KINDS:
        raise FusekitError(f"statistic: found {statistic!r}, expected {' or '.join(STATISTICS)}")
    names = linear_modules(model, modules)
    inputs = [inputs_of(model.get_submodule(name)) for name in names]
    _check_memory(sum(map(KINDS[statistic].held_bytes, inputs)), max_memory)
    return Capture(model, statistic, names)


def _check_memory(needed: int, allowed: int | None) -> None:
    if allowed is not None and needed > allowed:
        raise FusekitError(
            f"the statistics need {needed / 1e9:.2f} GB while they are measured, allowed are "
            f"{allowed / 1e9:.2f} GB; choose fewer layers (modules) or allow more (max_memory)"
        )


@contextlib.contextmanager
def _hooked(watching: Capture | Information) -> Iterator[None]:
    with watching.watching() if isinstance(watching, Capture) else contextlib.nullcontext():
        yield


class _Snapshot:
    """A measurement's sums on disk, together with how many batches they hold."""

    def __init__(self, path: Path, subject: dict[str, Any]) -> None:
        self.path = path
        self._subject = json.loads(json.dumps(subject))

    def save(self, watching: Capture | Information, batches: int) -> None:
        """Replace the file; a crash leaves the old one or the new one."""
        sums, counts = watching.state()
        fresh = self.path.with_name(self.path.name + ".new")
        content = {"subject": self._subject, "batches": batches, "counts": counts}
        arrays = {name: total.cpu().contiguous() for name, total in sums.items()}
        save_file(arrays, fresh, {"snapshot": json.dumps(content)})
        fresh.replace(self.path)

    def restore(self, watching: Capture | Information) -> int:
        """Go on from the file, if there is one; how many batches it holds."""
        if not self.path.is_file():
            return 0
        with safe_open(self.path, "pt") as file:
            content = json.loads((file.metadata() or {}).get("snapshot", "{}"))
            if content.get("subject") != self._subject:
                raise FusekitError(
                    f"{self.path}: holds part of another measurement; pass --no-resume to start "
                    "over"
                )
            sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        watching.restore(sums, content["counts"])
        batches: int = content["batches"]
        return batches


def measure_folder(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    statistic: str = "gram",
    modules: str | None = None,
    estimator: Estimator | None = None,
    samples: int = 128,
    length: int = 2048,
    batch: int = 1,
    text: str = "text",
    label: str = "label",
    device: str = "cpu",
    seed: int = 0,
    max_memory: int | None = None,
    resume: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Measure a transformers model folder on a file of documents, or of token ids.

    Language models get documents joined into full sequences, other models one document each. The
    estimator of `fisher` is `sampled` for language models and `exact` for others by default.

    Args:
        model: folder with config, weights and tokenizer.
        data: `.txt`, `.jsonl`, `.parquet`, `.arrow` or `.feather`, see `read_documents`; or
            `.safetensors`, see `read_token_ids`, for which no tokenizer is needed.
        out: the file of statistics to write.
        samples: sequences in all.
        length: tokens of each.
        batch: sequences at a time.
        text: name of the data's field of texts.
        label: name of the data's field of labels.
        device: where the model runs.

    Remaining arguments and errors as of `measure`.
    """
    loaded, is_causal = _load(Path(model), device)
    length = min(length, getattr(loaded.config, "max_position_embeddings", length))
    sizes = {"samples": samples, "length": length, "batch": batch}
    if Path(data).suffix == TOKENS:
        prepared = read_token_ids(data, **sizes)
        _check_token_ids(prepared, loaded, data)
    else:
        documents = read_documents(data, text=text, label=label)
        prepared = token_batches(documents, _tokenizer(Path(model)), pack=is_causal, **sizes)
    about = {"model": str(model), "data": str(data), "samples": samples, "length": length}
    return measure(
        loaded,
        prepared,
        out,
        statistic=statistic,
        modules=modules,
        estimator=estimator or ("sampled" if is_causal else "exact"),
        seed=seed,
        max_memory=max_memory,
        resume=resume,
        about=about,
        on_progress=on_progress,
    )


def _check_token_ids(batches: Sequence[Batch], model: Any, data: str | Path) -> None:
    size = model.get_input_embeddings().num_embeddings
    least = min(int(batch["input_ids"].min()) for batch in batches)
    most = max(int(batch["input_ids"].max()) for batch in batches)
    if least < 0 or most >= size:
        raise FusekitError(
            f"{data}: 'input_ids' go from {least} to {most}, expected 0 to {size - 1}, the model's "
            "vocabulary"
        )


def _tokenizer(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise FusekitError(
            f"{folder}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}; give token "
            f"ids ({TOKENS}) instead of texts"
        ) from None


def _load(folder: Path, device: str) -> tuple[Any, bool]:
    """Model in float32, and whether it is a causal language model."""
    try:
        import transformers
    except ModuleNotFoundError:
        raise MissingExtraError("calibrating a model folder", "torch") from None
    place = torch_device(device, "calibrating a model folder")
    if not (folder / "config.json").is_file():
        raise FusekitError(f"{folder}: no config.json, expected the folder of a transformers model")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        name = (config.architectures or ["none"])[0]
        kind = getattr(transformers, name, None)
        if kind is None:
            raise FusekitError(
                f"{folder}: config.json names the architecture {name!r}, which this "
                "version of transformers does not have"
            )
        model = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise FusekitError(f"{folder}: cannot be loaded: {str(error).splitlines()[0]}") from None
    causal = name.endswith(("ForCausalLM", "LMHeadModel"))
    return model.to(place), causal
